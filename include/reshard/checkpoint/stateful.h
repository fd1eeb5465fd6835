// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Stateful: objects that know their own state, saved and loaded as they are. The counterpart of torch.distributed.checkpoint.stateful.
//
//   struct AppState : reshard::Stateful {
//     reshard::StateDict state_dict() const override { ... get_state_dict(model, optimizer) ... }
//     void load_state_dict(const reshard::StateDict& state) override { ... set_state_dict(model, optimizer, ...) ... }
//   } app;
//   const reshard::StatefulObjects objects{{"app", &app}};
//   reshard::save(objects, reshard::FileSystemWriter(dir));
//   reshard::load(objects, reshard::FileSystemReader(dir));

#include <map>
#include <string>

#include "reshard/checkpoint/checkpoint.h"

namespace reshard {

class Stateful {
 public:
  virtual ~Stateful() = default;
  /// Tensors of the object itself, if a load is to go into them in place. May be collective.
  virtual StateDict state_dict() const = 0;
  /// Takes what state_dict() gave, filled. May be collective.
  virtual void load_state_dict(const StateDict& state) = 0;
};

/// By name. Borrowed for a call; asked in the order of their names, on every rank alike.
using StatefulObjects = std::map<std::string, Stateful*>;

/// save() of {name: object's state_dict()}. Collective as that.
SaveResult save(const StatefulObjects& objects, StorageWriter& writer, const SaveOptions& options = {});
SaveResult save(const StatefulObjects& objects, StorageWriter&& writer, const SaveOptions& options = {});

/// load() into the state dicts of the objects, which then get them by load_state_dict. Where the load fails, no object is asked to.
LoadReport load(const StatefulObjects& objects, StorageReader& reader, const LoadOptions& options = {});
LoadReport load(const StatefulObjects& objects, StorageReader&& reader, const LoadOptions& options = {});

}  // namespace reshard
