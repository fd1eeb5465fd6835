// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The state of a learning-rate scheduler, which torch::optim's have no state dict for. What a scheduler made of the learning rates is in
// the optimizer's state dict; what it counts is here. ReduceLROnPlateauScheduler keeps all of its state private: it cannot be saved.

#include <torch/csrc/api/include/torch/optim/schedulers/lr_scheduler.h>

#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// {"last_epoch": steps taken}, PyTorch's name for it. Equal on all ranks, so a checkpoint holds it once.
StateDict scheduler_state_dict(const torch::optim::LRScheduler& scheduler);

/// Takes what scheduler_state_dict gave, or the state dict of a PyTorch scheduler (other keys are not looked at). Throws kNotFound or
/// kInvalidArgument naming the key; the scheduler is then as it was. Learning rates come with the optimizer's state.
void load_scheduler_state_dict(torch::optim::LRScheduler& scheduler, const StateDict& state);

}  // namespace reshard
