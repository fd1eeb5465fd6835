// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/fully_sharded_data_parallel.h"

#include <c10/core/CPUAllocator.h>
#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>
#include <torch/csrc/api/include/torch/nn/utils/clip_grad.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

#include "fsdp/test_model.h"
#include "fsdp/training.h"
#include "reshard/core/hooks.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, TrainsSavesAndLoadsALinearBuiltOnMeta, .ranks = 2) {
  const auto group = process_group();
  at::manual_seed(1);
  auto model = FullyShardedDataParallel(on_meta([] { return torch::nn::Linear(8, 8); }), {.process_group = group});
  const uint64_t before = group->traffic().bytes;
  const StateDict state = model.state_dict(StateDictType::kSharded);
  EXPECT_EQ(group->traffic().bytes, before);
  model(at::rand({8, 8})).sum().backward();
  EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
  for (const at::Tensor& slice : model.parameters()) EXPECT_TRUE(slice.grad().defined());

  at::manual_seed(2);
  auto other = FullyShardedDataParallel(torch::nn::Linear(8, 8), {.process_group = group});
  {
    const SummonFullParams a(model);
    const SummonFullParams b(other);
    EXPECT_FALSE(at::equal(model.module()->weight, other.module()->weight));
  }
  other.load_state_dict(model.state_dict(StateDictType::kSharded));
  const SummonFullParams a(model);
  const SummonFullParams b(other);
  EXPECT_TRUE(at::equal(model.module()->weight, other.module()->weight));
  EXPECT_TRUE(at::equal(model.module()->bias, other.module()->bias));
}

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, TrainsLikeTheUnshardedModelOnTwoRanks, .ranks = 2) {
  const auto blocks = wrap_by_type<BlockImpl>();
  train_and_compare(process_group(), Optimizer::kAdamW, {.wrap_policy = blocks, .poison_freed = true},
                    /*from_meta=*/true);
  train_and_compare(process_group(), Optimizer::kSgd, {.wrap_policy = blocks, .layout = ShardLayout::kDim0Chunks},
                    /*from_meta=*/false);
  train_and_compare(process_group(), Optimizer::kAdamWLargeEps, {}, /*from_meta=*/false);
  // A block comes twice, so the order is more than who follows whom.
  train_and_compare(process_group(), Optimizer::kAdamW,
                    {.wrap_policy = blocks, .forward_prefetch = true, .backward_prefetch = true, .poison_freed = true},
                    /*from_meta=*/false);
  // The tied weight is used by two units side by side.
  train_and_compare(process_group(), Optimizer::kAdamWLargeEps,
                    {.wrap_policy = wrap_by_name({"embedding", "block0", "head"}), .poison_freed = true},
                    /*from_meta=*/false);
}

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, TrainsLikeTheUnshardedModelOnThreeRanks, .ranks = 3) {
  const auto linears = wrap_by_type<torch::nn::LinearImpl, BlockImpl>();
  train_and_compare(process_group(), Optimizer::kAdamWLargeEps, {.wrap_policy = linears, .poison_freed = true},
                    /*from_meta=*/true);
  train_and_compare(process_group(), Optimizer::kSgd,
                    {.wrap_policy = wrap_by_name({"block1", "norm", "head"}), .reshard_after_forward = false},
                    /*from_meta=*/false);
  train_and_compare(process_group(), Optimizer::kAdamW, {.wrap_policy = linears, .layout = ShardLayout::kDim0Chunks},
                    /*from_meta=*/true);
}

