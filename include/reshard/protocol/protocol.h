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
//      (with a SavePlanCache: digests instead of plans, names of files instead of parts; if those of any rank are not
//      those of the last save, one more round trip with plans)
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

#include <memory>
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

/// What a rank keeps from one save to the next, so that a save of unchanged structure (keys, sizes, dtypes, chunks,
/// lengths of values, number of ranks) is planned with one small message of each rank and its answer. One object a rank,
/// kept by the caller for as long as it saves the same state again and again with equal planner options; it takes about
/// as much memory as the plan, on the coordinator that of all ranks. Nothing has to be told to it: where any rank has
/// another structure, an empty cache or none, that save plans in full. A save that fails empties it. Not thread-safe.
///
/// A rank sends 21 bytes, and 16 more for each set of ranks with which it shares plain tensors or values: their contents
/// are compared in every save (DefaultSavePlanner). It gets 43 bytes and the names of its files.
class SavePlanCache {
 public:
  SavePlanCache();
  ~SavePlanCache();
  SavePlanCache(SavePlanCache&&) noexcept;
  SavePlanCache& operator=(SavePlanCache&&) noexcept;
  /// How many saves were planned from what was kept.
  uint64_t hits() const { return hits_; }
  void clear();
  struct Kept;

 private:
  friend struct SavePlanCacheAccess;
  std::unique_ptr<Kept> kept_;
  uint64_t hits_ = 0;
};

/// Saves `state` on all ranks of `transport`. Collective: every rank calls it with its own state. Throws
/// CheckpointError on every rank or on none (std::bad_alloc on a rank that has no memory left for that). `progress` is called on this rank while bytes move, from any thread. `cache`: of this rank, from its last save.
SaveResult run_save(Transport& transport, const SaveState& state, SavePlanner& planner, StorageWriter& writer,
                    const ProgressFn& progress = {}, SavePlanCache* cache = nullptr);

/// Loads into `state` on all ranks. Collective. Throws CheckpointError on every rank or on none; when planning failed
/// on any rank, no destination was touched on any. Returns this rank's report.
LoadReport run_load(Transport& transport, LoadState& state, LoadPlanner& planner, StorageReader& reader,
                    const ProgressFn& progress = {});

}  // namespace reshard
