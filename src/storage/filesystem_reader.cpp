// SPDX-License-Identifier: BSD-3-Clause
// Reads what a plan wants and nothing else. Items are taken file by file in the order of their offsets, each in one of
// three ways:
//
//   packed    small and wanted whole: neighbours are read together, then parsed and copied from memory
//   direct    row-major elements: the byte runs of the wanted box go straight to their places
//   staged    anything else (stored transposed or lazily conjugated; a destination of tiny runs): through a buffer
#include <algorithm>
#include <span>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "reshard/storage/filesystem.h"
#include "storage/archive_frames.h"
#include "storage/checked_file.h"
#include "storage/chunks.h"

namespace reshard {
namespace {

constexpr uint64_t kPackedItem = 64 << 10;  // longest item that is read packed
constexpr uint64_t kPackedRead = 4 << 20;   // most bytes, and
constexpr uint64_t kPackedGap = 4 << 10;    // longest gap of a packed read
constexpr int64_t kScatterBytes = 256;      // shorter destination runs are staged
constexpr uint64_t kStageBytes = 4 << 20;   // size of the staging buffer
constexpr uint64_t kReadBytes = 8 << 20;    // most bytes, and
constexpr size_t kReadParts = 1022;         // most destinations of one read call
constexpr size_t kMaxSegments = 1 << 16;    // collected before they are read

/// One item of the checkpoint, and what the plan wants of it.
struct Stored {
  const MetadataIndex* index = nullptr;
  const StorageInfo* place = nullptr;
  const TensorStorageMetadata* tensor = nullptr;  // null for a value
  const Box* chunk = nullptr;                     // of the tensor
  std::span<const ReadItem* const> wants;
  uint64_t wanted_bytes = 0;   // of elements, by all wants
  uint64_t element_bytes = 0;  // of the whole chunk
};

/// The item's position in the catalogue's storage_data.
size_t position_of(const Metadata& metadata, const MetadataIndex& index) {
  if (const auto position = metadata.storage_data.position(index)) return *position;
  throw Error(ErrorCode::kCorruptData, "the catalogue has no item " + to_string(index), {.key = index.fqn});
}

Stored stored_at(const Metadata& metadata, size_t position) {
  Stored stored;
  const auto& [key, place] = *(metadata.storage_data.begin() + static_cast<ptrdiff_t>(position));
  const MetadataIndex& index = key;
  const StorageMetadata* entry = metadata.state_dict_metadata.find(index.fqn);
  if (entry == nullptr) {
    throw Error(ErrorCode::kCorruptData, "the catalogue has no item " + to_string(index), {.key = index.fqn});
  }
  stored.index = &key;
  stored.place = &place;
  stored.tensor = std::get_if<TensorStorageMetadata>(entry);
  if (!place.transform_descriptors.empty()) {
    throw Error(ErrorCode::kUnsupported, "item is stored with a stream transform",
                {.key = index.fqn, .file = place.relative_path, .found = place.transform_descriptors.back()});
  }
  if (stored.tensor != nullptr) {
    stored.chunk = find_chunk(*stored.tensor, key);
    if (stored.chunk == nullptr) {
      throw Error(ErrorCode::kCorruptData, "the catalogue has no chunk " + to_string(index), {.key = index.fqn});
    }
    stored.element_bytes =
        static_cast<uint64_t>(volume(stored.chunk->sizes) * element_size(stored.tensor->properties.dtype));
  }
  return stored;
}

/// A file of the checkpoint that counts what is read of it.
class CountedFile {
 public:
  CountedFile(const RandomAccessFile& file, const SidecarFile* sums, ReadCounters& counters)
      : file_(file, sums), counters_(counters) {}
  uint64_t size() const { return file_.size(); }
  bool is_checked() const { return file_.is_checked(); }
  uint64_t block_end(uint64_t offset) const { return file_.block_end(offset); }
  void read(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const {
    const uint64_t read = file_.read(offset, parts, what);
    ++counters_.reads;
    counters_.bytes_read += read;
    counters_.bytes_verify += read;
    for (const MutableByteSpan& part : parts) counters_.bytes_verify -= part.size();
  }
  void read(uint64_t offset, MutableByteSpan out, std::string_view what) const { read(offset, {&out, 1}, what); }

 private:
  CheckedFile file_;
  ReadCounters& counters_;
};

/// The item's bytes in its file.
class FileSource final : public ByteSource {
 public:
  FileSource(const CountedFile& file, const StorageInfo& place) : file_(file), place_(place) {}
  uint64_t size() const override { return place_.length; }
  void read(uint64_t offset, MutableByteSpan out) const override {
    file_.read(place_.offset + offset, out, "header of an item");
  }

