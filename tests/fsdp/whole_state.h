// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Assembling whole tensors from sharded ones, by communication: what a checkpoint does, without one.

#include <ATen/ATen.h>

#include "reshard/distributed/process_group.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard::fsdp_test {

/// A copy of `value` in which each sharded tensor is whole. Collective.
inline StateValue whole_value(const StateValue& value, ProcessGroup& group) {
  if (value.is<ShardedTensor>()) {
    const ShardedTensor& sharded = value.as<ShardedTensor>();
    at::Tensor sum = at::zeros({sharded.size().data(), sharded.size().size()}, sharded.dtype());
    for (const LocalShard& shard : sharded.shards()) {
      at::Tensor part = sum;
      for (size_t d = 0; d < shard.box.sizes.size(); ++d)
        part = part.narrow(static_cast<int64_t>(d), shard.box.offsets[d], shard.box.sizes[d]);
      part.copy_(shard.tensor.detach());
    }
    group.all_reduce_sum(sum);
    return sum;
  }
  if (value.is<at::Tensor>()) return value.as<at::Tensor>().clone();
  if (!value.is<StateDict>()) return value;
  StateDict result;
  for (const auto& [name, item] : value.as<StateDict>().items()) result[name] = whole_value(item, group);
  return result;
}

inline StateDict whole_state(const StateDict& state, ProcessGroup& group) {
  return whole_value(StateValue(state), group).as<StateDict>();
}

}  // namespace reshard::fsdp_test
