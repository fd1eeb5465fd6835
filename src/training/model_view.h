// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A model, plain or sharded, as its state dict has it.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reshard/training/state_dict.h"

namespace reshard {

struct ModelView {
  /// One line of the state dict, in the module's order.
  struct Entry {
    std::string fqn;
    std::string key;                  // in the dict: as the options have it
    std::optional<size_t> parameter;  // index into parameters
    at::Tensor buffer;                // if it is one
    ExtraState* extra = nullptr;      // if it is one
  };

  ModelView(const ModelRef& model, const StateDictOptions& options);

  /// The key of a parameter or buffer, or nothing if the options leave it out.
  std::optional<std::string> key_of(const std::string& fqn) const;
  /// The parameter is in the state dict under one of its names.
  bool includes(const ShardedParameter& parameter) const;

  const StateDictOptions& options;
  const ShardedModule* sharded;
  std::shared_ptr<ProcessGroup> group;  // null: alone
  /// Of a plain module: each distinct parameter, whole, `slice` being the module's own handle.
  std::vector<ShardedParameter> parameters;
  std::vector<Entry> entries;
};

}  // namespace reshard
