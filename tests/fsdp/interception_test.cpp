// SPDX-License-Identifier: BSD-3-Clause
// Stock modules, unmodified, each parameter a unit of its own where that is possible: the hardest case for
// interception.

#include "fsdp/interception.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/api/include/torch/nn/modules.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

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
      group, "GRU", [] { return GRU(8, 5); }, [&](auto& m) { return std::get<0>(m.forward(sequence)).square().sum(); });
  expect_same(
      group, "LSTMCell", [] { return LSTMCell(8, 5); },
      [&](auto& m) { return std::get<0>(m.forward(rows)).square().sum(); });
  expect_same(
      group, "Conv2d", [] { return Conv2d(Conv2dOptions(4, 6, 3)); },
      [&](auto& m) { return m.forward(image).square().sum(); });
  expect_same(
      group, "ConvTranspose2d", [] { return ConvTranspose2d(ConvTranspose2dOptions(4, 6, 3)); },
      [&](auto& m) { return m.forward(image).square().sum(); });
  expect_same(
      group, "BatchNorm2d", [] { return BatchNorm2d(4); }, [&](auto& m) { return m.forward(image).square().sum(); });
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
