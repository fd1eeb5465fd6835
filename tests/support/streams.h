// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Stream transforms over memory, and one of the tests' own.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "reshard/format/extension.h"

namespace reshard {

class MemoryOutputStream final : public ByteOutputStream {
 public:
  void write(ByteSpan more) override { bytes.insert(bytes.end(), more.begin(), more.end()); }
  void finish() override {}
  Bytes bytes;
};

class MemoryInputStream final : public ByteInputStream {
 public:
  explicit MemoryInputStream(ByteSpan bytes) : left_(bytes) {}
  size_t read(MutableByteSpan out) override {
    const size_t size = std::min(out.size(), left_.size());
    std::copy_n(left_.begin(), size, out.begin());
    left_ = left_.subspan(size);
    return size;
  }

 private:
  ByteSpan left_;
};

/// What the extension makes of bytes, written to it piece by piece.
inline Bytes transformed(const StreamTransformExtension& extension, ByteSpan bytes, size_t piece = 1 << 20) {
  MemoryOutputStream out;
  const auto stream = extension.transform_to(out);
  for (; !bytes.empty(); bytes = bytes.subspan(std::min(piece, bytes.size()))) {
    stream->write(bytes.first(std::min(piece, bytes.size())));
  }
  stream->finish();
  return std::move(out.bytes);
}

/// And back.
inline Bytes restored(const StreamTransformExtension& extension, ByteSpan bytes, size_t piece = 1 << 20) {
  MemoryInputStream in(bytes);
  const auto stream = extension.transform_from(in);
  Bytes result;
  Bytes part(piece);
  while (const size_t size = stream->read(part)) {
    result.insert(result.end(), part.begin(), part.begin() + static_cast<ptrdiff_t>(size));
  }
  return result;
}

/// Turns letters by 13 places: its own inverse. "stream.rot13/1".
class Rot13 final : public StreamTransformExtension {
 public:
  static std::shared_ptr<const StreamTransformExtension> from_descriptor(std::string_view) {
    return std::make_shared<Rot13>();
  }
  std::string get_descriptor() const override { return "stream.rot13/1"; }
  std::unique_ptr<ByteOutputStream> transform_to(ByteOutputStream& output) const override {
    return std::make_unique<Out>(output);
  }
  std::unique_ptr<ByteInputStream> transform_from(ByteInputStream& input) const override {
    return std::make_unique<In>(input);
  }

 private:
  static void turn(MutableByteSpan bytes) {
    for (std::byte& byte : bytes) {
      const auto c = static_cast<unsigned char>(byte);
      const unsigned char first = c & 0xDFu;
      if (first < 'A' || first > 'Z') continue;
      byte = static_cast<std::byte>(first < 'N' ? c + 13 : c - 13);
    }
  }
  class Out final : public ByteOutputStream {
   public:
    explicit Out(ByteOutputStream& output) : output_(output) {}
    void write(ByteSpan bytes) override {
      Bytes turned(bytes.begin(), bytes.end());
      turn(turned);
      output_.write(turned);
    }
    void finish() override {}

   private:
    ByteOutputStream& output_;
  };
  class In final : public ByteInputStream {
   public:
    explicit In(ByteInputStream& input) : input_(input) {}
    size_t read(MutableByteSpan out) override {
      const size_t size = input_.read(out);
      turn(out.first(size));
      return size;
    }

   private:
    ByteInputStream& input_;
  };
};

}  // namespace reshard