 private:
  const CountedFile& file_;
  const StorageInfo& place_;
};

/// Sums the parts of one payload that were read, in any order; knows whether they are all of it.
class PayloadSum {
 public:
  void add(uint64_t offset, ByteSpan bytes) {
    if (bytes.empty()) return;
    if (!pieces_.empty() && pieces_.back().offset + pieces_.back().length == offset) {
      pieces_.back().crc = crc32(bytes, pieces_.back().crc);
      pieces_.back().length += bytes.size();
    } else {
      pieces_.push_back({offset, bytes.size(), crc32(bytes)});
    }
  }
  /// The CRC-32 of the payload, if exactly its bytes were added.
  std::optional<uint32_t> whole(uint64_t size) {
    std::ranges::sort(pieces_, {}, &Piece::offset);
    uint64_t end = 0;
    uint32_t crc = 0;
    for (const Piece& piece : pieces_) {
      if (piece.offset != end) return std::nullopt;
      crc = end == 0 ? piece.crc : crc32_combine(crc, piece.crc, piece.length);
      end += piece.length;
    }
    return end == size ? std::optional(crc) : std::nullopt;
  }

 private:
  struct Piece {
    uint64_t offset;
    uint64_t length;
    uint32_t crc;
  };
  std::vector<Piece> pieces_;
};

void require_crc(uint32_t wanted, uint32_t found) {
  if (wanted == found) return;
  throw Error(ErrorCode::kCorruptData, "the stored elements do not match their CRC-32",
              {.wanted = std::to_string(wanted), .found = std::to_string(found)});
}

int64_t dot(const Dims& offsets, const Dims& strides) {
  int64_t sum = 0;
  for (size_t d = 0; d < offsets.size(); ++d) sum += offsets[d] * strides[d];
  return sum;
}

MutableTensorView resolve(LoadPlanner& planner, const ReadItem& want, DType dtype) {
  MutableTensorView view = planner.resolve_tensor(want);
  if (view.dtype != dtype || view.sizes != want.lengths) {
    throw Error(ErrorCode::kInternal, "destination is not as planned",
                {.wanted = std::string(to_string(dtype)) + " " + to_string(want.lengths),
                 .found = std::string(to_string(view.dtype)) + " " + to_string(view.sizes)});
  }
  return view;
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

/// Reads the wanted runs of one item whose elements are stored row-major.
class DirectReader {
 public:
  /// `sum`, if given, gets all that is read; `on_read` the number of its bytes, call by call.
  DirectReader(const CountedFile& file, const Stored& stored, const TensorItem& item, uint32_t coalesce_gap,
               PayloadSum* sum, ReadCounters& counters, const std::function<void(uint64_t)>& on_read)
      : file_(file),
        stored_(stored),
        item_(item),
        gap_(coalesce_gap),
        sum_(sum),
        counters_(counters),
        on_read_(on_read),
        size_(element_size(item.dtype)),
        payload_(stored.place->offset + item.payload_offset) {}

  void read(const ReadItem& want, const MutableTensorView& view) {
    const Box region{want.storage_offsets, want.lengths};
    const int64_t inner = inner_run(view.sizes, view.strides);
    if (inner * size_ >= kScatterBytes || is_contiguous(view.sizes, view.strides)) {
      add_runs(region, [&](int64_t from, int64_t at, int64_t length) {
        while (length > 0) {
          const int64_t part = std::min(length, inner);  // one of the two is a multiple of the other
          add(from, view.data + place_of(at, view.sizes, view.strides) * size_, part);
          from += part;
          at += part;
          length -= part;
        }
      });
    } else {
      read_staged(want, view);
    }
  }

  void flush() {
    if (!std::ranges::is_sorted(segments_, {}, &Segment::offset)) {
      std::ranges::stable_sort(segments_, {}, &Segment::offset);
    }
    for (size_t begin = 0; begin < segments_.size();) begin = read_from(begin);
    segments_.clear();
  }

 private:
  struct Segment {
    uint64_t offset;  // in the payload
    std::byte* to;
    uint64_t length;
  };

  template <class Fn>
  void add_runs(const Box& region, const Fn& fn) {
    for_each_run(whole_box(stored_.chunk->sizes), region, fn);
  }

  void add(int64_t element, std::byte* to, int64_t elements) {
    auto offset = static_cast<uint64_t>((item_.storage_offset + element) * size_);
    auto length = static_cast<uint64_t>(elements * size_);
    if (!segments_.empty()) {
      Segment& last = segments_.back();
      if (last.offset + last.length == offset && last.to + last.length == to && last.length + length <= kReadBytes) {
        last.length += length;
        return;
      }
    }
    while (length > 0) {
      if (segments_.size() == kMaxSegments) flush();
      const uint64_t part = std::min(length, kReadBytes);
      segments_.push_back({offset, to, part});
      offset += part;
      to += part;
      length -= part;
    }
  }

  /// Reads segments from number `begin` on as far as one call goes; returns the number of the next one.
  size_t read_from(size_t begin) {
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
      if (!skip && payload_ + segment.offset > file_.block_end(payload_ + end)) break;
      if (next != begin && (segment.offset + segment.length - offset > kReadBytes || parts_.size() + 2 > kReadParts)) {
        break;
      }
      if (segment.offset > end) {
        if (!skip) skipped_to_verify += segment.offset - end;
        const auto gap = static_cast<size_t>(segment.offset - end);
        if (skipped_.empty()) skipped_.resize(kReadBytes);
        parts_.push_back(MutableByteSpan(skipped_).subspan(skipped, gap));
        skipped += gap;
      }
      parts_.push_back({segment.to, static_cast<size_t>(segment.length)});
      end = segment.offset + segment.length;
    }
    file_.read(payload_ + offset, parts_, "elements of an item");
    counters_.bytes_payload += end - offset - skipped_to_verify;
    counters_.bytes_verify += skipped_to_verify;
    for (const Segment& segment : std::span(segments_).subspan(begin, next - begin)) {
      const MutableByteSpan bytes{segment.to, static_cast<size_t>(segment.length)};
      if (sum_ != nullptr) sum_->add(segment.offset, bytes);
      if (item_.dtype == DType::kBool) normalize_bools(bytes);
    }
    on_read_(end - offset);
    return next;
  }

  /// Block by block through a dense buffer.
  void read_staged(const ReadItem& want, const MutableTensorView& view) {
    const int64_t total = volume(want.lengths);
    const int64_t block = static_cast<int64_t>(kStageBytes) / size_;
    flush();
    Bytes buffer(static_cast<size_t>(std::min(block, total) * size_));
    for (int64_t begin = 0; begin < total; begin += block) {
      for (const Box& box : flat_range_to_boxes(want.lengths, begin, std::min(begin + block, total))) {
        Box region = box;
        for (size_t d = 0; d < region.offsets.size(); ++d) region.offsets[d] += want.storage_offsets[d];
        add_runs(region,
                 [&](int64_t from, int64_t at, int64_t length) { add(from, buffer.data() + at * size_, length); });
        flush();
        copy_strided(buffer.data(), contiguous_strides(box.sizes), view.data + dot(box.offsets, view.strides) * size_,
                     view.strides, box.sizes, size_);
        counters_.bytes_staged += static_cast<uint64_t>(volume(box.sizes) * size_);
      }
    }
  }

  const CountedFile& file_;
  const Stored& stored_;
  const TensorItem& item_;
  const uint64_t gap_;
  PayloadSum* sum_;
  ReadCounters& counters_;
  const std::function<void(uint64_t)>& on_read_;
  const int64_t size_;      // bytes of an element
  const uint64_t payload_;  // where the payload begins in the file
  std::vector<Segment> segments_;
  std::vector<MutableByteSpan> parts_;
  Bytes skipped_;  // what lies between the segments of a read
};

/// Makes `view` hold `region` of an item; `payload` as for copy_region.
void deliver(const TensorItem& item, ByteSpan payload, const Box& region, const MutableTensorView& view) {
  const auto bytes = static_cast<size_t>(volume(region.sizes) * element_size(item.dtype));
  if (is_contiguous(view.sizes, view.strides)) {
    copy_region(item, payload, region, {view.data, bytes});
    return;
  }
  Bytes dense(bytes);
  copy_region(item, payload, region, dense);
  copy_strided(dense.data(), contiguous_strides(region.sizes), view.data, view.strides, region.sizes,
               element_size(item.dtype));
}

/// One load's walk over one data file.
class FileLoad {
 public:
  /// `sums`: null where there are none.
  FileLoad(const RandomAccessFile& file, const SidecarFile* sums, LoadPlanner& planner,
           const FileSystemReaderOptions& options, ReadCounters& counters, std::function<void(uint64_t)> on_read)
      : file_(file, sums, counters),
        verify_records_(options.verify_checksums && !file_.is_checked()),
        planner_(planner),
        options_(options),
        counters_(counters),
        on_read_(std::move(on_read)) {}

