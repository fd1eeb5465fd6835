// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// save and load: a StateDict on N ranks to a DCP checkpoint, and back on M.
//
//   reshard::StateDict state{{"model", model.state_dict(reshard::StateDictType::kSharded)}, {"step", 100}};
//   reshard::save(state, reshard::FileSystemWriter(dir));
//   ...
//   reshard::load(state, reshard::FileSystemReader(dir));      // tensors in place, other values replaced
//
// Both are collective over a process group and block. Tensors travel between memory and storage only; the ranks
// exchange plans and votes over the group's store. An error of any rank is one CheckpointError on every rank
// (core/error.h).

#include <chrono>
#include <memory>
#include <optional>

#include "reshard/distributed/process_group.h"
#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "reshard/state_dict/state_dict.h"
#include "reshard/storage/filesystem.h"

namespace reshard {

struct SaveOptions {
  /// Ranks that take part; rank 0 of the group coordinates. Null: the default group, or this process alone where there
  /// is none.
  std::shared_ptr<ProcessGroup> process_group = nullptr;
  /// Null: DefaultSavePlanner with the flag below, which a planner of the caller's own decides itself.
  SavePlanner* planner = nullptr;
  /// Compares also the replicas of sharded tensors.
  bool verify_replicas = false;
  /// A rank that shows no progress for so long is an error on all others. Default: the group's timeout.
  std::optional<std::chrono::milliseconds> silence_timeout = {};
  /// Called on this rank while bytes are written, from any thread.
  ProgressFn progress = {};
  /// This rank's, kept by the caller from save to save of one and the same structure, which is then planned with a few
  /// dozen bytes a rank (protocol/protocol.h). Borrowed.
  SavePlanCache* plan_cache = nullptr;
};

struct LoadOptions {
  std::shared_ptr<ProcessGroup> process_group = nullptr;  // as above
  /// Ranks that load into equal states as this one does, such as mesh.get_group("replicate") of a hybrid model: the
  /// first of them reads, the others get it from there, so that each byte is read once. Every rank of process_group
  /// gives its own such group, one with a backend for CPU tensors. States that differ in keys, sizes, dtypes, shards or devices are kInvalidArgument before
  /// anything is touched; a rank that is lost while tensors are sent is kTimeout or kUnavailable on its replicas alone.
  std::shared_ptr<ProcessGroup> replicas = nullptr;
  /// Null: DefaultLoadPlanner with the three flags below, which a planner of the caller's own decides itself.
  LoadPlanner* planner = nullptr;
  bool allow_partial_load = false;
  bool allow_cast = false;
  bool allow_shape_mismatch = false;
  std::optional<std::chrono::milliseconds> silence_timeout = {};
  ProgressFn progress = {};
};

/// Saves `state`, whose sharded tensors on all ranks together make whole tensors. A plain tensor or value under the
/// same key on several ranks must be equal on them (kInvalidArgument names the key and two ranks that differ) and is
/// written once; what differs by rank goes by rank_local (rank_local.h). A sharded tensor that is whole on several ranks is a
/// declared replica: it is trusted, and costs no comparison. Ranks may hold different keys. When it returns, the
/// checkpoint is committed and durable, on every rank. Tensors are read from where they lie (device tensors and lazily
/// conjugated or negated ones through a copy); do not change them meanwhile.
SaveResult save(const StateDict& state, StorageWriter& writer, const SaveOptions& options = {});
SaveResult save(const StateDict& state, StorageWriter&& writer, const SaveOptions& options = {});
/// The storage is found by the id: the path of a directory. An empty one, or one with a scheme ("s3://..."), is kInvalidArgument.
SaveResult save(const StateDict& state, const std::string& checkpoint_id, const SaveOptions& options = {});

/// Loads the keys of `state` from a checkpoint saved by any number of ranks in any layout. Tensors and shards are
/// filled in place; every other value is replaced by the stored one. Keys that only the checkpoint has are left alone
/// (LoadReport::unexpected). When planning fails on any rank (missing key, shape, dtype), nothing was touched on any.
LoadReport load(StateDict& state, StorageReader& reader, const LoadOptions& options = {});
LoadReport load(StateDict& state, StorageReader&& reader, const LoadOptions& options = {});
LoadReport load(StateDict& state, const std::string& checkpoint_id, const LoadOptions& options = {});

}  // namespace reshard
