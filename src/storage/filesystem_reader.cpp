// SPDX-License-Identifier: BSD-3-Clause
// Reads what a plan wants and nothing else. Items are taken file by file in the order of their offsets, each in one of
// four ways:
//
//   packed    small and wanted whole: neighbours are read together, then parsed and copied from memory
//   direct    row-major elements: the byte runs of the wanted box go straight to their places
//   staged    anything else (stored transposed or lazily conjugated; a destination of tiny runs): through a buffer
//   decoded   with a stream transform: front to back through a buffer, up to the last element that is wanted
#include <algorithm>
#include <mutex>
#include <span>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "reshard/storage/filesystem.h"
#include "storage/archive_frames.h"
#include "storage/direct_reader.h"
#include "storage/parallel.h"
#include "storage/stored_items.h"
#include "storage/transformed_item.h"

namespace reshard {
namespace {

constexpr uint64_t kPackedItem = 64 << 10;  // longest item that is read packed
constexpr uint64_t kPackedRead = 1 << 20;   // most bytes, where the core's cache shall keep them until they are parsed,
constexpr uint64_t kFarPackedRead = 4 << 20;  // and where fewer calls count for more; and
constexpr uint64_t kPackedGap = 4 << 10;      // longest gap of a packed read
constexpr uint64_t kDecodedBlock = 1 << 20;   // elements decoded at a time

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

void require_crc(uint32_t wanted, uint32_t found) {
  if (wanted == found) return;
  throw Error(ErrorCode::kCorruptData, "the stored elements do not match their CRC-32",
              {.wanted = std::to_string(wanted), .found = std::to_string(found)});
}

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

/// Copies those elements of `region` that are among the elements [begin, begin + n) of a row-major item of `sizes`.
void scatter(ByteSpan elements, int64_t begin, const Dims& sizes, const Box& region, const MutableTensorView& view) {
  const int64_t size = element_size(view.dtype);
  const Dims strides = contiguous_strides(sizes);
  const int64_t end = begin + static_cast<int64_t>(elements.size()) / size;
  for (const Box& box : flat_range_to_boxes(sizes, begin, end)) {
    const auto part = intersect(box, region);
    if (!part) continue;
    int64_t from = -begin;
    int64_t to = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      from += part->offsets[d] * strides[d];
      to += (part->offsets[d] - region.offsets[d]) * view.strides[d];
    }
    copy_strided(elements.data() + from * size, strides, view.data + to * size, view.strides, part->sizes, size);
  }
}

/// One thread's walk over items of one data file.
class FileLoad {
 public:
  FileLoad(std::shared_ptr<const SharedFile> file, LoadPlanner& planner, const FileSystemReaderOptions& options,
           ReadCounters& counters, PartlyRead& partly_read, std::mutex& values, std::function<void(uint64_t)> on_read)
      : shared_(std::move(file)),
        file_(shared_->counted()),
        verify_records_(options.verify_checksums && !file_.is_checked()),
        planner_(planner),
        options_(options),
        counters_(counters),
        partly_read_(partly_read),
        values_(values),
        packed_read_(std::clamp(file_.preferred_read_bytes(), kPackedRead, kFarPackedRead)),
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
      if (!items[i].place->transform_descriptors.empty()) {
        in_context(items[i], [&] { read_transformed(items[i]); });
        ++i;
      } else if (is_packable(items[i])) {
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
    return stored.place->length <= kPackedItem && stored.place->transform_descriptors.empty() &&
           (stored.tensor == nullptr || stored.wanted_bytes >= stored.element_bytes);
  }

