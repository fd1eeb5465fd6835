// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Dims: the sizes, offsets or strides of an N-dimensional tensor, held inline up to two dimensions (those of
// nearly all large tensors), because plans and catalogues hold tens of millions of them.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <utility>

namespace reshard {

/// Largest tensor rank that is accepted anywhere; LibTorch's own limit is 64.
inline constexpr size_t kMaxTensorRank = 64;

/// A short vector of int64_t with value semantics. The rank of a 0-d tensor is 0.
class Dims {
 public:
  using value_type = int64_t;

  Dims() noexcept : inline_{} {}
  Dims(std::initializer_list<int64_t> values) : Dims(std::span<const int64_t>(values.begin(), values.size())) {}
  explicit Dims(std::span<const int64_t> values) : Dims() {
    resize(values.size());
    std::copy(values.begin(), values.end(), begin());
  }
  explicit Dims(size_t rank, int64_t value) : Dims() {
    resize(rank);
    std::fill(begin(), end(), value);
  }
  Dims(const Dims& other) : size_(other.size_), inline_{other.inline_[0], other.inline_[1]} {
    if (is_on_heap()) {
      heap_ = new int64_t[size_];
      std::copy(other.begin(), other.end(), heap_);
    }
  }
  Dims(Dims&& other) noexcept : size_(std::exchange(other.size_, 0)), inline_{other.inline_[0], other.inline_[1]} {}
  Dims& operator=(const Dims& other) {
    if (!is_on_heap() && !other.is_on_heap()) {
      size_ = other.size_;
      std::copy_n(other.inline_, kInline, inline_);
    } else if (this != &other) {
      Dims(other).swap(*this);
    }
    return *this;
  }
  Dims& operator=(Dims&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Dims() {
    if (is_on_heap()) delete[] heap_;
  }

  size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  int64_t* data() noexcept { return is_on_heap() ? heap_ : inline_; }
  const int64_t* data() const noexcept { return is_on_heap() ? heap_ : inline_; }
  int64_t* begin() noexcept { return data(); }
  int64_t* end() noexcept { return data() + size_; }
  const int64_t* begin() const noexcept { return data(); }
  const int64_t* end() const noexcept { return data() + size_; }
  int64_t& operator[](size_t i) noexcept { return data()[i]; }
  int64_t operator[](size_t i) const noexcept { return data()[i]; }
  std::span<const int64_t> span() const noexcept { return {data(), size_}; }
  void push_back(int64_t value) {
    Dims grown;
    grown.resize(size_ + size_t{1});
    std::copy(begin(), end(), grown.begin());
    grown[size_] = value;
    swap(grown);
  }

  friend bool operator==(const Dims& a, const Dims& b) noexcept {
    return a.size_ == b.size_ && std::equal(a.begin(), a.end(), b.begin());
  }
  /// Lexicographic; a shorter one that is a prefix comes first.
  friend bool operator<(const Dims& a, const Dims& b) noexcept {
    for (size_t i = 0; i < a.size_ && i < b.size_; ++i) {
      if (a[i] != b[i]) return a[i] < b[i];
    }
    return a.size_ < b.size_;
  }

  void swap(Dims& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(inline_, other.inline_);
  }

 private:
  static constexpr size_t kInline = 2;
  bool is_on_heap() const noexcept { return size_ > kInline; }
  // Of an empty one.
  void resize(size_t rank) {
    if (rank > kInline) heap_ = new int64_t[rank];
    size_ = static_cast<uint32_t>(rank);
  }

  uint32_t size_ = 0;
  union {
    int64_t inline_[kInline];  // all of it always has a value
    int64_t* heap_;
  };
};

/// "[4, 8]"; "[]" for a 0-d tensor.
std::string to_string(const Dims& dims);

/// Number of elements; 1 for rank 0. Throws kCorruptData on a negative size or when the number leaves int64.
int64_t volume(const Dims& sizes);

/// Row-major strides, in elements, of a dense tensor of these sizes; a size of 0 counts as 1, as in LibTorch. Throws
/// kCorruptData when a stride leaves int64.
Dims contiguous_strides(const Dims& sizes);

struct DimsHash {
  size_t operator()(const Dims& dims) const noexcept {
    uint64_t h = 0x9E3779B97F4A7C15ull + dims.size();
    for (int64_t v : dims) {
      h ^= static_cast<uint64_t>(v);
      h *= 0xFF51AFD7ED558CCDull;
      h ^= h >> 32;
    }
    return static_cast<size_t>(h);
  }
};

}  // namespace reshard