/// Counts the blocks of one size that the CPU allocator hands out, and those that come back full of 0xFF.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(size_t size) : size_(size), base_(c10::GetCPUAllocator()) {
    current_ = this;
    c10::SetCPUAllocator(this, 255);
  }
  ~CountingAllocator() override {
    c10::SetCPUAllocator(base_, 255);
    current_ = nullptr;
  }
  c10::DataPtr allocate(size_t n) override {
    if (n != size_) return base_->allocate(n);
    const int now = ++live;
    for (int seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
    }
    void* data = std::aligned_alloc(64, (n + 63) / 64 * 64);
    return {data, data, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return base_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  /// Gloo's threads let go of their own copies shortly after a collective has returned.
  bool is_empty_soon() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (live != 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    return live == 0;
  }

  std::atomic<int> live = 0;
  std::atomic<int> peak = 0;
  std::atomic<int> poisoned = 0;

 private:
  static void release(void* data) {
    if (current_ != nullptr) {
      const auto* bytes = static_cast<const unsigned char*>(data);
      if (std::all_of(bytes, bytes + current_->size_, [](unsigned char byte) { return byte == 0xFF; })) {
        ++current_->poisoned;
      }
      --current_->live;
    }
    std::free(data);
  }
  static inline CountingAllocator* current_ = nullptr;
  size_t size_;
  c10::Allocator* base_;
};

struct ChainImpl : torch::nn::Module {
  ChainImpl() {
    for (int i = 0; i < 6; ++i)
      layers.push_back(register_module("layer" + std::to_string(i), torch::nn::Linear(37, 37)));
  }
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) x = at::relu(layer->forward(x));
    return x;
  }
  std::vector<torch::nn::Linear> layers;
};
TORCH_MODULE(Chain);

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, HoldsOneUnitAtATime, .ranks = 2) {
  const size_t unit_bytes = (37 * 37 + 37) * sizeof(float);  // even number of elements: no padding on two ranks
  CountingAllocator allocator(unit_bytes);
  {
    auto model = FullyShardedDataParallel(
        on_meta([] { return Chain(); }),
        {.process_group = process_group(), .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(), .poison_freed = true});
    EXPECT_EQ(model.unit_names().size(), 7u);
    EXPECT_EQ(model.memory_stats().largest_unit_bytes, unit_bytes);
    EXPECT_EQ(model.memory_stats().all_units_bytes, 6 * unit_bytes);
    EXPECT_EQ(allocator.peak, 1) << "building";
    EXPECT_EQ(allocator.live, 0);
    const at::Tensor x = at::rand({3, 37});
    at::Tensor out = model(x);
    EXPECT_EQ(allocator.peak, 1) << "forward";
    allocator.peak = 0;
    out.sum().backward();
    // The unit is freed before its gradient is reduced, but gloo reduces a copy of what it is given, which its threads
    // may hold a moment longer.
    EXPECT_LT(allocator.peak, 6) << "backward: the flat gradient, autograd's part of it or a unit, and gloo's copies";
    EXPECT_TRUE(allocator.is_empty_soon()) << "after backward";
    const FsdpMemoryStats& stats = model.memory_stats();
    EXPECT_EQ(stats.peak_unsharded_bytes, unit_bytes);
    EXPECT_EQ(stats.peak_gradient_bytes, unit_bytes);
    EXPECT_EQ(stats.unsharded_bytes, 0u);
    EXPECT_EQ(stats.gathers, 6u + 4u)
        << "backward keeps the last unit of forward, and never reads the weights of the first";
    EXPECT_EQ(stats.reductions, 6u);
    model.zero_grad();
    {
      const at::NoGradGuard no_grad;
      allocator.poisoned = 0;
      model(x);
      EXPECT_EQ(allocator.live, 0) << "without gradients nothing stays";
      EXPECT_EQ(allocator.poisoned, 6) << "each unit was overwritten before it was freed";
    }
  }
  auto kept = FullyShardedDataParallel(Chain(), {.process_group = process_group(),
                                                 .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(),
                                                 .reshard_after_forward = false});
  kept(at::rand({3, 37})).sum().backward();
  EXPECT_EQ(kept.memory_stats().gathers, 6u);
  EXPECT_EQ(kept.memory_stats().peak_unsharded_bytes, 6 * unit_bytes);
  EXPECT_EQ(kept.memory_stats().unsharded_bytes, 0u);
}

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, NamesWhatIsUsedWrongly, .ranks = 2) {
  const auto group = process_group();
  const FsdpOptions options{.process_group = group};
  const at::Tensor x = at::rand({4, 3});
  auto model = FullyShardedDataParallel(torch::nn::Linear(3, 5), options);

  // A touch outside of any scope, on one rank only: an error and no collective, so the other rank has nothing to wait
  // for.
  const uint64_t collectives = group->traffic().collectives;
  if (rank() == 0) {
    expect_error(ErrorCode::kFailedPrecondition, {"outside of a forward pass", "bias", "aten::sum"},
                 [&] { model.module()->bias.sum(); });
    expect_error(ErrorCode::kFailedPrecondition, {"outside of a forward pass", "aten::addmm"},
                 [&] { model.module()->forward(x); });
    try {
      model.module()->weight.data_ptr<float>();
      ADD_FAILURE() << "freed memory was handed out";
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find("read while sharded"), std::string::npos) << error.what();
    }
    EXPECT_EQ(model.module()->weight.t().size(0), 3) << "shapes need no values";
  }
  EXPECT_EQ(group->traffic().collectives, collectives);
  {
    const ForwardScope scope(model);
    model.module()->forward(x).sum().backward();  // by hand
  }

  // The module's own handles in an optimizer or a clip.
  torch::optim::SGD wrong(model.module()->parameters(), 0.1);
  expect_error(ErrorCode::kFailedPrecondition, {"parameters()", "key weight"}, [&] { wrong.step(); });
  expect_error(ErrorCode::kFailedPrecondition, {"own parameter handle", "clip_grad_norm"},
               [&] { torch::nn::utils::clip_grad_norm_(model.module()->parameters(), 1.0); });
  expect_error(ErrorCode::kFailedPrecondition, {"own parameter handle", "clip_grad_norm"},
               [&] { torch::nn::utils::clip_grad_value_(model.module()->parameters(), 1.0); });
  // A gradient that no optimizer used.
  expect_error(ErrorCode::kFailedPrecondition, {"no optimizer used the gradient", "weight"}, [&] { model(x); });
  model.clip_grad_norm(1e-3);
  expect_error(ErrorCode::kFailedPrecondition, {"no optimizer used the gradient"}, [&] { model(x); });
  {
    const at::NoGradGuard evaluation;
    model(x);
  }
  // An optimizer that was given some of the parameters: all ranks hear of the rest, also rank 0, which owns nothing of
  // the bias.
  torch::optim::SGD partial({model.parameters()[0]}, 0.1);
  partial.step();
  expect_error(ErrorCode::kFailedPrecondition, {"no optimizer used the gradient", "key bias"}, [&] { model(x); });
  torch::optim::SGD right(model.parameters(), 0.1);
  right.step();
  model(x).sum().backward();
  right.step();
  model.module()->zero_grad();
  expect_error(ErrorCode::kFailedPrecondition, {"zero_grad() does not reach"}, [&] { model(x); });
  right.zero_grad();
  model(x).sum().backward();
  right.zero_grad();
  // Backward of a backward.
  expect_error(ErrorCode::kUnsupported, {"create_graph"},
               [&] { model(x).square().sum().backward({}, true, /*create_graph=*/true); });
  model.zero_grad();

  // Handles that were replaced.
  {
    auto moved = FullyShardedDataParallel(torch::nn::Linear(3, 5), options);
    expect_error(ErrorCode::kFailedPrecondition, {"outside of a forward pass", "weight"}, [&] {
      moved.module()->weight.set_data(at::zeros({5, 3}));
    });
    expect_error(ErrorCode::kFailedPrecondition, {"outside", "aten::_to_copy"},
                 [&] { moved.module()->to(at::kDouble); });
    moved.module()->weight.unsafeGetTensorImpl()->shallow_copy_from(at::zeros({5, 3}).getIntrusivePtr());
    expect_error(ErrorCode::kFailedPrecondition, {"no longer belongs", "weight"}, [&] { moved(x); });
  }
  expect_error(ErrorCode::kFailedPrecondition, {"not allowed inside"}, [&] {
    const ForwardScope scope(model);
    const SummonFullParams full(model);
  });
}

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, AccumulatesAndClipsLikeTheUnshardedModel, .ranks = 2) {
  const DoublePrecision in_double;
  const auto group = process_group();
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    at::manual_seed(3);
    Chain reference;
    at::manual_seed(3);
    auto model = FullyShardedDataParallel(Chain(), {.process_group = group,
                                                    .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(),
                                                    .layout = layout,
                                                    .accumulate_reduced_gradients = true});
    const at::Tensor data = at::rand({3, 4, 37});  // micro-batch, row, feature; two rows a rank
    const auto mine = [&](int64_t micro) { return data[micro].slice(0, 2 * group->rank(), 2 * group->rank() + 2); };
    torch::optim::SGD optimizer(model.parameters(), 0.1);
    torch::optim::SGD reference_optimizer(reference->parameters(), 0.1);
    for (const double norm_type : {2.0, 1.0, std::numeric_limits<double>::infinity()}) {
      for (const bool without_sync : {true, false}) {
        optimizer.zero_grad();
        reference_optimizer.zero_grad();
        const uint64_t reductions = model.memory_stats().reductions;
        for (int64_t micro = 0; micro < 3; ++micro) {
          const auto backward = [&] { model(mine(micro)).square().mean().backward(); };
          if (without_sync && micro < 2) {
            const NoSync guard = model.no_sync();
            backward();
            EXPECT_FALSE(model.parameters()[0].grad().defined()) << "nothing is reduced without synchronisation";
          } else {
            backward();
          }
          reference(data[micro]).square().mean().backward();
        }
        EXPECT_EQ(model.memory_stats().reductions - reductions, without_sync ? 6u : 18u);
        EXPECT_EQ(model.memory_stats().gradient_bytes, 0u);
        const double norm = model.clip_grad_norm(1e-2, norm_type);
        const double wanted = torch::nn::utils::clip_grad_norm_(reference->parameters(), 1e-2, norm_type);
        EXPECT_GT(wanted, 1e-2) << "the clip must do something";
        EXPECT_NEAR(norm, wanted, 1e-12 * wanted);
        optimizer.step();
        reference_optimizer.step();
        EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-14);
      }
    }
    // Two backward passes through one graph.
    optimizer.zero_grad();
    reference_optimizer.zero_grad();
    const at::Tensor loss = model(mine(0)).square().mean();
    loss.backward({}, /*retain_graph=*/true);
    loss.backward();
    const at::Tensor reference_loss = reference(data[0]).square().mean();
    reference_loss.backward({}, true);
    reference_loss.backward();
    optimizer.step();
    reference_optimizer.step();
    EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-14);
  }
  expect_error(ErrorCode::kInvalidArgument, {"norm_type"}, [&] {
    auto model = FullyShardedDataParallel(torch::nn::Linear(2, 2), {.process_group = group});
    model.clip_grad_norm(1.0, 0.0);
  });
}