  /// `items` in order of offset.
  void read(std::span<const Stored> items) {
    for (const Stored& stored : items) {
      if (stored.place->offset + stored.place->length > file_.size()) {
        throw Error(ErrorCode::kCorruptData, "the file ends before the item",
                    {.key = stored.index->fqn,
                     .file = stored.place->relative_path,
                     .offset = stored.place->offset,
                     .wanted = std::to_string(stored.place->offset + stored.place->length) + " bytes",
                     .found = std::to_string(file_.size()) + " bytes"});
      }
    }
    for (size_t i = 0; i < items.size();) {
      if (is_packable(items[i])) {
        i += read_packed(items.subspan(i));
      } else {
        in_context(items[i], [&] { read_one(items[i]); });
        ++i;
      }
    }
  }

 private:
  template <class Body>
  void in_context(const Stored& stored, const Body& body) {
    with_error_context(
        [&] {
          return ErrorContext{
              .key = stored.index->fqn, .file = stored.place->relative_path, .offset = stored.place->offset};
        },
        body);
  }

  static bool is_packable(const Stored& stored) {
    return stored.place->length <= kPackedItem &&
           (stored.tensor == nullptr || stored.wanted_bytes >= stored.element_bytes);
  }

  /// Reads the first item and those after it that fit into the same call; returns how many.
  size_t read_packed(std::span<const Stored> items) {
    const uint64_t begin = items[0].place->offset;
    uint64_t end = begin + items[0].place->length;
    size_t count = 1;
    for (; count < items.size() && is_packable(items[count]); ++count) {
      const StorageInfo& place = *items[count].place;
      if (place.offset < end || place.offset - end > kPackedGap || place.offset + place.length - begin > kPackedRead) {
        break;
      }
      end = place.offset + place.length;
    }
    packed_.resize(static_cast<size_t>(end - begin));
    with_error_context({.key = items[0].index->fqn, .file = items[0].place->relative_path, .offset = begin},
                       [&] { file_.read(begin, packed_, "items"); });
    for (const Stored& stored : items.first(count)) {
      const ByteSpan bytes = ByteSpan(packed_).subspan(static_cast<size_t>(stored.place->offset - begin),
                                                       static_cast<size_t>(stored.place->length));
      in_context(stored, [&] { take_packed(stored, bytes); });
      on_read_(stored.tensor != nullptr ? stored.wanted_bytes : stored.place->length);
    }
    return count;
  }

