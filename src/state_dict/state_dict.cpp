// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/state_dict.h"

#include "reshard/core/error.h"

namespace reshard {

StateDict::StateDict() : items_(std::make_unique<OrderedMap<std::string, StateValue>>()) {}
StateDict::StateDict(std::initializer_list<std::pair<std::string, StateValue>> items) : StateDict() {
  for (const auto& [key, value] : items) {
    if (!items_->insert(key, value)) throw Error(ErrorCode::kInvalidArgument, "a key is given twice", {.key = key});
  }
}
StateDict::StateDict(const StateDict& other)
    : items_(std::make_unique<OrderedMap<std::string, StateValue>>(*other.items_)) {}
// A moved-from dict is empty, not broken.
StateDict::StateDict(StateDict&& other) noexcept : StateDict() { items_.swap(other.items_); }
StateDict& StateDict::operator=(const StateDict& other) {
  if (this != &other) *items_ = OrderedMap<std::string, StateValue>(*other.items_);
  return *this;
}
StateDict& StateDict::operator=(StateDict&& other) noexcept {
  items_.swap(other.items_);
  return *this;
}
StateDict::~StateDict() = default;

size_t StateDict::size() const { return items_->size(); }
bool StateDict::contains(const std::string& key) const { return items_->contains(key); }
const StateValue& StateDict::at(const std::string& key) const {
  if (const StateValue* value = items_->find(key)) return *value;
  std::string keys;
  for (const auto& [name, value] : *items_) keys += (keys.empty() ? "" : ", ") + name;
  throw Error(ErrorCode::kNotFound, "no such key in the state dict",
              {.key = key, .found = size() <= 20 ? "[" + keys + "]" : std::to_string(size()) + " other keys"});
}
StateValue& StateDict::at(const std::string& key) { return const_cast<StateValue&>(std::as_const(*this).at(key)); }
StateValue& StateDict::operator[](const std::string& key) { return (*items_)[key]; }
const OrderedMap<std::string, StateValue>& StateDict::items() const { return *items_; }
OrderedMap<std::string, StateValue>& StateDict::items() { return *items_; }

namespace {
constexpr const char* kTypeNames[] = {"None",   "bool",          "int",  "float", "str",  "bytes",
                                      "Tensor", "ShardedTensor", "list", "tuple", "dict", "opaque value"};
static_assert(std::size(kTypeNames) == std::variant_size_v<StateValue::Variant>);
}  // namespace

const char* StateValue::type_name() const { return kTypeNames[value_.index()]; }

void StateValue::wrong_type(size_t wanted) const {
  throw Error(ErrorCode::kInvalidArgument, "a value of the state dict has another type",
              {.wanted = kTypeNames[wanted], .found = type_name()});
}

}  // namespace reshard
