// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The state of a torch::optim optimizer by PyTorch's names, for parameters of sharded and of plain modules alike.

#include <torch/csrc/api/include/torch/optim/optimizer.h>

#include <functional>
#include <string>
#include <vector>

#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace reshard {

/// One value of a state dict that was checked, and what takes it. `value` may be swapped for another of the same type, sizes and dtype.
struct StateWrite {
  const StateValue* value;  // into the dict that was checked; null: `apply` needs none
  std::function<void(const StateValue&)> apply;
};

/// What a load of optimizer state will do, and what does not fit.
struct OptimizerLoad {
  bool strict = true;  // state or a group that is missing is an error
  /// Parameters that the dict is asked for. Null: all.
  std::function<bool(const ShardedParameter&)> includes = {};
  std::vector<StateWrite> writes = {};
  std::vector<std::string> missing = {};  // "state.<fqn>", "param_groups.<fqn>"; only if not strict
  std::vector<std::string> unexpected =
      {};  // "param_groups.<fqn>.<setting>": of a setting that LibTorch's optimizer has no place for
};

/// As optimizer_state_dict. `whole`: each slice is the whole parameter of a plain module, in its own shape.
StateDict read_optimizer(torch::optim::Optimizer& optimizer, const std::vector<ShardedParameter>& parameters,
                         bool whole);

/// Checks `state` as load_optimizer_state_dict does, and adds to `load` what is to be written. Writes nothing.
void plan_optimizer_load(torch::optim::Optimizer& optimizer, const std::vector<ShardedParameter>& parameters,
                         bool whole, const StateDict& state, OptimizerLoad& load);

/// The canonical names of the parameters of each group, in the optimizer's order. Throws kInvalidArgument for a tensor that is none of
/// `parameters`.
std::vector<std::vector<std::string>> names_of_groups(torch::optim::Optimizer& optimizer,
                                                      const std::vector<ShardedParameter>& parameters);

}  // namespace reshard
