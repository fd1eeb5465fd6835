// SPDX-License-Identifier: BSD-3-Clause
// Cases that fail, run as a child by torch_distributed_test_test.cpp.
#include <ATen/ops/full.h>
#include <unistd.h>

#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

// Rank 1 waits in a collective that rank 0 never joins.
RESHARD_DISTRIBUTED_TEST(Stuck, InACollective, .ranks = 2, .deadline = std::chrono::seconds(5)) {
  at::Tensor tensor = at::full({1}, 1.0);
  process_group()->all_reduce_sum(tensor);
  if (rank() == 0) {
    for (;;) pause();
  }
  process_group()->all_reduce_sum(tensor);
}

}  // namespace
}  // namespace reshard
