// SPDX-License-Identifier: BSD-3-Clause
// Stock modules, unmodified, each parameter a unit of its own where that is possible: the hardest case for
// interception.

#include "fsdp/interception.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/api/include/torch/nn/modules.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>

#include "fsdp/test_model.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

using torch::nn::AnyModule;

/// Builds the same module twice, shards one, runs a step of SGD on both with the same input, and compares.
template <class Build, class Run>
void expect_same(const std::shared_ptr<ProcessGroup>& group, const char* name, Build build, Run run) {
  SCOPED_TRACE(name);
  try {
    at::manual_seed(7);
    auto reference = build();
    at::manual_seed(7);
    auto model = FullyShardedDataParallel(
        on_meta(build), {.process_group = group,
                         .wrap_policy = wrap_by_predicate(
                             [](const std::string&, const torch::nn::Module& m) { return m.children().empty(); }),
                         .poison_freed = true});
    torch::optim::SGD optimizer(model.parameters(), 0.1);
    torch::optim::SGD reference_optimizer(reference->parameters(), 0.1);
    at::manual_seed(8);
    const at::Tensor reference_loss = run(*reference);
    reference_loss.backward();
    reference_optimizer.step();
    at::manual_seed(8);
    const at::Tensor loss = [&] {
      const ForwardScope scope(model);
      return run(*model.module());
    }();
    loss.backward();
    optimizer.step();
    EXPECT_EQ(loss.item<double>(), reference_loss.item<double>());
    EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-14);
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

/// x times each of `weights` and `maybe`, elementwise, through raw pointers.
at::Tensor multiply_like(const at::Tensor& x, at::TensorList weights,
                         const c10::List<std::optional<at::Tensor>>& maybe) {
  at::Tensor out = x.clone();
  const auto multiply = [&](const at::Tensor& weight) {
    for (int64_t i = 0; i < out.numel(); ++i)
      out.mutable_data_ptr<double>()[i] *= weight.const_data_ptr<double>()[i % weight.numel()];
  };
  for (const at::Tensor& weight : weights) multiply(weight);
  for (const std::optional<at::Tensor>& weight : maybe) {
    if (weight.has_value()) multiply(*weight);
  }
  return out;
}
TORCH_LIBRARY(reshard_test, library) {
  library.def("multiply_like(Tensor x, Tensor[] weights, Tensor?[] maybe) -> Tensor");
  library.impl("multiply_like", c10::DispatchKey::CompositeExplicitAutograd, multiply_like);
}

/// A linear map with its derivatives written by hand.
struct HandWritten : torch::autograd::Function<HandWritten> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight) {
    context->save_for_backward({x, weight});
    return x.mm(weight.t());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    return {gradients[0].mm(saved[1]), gradients[0].t().mm(saved[0])};
  }
};

/// What users write: an operator of their own with a kernel that knows pointers only, and an autograd function.
struct UserMadeImpl : torch::nn::Module {
  UserMadeImpl() {
    inner = register_module("inner", torch::nn::Linear(torch::nn::LinearOptions(8, 8).bias(false)));
    scale = register_parameter("scale", at::rand({8}));
    shift = register_parameter("shift", at::rand({8}) + 1, /*requires_grad=*/false);
  }
  at::Tensor forward(const at::Tensor& x) {
    static const auto multiply = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("reshard_test::multiply_like", "")
                                     .typed<decltype(multiply_like)>();
    at::Tensor scaled;
    {
      const at::NoGradGuard no_grad;
      scaled = multiply.call(x, {scale, scale}, c10::List<std::optional<at::Tensor>>({std::nullopt, shift}));
    }
    return HandWritten::apply(HandWritten::apply(scaled * scale, inner->weight), inner->weight);
  }
  torch::nn::Linear inner{nullptr};
  at::Tensor scale, shift;
};

/// Parameters in every kind of container.
struct ContainersImpl : torch::nn::Module {
  ContainersImpl() {
    list = register_module("list", torch::nn::ModuleList(torch::nn::Linear(8, 8), torch::nn::Linear(8, 4)));
    dict = register_module("dict", torch::nn::ModuleDict());
    dict->update(
        std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>{{"up", torch::nn::Linear(4, 8).ptr()}});
    scales = register_module("scales", torch::nn::ParameterList());
    scales->append(at::rand({4}).requires_grad_());
    scales->append(at::rand({8}).requires_grad_());
    shifts = register_module("shifts", torch::nn::ParameterDict());
    shifts->insert("last", at::rand({8}).requires_grad_());
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& layer : *list) x = layer->as<torch::nn::Linear>()->forward(x);
    x = at::tanh(x * (*scales)[0]);
    return (*dict)["up"]->as<torch::nn::Linear>()->forward(x) * (*scales)[1] + (*shifts)["last"];
  }
  torch::nn::ModuleList list{nullptr};
  torch::nn::ModuleDict dict{nullptr};
  torch::nn::ParameterList scales{nullptr};
  torch::nn::ParameterDict shifts{nullptr};
};

