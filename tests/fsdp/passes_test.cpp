// SPDX-License-Identifier: BSD-3-Clause
// Forward and backward passes that are out of the ordinary: frozen parts, recomputation, passes that break off, and what
// may not happen between them.

#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <thread>

#include "fsdp/test_model.h"
#include "reshard/core/hooks.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

using torch::nn::Linear;

/// Layers 5 -> 5 with tanh between; `around` runs each layer.
struct StackImpl : torch::nn::Module {
  using Layer = std::function<at::Tensor(const at::Tensor&)>;
  explicit StackImpl(std::function<at::Tensor(const Layer&, const at::Tensor&)> around_each = nullptr)
      : around(std::move(around_each)) {
    for (const char* name : {"l0", "l1", "l2", "l3"}) layers.push_back(register_module(name, Linear(5, 5)));
  }
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) {
      const Layer run = [layer](const at::Tensor& in) mutable { return at::tanh(layer->forward(in)); };
      x = around ? around(run, x) : run(x);
    }
    return x.square().sum();
  }
  std::function<at::Tensor(const Layer&, const at::Tensor&)> around;
  std::vector<Linear> layers;
};
TORCH_MODULE(Stack);

Stack seeded_stack(std::function<at::Tensor(const StackImpl::Layer&, const at::Tensor&)> around = nullptr) {
  at::manual_seed(61);
  return Stack(std::move(around));
}

/// Three steps of SGD on both, with a batch of which each rank gets its own rows; then both must be the same.
template <class Model>
void expect_same_training(Model& model, Stack& reference, const ProcessGroup& group) {
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.05).weight_decay(0.1));
  torch::optim::SGD reference_optimizer(reference->parameters(), torch::optim::SGDOptions(0.05).weight_decay(0.1));
  at::manual_seed(62);
  const at::Tensor batch = at::rand({6, 5});
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    reference_optimizer.zero_grad();
    model(rows_of_rank(batch, group)).backward();
    (reference(batch) / group.size()).backward();
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
    optimizer.step();
    reference_optimizer.step();
  }
  EXPECT_LE(model.memory_stats().peak_unsharded_bytes, model.memory_stats().largest_unit_bytes);
  EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-13);
}

RESHARD_DISTRIBUTED_TEST(PassesTest, FrozenLayersTrainNothingAndAreGatheredWhenNeeded, .ranks = 2) {
  const DoublePrecision in_double;
  const auto group = process_group();
  const auto freeze = [](Stack stack, const std::vector<size_t>& layers) {
    for (const size_t i : layers) {
      for (at::Tensor& parameter : stack->layers[i]->parameters()) parameter.set_requires_grad(false);
    }
    return stack;
  };
  // The first layers of a unit, the last, whole units, all but one.
  for (const std::vector<size_t>& frozen : {std::vector<size_t>{0, 1}, {2, 3}, {1}, {0, 1, 3}}) {
    for (const WrapPolicy& policy : {WrapPolicy(), wrap_by_type<torch::nn::LinearImpl>(), wrap_by_name({"l1", "l2"})}) {
      Stack reference = freeze(seeded_stack(), frozen);
      auto model = FullyShardedDataParallel(freeze(seeded_stack(), frozen),
                                            {.process_group = group, .wrap_policy = policy, .poison_freed = true});
      expect_same_training(model, reference, *group);
    }
  }
  // Freezing later is fine; unfreezing would lose gradients.
  Stack reference = seeded_stack();
  auto model = FullyShardedDataParallel(freeze(seeded_stack(), {3}), {.process_group = group});
  freeze(reference, {0, 3});
  freeze(model.module(), {0});
  expect_same_training(model, reference, *group);
  model.module()->layers[3]->weight.set_requires_grad(true);
  expect_error(ErrorCode::kFailedPrecondition, {"was frozen when the model was wrapped", "key l3.weight"}, [&] {
    model(at::rand({1, 5}));
  });
}

/// Activation checkpointing: keeps only the input, and runs the layer again in the backward pass.
struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const std::function<at::Tensor(const at::Tensor&)>* layer) {
    context->save_for_backward({x});
    context->saved_data["layer"] = reinterpret_cast<int64_t>(new std::function<at::Tensor(const at::Tensor&)>(*layer));
    return (*layer)(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const std::unique_ptr<std::function<at::Tensor(const at::Tensor&)>> layer(
        reinterpret_cast<std::function<at::Tensor(const at::Tensor&)>*>(context->saved_data["layer"].toInt()));
    at::Tensor x = context->get_saved_variables()[0].detach();
    x.set_requires_grad(true);
    const at::AutoGradMode enable(true);
    (*layer)(x).backward(gradients[0]);
    return {x.grad(), at::Tensor()};
  }
};

