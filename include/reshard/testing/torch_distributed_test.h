// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The multi-process fixture (testing/distributed_test.h, read that first) for LibTorch programs: process group and
// device. Including this header makes TorchDistributedTest the fixture of RESHARD_DISTRIBUTED_TEST and
// RESHARD_DEVICE_TEST.
//
//   RESHARD_DEVICE_TEST(AllReduce, SumsOverRanks, .ranks = {2, 4}) {
//     at::Tensor t = at::ones({3}, device());
//     process_group()->all_reduce_sum(t);
//     EXPECT_EQ(t[0].item<float>(), world_size());
//   }
//
// Ranks that get a fatal signal, and ranks stuck at the deadline, print the stack of every thread. Link
// reshard::torch_testing.

#include <c10/core/Device.h>

#include <memory>

#include "reshard/distributed/process_group.h"
#include "reshard/testing/distributed_test.h"

namespace reshard {

class TorchDistributedTest : public DistributedTest {
 public:
  /// The default group with backend(); the first call joins it (collective over all ranks) unless the body did so
  /// itself. Its timeout is the deadline of the case, so that a stuck case ends with every rank's stack.
  std::shared_ptr<ProcessGroup> process_group();
  /// cuda:(local rank modulo GPUs) in a GPU case, else cpu.
  c10::Device device() const { return rank_device(uses_gpu()); }

 protected:
  /// A fixture that overrides these calls them.
  void set_up_rank() override;
  void tear_down_rank() override;
};

}  // namespace reshard

#undef RESHARD_DISTRIBUTED_FIXTURE
#define RESHARD_DISTRIBUTED_FIXTURE ::reshard::TorchDistributedTest
