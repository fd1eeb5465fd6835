// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The state of a torch::optim optimizer over the slices of a sharded model, as PyTorch's get_optimizer_state_dict gives
// it, so that training goes on across languages and numbers of ranks:
//
//   {"state": {<fqn>: {"step": 0-d tensor, "exp_avg": sharded like the parameter, ...}},
//    "param_groups": [{"lr": ..., "betas": (..), ..., "params": [<fqn>, ...]}]}
// Steps are float32, or float64 where that is the default dtype. SGD, Adam, AdamW, Adagrad and RMSprop are known; another optimizer is kUnsupported. No communication, no copy of
// state tensors.

#include <torch/csrc/api/include/torch/optim/optimizer.h>

#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace reshard {

/// The tensors are views of the optimizer's own: loading into them in place loads the optimizer. State that the
/// optimizer has not created yet is created here as zeros, with step 0, for each parameter that requires grad; so the
/// result is also the target of a load into a new optimizer. Throws kInvalidArgument naming the parameter if the
/// optimizer holds a tensor that is not a slice of `model`, such as one of the module's own handles.
StateDict optimizer_state_dict(torch::optim::Optimizer& optimizer, const ShardedModule& model);

/// Takes what optimizer_state_dict gives, here or in PyTorch; tensors may be sharded in any way that covers this rank's
/// part, or whole. Tensors that are the optimizer's own already are left alone. Everything is checked before anything
/// is written: kNotFound for a missing parameter, group or key, kInvalidArgument for a shape, dtype or type that
/// differs, kUnsupported for a setting (maximize, ...) that LibTorch lacks.
void load_optimizer_state_dict(torch::optim::Optimizer& optimizer, const ShardedModule& model, const StateDict& state);

}  // namespace reshard