RESHARD_DISTRIBUTED_TEST(PassesTest, RecomputesActivationsInTheBackwardPass, .ranks = 2) {
  const DoublePrecision in_double;
  const auto group = process_group();
  const auto recompute = [](const StackImpl::Layer& layer, const at::Tensor& x) {
    return Recompute::apply(x.requires_grad() ? x : x.detach().requires_grad_(true), &layer);
  };
  for (const WrapPolicy& policy : {WrapPolicy(), wrap_by_type<torch::nn::LinearImpl>()}) {
    Stack reference = seeded_stack();
    auto model = FullyShardedDataParallel(seeded_stack(recompute),
                                          {.process_group = group, .wrap_policy = policy, .poison_freed = true});
    expect_same_training(model, reference, *group);
  }
}

RESHARD_DISTRIBUTED_TEST(PassesTest, BrokenPassesLeaveNothingBehind, .ranks = 2) {
  const DoublePrecision in_double;
  const auto group = process_group();
  std::vector<std::string> warnings;
  set_log_sink([&](LogLevel, std::string_view text) { warnings.emplace_back(text); });
  int fail_in = -1;
  const auto break_off = [&fail_in](const StackImpl::Layer& layer, const at::Tensor& x) {
    at::Tensor out = layer(x);
    if (fail_in >= 0 && out.requires_grad() && fail_in-- == 0)
      out.register_hook([](const at::Tensor&) { throw std::runtime_error("broken off"); });
    return out;
  };
  for (const bool one_unit : {true, false}) {
    Stack reference = seeded_stack();
    auto model = FullyShardedDataParallel(
        seeded_stack(break_off), {.process_group = group,
                                  .wrap_policy = one_unit ? WrapPolicy() : wrap_by_type<torch::nn::LinearImpl>(),
                                  .poison_freed = true});
    fail_in = 1;
    at::Tensor loss = model(at::rand({2, 5}));
    EXPECT_THROW(loss.backward(), std::runtime_error);
    EXPECT_EQ(model.parameters().back().grad().defined(), !one_unit) << "reduced before it broke";
    model.zero_grad();
    expect_same_training(model, reference, *group);
    EXPECT_EQ(warnings.size(), one_unit ? 1u : 0u);
    for (const std::string& text : warnings) EXPECT_NE(text.find("broke off"), std::string::npos) << text;
    EXPECT_EQ(model.memory_stats().gradient_bytes, 0u);
    warnings.clear();
  }
  set_log_sink(nullptr);
}

RESHARD_DEVICE_TEST(PassesTest, PrefetchesWhatCameNextInThePassBefore, .ranks = {2}, .one_gpu_ranks = {2}) {
  const DoublePrecision in_double;
  const auto group = process_group();
  size_t skipped = 9, layer = 0;
  std::vector<uint64_t> begun;  // gathers that had begun when each layer was done, in the last forward pass
  const auto around = [&](const StackImpl::Layer& run, const at::Tensor& x) {
    if (layer == 0) begun.clear();
    const at::Tensor out = layer == skipped ? x : run(x);
    layer = (layer + 1) % 4;
    begun.push_back(group->traffic().collectives);
    return out;
  };
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    const auto options = [&](bool prefetch) {
      return FsdpOptions{.process_group = group,
                         .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(),
                         .device = device(),
                         .layout = layout,
                         .forward_prefetch = prefetch,
                         .backward_prefetch = prefetch,
                         .poison_freed = true};
    };
    auto model = FullyShardedDataParallel(seeded_stack(around), options(true));
    auto plain = FullyShardedDataParallel(seeded_stack(around), options(false));
    torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.05));
    torch::optim::SGD plain_optimizer(plain.parameters(), torch::optim::SGDOptions(0.05));
    at::manual_seed(63);
    const at::Tensor batch = at::rand({2, 5}).to(device());
    const auto step = [&] {
      const FsdpMemoryStats before = model.memory_stats(), plain_before = plain.memory_stats();
      const uint64_t collectives = group->traffic().collectives;
      const at::Tensor loss = model(batch);
      for (uint64_t& count : begun) count -= collectives;
      const std::vector<uint64_t> forward = begun;
      loss.backward();
      EXPECT_EQ(model.memory_stats().unsharded_bytes, 0U);
      const at::Tensor plain_loss = plain(batch);
      plain_loss.backward();
      EXPECT_EQ(loss.item<double>(), plain_loss.item<double>());
      optimizer.step();
      plain_optimizer.step();
      optimizer.zero_grad();
      plain_optimizer.zero_grad();
      begun = forward;
      return std::pair(model.memory_stats().prefetches - before.prefetches,
                       static_cast<int64_t>(model.memory_stats().gathers - before.gathers) -
                           static_cast<int64_t>(plain.memory_stats().gathers - plain_before.gathers));
    };
    using Counts = std::pair<uint64_t, int64_t>;  // prefetches, gathers beyond those without prefetch
    skipped = 9;
    EXPECT_EQ(step(), Counts(0, 0)) << "nothing is known of a first pass";
    EXPECT_EQ(begun, (std::vector<uint64_t>{1, 2, 3, 4}));
    EXPECT_EQ(step(), Counts(3 + 1, 0)) << "all but the first of each pass; backward gathers two";
    EXPECT_EQ(begun, (std::vector<uint64_t>{2, 3, 4, 4}));
    const uint64_t unit = model.memory_stats().largest_unit_bytes;
    EXPECT_GT(model.memory_stats().peak_unsharded_bytes, unit);
    EXPECT_LE(model.memory_stats().peak_unsharded_bytes, (layout == ShardLayout::kFlat ? 2 : 4) * unit);
    // Without the second layer it has gathered that for nothing, once, and stops.
    skipped = 1;
    EXPECT_EQ(step(), Counts(0, 1 + 1));
    EXPECT_EQ(step(), Counts(2, 0));
    skipped = 9;
    step();
    EXPECT_EQ(step(), Counts(3 + 1, 0));
    {
      const SummonFullParams full(plain);
      EXPECT_EQ(difference_to(model, *model.module(), *plain.module()), 0.0);
    }

    // A pass that breaks off with a gather on its way.
    skipped = 9;
    const at::Tensor out = model(batch);
    EXPECT_ANY_THROW(model(at::rand({2, 6}).to(device())));
    layer = 0;
    EXPECT_EQ(model(batch).item<double>(), out.item<double>());
    model.reshard();
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0U);
    model.state_dict(StateDictType::kFull);
  }
}