/// Two heads of which a pass uses one; fp32, bf16 and complex parameters; buffers, one of them not contiguous.
struct MixedImpl : torch::nn::Module {
  MixedImpl() {
    first = register_module("first", torch::nn::Linear(3, 3));
    second = register_module("second", torch::nn::Linear(3, 3));
    low = register_parameter("low", at::rand({5}).to(at::kBFloat16));
    turn = register_parameter("turn", at::rand({3}, at::kComplexFloat));
    scale = register_buffer("scale", at::rand({2}) + 1);
    table = register_buffer("table", at::rand({3, 2}).t());
  }
  at::Tensor forward(const at::Tensor& x, bool use_second) {
    const at::Tensor y = (use_second ? second : first)->forward(x) * scale[0];
    return at::real(y * turn).sum() + low.to(at::kFloat).sum();
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
  at::Tensor low, turn, scale, table;
};
TORCH_MODULE(Mixed);

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, KeepsDtypesApartAndUnusedParametersStill, .ranks = 3) {
  const auto group = process_group();
  at::manual_seed(10 + static_cast<uint64_t>(rank()));  // ranks differ until they are synchronised
  Mixed start;
  auto model = FullyShardedDataParallel(start, {.process_group = group, .sync_module_states = true});
  at::manual_seed(10);
  Mixed reference;
  EXPECT_EQ(difference_to(model, *model.module(), *reference), 0.0) << "rank 0's values are everybody's";
  at::manual_seed(10 + static_cast<uint64_t>(rank()));
  const auto replayed =
      FullyShardedDataParallel(on_meta([] { return Mixed(); }), {.process_group = group, .sync_module_states = true});
  EXPECT_EQ(difference_to(replayed, *replayed.module(), *reference), 0.0) << "also those that each rank replays";

  torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(0.1).weight_decay(0.5).eps(1e-3));
  torch::optim::AdamW reference_optimizer(reference->parameters(),
                                          torch::optim::AdamWOptions(0.1).weight_decay(0.5).eps(1e-3));
  for (int step = 0; step < 3; ++step) {
    const at::Tensor x = at::full({2, 3}, 0.5 + step);
    optimizer.zero_grad();
    reference_optimizer.zero_grad();
    model(x, false).backward();
    reference->forward(x, false).backward();
    for (const ShardedParameter& p : model.sharded_parameters()) {
      EXPECT_EQ(p.slice.grad().defined(), !p.names[0].starts_with("second")) << p.names[0];
    }
    optimizer.step();
    reference_optimizer.step();
  }
  EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-5);
  size_t elements = 0;
  for (const ShardedParameter& p : model.sharded_parameters()) elements += static_cast<size_t>(p.end - p.begin);
  at::Tensor sum = at::full({1}, static_cast<double>(elements), at::kDouble);
  group->all_reduce_sum(sum);
  EXPECT_EQ(sum.item<double>(), 12 + 12 + 5 + 3) << "each element has one owner";
}

