// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/checkpoint.h"

#include "checkpoint/group_transport.h"
#include "checkpoint/load_state.h"
#include "checkpoint/save_state.h"

namespace reshard {

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

LoadReport load(StateDict& state, StorageReader& reader, const LoadOptions& options) {
  const auto transport = make_transport(options.process_group, options.silence_timeout);
  DefaultLoadPlanner default_planner({.allow_partial_load = options.allow_partial_load,
                                      .allow_cast = options.allow_cast,
                                      .allow_shape_mismatch = options.allow_shape_mismatch});
  StateDictLoadState target(state);
  return run_load(*transport, target, options.planner ? *options.planner : default_planner, reader, options.progress);
}

LoadReport load(StateDict& state, StorageReader&& reader, const LoadOptions& options) {
  return load(state, reader, options);
}

}  // namespace reshard
