// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// One save and one load as conversations between ranks: who plans, who answers, who votes, who commits, and what each error becomes. Drives planner
// and storage through their interfaces and knows neither LibTorch nor what carries the bytes, so that tests run it with thousands of simulated
// ranks. Rank 0 of the transport is the coordinator.
//
// Save                                                             Load
//   1. every rank plans, sends its plan            -> coordinator    1. the coordinator reads the catalogue and sends it to all
//   2. the coordinator dedups, validates, places every item,         2. every rank plans and votes        (nothing is touched if any fails)
//      answers each rank with its own part         -> rank           3. every rank reads and votes
//   3. every rank writes durably, votes (64 bytes) -> coordinator    4. all learn the outcome
//   4. the coordinator commits, tells the outcome  -> all
// Nobody returns from a save before the commit is durable. An error of any rank in any step becomes one CheckpointError on every rank, after all
// ranks came to the end of that step; a silent or lost rank is reported by its number.

#include <string>

#include "reshard/core/error.h"
#include "reshard/planner/planner.h"
#include "reshard/protocol/transport.h"
#include "reshard/storage/storage.h"

namespace reshard {

/// What a save made, equal on every rank.
struct SaveResult {
  std::string save_id;
  uint64_t bytes_written = 0;  // by all ranks: data files, headers included
  uint64_t items = 0;          // written by all ranks
};

/// Saves `state` on all ranks of `transport`. Collective: every rank calls it with its own state. Throws CheckpointError on every rank or on none.
SaveResult run_save(Transport& transport, const SaveState& state, SavePlanner& planner, StorageWriter& writer, const ProgressFn& progress = {});

/// Loads into `state` on all ranks. Collective. Throws CheckpointError on every rank or on none; when planning failed on any rank, no destination was touched on any.
LoadReport run_load(Transport& transport, LoadState& state, LoadPlanner& planner, StorageReader& reader, const ProgressFn& progress = {});

}  // namespace reshard
