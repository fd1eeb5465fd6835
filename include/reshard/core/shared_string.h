// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// SharedString: an immutable string whose copies share one memory. The plans and the catalogue of a large job hold millions
// of items that repeat a few thousand names: each repetition is one pointer, and equal names usually compare as such.

#include <atomic>
#include <concepts>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>

namespace reshard {

/// Reads as a std::string does. Copies are cheap and may be used by several threads.
class SharedString {
 public:
  SharedString() noexcept = default;
  SharedString(std::string text) : block_(text.empty() ? nullptr : new Block(std::move(text))) {}
  SharedString(std::string_view text) : SharedString(std::string(text)) {}
  SharedString(const char* text) : SharedString(std::string(text)) {}
  /// One that lives as long as the process. Its copies are not counted, so that threads that make them do not wait for one
  /// another.
  static SharedString permanent(std::string text) {
    SharedString result(std::move(text));
    if (result.block_ != nullptr) result.block_->owners.store(Block::kPermanent, std::memory_order_relaxed);
    return result;
  }
  SharedString(const SharedString& other) noexcept : block_(other.block_) {
    if (is_counted()) block_->owners.fetch_add(1, std::memory_order_relaxed);
  }
  SharedString(SharedString&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  SharedString& operator=(SharedString other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~SharedString() {
    if (is_counted() && block_->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete block_;
  }

  const std::string& str() const noexcept { return block_ != nullptr ? block_->text : empty_string(); }
  operator const std::string&() const noexcept { return str(); }
  operator std::string_view() const noexcept { return str(); }
  const char* c_str() const noexcept { return str().c_str(); }
  size_t size() const noexcept { return str().size(); }
  bool empty() const noexcept { return block_ == nullptr; }
  int compare(std::string_view other) const noexcept { return str().compare(other); }
  /// Computed once, when the string is made.
  size_t hash() const noexcept { return block_ != nullptr ? block_->hash : 0; }

  friend bool operator==(const SharedString& a, const SharedString& b) noexcept {
    if (a.block_ == b.block_) return true;
    return a.hash() == b.hash() && a.str() == b.str();
  }
  template <class T>
  requires(!std::same_as<T, SharedString> && std::convertible_to<const T&, std::string_view>) friend bool operator==(
      const SharedString& a, const T& b) noexcept {
    return a.str() == std::string_view(b);
  }
  friend bool operator<(const SharedString& a, const SharedString& b) noexcept { return a.str() < b.str(); }
  friend std::string operator+(const SharedString& a, std::string_view b) { return std::string(a.str()).append(b); }
  friend std::string operator+(std::string_view a, const SharedString& b) { return std::string(a).append(b.str()); }

 private:
  struct Block {
    explicit Block(std::string t) : text(std::move(t)), hash(std::hash<std::string>{}(text)) {}
    static constexpr size_t kPermanent = 0;  // which no living text has otherwise
    std::atomic<size_t> owners = 1;
    const std::string text;
    const size_t hash;
  };
  bool is_counted() const noexcept {
    return block_ != nullptr && block_->owners.load(std::memory_order_relaxed) != Block::kPermanent;
  }
  static const std::string& empty_string() noexcept {
    static const std::string empty;
    return empty;
  }
  Block* block_ = nullptr;
};

struct SharedStringHash {
  using is_transparent = void;
  size_t operator()(const SharedString& text) const noexcept { return text.hash(); }
  size_t operator()(std::string_view text) const noexcept {
    return text.empty() ? 0 : std::hash<std::string_view>{}(text);
  }
};

/// Makes equal strings of many sources the same one. Not thread-safe.
class SharedStringPool {
 public:
  SharedString get(std::string_view text) {
    const auto known = strings_.find(text);
    return known != strings_.end() ? *known : *strings_.emplace(text).first;
  }

 private:
  std::unordered_set<SharedString, SharedStringHash, std::equal_to<>> strings_;
};

}  // namespace reshard

template <>
struct std::hash<reshard::SharedString> {
  size_t operator()(const reshard::SharedString& text) const noexcept { return text.hash(); }
};
