// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Reads boxes of row-major elements straight to where they go: byte runs, merged with their neighbours, a few calls.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "reshard/core/box.h"
#include "reshard/core/bytes.h"
#include "reshard/planner/state.h"
#include "reshard/storage/filesystem.h"
#include "storage/checked_file.h"

namespace reshard {

/// Adds to a counter that other threads add to as well.
inline void add_to(uint64_t& counter, uint64_t more) {
  std::atomic_ref(counter).fetch_add(more, std::memory_order_relaxed);
}

/// A file of the checkpoint that counts what is read of it.
class CountedFile {
 public:
  CountedFile(const RandomAccessFile& file, const SidecarFile* sums, ReadCounters& counters)
      : file_(file, sums), counters_(counters) {}
  uint64_t size() const { return file_.size(); }
  uint64_t preferred_read_bytes() const { return file_.preferred_read_bytes(); }
  bool is_checked() const { return file_.is_checked(); }
  uint64_t block_end(uint64_t offset) const { return file_.block_end(offset); }
  void read(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const;
  void read(uint64_t offset, MutableByteSpan out, std::string_view what) const { read(offset, {&out, 1}, what); }

 private:
  CheckedFile file_;
  ReadCounters& counters_;
};

/// Sums the parts of one payload that were read, in any order; knows whether they are all of it.
class PayloadSum {
 public:
  /// `offset` in the file.
  void add(uint64_t offset, ByteSpan bytes);
  /// The CRC-32 of the payload [begin, begin + size), if exactly its bytes were added.
  std::optional<uint32_t> whole(uint64_t begin, uint64_t size);

 private:
  struct Piece {
    uint64_t offset;
    uint64_t length;
    uint32_t crc;
  };
  std::vector<Piece> pieces_;
};

/// Row-major elements without gaps in a file.
struct DenseElements {
  uint64_t begin = 0;  // of the first one in the file
  DType dtype = DType::kFloat32;
  Dims sizes;
};

/// Of one file. Borrows all that it is given.
class DirectReader {
 public:
  /// `sum`, if given, gets all that is read; `on_read` the number of its bytes, call by call.
  DirectReader(const CountedFile& file, uint32_t coalesce_gap, PayloadSum* sum, ReadCounters& counters,
               const std::function<void(uint64_t)>& on_read)
      : file_(file),
        // What is summed after the read is read in pieces that the core's own cache holds.
        read_bytes_(sum != nullptr ? file.preferred_read_bytes() : std::max(kReadBytes, file.preferred_read_bytes())),
        gap_(coalesce_gap),
        sum_(sum),
        counters_(counters),
        on_read_(on_read) {}

  /// Makes `view` hold the elements of `region`, once flush() has returned.
  void add(const DenseElements& elements, const Box& region, const MutableTensorView& view);
  void flush();

 private:
  struct Segment {
    uint64_t offset;  // in the file
    std::byte* to;
    uint64_t length;
    bool is_bool;
  };

  void add_segment(const DenseElements& elements, int64_t element, std::byte* to, int64_t count);
  size_t read_from(size_t begin);
  void read_staged(const DenseElements& elements, const Box& region, const MutableTensorView& view);

  static constexpr uint64_t kReadBytes = 8 << 20;

  const CountedFile& file_;
  const uint64_t read_bytes_;  // most bytes of a read
  const uint64_t gap_;
  PayloadSum* sum_;
  ReadCounters& counters_;
  const std::function<void(uint64_t)>& on_read_;
  std::vector<Segment> segments_;
  std::vector<MutableByteSpan> parts_;
  Bytes skipped_;  // what lies between the segments of a read
};

}  // namespace reshard
