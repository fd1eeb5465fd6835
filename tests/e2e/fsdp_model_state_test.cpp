// SPDX-License-Identifier: BSD-3-Clause
// Counterpart of test_fsdp_model_state.py, the mission's case.
#include <ATen/ops/rand.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/utils.h>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

class FsdpModelState : public TorchDistributedTest {
 protected:
  using Model = FullyShardedDataParallel<torch::nn::Linear>;

  Model build(const std::shared_ptr<ProcessGroup>& group) {
    return FullyShardedDataParallel(on_meta([] { return torch::nn::Linear(8, 8); }),
                                    {.process_group = group, .device = device()});
  }

  /// The group of this rank's parity; all ranks make both.
  std::shared_ptr<ProcessGroup> half() {
    const auto world = process_group();
    std::vector<int> even, odd;
    for (int r = 0; r < world->size(); ++r) (r % 2 == 0 ? even : odd).push_back(r);
    const auto even_group = new_group(even);
    const auto odd_group = new_group(odd);
    return rank() % 2 == 0 ? even_group : odd_group;
  }

  void round_trip(const std::shared_ptr<ProcessGroup>& save_group, const std::shared_ptr<ProcessGroup>& load_group) {
    const std::string directory = (temp_dir() / "checkpoint").string();
    torch::manual_seed(0);
    Model model = build(save_group);
    model(at::rand({8, 8}, device())).sum().backward();
    const TrafficCounters before = model.process_group().traffic();
    const StateDict state{{"model", model.state_dict(StateDictType::kSharded)}};
    EXPECT_EQ(model.process_group().traffic().bytes, before.bytes) << "a sharded state dict sends nothing";
    EXPECT_EQ(model.process_group().traffic().collectives, before.collectives);
    DefaultSavePlanner save_planner;
    // The group of rank 0 saves; other ranks, if any, hold an equal model and take no part.
    if (save_group->ranks().front() == 0) {
      save(state, FileSystemWriter(directory), {.process_group = save_group, .planner = &save_planner});
    }
    process_group()->barrier();

    Model other = build(load_group);
    {
      const SummonFullParams full(model), full_other(other);
      EXPECT_FALSE(model.module()->weight.equal(other.module()->weight));
      EXPECT_FALSE(model.module()->bias.equal(other.module()->bias));
    }
    StateDict target{{"model", other.state_dict(StateDictType::kSharded)}};
    DefaultLoadPlanner load_planner;
    load(target, FileSystemReader(directory), {.process_group = process_group(), .planner = &load_planner});
    other.load_state_dict(target.at("model"));
    {
      const SummonFullParams full(model), full_other(other);
      EXPECT_TRUE(model.module()->weight.equal(other.module()->weight));
      EXPECT_TRUE(model.module()->bias.equal(other.module()->bias));
      EXPECT_EQ(model.module()->weight.sizes(), (std::vector<int64_t>{8, 8}));
    }
  }
};

using FsdpModelStateCheckpointFixture = FsdpModelState;

// test_fsdp_model_state_no_resharding
RESHARD_DEVICE_TEST_F(FsdpModelStateCheckpointFixture, FsdpModelStateCheckpoint, NoResharding, .ranks = {2, 4},
                      .one_gpu_ranks = {1, 2, 4}) {
  round_trip(process_group(), process_group());
}

// test_fsdp_model_state_with_resharding
RESHARD_DEVICE_TEST_F(FsdpModelStateCheckpointFixture, FsdpModelStateCheckpoint, WithResharding, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  round_trip(process_group(), half());
}

// The other direction: saved by a group of two, loaded by all four.
RESHARD_DEVICE_TEST_F(FsdpModelStateCheckpointFixture, FsdpModelStateCheckpoint, WithReshardingUp, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  round_trip(half(), process_group());
}

}  // namespace
}  // namespace reshard