  void take_packed(const Stored& stored, ByteSpan bytes) {
    if (stored.tensor == nullptr) {
      take_value(stored, bytes);
      return;
    }
    // Most are laid out as this library and the current PyTorch do it; then there is nothing to parse.
    const auto known = frames_.match(stored.tensor->properties.dtype, stored.chunk->sizes, bytes);
    const TensorItem item = known ? *known : read_header(stored, MemorySource(bytes));
    const ByteSpan payload =
        bytes.subspan(static_cast<size_t>(item.payload_offset), static_cast<size_t>(item.payload_size));
    if (verify_records_ && item.crc32) require_crc(*item.crc32, crc32(payload));
    counters_.bytes_payload += payload.size();
    for (const ReadItem* want : stored.wants) {
      const MutableTensorView view = resolve(planner_, *want, item.dtype);
      const Box region{want->storage_offsets, want->lengths};
      const ByteRange range = payload_range(item, region);
      deliver(item, payload.subspan(static_cast<size_t>(range.begin), static_cast<size_t>(range.end - range.begin)),
              region, view);
      counters_.bytes_staged += range.end - range.begin;
      planner_.commit_tensor(*want, view);
    }
  }

  void take_value(const Stored& stored, ByteSpan bytes) {
    if (verify_records_) verify_archive(MemorySource(bytes));
    for (const ReadItem* want : stored.wants) planner_.load_bytes(*want, bytes);
  }

