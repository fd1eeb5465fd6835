// SPDX-License-Identifier: BSD-3-Clause
// What happens when a module is wrapped: units, odd sizes, and what is refused.

#include "fsdp/test_model.h"

#include <torch/csrc/api/include/torch/nn/modules/batchnorm.h>
#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <functional>

#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

/// A module whose constructor is the given function.
struct CustomImpl : torch::nn::Module {
  explicit CustomImpl(const std::function<void(CustomImpl&)>& build) { build(*this); }
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor sum = x.sum();
    for (const auto& item : named_parameters()) sum = sum + item.value().sum() * x.sum();
    return sum;
  }
};
std::shared_ptr<CustomImpl> custom(const std::function<void(CustomImpl&)>& build) {
  return std::make_shared<CustomImpl>(build);
}

struct PairImpl : torch::nn::Module {
  PairImpl() {
    register_module("first", torch::nn::Linear(2, 3));
    register_module("second", torch::nn::Linear(3, 4));
  }
  at::Tensor forward(const at::Tensor& x) { return x; }
};
TORCH_MODULE(Pair);

struct NestImpl : torch::nn::Module {
  NestImpl() {
    register_module("a", Pair());
    register_module("b", torch::nn::Sequential(torch::nn::Linear(4, 5), torch::nn::Linear(5, 6)));
  }
};
TORCH_MODULE(Nest);

RESHARD_DISTRIBUTED_TEST(WrappingTest, UnitsFollowThePolicy, .ranks = 1) {
  using Names = std::vector<std::string>;
  const auto wrap = [&](WrapPolicy policy) {
    return FullyShardedDataParallel(Nest(), {.process_group = process_group(), .wrap_policy = std::move(policy)});
  };
  const uint64_t first = 9 * 4, second = 16 * 4, b0 = 25 * 4, b1 = 36 * 4;
  const uint64_t all = first + second + b0 + b1;

  const auto whole = wrap({});
  EXPECT_EQ(whole.unit_names(), (Names{""}));
  EXPECT_EQ(whole.memory_stats().largest_unit_bytes, all);
  const auto by_type = wrap(wrap_by_type<PairImpl, torch::nn::SequentialImpl>());
  EXPECT_EQ(by_type.unit_names(), (Names{"", "a", "b"}));
  EXPECT_EQ(by_type.memory_stats().largest_unit_bytes, b0 + b1);
  const auto by_predicate = wrap(wrap_by_predicate([](const std::string& name, const torch::nn::Module& module) {
    EXPECT_FALSE(name.empty()) << "never asked about the root";
    return module.parameters(/*recurse=*/false).size() == 2 && name != "b.1";
  }));
  EXPECT_EQ(by_predicate.unit_names(), (Names{"", "a.first", "a.second", "b.0"}));
  EXPECT_EQ(by_predicate.memory_stats().largest_unit_bytes, b1) << "what is left is the root's";
  const auto by_name = wrap(wrap_by_name({"b.1", "a", "a.second"}));
  EXPECT_EQ(by_name.unit_names(), (Names{"", "a", "a.second", "b.1"})) << "units nest";
  EXPECT_EQ(by_name.memory_stats().all_units_bytes, all);
  expect_error(ErrorCode::kInvalidArgument, {"wrap policy", "block7"}, [&] { wrap(wrap_by_name({"a", "block7"})); });
}

