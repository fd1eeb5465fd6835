// SPDX-License-Identifier: BSD-3-Clause
#include "storage/direct_reader.h"

#include <algorithm>
#include <utility>

#include "reshard/format/crc32.h"
#include "reshard/format/strided_copy.h"

namespace reshard {
namespace {

constexpr int64_t kScatterBytes = 256;     // shorter destination runs are staged
constexpr uint64_t kStageBytes = 4 << 20;  // size of the staging buffer
constexpr size_t kReadParts = 1022;        // most destinations of one read call
constexpr size_t kMaxSegments = 1 << 16;   // collected before they are read

int64_t dot(const Dims& offsets, const Dims& strides) {
  int64_t sum = 0;
  for (size_t d = 0; d < offsets.size(); ++d) sum += offsets[d] * strides[d];
  return sum;
}

/// Elements at the end of a row-major walk over a view that lie without gaps.
int64_t inner_run(const Dims& sizes, const Dims& strides) {
  int64_t run = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (strides[d] != run) break;
    run *= sizes[d];
  }
  return run;
}

/// Place, in elements, of element `flat` of a row-major walk over a view.
int64_t place_of(int64_t flat, const Dims& sizes, const Dims& strides) {
  int64_t place = 0;
  for (size_t d = sizes.size(); d-- > 0; flat /= sizes[d]) place += flat % sizes[d] * strides[d];
  return place;
}

}  // namespace

void CountedFile::read(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const {
  uint64_t wanted = 0;
  for (const MutableByteSpan& part : parts) wanted += part.size();
  const CheckedFile::Read read = file_.read(offset, parts, what);
  add_to(counters_.reads, read.calls);
  add_to(counters_.bytes_read, read.bytes);
  add_to(counters_.bytes_verify, read.bytes - wanted);
}

void PayloadSum::add(uint64_t offset, ByteSpan bytes) {
  if (bytes.empty()) return;
  if (!pieces_.empty() && pieces_.back().offset + pieces_.back().length == offset) {
    pieces_.back().crc = crc32(bytes, pieces_.back().crc);
    pieces_.back().length += bytes.size();
  } else {
    pieces_.push_back({offset, bytes.size(), crc32(bytes)});
  }
}

std::optional<uint32_t> PayloadSum::whole(uint64_t begin, uint64_t size) {
  std::ranges::sort(pieces_, {}, &Piece::offset);
  uint64_t end = begin;
  uint32_t crc = 0;
  for (const Piece& piece : pieces_) {
    if (piece.offset != end) return std::nullopt;
    crc = end == begin ? piece.crc : crc32_combine(crc, piece.crc, piece.length);
    end += piece.length;
  }
  return end - begin == size ? std::optional(crc) : std::nullopt;
}

void DirectReader::add(const DenseElements& elements, const Box& region, const MutableTensorView& view) {
  const int64_t size = element_size(elements.dtype);
  const int64_t inner = inner_run(view.sizes, view.strides);
  if (inner * size < kScatterBytes && !is_contiguous(view.sizes, view.strides)) {
    read_staged(elements, region, view);
    return;
  }
  for_each_run(whole_box(elements.sizes), region, [&](int64_t from, int64_t at, int64_t length) {
    while (length > 0) {
      const int64_t part = std::min(length, inner);  // one of the two is a multiple of the other
      add_segment(elements, from, view.data + place_of(at, view.sizes, view.strides) * size, part);
      from += part;
      at += part;
      length -= part;
    }
  });
}

void DirectReader::flush() {
  if (!std::ranges::is_sorted(segments_, {}, &Segment::offset)) {
    std::ranges::stable_sort(segments_, {}, &Segment::offset);
  }
  for (size_t begin = 0; begin < segments_.size();) begin = read_from(begin);
  segments_.clear();
}

void DirectReader::add_segment(const DenseElements& elements, int64_t element, std::byte* to, int64_t count) {
  const bool is_bool = elements.dtype == DType::kBool;
  uint64_t offset = elements.begin + static_cast<uint64_t>(element * element_size(elements.dtype));
  auto length = static_cast<uint64_t>(count * element_size(elements.dtype));
  if (!segments_.empty()) {
    Segment& last = segments_.back();
    if (last.offset + last.length == offset && last.to + last.length == to && last.is_bool == is_bool &&
        last.length + length <= read_bytes_) {
      last.length += length;
      return;
    }
  }
  while (length > 0) {
    if (segments_.size() == kMaxSegments) flush();
    const uint64_t part = std::min(length, read_bytes_);
    segments_.push_back({offset, to, part, is_bool});
    offset += part;
    to += part;
    length -= part;
  }
}

/// Reads segments from number `begin` on as far as one call goes; returns the number of the next one.
size_t DirectReader::read_from(size_t begin) {
  parts_.clear();
  const uint64_t offset = segments_[begin].offset;
  uint64_t end = offset;
  size_t skipped = 0;
  uint64_t skipped_to_verify = 0;
  size_t next = begin;
  for (; next < segments_.size(); ++next) {
    const Segment& segment = segments_[next];
    if (segment.offset < end) break;
    // What lies in one block with the last segment is read anyway.
    const bool skip = segment.offset - end <= gap_;
    if (!skip && segment.offset > file_.block_end(end)) break;
    if (next != begin && (segment.offset + segment.length - offset > read_bytes_ || parts_.size() + 2 > kReadParts)) {
      break;
    }
    if (segment.offset > end) {
      if (!skip) skipped_to_verify += segment.offset - end;
      const auto gap = static_cast<size_t>(segment.offset - end);
      if (skipped_.empty()) skipped_.resize(read_bytes_);
      parts_.push_back(MutableByteSpan(skipped_).subspan(skipped, gap));
      skipped += gap;
    }
    parts_.emplace_back(segment.to, static_cast<size_t>(segment.length));
    end = segment.offset + segment.length;
  }
  file_.read(offset, parts_, "elements of an item");
  add_to(counters_.bytes_payload, end - offset - skipped_to_verify);
  add_to(counters_.bytes_verify, skipped_to_verify);
  for (const Segment& segment : std::span(segments_).subspan(begin, next - begin)) {
    const MutableByteSpan bytes{segment.to, static_cast<size_t>(segment.length)};
    if (sum_ != nullptr) sum_->add(segment.offset, bytes);
    if (segment.is_bool) normalize_bools(bytes);
  }
  on_read_(end - offset);
  return next;
}

/// Block by block through a dense buffer.
void DirectReader::read_staged(const DenseElements& elements, const Box& region, const MutableTensorView& view) {
  const int64_t size = element_size(elements.dtype);
  const int64_t total = volume(region.sizes);
  const int64_t block = static_cast<int64_t>(kStageBytes) / size;
  Bytes buffer(static_cast<size_t>(std::min(block, total) * size));
  for (int64_t begin = 0; begin < total; begin += block) {
    for (const Box& box : flat_range_to_boxes(region.sizes, begin, std::min(begin + block, total))) {
      Box part = box;
      for (size_t d = 0; d < part.offsets.size(); ++d) part.offsets[d] += region.offsets[d];
      for_each_run(whole_box(elements.sizes), part, [&](int64_t from, int64_t at, int64_t length) {
        add_segment(elements, from, buffer.data() + at * size, length);
      });
      flush();
      copy_strided(buffer.data(), contiguous_strides(box.sizes), view.data + dot(box.offsets, view.strides) * size,
                   view.strides, box.sizes, size);
      add_to(counters_.bytes_staged, static_cast<uint64_t>(volume(box.sizes) * size));
    }
  }
}

}  // namespace reshard
