// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A load that needs no state dict of the right shape: what is there, or what is there under some keys.
//
//   reshard::FileSystemReader reader(dir);
//   reshard::StateDict all = reshard::load_state_dict_from_keys(reader);
//   reshard::StateDict part = reshard::load_state_dict_from_keys(reader, {"model.embedding", "optim.state"});

#include <string>
#include <vector>

#include "reshard/checkpoint/checkpoint.h"

namespace reshard {

/// The stored values whose fully qualified name is one of `keys`, or begins with one and a dot (by elements of the path, as
/// PyTorch's _load_state_dict_from_keys); all of them if `keys` is empty. Nested as they were saved; a list of which only some elements
/// were asked for has None in the other places. Tensors are whole and on the host, on every rank: on many ranks with much to load, give load()
/// a sharded state dict instead. Collective as load(), options as there. Throws CheckpointError (kNotFound) naming a key that matches
/// nothing, unless options.allow_partial_load is set.
StateDict load_state_dict_from_keys(StorageReader& reader, const std::vector<std::string>& keys = {},
                                    const LoadOptions& options = {});

}  // namespace reshard
