// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Values that each rank has for itself: states of random generators, positions in the data. Under one key they would be copies of
// one value, and a save refuses copies that differ; here every rank's value has a name of its own.
//
//   state["rng"] = reshard::rank_local(generator_state, *world);              // saved as rng.rank_1_of_4 on rank 1 of 4
//   ...
//   state["rng"] = reshard::rank_local(at::empty_like(generator_state), *world);
//   reshard::load(state, reader);
//   use(reshard::rank_local_value(state.at("rng"), *world));
//
// The name holds the number of ranks: a load on another number is kNotFound, naming the key, because nobody can say what became of
// the ranks that are gone. Where starting afresh is right, leave the key out of the load or allow a partial one.

#include "reshard/distributed/process_group.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// `value` as this rank's own, for any key of a state dict.
StateDict rank_local(StateValue value, const ProcessGroup& group);

/// What this rank put into, or loaded into, such a dict. Throws kNotFound if it is another rank's or another number of ranks'.
const StateValue& rank_local_value(const StateDict& dict, const ProcessGroup& group);

}  // namespace reshard