RESHARD_DISTRIBUTED_TEST(WrappingTest, RefusesByNameWhatCannotWorkSharded, .ranks = 2) {
  const FsdpOptions options{.process_group = process_group()};
  const auto refuse = [&](ErrorCode code, const std::vector<std::string>& parts,
                          const std::function<void(CustomImpl&)>& build) {
    expect_error(code, parts, [&] { FullyShardedDataParallel(custom(build), options); });
  };
  using namespace torch::nn;
  refuse(ErrorCode::kUnsupported, {"Embedding", "sparse", "key tokens"},
         [](CustomImpl& m) { m.register_module("tokens", Embedding(EmbeddingOptions(4, 2).sparse(true))); });
  refuse(ErrorCode::kUnsupported, {"Embedding", "max_norm", "key tokens"},
         [](CustomImpl& m) { m.register_module("tokens", Embedding(EmbeddingOptions(4, 2).max_norm(1.0))); });
  refuse(ErrorCode::kUnsupported, {"EmbeddingBag", "sparse", "key bag"},
         [](CustomImpl& m) { m.register_module("bag", EmbeddingBag(EmbeddingBagOptions(4, 2).sparse(true))); });
  refuse(ErrorCode::kUnsupported, {"EmbeddingBag", "max_norm", "key bag"},
         [](CustomImpl& m) { m.register_module("bag", EmbeddingBag(EmbeddingBagOptions(4, 2).max_norm(1.0))); });
  refuse(ErrorCode::kUnsupported, {"only dense", "key lines"},
         [](CustomImpl& m) { m.register_parameter("lines", at::eye(3).to_sparse()); });
  refuse(ErrorCode::kUnsupported, {"only dense", "key small"}, [](CustomImpl& m) {
    m.register_parameter("small", at::quantize_per_tensor(at::ones({3}), 0.1, 0, at::kQInt8), /*requires_grad=*/false);
  });
  refuse(ErrorCode::kInvalidArgument, {"not a leaf", "key twice"}, [](CustomImpl& m) {
    const at::Tensor& once = m.register_parameter("once", at::ones({3}));
    m.register_parameter("twice", once * 2);
  });
  // One memory under two tensors would become two memories.
  refuse(ErrorCode::kUnsupported, {"shares memory with 'weight'", "key copy"}, [](CustomImpl& m) {
    const at::Tensor& weight = m.register_parameter("weight", at::ones({3, 4}));
    m.register_parameter("copy", weight.detach().slice(0, 2, 3));
  });
  refuse(ErrorCode::kUnsupported, {"shares memory with 'weight'", "key frozen"}, [](CustomImpl& m) {
    const at::Tensor& weight = m.register_parameter("weight", at::ones({3, 4}));
    m.register_buffer("frozen", weight.detach().t());
  });
  expect_error(ErrorCode::kUnsupported, {"shares memory with 'weight'", "key frozen"}, [&] {
    auto meta = on_meta([] {
      return custom([](CustomImpl& m) {
        const at::Tensor& weight = m.register_parameter("weight", at::ones({3, 4}));
        m.register_buffer("frozen", weight.detach().t());
      });
    });
    FullyShardedDataParallel(meta, options);
  });
  // Neighbours in one memory do not.
  auto neighbours = FullyShardedDataParallel(custom([](CustomImpl& m) {
                                               const at::Tensor memory = at::arange(12, at::kFloat);
                                               m.register_parameter("left", memory.slice(0, 0, 5));
                                               m.register_buffer("middle", memory.slice(0, 5, 7));
                                               m.register_parameter("right", memory.slice(0, 7, 12));
                                             }),
                                             options);
  EXPECT_EQ(neighbours.state_dict(StateDictType::kFull).at("right").as<at::Tensor>()[0].item<float>(), 7.0f);

  auto model = FullyShardedDataParallel(Linear(2, 2), options);
  expect_error(ErrorCode::kInvalidArgument, {"sharded already", "weight"},
               [&] { FullyShardedDataParallel(model.module(), options); });
  const auto alone = new_group({0});
  if (rank() == 1) {
    expect_error(ErrorCode::kInvalidArgument, {},
                 [&] { FullyShardedDataParallel(Linear(2, 2), {.process_group = alone}); });
  }
  // Ranks that disagree all hear of it; their collectives would not match.
  expect_error(ErrorCode::kInvalidArgument, {"different models", "2 parameters"},
               [&] { FullyShardedDataParallel(Linear(2, 2 + rank()), options); });
  expect_error(ErrorCode::kInvalidArgument, {"different models"}, [&] {
    Linear linear(2, 2);
    linear->bias.set_requires_grad(rank() == 0);
    FullyShardedDataParallel(linear, options);
  });
  expect_error(ErrorCode::kInvalidArgument, {"different models"}, [&] {
    FullyShardedDataParallel(
        Pair(), {.process_group = process_group(), .wrap_policy = wrap_by_name({rank() == 0 ? "first" : "second"})});
  });
}

RESHARD_DISTRIBUTED_TEST(WrappingTest, TakesParametersOfAnySize, .ranks = 3) {
  const auto group = process_group();
  // Fewer elements than ranks, none at all, a scalar, strides of its own, and a gradient from before.
  const auto build = [](CustomImpl& m) {
    m.register_parameter("scalar", at::full({}, 2.0));
    m.register_parameter("none", at::empty({0, 4}));
    m.register_parameter("two", at::arange(2, at::kFloat));
    m.register_parameter("transposed", at::arange(35, at::kFloat).view({5, 7}).t()).mutable_grad() = at::ones({7, 5});
    m.register_parameter("count", at::arange(4, at::kLong), /*requires_grad=*/false);
    m.register_module("unit", custom([](CustomImpl& unit) { unit.register_parameter("none", at::empty({0})); }));
    m.register_module(
        "norm", torch::nn::BatchNorm1d(torch::nn::BatchNorm1dOptions(3).affine(false).track_running_stats(false)));
  };
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    const auto reference = custom(build);
    reference->zero_grad();
    auto model = FullyShardedDataParallel(
        custom(build), {.process_group = group, .wrap_policy = wrap_by_name({"unit"}), .layout = layout});
    for (const at::Tensor& handle : model.module()->parameters()) EXPECT_FALSE(handle.grad().defined());
    EXPECT_EQ(difference_to(model, *model.module(), *reference), 0.0);
    torch::optim::SGD optimizer(model.parameters(), 0.5);
    torch::optim::SGD reference_optimizer(reference->parameters(), 0.5);
    const at::Tensor x = at::full({1}, 3.0);
    EXPECT_EQ(model(x).item<float>(), reference->forward(x).item<float>());
    model(x).backward();
    reference->forward(x).backward();
    optimizer.step();
    reference_optimizer.step();
    EXPECT_EQ(difference_to(model, *model.module(), *reference), 0.0);
    EXPECT_EQ(model.module()->named_parameters()["transposed"].sizes(), (at::IntArrayRef{7, 5}));
    // Together the ranks own each element once.
    for (const ShardedParameter& p : model.sharded_parameters()) {
      EXPECT_EQ(p.slice.numel(), p.end - p.begin);
      at::Tensor owned = at::zeros({volume(p.shape)});
      owned.slice(0, p.begin, p.end).fill_(1);
      group->all_reduce_sum(owned);
      EXPECT_TRUE(at::all(owned == 1).item<bool>()) << p.names[0];
    }
  }
  auto nothing = FullyShardedDataParallel(torch::nn::Sequential(torch::nn::Flatten()), {.process_group = group});
  EXPECT_EQ(nothing(at::ones({2, 3})).sum().item<float>(), 6.0f);
  EXPECT_EQ(nothing.clip_grad_norm(1.0), 0.0);
  EXPECT_TRUE(nothing.parameters().empty());
}

}  // namespace
}  // namespace reshard::fsdp_test
