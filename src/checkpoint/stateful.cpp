// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/stateful.h"

namespace reshard {
namespace {

StateDict states_of(const StatefulObjects& objects) {
  StateDict state;
  for (const auto& [name, object] : objects) state[name] = object->state_dict();
  return state;
}

}  // namespace

SaveResult save(const StatefulObjects& objects, StorageWriter& writer, const SaveOptions& options) {
  return save(states_of(objects), writer, options);
}

SaveResult save(const StatefulObjects& objects, StorageWriter&& writer, const SaveOptions& options) {
  return save(objects, writer, options);
}

LoadReport load(const StatefulObjects& objects, StorageReader& reader, const LoadOptions& options) {
  StateDict state = states_of(objects);
  LoadReport report = load(state, reader, options);
  for (const auto& [name, object] : objects) object->load_state_dict(state.at(name));
  return report;
}

LoadReport load(const StatefulObjects& objects, StorageReader&& reader, const LoadOptions& options) {
  return load(objects, reader, options);
}

}  // namespace reshard
