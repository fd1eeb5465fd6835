// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/testing/torch_distributed_test.h"

#include <ATen/ops/full.h>
#include <gmock/gmock.h>

#include <csignal>

#include "launch/child_process.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;

RESHARD_DEVICE_TEST(TorchDistributedTestTest, RanksMeetInAGroup, .ranks = {2, 3}, .one_gpu_ranks = {1, 2}) {
  at::Tensor tensor = at::full({3}, rank() + 1.0, device());
  process_group()->all_reduce_sum(tensor);
  const int n = world_size();
  EXPECT_EQ(process_group()->size(), n);
  EXPECT_EQ(tensor[0].item<double>(), n * (n + 1) / 2);
  EXPECT_EQ(tensor.device().is_cuda(), uses_gpu());
}

// Rank 0, which serves the store, leaves last: no barrier holds the others back.
RESHARD_DISTRIBUTED_TEST(TorchDistributedTestTest, RanksMayEndInAnyOrder, .ranks = 3) {
  const auto group = process_group();
  if (rank() == 2) {
    EXPECT_EQ(group->store()->get("key"), (std::vector<uint8_t>{1, 2}));
  }
  if (rank() == 0) group->store()->set("key", std::vector<uint8_t>{1, 2});
}

RESHARD_DISTRIBUTED_TEST(TorchDistributedTestTest, RanksMayJoinAgain, .ranks = 2) {
  for (int round = 0; round < 3; ++round) {
    at::Tensor tensor = at::full({1}, 1.0);
    process_group()->all_reduce_sum(tensor);
    EXPECT_EQ(tensor.item<double>(), 2);
    destroy_process_group();
  }
}

RESHARD_DISTRIBUTED_TEST(TorchDistributedTestTest, SurvivorsSeeADeadRank, .ranks = 3,
                         .expected = {{2, killed_by(SIGKILL)}}) {
  at::Tensor tensor = at::full({3}, 1.0);
  process_group()->all_reduce_sum(tensor);
  if (rank() == 2) raise(SIGKILL);
  EXPECT_THROW(process_group()->all_reduce_sum(tensor), Error);
}

TEST(TorchHarnessTest, StuckRanksPrintTheStackOfEveryThread) {
  ChildProcess child({RESHARD_TORCH_HARNESS_CASES, "--gtest_filter=Stuck.InACollective"});
  const ChildResult result = child.wait();
  EXPECT_EQ(result.exit_code, 1);
  for (const char* text : {"[rank 0] ", "[rank 1] ", "still running at the deadline of 5 s; killed by SIGABRT"}) {
    EXPECT_THAT(result.output, HasSubstr(text));
  }
  EXPECT_THAT(result.output, HasSubstr("ProcessGroup::all_reduce_sum"));
  EXPECT_THAT(result.output, HasSubstr("gloo::transport::tcp::Loop::run")) << "a thread that is not the main one";
}

}  // namespace
}  // namespace reshard