  void read_one(const Stored& stored) {
    if (stored.tensor == nullptr) {
      Bytes bytes(static_cast<size_t>(stored.place->length));
      file_.read(stored.place->offset, bytes, "value");
      take_value(stored, bytes);
      on_read_(bytes.size());
      return;
    }
    const TensorItem item = read_header(stored, FileSource(file_, *stored.place));
    const bool verify = verify_records_ && item.crc32 && stored.wanted_bytes >= stored.element_bytes;
    PayloadSum sum;
    if (item.is_dense() && !item.conj && !item.neg) {
      DirectReader reader(file_, stored, item, options_.coalesce_gap, verify ? &sum : nullptr, counters_, on_read_);
      std::vector<MutableTensorView> views;
      views.reserve(stored.wants.size());
      for (const ReadItem* want : stored.wants) {
        views.push_back(resolve(planner_, *want, item.dtype));
        reader.read(*want, views.back());
      }
      reader.flush();
      check(item, verify, sum);
      for (size_t i = 0; i < views.size(); ++i) planner_.commit_tensor(*stored.wants[i], views[i]);
      return;
    }
    for (const ReadItem* want : stored.wants) {
      const MutableTensorView view = resolve(planner_, *want, item.dtype);
      const Box region{want->storage_offsets, want->lengths};
      const ByteRange range = payload_range(item, region);
      Bytes payload(static_cast<size_t>(range.end - range.begin));
      if (!payload.empty()) {
        file_.read(stored.place->offset + item.payload_offset + range.begin, payload, "elements of an item");
      }
      if (verify) sum.add(range.begin, payload);
      counters_.bytes_payload += payload.size();
      counters_.bytes_staged += payload.size();
      deliver(item, payload, region, view);
      // Verified before the last destination is handed over.
      if (want == stored.wants.back()) check(item, verify, sum);
      planner_.commit_tensor(*want, view);
      on_read_(payload.size());
    }
  }

  static void check(const TensorItem& item, bool verify, PayloadSum& sum) {
    if (!verify) return;
    if (const auto crc = sum.whole(item.payload_size)) require_crc(*item.crc32, *crc);
  }

  TensorItem read_header(const Stored& stored, const ByteSource& source) {
    const TensorItem item = read_tensor_item(source);
    const DType dtype = stored.tensor->properties.dtype;
    if (item.dtype != dtype || item.sizes != stored.chunk->sizes) {
      throw Error(ErrorCode::kCorruptData, "the stored tensor is not the one of the catalogue",
                  {.wanted = std::string(to_string(dtype)) + " " + to_string(stored.chunk->sizes),
                   .found = std::string(to_string(item.dtype)) + " " + to_string(item.sizes)});
    }
    return item;
  }

