// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Byte spans, and the little-endian reader and writer that every wire form and file format here is made with.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/core/error.h"

namespace reshard {

using Bytes = std::vector<std::byte>;
using ByteSpan = std::span<const std::byte>;
using MutableByteSpan = std::span<std::byte>;

inline ByteSpan as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
inline std::string_view as_text(ByteSpan bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

/// Appends little-endian values to a buffer. The last few hundred bytes are kept apart until they are enough to be worth a call of the
/// buffer: catalogues are made of bytes and short numbers.
class ByteWriter {
 public:
  void u8(uint8_t v) {
    *room(1) = static_cast<std::byte>(v);
    ++staged_;
  }
  void u16(uint16_t v) { raw(&v, 2); }
  void u32(uint32_t v) { raw(&v, 4); }
  void u64(uint64_t v) { raw(&v, 8); }
  void i64(int64_t v) { raw(&v, 8); }
  void varint(uint64_t v) {  // LEB128: 7 bits a byte, low first
    std::byte* at = room(10);
    for (; v >= 0x80; v >>= 7) *at++ = static_cast<std::byte>(v | 0x80);
    *at++ = static_cast<std::byte>(v);
    staged_ = static_cast<size_t>(at - stage_);
  }
  void bytes(ByteSpan b) {
    if (b.size() <= kStage) return raw(b.data(), b.size());
    flush();
    append(b);
  }
  void text(std::string_view s) { bytes(as_bytes(s)); }
  /// varint length, then the bytes.
  void blob(ByteSpan b) {
    varint(b.size());
    bytes(b);
  }
  void string(std::string_view s) { blob(as_bytes(s)); }
  size_t size() const { return out_.size() + staged_; }
  /// All that was written, until the next value is.
  Bytes& buffer() {
    flush();
    return out_;
  }
  Bytes take() { return std::move(buffer()); }

 private:
  static constexpr size_t kStage = 256;
  std::byte* room(size_t n) {
    if (kStage - staged_ < n) flush();
    return stage_ + staged_;
  }
  void raw(const void* p, size_t n) {
    if (n != 0) std::memcpy(room(n), p, n);
    staged_ += n;
  }
  void flush() {
    append({stage_, staged_});
    staged_ = 0;
  }
  [[gnu::noinline]] void append(ByteSpan b) { out_.insert(out_.end(), b.begin(), b.end()); }
  Bytes out_;
  size_t staged_ = 0;
  std::byte stage_[kStage];
};

/// Reads little-endian values from a span; reading past the end throws kCorruptData naming what was wanted. Borrows the
/// span.
class ByteReader {
 public:
  explicit ByteReader(ByteSpan data, std::string_view what = "data") : data_(data), what_(what) {}
  uint8_t u8() { return value<uint8_t>(); }
  uint16_t u16() { return value<uint16_t>(); }
  uint32_t u32() { return value<uint32_t>(); }
  uint64_t u64() { return value<uint64_t>(); }
  int64_t i64() { return value<int64_t>(); }
  uint64_t varint() {
    if (position_ < data_.size() && data_[position_] < std::byte{0x80})
      return static_cast<uint64_t>(data_[position_++]);
    uint64_t v = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const uint8_t b = u8();
      if (shift == 63 && b > 1) break;
      v |= static_cast<uint64_t>(b & 0x7F) << shift;
      if ((b & 0x80) == 0) return v;
    }
    throw Error(ErrorCode::kCorruptData, std::string(what_) + ": number longer than 64 bits");
  }
  /// A count of things that take at least `min_bytes` each: refused when they cannot fit in what remains.
  size_t count(size_t min_bytes = 1) {
    const uint64_t n = varint();
    if (n > remaining() / (min_bytes == 0 ? 1 : min_bytes)) fail(n, "items");
    return static_cast<size_t>(n);
  }
  ByteSpan bytes(size_t n) {
    if (n > remaining()) fail(n, "bytes");
    const ByteSpan b = data_.subspan(position_, n);
    position_ += n;
    return b;
  }
  ByteSpan blob() { return bytes(count()); }
  /// Valid as long as the span.
  std::string_view text() { return as_text(blob()); }
  std::string string() { return std::string(as_text(blob())); }
  size_t position() const { return position_; }
  size_t remaining() const { return data_.size() - position_; }
  bool at_end() const { return remaining() == 0; }
  /// What is still to be read.
  ByteSpan rest() const { return data_.subspan(position_); }

 private:
  template <class T>
  T value() {
    T v;
    std::memcpy(&v, bytes(sizeof(T)).data(), sizeof(T));
    return v;
  }
  [[noreturn]] void fail(uint64_t n, const char* unit) const {
    throw Error(ErrorCode::kCorruptData, std::string(what_) + " ends too early",
                {.offset = position_,
                 .wanted = std::to_string(n) + " " + unit,
                 .found = std::to_string(remaining()) + " bytes"});
  }
  ByteSpan data_;
  std::string_view what_;
  size_t position_ = 0;
};

}  // namespace reshard