void run_stock_modules(const std::shared_ptr<ProcessGroup>& group) {
  using namespace torch::nn;
  const DoublePrecision in_double;
  at::manual_seed(6);
  const at::Tensor rows = at::rand({6, 8});
  const at::Tensor sequence = at::rand({5, 3, 8});  // length, batch, feature
  const at::Tensor image = at::rand({2, 4, 7, 7});
  const at::Tensor indices = at::randint(10, {4, 3}, at::kLong);

  expect_same(
      group, "Linear", [] { return Linear(8, 5); }, [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "Linear without bias", [] { return Linear(LinearOptions(8, 5).bias(false)); },
      [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "TransformerEncoder",
      [] {
        return TransformerEncoder(
            TransformerEncoderOptions(TransformerEncoderLayerOptions(8, 2).dim_feedforward(16), 3));
      },
      [&](auto& m) { return m.forward(sequence).square().sum(); });
  expect_same(
      group, "Transformer",
      [] {
        return Transformer(TransformerOptions(8, 2).num_encoder_layers(1).num_decoder_layers(1).dim_feedforward(16));
      },
      [&](auto& m) { return m.forward(sequence, sequence.slice(0, 0, 4)).square().sum(); });
  expect_same(
      group, "MultiheadAttention with another kdim",
      [] { return MultiheadAttention(MultiheadAttentionOptions(8, 2).kdim(4).vdim(4)); },
      [&](auto& m) {
        const at::Tensor narrow = sequence.slice(2, 0, 4);
        return std::get<0>(m.forward(sequence, narrow, narrow)).square().sum();
      });
  expect_same(
      group, "LSTM", [] { return LSTM(LSTMOptions(8, 5).num_layers(2).bidirectional(true)); },
      [&](auto& m) { return std::get<0>(m.forward(sequence)).square().sum(); });
  expect_same(
      group, "LSTM with projections", [] { return LSTM(LSTMOptions(8, 5).proj_size(3)); },
      [&](auto& m) { return std::get<0>(m.forward(sequence)).square().sum(); });
  expect_same(
      group, "RNN", [] { return RNN(8, 5); }, [&](auto& m) { return std::get<0>(m.forward(sequence)).square().sum(); });
  expect_same(
      group, "RNNCell", [] { return RNNCell(8, 5); }, [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "GRUCell", [] { return GRUCell(8, 5); }, [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "GRU", [] { return GRU(8, 5); }, [&](auto& m) { return std::get<0>(m.forward(sequence)).square().sum(); });
  expect_same(
      group, "LSTMCell", [] { return LSTMCell(8, 5); },
      [&](auto& m) { return std::get<0>(m.forward(rows)).square().sum(); });
  expect_same(
      group, "Conv2d", [] { return Conv2d(Conv2dOptions(4, 6, 3)); },
      [&](auto& m) { return m.forward(image).square().sum(); });
  expect_same(
      group, "Conv1d without bias", [] { return Conv1d(Conv1dOptions(3, 6, 3).bias(false)); },
      [&](auto& m) { return m.forward(sequence).square().sum(); });
  expect_same(
      group, "Conv3d", [] { return Conv3d(Conv3dOptions(2, 6, 3)); },
      [&](auto& m) { return m.forward(image.unsqueeze(0)).square().sum(); });
  expect_same(
      group, "ConvTranspose1d", [] { return ConvTranspose1d(ConvTranspose1dOptions(3, 6, 3)); },
      [&](auto& m) { return m.forward(sequence).square().sum(); });
  expect_same(
      group, "ConvTranspose3d", [] { return ConvTranspose3d(ConvTranspose3dOptions(2, 3, 2)); },
      [&](auto& m) { return m.forward(image.unsqueeze(0)).square().sum(); });
  expect_same(
      group, "ConvTranspose2d", [] { return ConvTranspose2d(ConvTranspose2dOptions(4, 6, 3)); },
      [&](auto& m) { return m.forward(image).square().sum(); });
  expect_same(
      group, "BatchNorm2d", [] { return BatchNorm2d(4); }, [&](auto& m) { return m.forward(image).square().sum(); });
  expect_same(
      group, "BatchNorm1d", [] { return BatchNorm1d(8); }, [&](auto& m) { return m.forward(rows).pow(3).sum(); });
  expect_same(
      group, "BatchNorm3d", [] { return BatchNorm3d(2); },
      [&](auto& m) { return m.forward(image.unsqueeze(0)).pow(3).sum(); });
  expect_same(
      group, "InstanceNorm1d", [] { return InstanceNorm1d(InstanceNorm1dOptions(3).affine(true)); },
      [&](auto& m) { return m.forward(sequence).pow(3).sum(); });
  expect_same(
      group, "InstanceNorm2d",
      [] { return InstanceNorm2d(InstanceNorm2dOptions(4).affine(true).track_running_stats(true)); },
      [&](auto& m) { return m.forward(image).pow(3).sum(); });
  expect_same(
      group, "InstanceNorm3d", [] { return InstanceNorm3d(InstanceNorm3dOptions(2).affine(true)); },
      [&](auto& m) { return m.forward(image.unsqueeze(0)).pow(3).sum(); });
  expect_same(
      group, "LayerNorm", [] { return LayerNorm(LayerNormOptions({8})); },
      [&](auto& m) { return m.forward(rows).pow(3).sum(); });
  expect_same(
      group, "GroupNorm", [] { return GroupNorm(2, 4); }, [&](auto& m) { return (m.forward(image) * image).sum(); });
  expect_same(
      group, "PReLU", [] { return PReLU(); }, [&](auto& m) { return m.forward(image - 0.5).square().sum(); });
  expect_same(
      group, "Embedding", [] { return Embedding(EmbeddingOptions(10, 3).padding_idx(2)); },
      [&](auto& m) { return m.forward(indices).square().sum(); });
  expect_same(
      group, "EmbeddingBag", [] { return EmbeddingBag(10, 3); },
      [&](auto& m) { return m.forward(indices).square().sum(); });
  expect_same(
      group, "Bilinear", [] { return Bilinear(8, 8, 3); },
      [&](auto& m) { return m.forward(rows, rows).square().sum(); });
  expect_same(
      group, "AdaptiveLogSoftmaxWithLoss",
      [] {
        return AdaptiveLogSoftmaxWithLoss(AdaptiveLogSoftmaxWithLossOptions(8, 10, {3, 6}).div_value(2));
      },
      [&](auto& m) { return m.forward(rows, at::arange(6)).output.mean().neg(); });
  expect_same(
      group, "operators and functions of one's own", [] { return std::make_shared<UserMadeImpl>(); },
      [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "containers", [] { return std::make_shared<ContainersImpl>(); },
      [&](auto& m) { return m.forward(rows).square().sum(); });
  expect_same(
      group, "Sequential", [] { return Sequential(Linear(8, 4), BatchNorm1d(4), ReLU(), Linear(4, 2)); },
      [&](auto& m) { return m.forward(rows).square().sum(); });
}

RESHARD_DISTRIBUTED_TEST(InterceptionTest, StockModulesRunUnmodifiedOnTwoRanks, .ranks = 2) {
  run_stock_modules(process_group());
}
RESHARD_DISTRIBUTED_TEST(InterceptionTest, StockModulesRunUnmodifiedOnThreeRanks, .ranks = 3) {
  run_stock_modules(process_group());
}

RESHARD_DISTRIBUTED_TEST(InterceptionTest, RunsUnderInferenceModeAutocastAndAbsentGradients, .ranks = 2) {
  auto model = FullyShardedDataParallel(
      torch::nn::Sequential(torch::nn::Linear(4, 4), torch::nn::Linear(4, 2)),
      {.process_group = process_group(), .wrap_policy = wrap_by_type<torch::nn::LinearImpl>()});
  const at::Tensor x = at::rand({3, 4});
  const at::Tensor plain = model(x).detach();
  {
    const c10::InferenceMode inference;
    EXPECT_TRUE(at::equal(model(x), plain));
  }
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor low = model(x);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(low.scalar_type(), at::kBFloat16);
  EXPECT_LT(max_difference(low, plain), 0.05);
  low.sum().backward();
  for (const at::Tensor& slice : model.parameters()) EXPECT_TRUE(slice.grad().defined());

  // Outputs and gradients are ordinary tensors; views of parameters are not.
  EXPECT_FALSE(plain.key_set().has(kShardKey));
  EXPECT_FALSE(model.parameters()[0].grad().key_set().has(kShardKey));
  EXPECT_TRUE(model.module()->named_parameters()[0].value().t().key_set().has(kShardKey));

  // A pass that an exception broke off leaves nothing behind that the next would trip over.
  model.zero_grad();
  EXPECT_THROW(model(at::rand({3, 5})), c10::Error);
  EXPECT_TRUE(at::equal(model(x).detach(), plain));
}

}  // namespace
}  // namespace reshard::fsdp_test
