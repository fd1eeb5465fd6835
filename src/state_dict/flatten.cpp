// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/flatten.h"

#include <string_view>
#include <utility>
#include <variant>

#include "reshard/core/error.h"
#include "reshard/core/ordered_map.h"

namespace reshard {
namespace {

constexpr int64_t kMaxListPosition = 1 << 24;

bool is_tensor(const StateValue& value) { return value.is<at::Tensor>() || value.is<ShardedTensor>(); }

bool holds_tensor(const StateValue& value) {
  if (is_tensor(value)) return true;
  if (value.is<StateDict>()) {
    for (const auto& [key, item] : value.as<StateDict>().items()) {
      if (holds_tensor(item)) return true;
    }
  } else if (value.is<StateList>()) {
    for (const StateValue& item : value.as<StateList>()) {
      if (holds_tensor(item)) return true;
    }
  }
  return false;
}

/// A list that the current rule enters: a tensor or a dict in it, or in lists in it.
bool list_is_entered(const StateList& list) {
  for (const StateValue& item : list) {
    if (is_tensor(item) || item.is<StateDict>()) return true;
    if (item.is<StateList>() && list_is_entered(item.as<StateList>())) return true;
  }
  return false;
}

bool is_entered(const StateValue& value, FlattenRule rule) {
  if (value.is<StateDict>()) return rule == FlattenRule::kCurrent || holds_tensor(value);
  if (value.is<StateList>())
    return rule == FlattenRule::kCurrent ? list_is_entered(value.as<StateList>()) : holds_tensor(value);
  return false;
}

template <class Value>
class Flattener {
 public:
  explicit Flattener(FlattenRule rule) : rule_(rule) {}

  void visit(ObjectPath& path, Value& value) {
    if (!is_entered(value, rule_)) {
      items_.push_back({path_to_fqn(path), path, &value});
    } else if (value.template is<StateDict>()) {
      for (auto& [key, item] : value.template as<StateDict>().items()) visit_child(path, key, item);
    } else {
      int64_t position = 0;
      for (auto& item : value.template as<StateList>()) visit_child(path, position++, item);
    }
  }
  template <class Key>
  void visit_child(ObjectPath& path, const Key& key, Value& item) {
    path.emplace_back(key);
    visit(path, item);
    path.pop_back();
  }
  std::vector<FlatItem<Value>> take() {
    std::vector<std::pair<std::string_view, std::monostate>> names;
    names.reserve(items_.size());
    for (const auto& item : items_) names.emplace_back(item.fqn, std::monostate());
    if (const auto twice = OrderedMap<std::string_view, std::monostate>().assign(std::move(names))) {
      throw Error(ErrorCode::kInvalidArgument, "two values of the state dict get the same flattened name",
                  {.key = items_[*twice].fqn});
    }
    return std::move(items_);
  }

 private:
  FlattenRule rule_;
  std::vector<FlatItem<Value>> items_;
};

template <class Value, class Dict>
std::vector<FlatItem<Value>> flatten_dict(Dict& state, FlattenRule rule) {
  Flattener<Value> flattener(rule);
  ObjectPath path;
  for (auto& [key, item] : state.items()) flattener.visit_child(path, key, item);
  return flattener.take();
}

}  // namespace

std::vector<FlatItem<const StateValue>> flatten(const StateDict& state, FlattenRule rule) {
  return flatten_dict<const StateValue>(state, rule);
}
std::vector<FlatItem<StateValue>> flatten(StateDict& state, FlattenRule rule) {
  return flatten_dict<StateValue>(state, rule);
}

void set_at_path(StateDict& state, const ObjectPath& path, StateValue value) {
  const auto blocked = [&](const StateValue& found) {
    return Error(ErrorCode::kInvalidArgument, "something else is in the way of a value",
                 {.key = path_to_fqn(path), .found = found.type_name()});
  };
  if (path.empty() || !std::holds_alternative<std::string>(path[0])) {
    throw Error(ErrorCode::kInvalidArgument, "a path into a state dict starts with a key", {.key = path_to_fqn(path)});
  }
  StateValue* place = &state[std::get<std::string>(path[0])];
  for (size_t i = 1; i < path.size(); ++i) {
    if (const auto* key = std::get_if<std::string>(&path[i])) {
      if (place->is<None>()) *place = StateDict();
      if (!place->is<StateDict>()) throw blocked(*place);
      place = &place->as<StateDict>()[*key];
    } else {
      const int64_t position = std::get<int64_t>(path[i]);
      if (place->is<None>()) *place = StateList();
      if (!place->is<StateList>()) throw blocked(*place);
      auto& list = place->as<StateList>();
      if (position < 0 || position > kMaxListPosition) {
        throw Error(ErrorCode::kInvalidArgument, "an absurd list position",
                    {.key = path_to_fqn(path), .found = std::to_string(position)});
      }
      if (list.size() <= static_cast<size_t>(position)) list.resize(static_cast<size_t>(position) + 1);
      place = &list[static_cast<size_t>(position)];
    }
  }
  *place = std::move(value);
}

}  // namespace reshard
