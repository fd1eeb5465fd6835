// SPDX-License-Identifier: BSD-3-Clause
// Models on meshes of two dimensions: replicas over the first, each sharded over the second.
#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/nn/modules/batchnorm.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/nn/utils/clip_grad.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <limits>

#include "fsdp/test_model.h"
#include "fsdp/training.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

DeviceMesh mesh_of(const Dims& shape, std::vector<int> ranks = {}) {
  return init_device_mesh(shape, {.dim_names = {"replicate", "shard"}, .ranks = std::move(ranks)});
}

RESHARD_DEVICE_TEST(HybridShardingTest, TrainsLikeTheUnshardedModel, .ranks = {4}, .one_gpu_ranks = {4},
                    .deadline = std::chrono::seconds(180)) {
  const auto world = process_group();
  const auto blocks = wrap_by_type<BlockImpl>();
  const c10::Device on = device();
  train_and_compare(world, Optimizer::kAdamWLargeEps,
                    {.mesh = mesh_of({2, 2}), .wrap_policy = blocks, .device = on, .poison_freed = true},
                    /*from_meta=*/true);
  train_and_compare(world, Optimizer::kSgd,
                    {.mesh = mesh_of({2, 2}, {3, 1, 0, 2}), .device = on, .layout = ShardLayout::kDim0Chunks},
                    /*from_meta=*/false);
  // Nothing but replicas, nothing but shards, and a mesh of one dimension.
  train_and_compare(world, Optimizer::kSgd, {.mesh = mesh_of({4, 1}), .wrap_policy = blocks, .device = on},
                    /*from_meta=*/true);
  train_and_compare(world, Optimizer::kAdamWLargeEps,
                    {.mesh = mesh_of({1, 4}), .reshard_after_forward = false, .device = on},
                    /*from_meta=*/false);
  train_and_compare(world, Optimizer::kSgd, {.mesh = init_device_mesh({4}), .device = on}, /*from_meta=*/true);
}

RESHARD_DISTRIBUTED_TEST(HybridShardingTest, TrainsLikeTheUnshardedModelOnThreeRowsOfTwo, .ranks = 6,
                         .deadline = std::chrono::seconds(120)) {
  const auto world = process_group();
  train_and_compare(world, Optimizer::kAdamWLargeEps,
                    {.mesh = mesh_of({3, 2}), .wrap_policy = wrap_by_type<BlockImpl>()}, /*from_meta=*/true);
}

/// Every row has the same parameters and buffers, to the bit.
void expect_equal_everywhere(const ShardedModule& model, ProcessGroup& world) {
  const StateDict full = model.state_dict(StateDictType::kFull);
  for (const auto& [name, value] : full.items()) {
    const at::Tensor mine = value.as<at::Tensor>();
    at::Tensor first = mine.clone();
    world.broadcast(first, 0);
    EXPECT_TRUE(first.equal(mine)) << name;
  }
}

RESHARD_DEVICE_TEST(HybridShardingTest, RowsStartEqualWhateverTheyWereBuiltWith, .ranks = {4}, .one_gpu_ranks = {4}) {
  const auto world = process_group();
  const DeviceMesh mesh = mesh_of({2, 2}, {2, 1, 0, 3});
  const auto build = [&](uint64_t seed) {
    at::manual_seed(seed);
    return torch::nn::Linear(5, 3);
  };
  const uint64_t seed = 20 + static_cast<uint64_t>(rank());
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    auto model = FullyShardedDataParallel(build(seed), {.mesh = mesh, .device = device(), .layout = layout});
    expect_equal_everywhere(model, *world);
    // The first row is made of global ranks 2 and 1, each of which has given its own part.
    const StateDict full = model.state_dict(StateDictType::kFull);
    EXPECT_EQ(max_difference(full.at("weight").as<at::Tensor>()[0], build(22)->weight[0]), 0.0);
    EXPECT_EQ(max_difference(full.at("weight").as<at::Tensor>()[2], build(21)->weight[2]), 0.0);

    // With sync_module_states all is the mesh's first rank's, buffers too.
    at::manual_seed(seed);
    torch::nn::BatchNorm1d start(3);
    {
      const at::NoGradGuard no_grad;
      start->weight.uniform_();
      start->running_mean.fill_(rank());
    }
    auto synced = FullyShardedDataParallel(
        start, {.mesh = mesh, .sync_module_states = true, .device = device(), .layout = layout});
    expect_equal_everywhere(synced, *world);
    at::manual_seed(22);
    EXPECT_EQ(max_difference(synced.state_dict(StateDictType::kFull).at("weight").as<at::Tensor>(),
                             at::empty({3}).uniform_()),
              0.0);
    EXPECT_EQ(start->running_mean[0].item<float>(), 2.0f);
  }
}

