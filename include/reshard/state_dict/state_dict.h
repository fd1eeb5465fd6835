// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// StateDict: the nested dictionary that a program saves and loads; the one place where models, optimizers and
// checkpoints meet. What Python keeps in a state_dict has a place here, and keeps its order.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/core/ordered_map.h"
#include "reshard/state_dict/sharded_tensor.h"

namespace reshard {

class StateValue;

/// Python's None.
struct None {
  friend bool operator==(None, None) { return true; }
};
/// Python's bytes (a std::string is Python's str, UTF-8).
struct ByteString {
  std::string data;
  friend bool operator==(const ByteString&, const ByteString&) = default;
};
/// A value that this library does not interpret: the torch.save archive that holds it, kept byte for byte and written
/// back unchanged.
struct OpaqueValue {
  std::shared_ptr<const Bytes> archive;
};
/// Python's tuple.
struct StateTuple {
  std::vector<StateValue> items;
};
using StateList = std::vector<StateValue>;

/// Keys are unique and keep their order of insertion.
class StateDict {
 public:
  StateDict();
  StateDict(std::initializer_list<std::pair<std::string, StateValue>> items);
  StateDict(const StateDict&);
  StateDict(StateDict&&) noexcept;
  StateDict& operator=(const StateDict&);
  StateDict& operator=(StateDict&&) noexcept;
  ~StateDict();

  size_t size() const;
  bool empty() const { return size() == 0; }
  bool contains(const std::string& key) const;
  /// Throws kNotFound naming the key and, if few, the keys there are.
  const StateValue& at(const std::string& key) const;
  StateValue& at(const std::string& key);
  /// None if new.
  StateValue& operator[](const std::string& key);
  const OrderedMap<std::string, StateValue>& items() const;
  OrderedMap<std::string, StateValue>& items();

 private:
  std::unique_ptr<OrderedMap<std::string, StateValue>> items_;
};

/// One value of a state dict. Converts from what it holds, and back with as<T>().
class StateValue {
 public:
  using Variant = std::variant<None, bool, int64_t, double, std::string, ByteString, at::Tensor, ShardedTensor,
                               StateList, StateTuple, StateDict, OpaqueValue>;

  StateValue() = default;
  StateValue(None) {}
  StateValue(bool v) : value_(v) {}
  StateValue(const void*) = delete;  // a pointer is no bool
  StateValue(int v) : value_(int64_t{v}) {}
  StateValue(int64_t v) : value_(v) {}
  StateValue(double v) : value_(v) {}
  StateValue(const char* v) : value_(std::string(v)) {}
  StateValue(std::string v) : value_(std::move(v)) {}
  StateValue(ByteString v) : value_(std::move(v)) {}
  StateValue(at::Tensor v) : value_(std::move(v)) {}
  StateValue(ShardedTensor v) : value_(std::move(v)) {}
  StateValue(StateList v) : value_(std::move(v)) {}
  StateValue(StateTuple v) : value_(std::move(v)) {}
  StateValue(StateDict v) : value_(std::move(v)) {}
  StateValue(OpaqueValue v) : value_(std::move(v)) {}

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(value_);
  }
  /// Throws kInvalidArgument naming both types if it holds something else.
  template <class T>
  const T& as() const {
    if (const T* v = std::get_if<T>(&value_)) return *v;
    wrong_type(index_of<T>(std::make_index_sequence<std::variant_size_v<Variant>>{}));
  }
  template <class T>
  T& as() {
    return const_cast<T&>(std::as_const(*this).template as<T>());
  }
  const Variant& variant() const { return value_; }
  Variant& variant() { return value_; }
  /// "int", "Tensor", "dict", ...
  const char* type_name() const;

  /// A nested dict may be used where a StateDict is wanted: load_state_dict(state.at("model")).
  operator const StateDict&() const { return as<StateDict>(); }
  operator StateDict&() { return as<StateDict>(); }

 private:
  template <class T, size_t... I>
  static constexpr size_t index_of(std::index_sequence<I...>) {
    return ((std::is_same_v<T, std::variant_alternative_t<I, Variant>> ? I : 0) + ...);
  }
  [[noreturn]] void wrong_type(size_t wanted) const;
  Variant value_;
};

}  // namespace reshard