  CountedFile file_;
  const bool verify_records_;  // by their zip CRC-32
  LoadPlanner& planner_;
  const FileSystemReaderOptions& options_;
  ReadCounters& counters_;
  std::function<void(uint64_t)> on_read_;
  ArchiveFrames frames_{TensorArchiveOptions{}.alignment};
  Bytes packed_;
};

}  // namespace

FileSystemReader::FileSystemReader(std::string directory, FileSystemReaderOptions options, FileSystem& file_system)
    : directory_(std::move(directory)), options_(options), file_system_(file_system) {}

FileSystemReader::~FileSystemReader() = default;

Metadata FileSystemReader::read_metadata() {
  const std::string path = join_path(directory_, kMetadataFileName);
  if (!file_system_.status(path)) {
    const std::string directory = directory_.empty() ? "." : directory_;
    const auto status = file_system_.status(directory);
    if (!status) throw Error(ErrorCode::kNotFound, "there is no such checkpoint directory", {.file = directory});
    if (status->kind == FileKind::kRegular) {
      throw Error(ErrorCode::kNotFound, "a checkpoint is a directory, and this is a file", {.file = directory});
    }
    if (file_system_.status(join_path(directory_, "__0.metadata"))) {
      throw Error(ErrorCode::kUnsupported,
                  "the checkpoint was saved by each rank alone (use_collectives=False): it has no common catalogue",
                  {.file = directory, .wanted = kMetadataFileName, .found = "__0.metadata"});
    }
    throw Error(ErrorCode::kNotFound, "the directory holds no checkpoint, or one that was never finished",
                {.file = directory, .wanted = kMetadataFileName});
  }
  return with_error_context({.file = path}, [&] {
    return decode_metadata(file_system_.read_file(path, kMaxMetadataBytes), options_.verify_checksums);
  });
}

void FileSystemReader::set_up_storage_reader(const Metadata& metadata) {
  metadata_ = &metadata;
  sidecars_ = std::make_unique<Sidecars>(directory_, file_system_, metadata);
  counters_ = {};
}

void FileSystemReader::read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) {
  if (metadata_ == nullptr) {
    throw Error(ErrorCode::kFailedPrecondition, "read_data before set_up_storage_reader", {.rank = context.rank});
  }
  with_error_context({.rank = context.rank}, [&] {
    // What is wanted of each stored item, in the plan's order.
    std::vector<std::pair<size_t, const ReadItem*>> numbered;
    numbered.reserve(plan.items.size());
    for (const ReadItem& want : plan.items) {
      if (want.is_bytes || volume(want.lengths) != 0) {
        numbered.emplace_back(position_of(*metadata_, want.storage_index), &want);
        continue;
      }
      const StorageMetadata* entry = metadata_->state_dict_metadata.find(want.storage_index.fqn);
      const auto* tensor = entry != nullptr ? std::get_if<TensorStorageMetadata>(entry) : nullptr;
      if (tensor != nullptr) planner.commit_tensor(want, resolve(planner, want, tensor->properties.dtype));
    }
    std::ranges::stable_sort(numbered, {}, [](const auto& pair) { return pair.first; });
    std::vector<const ReadItem*> wants;
    wants.reserve(numbered.size());
    for (const auto& [position, want] : numbered) wants.push_back(want);

    std::vector<Stored> items;
    uint64_t total = 0;
    for (size_t begin = 0, end = 0; begin < numbered.size(); begin = end) {
      while (end < numbered.size() && numbered[end].first == numbered[begin].first) ++end;
      Stored stored = stored_at(*metadata_, numbered[begin].first);
      stored.wants = std::span(wants).subspan(begin, end - begin);
      if (stored.tensor == nullptr) total += stored.place->length;
      for (const ReadItem* want : stored.wants) {
        if (want->is_bytes != (stored.tensor == nullptr)) {
          throw Error(ErrorCode::kInternal, "the plan and the catalogue differ on what is a tensor",
                      {.key = want->storage_index.fqn});
        }
        if (stored.tensor == nullptr) continue;
        if (!is_inside({want->storage_offsets, want->lengths}, stored.chunk->sizes)) {
          throw Error(ErrorCode::kInternal, "the plan wants a region outside its stored chunk",
                      {.key = want->storage_index.fqn,
                       .wanted = to_string(Box{want->storage_offsets, want->lengths}),
                       .found = to_string(stored.chunk->sizes)});
        }
        const auto bytes = static_cast<uint64_t>(volume(want->lengths) * element_size(stored.tensor->properties.dtype));
        stored.wanted_bytes += bytes;
        counters_.bytes_needed += bytes;
        total += bytes;
      }
      items.push_back(stored);
    }
    std::ranges::stable_sort(items, [](const Stored& a, const Stored& b) {
      const int order = a.place->relative_path.compare(b.place->relative_path);
      return order != 0 ? order < 0 : a.place->offset < b.place->offset;
    });

    uint64_t done = 0;
    const auto on_read = [&](uint64_t bytes) {
      done += bytes;
      if (context.progress) context.progress({"read", std::min(done, total), total});
    };
    for (size_t begin = 0; begin < items.size();) {
      size_t end = begin;
      const std::string& path = items[begin].place->relative_path;
      while (end < items.size() && items[end].place->relative_path == path) ++end;
      const ErrorContext context_of_file{.key = items[begin].index->fqn, .file = path};
      const auto file =
          with_error_context(context_of_file, [&] { return file_system_.open_beneath(directory_, path); });
      const SidecarFile* sums = with_error_context(
          context_of_file, [&] { return options_.verify_checksums ? sidecars_->of_file(path) : nullptr; });
      counters_.bytes_sidecars = sidecars_->bytes_read();
      auto load = with_error_context(context_of_file,
                                     [&] { return FileLoad(*file, sums, planner, options_, counters_, on_read); });
      load.read(std::span(items).subspan(begin, end - begin));
      begin = end;
    }
  });
}

}  // namespace reshard
