// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Whole state dicts between ranks and devices, without a checkpoint.

#include <vector>

#include "reshard/distributed/process_group.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

struct GatherOptions {
  /// The result lies on the host.
  bool cpu_offload = false;
  /// Ranks of the group that get the result; the others get an empty dict. Empty: all of them.
  std::vector<int> ranks_only = {};
};

/// A copy of `state` in which every sharded tensor is whole. Other tensors and values are those of `state` (on the host, if asked for).
/// Each element travels once, one tensor at a time, so that a rank which does not keep the result needs memory for one shard. Tied
/// sharded tensors stay tied. Collective over `group`, whose ranks hold the same sharded keys: a key that some rank lacks, shards that
/// do not make the whole, or sizes that differ are one CheckpointError on all.
StateDict gather_state_dict(const StateDict& state, ProcessGroup& group, const GatherOptions& options = {});

/// A copy of `state` whose tensors and shards all lie on the host. What lies there already is shared, not copied. Each device tensor is
/// copied once, however many names it has. No communication.
StateDict offload_state_dict_to_cpu(const StateDict& state);

}  // namespace reshard
