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
    if (2 * n > slots_.size()) index(n);
  }
  /// The key's place in insertion order, if it is there.
  std::optional<size_t> position(const Key& key) const {
    if (items_.empty()) return std::nullopt;
    const Slot& slot = slots_[find_slot(key, mix(Hash{}(key)))];
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
  /// Takes `items` in place of all that is there. The place of an item whose key an earlier one has, if there is such; the map
  /// is then as good as empty. For many items quicker than one insertion after the other, each of which waits for memory.
  std::optional<size_t> assign(std::vector<Item> items) {
    items_ = std::move(items);
    return index(items_.size());
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
  size_t find_slot(const Key& key, uint64_t mixed) const {
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
    if (2 * (items_.size() + 1) > slots_.size()) index(2 * items_.size() + 4);
    const uint64_t mixed = mix(Hash{}(key));
    Slot& slot = slots_[find_slot(key, mixed)];
    if (slot.position != 0) return nullptr;
    slot.hash = static_cast<uint32_t>(mixed);
    return &slot;
  }
  // Makes slots for n items and fills in those that are there. Slots of many items are far from each other: each is asked
  // for some items ahead. The place of an item whose key an earlier one has, if there is such.
  std::optional<size_t> index(size_t n) {
    constexpr size_t kAhead = 16;
    size_t count = 8;
    while (count < 2 * n) count *= 2;
    slots_.assign(count, {});
    uint64_t ahead[kAhead] = {};
    for (size_t i = 0; i < items_.size() + kAhead; ++i) {
      uint64_t& mixed = ahead[i % kAhead];
      if (i >= kAhead && i - kAhead < items_.size()) {
        const size_t position = i - kAhead;
        Slot& slot = slots_[find_slot(items_[position].first, mixed)];
        if (slot.position != 0) return position;
        slot = {static_cast<uint32_t>(position + 1), static_cast<uint32_t>(mixed)};
      }
      if (i < items_.size()) {
        mixed = mix(Hash{}(items_[i].first));
        __builtin_prefetch(&slots_[static_cast<size_t>(mixed >> 32) & (count - 1)], 1);
      }
    }
    return std::nullopt;
  }

  std::vector<Item> items_;
  std::vector<Slot> slots_;
};

}  // namespace reshard