RESHARD_DISTRIBUTED_TEST(HybridShardingTest, OnlyReducedGradientsCrossRows, .ranks = 4) {
  const DoublePrecision in_double;
  const auto world = process_group();
  const DeviceMesh mesh = mesh_of({2, 2});
  ProcessGroup& across = *mesh.get_group("replicate");
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    at::manual_seed(7);
    torch::nn::Linear reference(6, 5);
    at::manual_seed(7);
    auto model = FullyShardedDataParallel(torch::nn::Linear(6, 5), {.mesh = mesh, .layout = layout});
    EXPECT_EQ(model.process_group().ranks(), mesh.get_group("shard")->ranks());
    torch::optim::SGD optimizer(model.parameters(), 0.1);
    torch::optim::SGD reference_optimizer(reference->parameters(), 0.1);
    // 35 elements; by rows 3 of 5 and their biases.
    const uint64_t shard_bytes = (layout == ShardLayout::kFlat ? 18u : 3u * 6 + 3) * sizeof(double);
    for (const double norm_type : {2.0, std::numeric_limits<double>::infinity()}) {
      optimizer.zero_grad();
      reference_optimizer.zero_grad();
      const TrafficCounters before = across.traffic();
      for (int micro = 0; micro < 2; ++micro) {
        at::manual_seed(static_cast<uint64_t>(micro));
        const at::Tensor data = at::rand({8, 6});
        const auto backward = [&] { model(rows_of_rank(data, *world)).square().mean().backward(); };
        if (micro == 0) {
          const NoSync guard = model.no_sync();
          backward();
          EXPECT_EQ(across.traffic().collectives, before.collectives);
        } else {
          backward();
        }
        reference(data).square().mean().backward();
      }
      EXPECT_EQ(across.traffic().collectives, before.collectives + 1) << "one all-reduce for both passes";
      EXPECT_EQ(across.traffic().bytes, before.bytes + shard_bytes) << "of this rank's shard";
      const double norm = model.clip_grad_norm(1e-2, norm_type);
      const double wanted = torch::nn::utils::clip_grad_norm_(reference->parameters(), 1e-2, norm_type);
      EXPECT_NEAR(norm, wanted, 1e-12 * wanted);
      EXPECT_EQ(across.traffic().collectives, before.collectives + 1) << "the norm is the row's own";
      optimizer.step();
      reference_optimizer.step();
      EXPECT_LT(difference_to(model, *model.module(), *reference), 1e-14);
    }
    expect_equal_everywhere(model, *world);
    const TrafficCounters before = across.traffic();
    const StateDict state = model.state_dict(StateDictType::kSharded);
    EXPECT_EQ(across.traffic().collectives, before.collectives);
    EXPECT_EQ(state.at("weight").as<ShardedTensor>().size(), (Dims{5, 6}));
  }
}

RESHARD_DISTRIBUTED_TEST(HybridShardingTest, NamesWhatDoesNotFit, .ranks = 4) {
  const auto world = process_group();
  const DeviceMesh mesh = mesh_of({2, 2});
  const auto code = ErrorCode::kInvalidArgument;
  const auto wrap = [](FsdpOptions options) { FullyShardedDataParallel(torch::nn::Linear(2, 2), std::move(options)); };
  expect_error(code, {"a process group and a mesh"}, [&] { wrap({.process_group = world, .mesh = mesh}); });
  expect_error(code, {"wanted 1 dimension (shard) or 2 (replicate, shard)", "found 3"}, [&] {
    wrap({.mesh = init_device_mesh({2, 2, 1})});
  });
  const DeviceMesh pair = init_device_mesh({2, 1}, {.ranks = {0, 1}});
  if (rank() >= 2) {
    expect_error(code, {"one of the global ranks [0, 1]", "global rank " + std::to_string(rank())},
                 [&] { wrap({.mesh = pair}); });
  }
  // Rows that wrap different models, each of one mind.
  expect_error(code, {"wrap different models", "rank " + std::to_string(rank())}, [&] {
    FullyShardedDataParallel(torch::nn::Linear(2, mesh.get_local_rank("replicate") == 0 ? 2 : 3), {.mesh = mesh});
  });
  world->barrier();
}

}  // namespace
}  // namespace reshard::fsdp_test
