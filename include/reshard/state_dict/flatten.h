// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Flattening: from a nested state dict to fully qualified names, by the rules that PyTorch's planner has or had.

#include <vector>

#include "reshard/planner/state.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// A leaf of a nested state dict. `value` points into the dict it came from.
template <class Value>
struct FlatItem {
  std::string fqn;
  ObjectPath path;
  Value* value;
};

/// Leaves in order. What is a leaf depends on the rule (see FlattenRule); tuples always are, empty dicts vanish under
/// kCurrent. Throws kInvalidArgument naming the key when two leaves get one name ({"a": {"b": ..}, "a.b": ..}).
std::vector<FlatItem<const StateValue>> flatten(const StateDict& state, FlattenRule rule = FlattenRule::kCurrent);
std::vector<FlatItem<StateValue>> flatten(StateDict& state, FlattenRule rule = FlattenRule::kCurrent);

/// Puts `value` at `path`, making dicts and lists on the way (a list where the next element is a number, padded with
/// None). Throws kInvalidArgument naming the path where something else is in the way or a position is absurd.
void set_at_path(StateDict& state, const ObjectPath& path, StateValue value);

}  // namespace reshard
