// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/training/scheduler_state.h"

#include <limits>

#include "reshard/core/error.h"

namespace reshard {
namespace {

/// The counter is protected: a derived class may name it.
struct Access : torch::optim::LRScheduler {
  static unsigned& step_count(torch::optim::LRScheduler& scheduler) { return scheduler.*(&Access::step_count_); }
};

}  // namespace

StateDict scheduler_state_dict(const torch::optim::LRScheduler& scheduler) {
  return {{"last_epoch", static_cast<int64_t>(Access::step_count(const_cast<torch::optim::LRScheduler&>(scheduler)))}};
}

void load_scheduler_state_dict(torch::optim::LRScheduler& scheduler, const StateDict& state) {
  const int64_t steps = state.at("last_epoch").as<int64_t>();
  if (steps < 0 || steps > std::numeric_limits<unsigned>::max()) {
    throw Error(ErrorCode::kInvalidArgument, "not a number of steps",
                {.key = "last_epoch", .found = std::to_string(steps)});
  }
  Access::step_count(scheduler) = static_cast<unsigned>(steps);
}

}  // namespace reshard