RESHARD_DISTRIBUTED_TEST(PassesTest, RefusesAWriteBetweenForwardAndBackward, .ranks = 2) {
  const auto group = process_group();
  {
    // Not hidden by a gather that began before it was asked for.
    auto model = FullyShardedDataParallel(
        seeded_stack(),
        {.process_group = group, .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(), .backward_prefetch = true});
    for (int pass = 0; pass < 2; ++pass) {
      const at::Tensor loss = model(at::rand({2, 5}));
      if (pass == 0) {
        loss.backward();
        model.zero_grad();
        continue;
      }
      {
        const at::NoGradGuard no_grad;
        model.parameters()[2].add_(1);  // l1.weight
      }
      expect_error(ErrorCode::kFailedPrecondition, {"written since", "key l1.weight"}, [&] { loss.backward(); });
    }
  }
  auto model = FullyShardedDataParallel(seeded_stack(),
                                        {.process_group = group, .wrap_policy = wrap_by_type<torch::nn::LinearImpl>()});
  torch::optim::AdamW optimizer(model.parameters());
  const at::Tensor x = at::rand({2, 5});
  const at::Tensor loss = model(x);
  loss.backward({}, /*retain_graph=*/true);
  optimizer.step();
  expect_error(ErrorCode::kFailedPrecondition, {"written since", "weight"}, [&] { loss.backward(); });
  model.zero_grad();
  model(x).backward();
  optimizer.step();
  // A pass on another thread is a pass.
  model.zero_grad();
  at::Tensor here = model(x).detach(), there;
  std::thread([&] { there = model(x).detach(); }).join();
  EXPECT_TRUE(at::equal(here, there));
}

RESHARD_DISTRIBUTED_TEST(PassesTest, ABackwardPassArmsItsOwnThreadOnly, .ranks = 2) {
  const auto group = process_group();
  auto model = FullyShardedDataParallel(seeded_stack(),
                                        {.process_group = group, .wrap_policy = wrap_by_type<torch::nn::LinearImpl>()});
  int calls = 0;
  const at::Tensor loss = model(at::rand({2, 5}));
  loss.register_hook([&](const at::Tensor&) {
    ++calls;
    const uint64_t collectives = group->traffic().collectives;
    std::thread([&] {
      expect_error(ErrorCode::kFailedPrecondition, {"outside of a forward pass", "key l0.weight", "aten::sum"},
                   [&] { model.module()->layers[0]->weight.sum(); });
    }).join();
    EXPECT_EQ(group->traffic().collectives, collectives);
    const at::NoGradGuard no_grad;
    EXPECT_GT(model.module()->layers[0]->weight.abs().sum().item<float>(), 0.0f) << "gathered on this thread";
    EXPECT_GT(group->traffic().collectives, collectives);
    expect_error(ErrorCode::kFailedPrecondition, {"SummonFullParams", "not allowed inside"},
                 [&] { const SummonFullParams full(model); });
    expect_error(ErrorCode::kFailedPrecondition, {"full state dict", "not allowed inside"},
                 [&] { model.state_dict(StateDictType::kFull); });
  });
  loss.backward();
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
}

RESHARD_DISTRIBUTED_TEST(PassesTest, ADestroyedModelLeavesErrorsNotCrashes, .ranks = 2) {
  Stack stack = seeded_stack();
  at::Tensor loss;
  {
    auto model = FullyShardedDataParallel(
        stack, {.process_group = process_group(), .wrap_policy = wrap_by_type<torch::nn::LinearImpl>()});
    loss = model(at::rand({2, 5}));
    auto moved = std::move(model);
    EXPECT_EQ(moved.parameters().size(), 8u);
  }
  const auto expect_unreadable = [](const std::function<void()>& use) {
    try {
      use();
      ADD_FAILURE() << "freed memory was read";
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find("read while sharded"), std::string::npos) << error.what();
    }
  };
  expect_unreadable([&] { stack(at::rand({2, 5})); });
  expect_unreadable([&] { loss.backward(); });
}

}  // namespace
}  // namespace reshard::fsdp_test