  /// Reads the first item and those after it that fit into the same call; returns how many.
  size_t read_packed(std::span<const Stored> items) {
    const uint64_t begin = items[0].place->offset;
    uint64_t end = begin + items[0].place->length;
    size_t count = 1;
    for (; count < items.size() && is_packable(items[count]); ++count) {
      const StorageInfo& place = *items[count].place;
      if (place.offset < end || place.offset - end > kPackedGap || place.offset + place.length - begin > packed_read_) {
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
    add_to(counters_.bytes_payload, payload.size());
    for (const ReadItem* want : stored.wants) {
      const MutableTensorView view = resolve_destination(planner_, *want, item.dtype);
      const Box region{want->storage_offsets, want->lengths};
      const ByteRange range = payload_range(item, region);
      deliver(item, payload.subspan(static_cast<size_t>(range.begin), static_cast<size_t>(range.end - range.begin)),
              region, view);
      add_to(counters_.bytes_staged, range.end - range.begin);
      planner_.commit_tensor(*want, view);
    }
  }

  void take_value(const Stored& stored, ByteSpan bytes) {
    if (verify_records_) verify_archive(MemorySource(bytes));
    const std::lock_guard lock(values_);
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
      DirectReader reader(file_, options_.coalesce_gap, verify ? &sum : nullptr, counters_, on_read_);
      const DenseElements elements{stored.place->offset + item.payload_offset +
                                       static_cast<uint64_t>(item.storage_offset * element_size(item.dtype)),
                                   item.dtype, item.sizes};
      std::vector<MutableTensorView> views;
      views.reserve(stored.wants.size());
      for (const ReadItem* want : stored.wants) {
        views.push_back(resolve_destination(planner_, *want, item.dtype));
        reader.add(elements, {want->storage_offsets, want->lengths}, views.back());
      }
      reader.flush();
      check(stored, item, verify, sum);
      for (size_t i = 0; i < views.size(); ++i) planner_.commit_tensor(*stored.wants[i], views[i]);
      return;
    }
    for (const ReadItem* want : stored.wants) {
      const MutableTensorView view = resolve_destination(planner_, *want, item.dtype);
      const Box region{want->storage_offsets, want->lengths};
      const ByteRange range = payload_range(item, region);
      Bytes payload(static_cast<size_t>(range.end - range.begin));
      if (!payload.empty()) {
        file_.read(stored.place->offset + item.payload_offset + range.begin, payload, "elements of an item");
      }
      if (verify) sum.add(stored.place->offset + item.payload_offset + range.begin, payload);
      add_to(counters_.bytes_payload, payload.size());
      add_to(counters_.bytes_staged, payload.size());
      deliver(item, payload, region, view);
      // Verified before the last destination is handed over.
      if (want == stored.wants.back()) check(stored, item, verify, sum);
      planner_.commit_tensor(*want, view);
      on_read_(payload.size());
    }
  }

  TransformedItem decode(const Stored& stored, uint64_t limit) const {
    return {shared_, *stored.place, options_.extension_registry, limit};
  }

  void read_transformed(const Stored& stored) {
    if (stored.tensor == nullptr) {
      const Bytes bytes = decode(stored, options_.max_transformed_value_bytes).read_rest();
      within_decoded_item([&] { take_value(stored, bytes); });
      on_read_(stored.place->length);
      return;
    }
    if (!stream_transformed(stored)) {
      const Bytes bytes = decode(stored, largest_archive(stored.element_bytes)).read_rest();
      within_decoded_item([&] { take_packed(stored, bytes); });
    }
    on_read_(stored.wanted_bytes);
  }

  /// False if the item has to be read whole; nothing is committed then.
  bool stream_transformed(const Stored& stored) {
    const DType dtype = stored.tensor->properties.dtype;
    const Dims& sizes = stored.chunk->sizes;
    TensorArchiveFrame* frame = frames_.find(dtype, sizes);
    if (frame == nullptr) return false;
    TensorItem dense;
    dense.dtype = dtype;
    dense.sizes = sizes;
    dense.strides = contiguous_strides(sizes);
    ByteRange range{stored.element_bytes, 0};  // of all that is wanted
    for (const ReadItem* want : stored.wants) {
      const ByteRange wanted = payload_range(dense, {want->storage_offsets, want->lengths});
      range = {std::min(range.begin, wanted.begin), std::max(range.end, wanted.end)};
    }
    auto elements = partly_read_.take(*stored.place, range.begin);
    if (!elements) {
      auto opened = TransformedTensor::open(decode(stored, largest_archive(stored.element_bytes)), *frame,
                                            options_.verify_checksums);
      if (!opened) return false;
      elements.emplace(std::move(*opened));
    }
    std::vector<MutableTensorView> views;
    views.reserve(stored.wants.size());
    for (const ReadItem* want : stored.wants) views.push_back(resolve_destination(planner_, *want, dtype));
    while (elements->position() < range.end) {
      const uint64_t begin = elements->position();
      block_.resize(static_cast<size_t>(std::min(range.end - begin, kDecodedBlock)));
      elements->read(block_);
      add_to(counters_.bytes_payload, block_.size());
      on_read_(0);
      if (dtype == DType::kBool) normalize_bools(block_);
      if (begin + block_.size() <= range.begin) continue;
      for (size_t i = 0; i < views.size(); ++i) {
        scatter(block_, static_cast<int64_t>(begin) / element_size(dtype), sizes,
                {stored.wants[i]->storage_offsets, stored.wants[i]->lengths}, views[i]);
      }
    }
    add_to(counters_.bytes_staged, stored.wanted_bytes);
    if (elements->position() < stored.element_bytes) {
      partly_read_.put(std::move(*elements));
    } else if (options_.verify_checksums && !elements->ends_well(*frame)) {
      return false;
    }
    for (size_t i = 0; i < views.size(); ++i) planner_.commit_tensor(*stored.wants[i], views[i]);
    return true;
  }

  static void check(const Stored& stored, const TensorItem& item, bool verify, PayloadSum& sum) {
    if (!verify) return;
    const auto crc = sum.whole(stored.place->offset + item.payload_offset, item.payload_size);
    if (crc) require_crc(*item.crc32, *crc);
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

  const std::shared_ptr<const SharedFile> shared_;
  const CountedFile& file_;
  const bool verify_records_;  // by their zip CRC-32
  LoadPlanner& planner_;
  const FileSystemReaderOptions& options_;
  ReadCounters& counters_;
  PartlyRead& partly_read_;
  std::mutex& values_;  // held while the planner takes one
  const uint64_t packed_read_;
  std::function<void(uint64_t)> on_read_;
  ArchiveFrames frames_{TensorArchiveOptions{}.alignment};
  Bytes packed_;
  Bytes block_;
};

}  // namespace

FileSystemReader::FileSystemReader(std::string directory, FileSystemReaderOptions options, FileSystem& file_system)
    : directory_(std::move(directory)), options_(std::move(options)), file_system_(file_system) {
  require_thread_count(options_.thread_count, "FileSystemReader");
}

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
  partly_read_ = std::make_unique<PartlyRead>();
}

void FileSystemReader::read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) {
  if (metadata_ == nullptr) {
    throw Error(ErrorCode::kFailedPrecondition, "read_data before set_up_storage_reader", {.rank = context.rank});
  }
  with_error_context({.rank = context.rank}, [&] {
    const StoredItems items(plan, *metadata_, planner, [&](const std::vector<std::string>& descriptors) {
      options_.extension_registry.from_descriptor_list(descriptors);
    });
    counters_.bytes_needed += items.bytes_wanted();
    const uint64_t total = items.bytes_planned();
    uint64_t done = 0;
    std::mutex progress;
    std::mutex values;
    const auto on_read = [&](uint64_t bytes) {
      const std::lock_guard lock(progress);
      done += bytes;
      if (context.progress) context.progress({"read", std::min(done, total), total});
    };
    for_each_batch(items, options_.thread_count, [&](const std::string& path, std::span<const Stored> batch) {
      const ErrorContext context_of_file{.key = batch[0].index->fqn, .file = path};
      auto file = with_error_context(context_of_file, [&] { return file_system_.open_beneath(directory_, path); });
      auto sums = with_error_context(context_of_file,
                                     [&] { return options_.verify_checksums ? sidecars_->of_file(path) : nullptr; });
      auto shared = with_error_context(context_of_file, [&] {
        return std::make_shared<const SharedFile>(std::move(file), std::move(sums), counters_);
      });
      FileLoad(std::move(shared), planner, options_, counters_, *partly_read_, values, on_read).read(batch);
    });
    counters_.bytes_sidecars = sidecars_->bytes_read();
  });
}

}  // namespace reshard
