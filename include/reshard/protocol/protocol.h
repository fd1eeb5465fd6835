// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// One save and one load as conversations between ranks: who plans, who answers, who votes, who commits, and what each
// error becomes. Drives planner and storage through their interfaces and knows neither LibTorch nor what carries the
// bytes, so that tests run it with thousands of simulated ranks. Rank 0 of the transport is the coordinator.
//
// Save: two round trips
//   1. every rank plans, sends its plan                     -> coordinator
//      it dedups, validates, places every item, and answers
//      each rank with its own part                          -> all
//   2. every rank writes durably and votes (65 bytes:
//      digests of its plan, its receipts and its sidecar)   -> coordinator
//      it holds the receipts against the plan, commits, and
//      tells the outcome                                    -> all
// Load: three round trips
//   1. every rank asks for the catalogue                    -> coordinator
//      it reads it and sends it                             -> all
//   2. every rank plans; go on only if all could (nothing is touched before)
//   3. every rank reads; all learn the outcome
//
// Nobody returns from a save before the commit is durable. An error of any rank in any step (whatever the type of the
// exception) becomes one CheckpointError with the same content on every rank, after all ranks came to the end of that
// step. A silent or lost rank is reported by its number. CheckpointError::step() is "plan", "write" or "commit" in a
// save, "metadata", "plan" or "read" in a load. CheckpointError::committed() is
//   no       up to the votes: the older checkpoint, if any, is untouched; every rank that can has called abandon()
//   yes      the new checkpoint is in place and durable, and something failed afterwards
//   unknown  the commit failed half-way, or this rank voted and then lost the coordinator: either checkpoint is there,
//            whole; the save's id on disk tells which
// Ranks that call different operations (one saves, one loads) get such an error at once.
//
// Test points: save.planned, save.planned_globally, save.placed, save.before_write, save.written, save.before_vote,
// save.before_commit, save.after_commit; load.before_metadata, load.metadata_read, load.planned, load.before_read,
// load.read.

#include <string>

#include "reshard/core/error.h"
#include "reshard/core/hooks.h"
#include "reshard/planner/planner.h"
#include "reshard/protocol/transport.h"
#include "reshard/storage/storage.h"

namespace reshard {

/// What a save made, equal on every rank.
struct SaveResult {
  std::string save_id;         // random UUID
  uint64_t bytes_written = 0;  // by all ranks: all items in data files, their archives included
  uint64_t items = 0;          // written by all ranks
};

/// Saves `state` on all ranks of `transport`. Collective: every rank calls it with its own state. Throws
/// CheckpointError on every rank or on none (std::bad_alloc on a rank that has no memory left for that). `progress` is called on this rank while bytes move, from any thread.
SaveResult run_save(Transport& transport, const SaveState& state, SavePlanner& planner, StorageWriter& writer,
                    const ProgressFn& progress = {});

/// Loads into `state` on all ranks. Collective. Throws CheckpointError on every rank or on none; when planning failed
/// on any rank, no destination was touched on any. Returns this rank's report.
LoadReport run_load(Transport& transport, LoadState& state, LoadPlanner& planner, StorageReader& reader,
                    const ProgressFn& progress = {});

}  // namespace reshard