RESHARD_DISTRIBUTED_TEST(FullyShardedDataParallelTest, SummonsAndSeesWritesToShards, .ranks = 2) {
  const auto group = process_group();
  const at::Tensor x = at::ones({1, 3});
  const at::NoGradGuard no_grad;
  std::vector<std::string> warnings;
  set_log_sink([&](LogLevel, std::string_view text) { warnings.emplace_back(text); });
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    auto model = FullyShardedDataParallel(torch::nn::Linear(3, 5),
                                          {.process_group = group, .reshard_after_forward = false, .layout = layout});
    {
      const SummonFullParams full(model, {.writeback = true});
      model.module()->weight.fill_(1);
      model.module()->bias.fill_(rank());  // ranks write differently: each keeps its own part
    }
    const at::Tensor first = model(x);
    const float bias =
        layout == ShardLayout::kFlat ? 1 : 0;  // of row 0: rank 1 has the end of the flat unit, rank 0 the first rows
    EXPECT_EQ(first[0][0].item<float>(), 3.0f + bias);
    EXPECT_EQ(first[0][4].item<float>(), 3.0f + 1.0f);
    {
      const SummonFullParams full(model);
      EXPECT_EQ(model.module()->weight.sum().item<float>(), 15.0f);
      model.module()->weight.fill_(7);
    }
    EXPECT_EQ(model(x)[0][0].item<float>(), 3.0f + bias) << "a write without write-back is lost";
    EXPECT_EQ(warnings.size(), 1u);
    EXPECT_NE(warnings.at(0).find("'weight' was written to while it was gathered"), std::string::npos) << warnings[0];
    warnings.clear();
    EXPECT_GT(model.memory_stats().unsharded_bytes, 0u)
        << "the unit is still gathered, so the next writes make it stale";
    for (at::Tensor& slice : model.parameters()) slice.fill_(2);
    EXPECT_EQ(model(x)[0][0].item<float>(), 8.0f) << "a stale unit is gathered anew";
    const StateDict state = model.state_dict(StateDictType::kSharded);
    model(x);
    for (const LocalShard& shard : state.at("weight").as<ShardedTensor>().shards()) shard.tensor.fill_(3);
    EXPECT_EQ(model(x)[0][0].item<float>(), 11.0f) << "so is one whose shard was written through the state dict";
    {
      const SummonFullParams outer(model);
      const SummonFullParams inner(model);
      EXPECT_EQ(model(x)[0][0].item<float>(), 11.0f);
    }
    {
      const SummonFullParams outer(model);
      const SummonFullParams inner(model, {.writeback = true});
      model.module()->weight.fill_(4);
    }
    EXPECT_EQ(model(x)[0][0].item<float>(), 14.0f) << "one scope that writes back is enough";
    EXPECT_TRUE(warnings.empty());
    expect_error(ErrorCode::kFailedPrecondition, {"outside"}, [&] { model.module()->weight.sum(); });
  }
  set_log_sink(nullptr);
}

}  // namespace
}  // namespace reshard::fsdp_test
