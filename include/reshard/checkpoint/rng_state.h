// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The random generators of a run, so that dropout after a resume is what it would have been.
//
//   state["rng"] = reshard::rng_state(*world);                          // when saving
//   ...
//   reshard::load_rng_state("rng", reader, {.process_group = world});    // after load(); not part of its state
//
// Every rank has generators of its own (rank_local.h), so their states mean nothing to another number of ranks.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "reshard/checkpoint/checkpoint.h"

namespace reshard {

/// {"cpu": .., "cuda": ..}: this rank's default generators, of the CPU and of rank_device() where there is a GPU, each rank_local and in
/// torch.get_rng_state()'s form. A copy: what the generators do afterwards does not change it.
StateDict rng_state(const ProcessGroup& group);

struct RngLoadOptions {
  std::shared_ptr<ProcessGroup> process_group = nullptr;  // null: the default group
  /// On another number of ranks than saved: seed the generators of each rank anew, from this number, the rank and the number of ranks.
  /// Without it that is an error.
  std::optional<uint64_t> reseed = {};
};

/// Gives the default generators the states that were saved under `key` as rng_state(). True if they have them; false if they were seeded
/// anew, as the options allow. Throws CheckpointError (kNotFound) for a key that is not there, or was saved by another number of ranks;
/// the generators are then as they were. Collective, one load of a few kilobytes a rank. A GPU that the saving run did not have is
/// left as it is.
bool load_rng_state(const std::string& key, StorageReader& reader, const RngLoadOptions& options = {});

}  // namespace reshard
