// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// OrderedMap: a hash map that remembers insertion order, as Python's dict does. The catalogue's order is part of the
// format.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
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

  void clear() {
    items_.clear();
    slots_.clear();
  }
  void reserve(size_t n) {
    items_.reserve(n);
    if (2 * n > slots_.size()) rehash(n);
  }
  /// The key's place in insertion order, if it is there.
  std::optional<size_t> position(const Key& key) const {
    if (items_.empty()) return std::nullopt;
    const Slot& slot = slots_[find_slot(key, Hash{}(key))];
    return slot.position == 0 ? std::nullopt : std::optional<size_t>(slot.position - 1);
  }
  /// Null if absent.
  const Value* find(const Key& key) const {
    const auto at = position(key);
    return at ? &items_[*at].second : nullptr;
  }
  Value* find(const Key& key) { return const_cast<Value*>(std::as_const(*this).find(key)); }
  bool contains(const Key& key) const { return position(key).has_value(); }
  /// False, and nothing changes, if the key is there already.
  bool insert(Key key, Value value) {
    Slot* slot = slot_for(key);
    if (slot == nullptr) return false;
    items_.emplace_back(std::move(key), std::move(value));
    slot->position = static_cast<uint32_t>(items_.size());
    return true;
  }
  /// The value of the key, default-constructed at the end if it is new.
  Value& operator[](const Key& key) {
    Slot* slot = slot_for(key);
    if (slot == nullptr) return *find(key);
    items_.emplace_back(key, Value{});
    slot->position = static_cast<uint32_t>(items_.size());
    return items_.back().second;
  }
  friend bool operator==(const OrderedMap& a, const OrderedMap& b) { return a.items_ == b.items_; }

 private:
  // Open addressing over positions in items_, so that keys exist once: a catalogue has millions of them.
  struct Slot {
    uint32_t position = 0;  // plus one; 0: free
    uint32_t hash = 0;      // part of the key's hash, to compare before the key
  };
  static uint64_t mix(size_t hash) { return static_cast<uint64_t>(hash) * 0x9E3779B97F4A7C15ull; }

  // The slot of the key, or the free one where it belongs. There are always free slots.
  size_t find_slot(const Key& key, size_t hash) const {
    const uint64_t mixed = mix(hash);
    const auto fragment = static_cast<uint32_t>(mixed);
    size_t at = static_cast<size_t>(mixed >> 32) & (slots_.size() - 1);
    while (slots_[at].position != 0 &&
           (slots_[at].hash != fragment || !(items_[slots_[at].position - 1].first == key))) {
      at = (at + 1) & (slots_.size() - 1);
    }
    return at;
  }
  // The free slot for a new key, ready but for its position; null if the key is there.
  Slot* slot_for(const Key& key) {
    if (2 * (items_.size() + 1) > slots_.size()) rehash(2 * items_.size() + 4);
    const size_t hash = Hash{}(key);
    Slot& slot = slots_[find_slot(key, hash)];
    if (slot.position != 0) return nullptr;
    slot.hash = static_cast<uint32_t>(mix(hash));
    return &slot;
  }
  void rehash(size_t n) {
    size_t count = 8;
    while (count < 2 * n) count *= 2;
    slots_.assign(count, {});
    for (size_t i = 0; i < items_.size(); ++i) {
      const size_t hash = Hash{}(items_[i].first);
      size_t at = static_cast<size_t>(mix(hash) >> 32) & (count - 1);
      while (slots_[at].position != 0) at = (at + 1) & (count - 1);
      slots_[at] = {static_cast<uint32_t>(i + 1), static_cast<uint32_t>(mix(hash))};
    }
  }

  std::vector<Item> items_;
  std::vector<Slot> slots_;
};

}  // namespace reshard
