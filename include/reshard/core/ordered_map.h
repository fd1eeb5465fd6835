// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// OrderedMap: a hash map that remembers insertion order, as Python's dict does. The catalogue's order is part of the
// format.

#include <functional>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace reshard {

/// Keys are unique and immutable. Iteration is in insertion order. Pointers are valid until the next insertion.
template <class Key, class Value, class Hash = std::hash<Key>>
class OrderedMap {
 public:
  using Item = std::pair<Key, Value>;

  size_t size() const { return items_.size(); }
  bool empty() const { return items_.empty(); }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }
  auto begin() { return items_.begin(); }
  auto end() { return items_.end(); }

  void reserve(size_t n) {
    items_.reserve(n);
    index_.reserve(n);
  }
  /// The key's place in insertion order, if it is there.
  std::optional<size_t> position(const Key& key) const {
    const auto it = index_.find(key);
    return it == index_.end() ? std::nullopt : std::optional(it->second);
  }
  /// Null if absent.
  const Value* find(const Key& key) const {
    const auto it = index_.find(key);
    return it == index_.end() ? nullptr : &items_[it->second].second;
  }
  Value* find(const Key& key) { return const_cast<Value*>(std::as_const(*this).find(key)); }
  bool contains(const Key& key) const { return index_.contains(key); }
  /// False, and nothing changes, if the key is there already.
  bool insert(Key key, Value value) {
    if (!index_.try_emplace(key, items_.size()).second) return false;
    items_.emplace_back(std::move(key), std::move(value));
    return true;
  }
  /// The value of the key, default-constructed at the end if it is new.
  Value& operator[](const Key& key) {
    const auto [it, inserted] = index_.try_emplace(key, items_.size());
    if (inserted) items_.emplace_back(key, Value{});
    return items_[it->second].second;
  }
  friend bool operator==(const OrderedMap& a, const OrderedMap& b) { return a.items_ == b.items_; }

 private:
  std::vector<Item> items_;
  std::unordered_map<Key, size_t, Hash> index_;
};

}  // namespace reshard
