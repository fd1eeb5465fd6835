// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/load_from_keys.h"

#include <ATen/ops/empty.h>

#include <set>
#include <utility>

#include "reshard/core/error.h"
#include "reshard/state_dict/flatten.h"

namespace reshard {
namespace {

/// Makes the state dict when it sees the catalogue; from there on the planner inside does the work.
class KeyedLoadPlanner final : public LoadPlanner {
 public:
  KeyedLoadPlanner(StateDict& state, const std::vector<std::string>& keys, const LoadOptions& options)
      : state_(state), keys_(keys), allows_missing_(options.allow_partial_load) {}

  void set_up_planner(LoadState& state, const Metadata& metadata, bool is_coordinator) override {
    std::set<std::string> unmet(keys_.begin(), keys_.end());
    for (const auto& [fqn, stored] : metadata.state_dict_metadata) {
      ObjectPath path{fqn};
      if (metadata.planner_data) {
        if (const ObjectPath* saved = metadata.planner_data->find(fqn)) path = *saved;
      }
      if (!keys_.empty() && !is_asked_for(path, unmet)) continue;
      asked_for_.state_dict_metadata.insert(fqn, stored);
      StateValue value;
      if (const auto* tensor = std::get_if<TensorStorageMetadata>(&stored)) {
        value = at::empty({tensor->size.data(), tensor->size.size()}, to_scalar_type(tensor->properties.dtype));
      }
      with_error_context({.key = fqn}, [&] { set_at_path(state_, path, std::move(value)); });
    }
    if (!unmet.empty() && !allows_missing_)
      throw Error(ErrorCode::kNotFound, "nothing is stored under this key", {.key = *unmet.begin()});
    inner_.set_up_planner(state, asked_for_, is_coordinator);
  }
  LoadPlan create_local_plan() override { return inner_.create_local_plan(); }
  const LoadReport& report() const override { return inner_.report(); }
  MutableTensorView resolve_tensor(const ReadItem& item) override { return inner_.resolve_tensor(item); }
  void commit_tensor(const ReadItem& item, const MutableTensorView& view) override { inner_.commit_tensor(item, view); }
  void load_bytes(const ReadItem& item, ByteSpan archive) override { inner_.load_bytes(item, archive); }

 private:
  /// One of the keys is a beginning of the path. Takes those out of `unmet`.
  bool is_asked_for(const ObjectPath& path, std::set<std::string>& unmet) const {
    bool found = false;
    std::string prefix;
    for (size_t i = 0; i < path.size(); ++i) {
      prefix = path_to_fqn({path.begin(), path.begin() + static_cast<std::ptrdiff_t>(i + 1)});
      for (const std::string& key : keys_) {
        if (key != prefix) continue;
        unmet.erase(key);
        found = true;
      }
    }
    return found;
  }

  StateDict& state_;
  const std::vector<std::string>& keys_;
  bool allows_missing_;
  Metadata asked_for_;  // as much of the catalogue as a planner looks at
  // A list has None where nothing was asked for: that is "missing", and stays as it is.
  DefaultLoadPlanner inner_{{.allow_partial_load = true}};
};

}  // namespace

StateDict load_state_dict_from_keys(StorageReader& reader, const std::vector<std::string>& keys,
                                    const LoadOptions& options) {
  StateDict state;
  KeyedLoadPlanner planner(state, keys, options);
  LoadOptions with_planner = options;
  with_planner.planner = &planner;
  load(state, reader, with_planner);
  return state;
}

}  // namespace reshard
