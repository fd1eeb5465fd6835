// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/checkpoint.h"

#include "checkpoint/group_transport.h"
#include "checkpoint/load_state.h"
#include "checkpoint/replica_load_state.h"
#include "checkpoint/save_state.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

/// The directory that an id names.
const std::string& directory_of(const std::string& checkpoint_id) {
  if (checkpoint_id.empty())
    throw Error(ErrorCode::kInvalidArgument, "checkpoint_id must be specified, or a storage writer or reader");
  if (checkpoint_id.find("://") != std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument,
                "Cannot detect a storage for this checkpoint_id: give a storage writer or reader",
                {.wanted = "the path of a directory", .found = checkpoint_id});
  }
  return checkpoint_id;
}

}  // namespace

SaveResult save(const StateDict& state, StorageWriter& writer, const SaveOptions& options) {
  const auto transport = make_transport(options.process_group, options.silence_timeout);
  DefaultSavePlanner default_planner({.verify_replicas = options.verify_replicas});
  const StateDictSaveState source(state);
  return run_save(*transport, source, options.planner ? *options.planner : default_planner, writer, options.progress,
                  options.plan_cache);
}

SaveResult save(const StateDict& state, StorageWriter&& writer, const SaveOptions& options) {
  return save(state, writer, options);
}

SaveResult save(const StateDict& state, const std::string& checkpoint_id, const SaveOptions& options) {
  return save(state, FileSystemWriter(directory_of(checkpoint_id)), options);
}

LoadReport load(StateDict& state, StorageReader& reader, const LoadOptions& options) {
  const auto transport = make_transport(options.process_group, options.silence_timeout);
  DefaultLoadPlanner default_planner({.allow_partial_load = options.allow_partial_load,
                                      .allow_cast = options.allow_cast,
                                      .allow_shape_mismatch = options.allow_shape_mismatch});
  LoadPlanner& planner = options.planner ? *options.planner : default_planner;
  if (!options.replicas || options.replicas->size() == 1) {
    StateDictLoadState target(state);
    return run_load(*transport, target, planner, reader, options.progress);
  }
  ReplicaLoadState target(state, *options.replicas);
  LoadReport report = run_load(*transport, target, planner, reader, options.progress);
  target.distribute(report);
  return report;
}

LoadReport load(StateDict& state, StorageReader&& reader, const LoadOptions& options) {
  return load(state, reader, options);
}

LoadReport load(StateDict& state, const std::string& checkpoint_id, const LoadOptions& options) {
  return load(state, FileSystemReader(directory_of(checkpoint_id)), options);
}

}  // namespace reshard
