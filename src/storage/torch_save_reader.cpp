// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/torch_save_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <unordered_map>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "reshard/format/torch_file.h"

namespace reshard {
namespace {

constexpr uint64_t kStageBytes = 8 << 20;   // most bytes of a read that does not go straight to its destination
constexpr uint64_t kSmallRange = 64 << 10;  // read whole, however little of it is wanted
constexpr uint64_t kReadBytes = 32 << 20;   // most bytes of one read, so that progress shows
// Tensors of a file may share and expand storages; together they unfold to no more than so many bytes.
constexpr uint64_t kUnfoldedPerByte = 16;
constexpr uint64_t kFreelyUnfolded = 64 << 20;

std::string base_name(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

class FileSource final : public ByteSource {
 public:
  explicit FileSource(const RandomAccessFile& file) : file_(file) {}
  uint64_t size() const override { return file_.size(); }
  void read(uint64_t offset, MutableByteSpan out) const override {
    file_.read_exactly(offset, out, "a record of the archive");
  }

 private:
  const RandomAccessFile& file_;
};

/// Refuses by name what is no zip archive but was written by some torch.save.
void refuse_other_formats(const RandomAccessFile& file) {
  std::array<std::byte, 6> head{};
  if (file.size() < head.size()) return;
  file.read_exactly(0, head, "head of the file");
  constexpr std::array<uint8_t, 6> kMagic{0x80, 0x02, 0x8A, 0x0A, 0x6C, 0xFC};  // a pickle of torch's magic number
  if (std::memcmp(head.data(), kMagic.data(), kMagic.size()) == 0) {
    throw Error(ErrorCode::kUnsupported, "the file is in the format of torch before 1.6",
                {.wanted = "a zip archive (load the file with torch and save it again)"});
  }
}

/// How the bytes at a place become the row-major elements of the tensor, if they are not just these.
std::vector<std::string> transforms_of(const TensorItem& item) {
  std::vector<std::string> transforms;
  if (!is_contiguous(item.sizes, item.strides)) {
    transforms.push_back("as_strided(" + to_string(item.sizes) + ", " + to_string(item.strides) + ", " +
                         std::to_string(item.storage_offset) + ")");
  }
  if (item.conj) transforms.emplace_back("conj");
  if (item.neg) transforms.emplace_back("neg");
  return transforms;
}

}  // namespace

struct TorchSaveReader::Contents {
  /// How far a storage was read from its front without a gap, and the CRC-32 so far.
  struct Run {
    uint64_t length = 0;
    uint32_t crc = 0;
  };
  explicit Contents(std::unique_ptr<RandomAccessFile> opened) : file(std::move(opened)), source(*file) {}

  std::unique_ptr<RandomAccessFile> file;
  FileSource source;
  ValueArchive archive;
  std::vector<StateLeaf> leaves;
  std::unordered_map<std::string, size_t> index;  // of the leaves
  Metadata metadata;
  std::map<uint64_t, Run> runs;  // by the position of the storage
};

namespace {

Metadata metadata_of(const std::string& file, uint64_t file_size, const ValueArchive& archive,
                     const std::vector<StateLeaf>& leaves) {
  Metadata metadata;
  const SharedString name(base_name(file));
  auto& paths = metadata.planner_data.emplace();
  uint64_t unfolded = 0;
  const uint64_t most =
      checked_add(kFreelyUnfolded, checked_mul(kUnfoldedPerByte, file_size, "size of the file"), "size of the file");
  for (const StateLeaf& leaf : leaves) {
    paths.insert(leaf.fqn, leaf.path);
    StorageInfo place{.relative_path = name, .offset = 0, .length = 0, .transform_descriptors = {}};
    if (!leaf.tensor) {
      metadata.state_dict_metadata.insert(leaf.fqn, BytesStorageMetadata{});
      place.offset = archive.pickled().offset;
      place.length = archive.pickled().size;
      metadata.storage_data.insert({leaf.fqn, {}, {}}, std::move(place));
      continue;
    }
    const TensorItem& item = *leaf.tensor;
    const auto size = static_cast<uint64_t>(volume(item.sizes) * element_size(item.dtype));
    unfolded = checked_add(unfolded, size, "size of all tensors");
    if (unfolded > most) {
      throw Error(ErrorCode::kUnsupported, "the tensors unfold to far more bytes than the file has",
                  {.key = leaf.fqn, .wanted = "at most " + std::to_string(most), .found = std::to_string(unfolded)});
    }
    TensorStorageMetadata tensor{.properties = {.dtype = item.dtype, .requires_grad = item.requires_grad},
                                 .size = item.sizes,
                                 .chunks = {whole_box(item.sizes)}};
    const ByteRange range = payload_range(item, tensor.chunks[0]);
    place.offset = item.payload_offset + range.begin;
    place.length = range.end - range.begin;
    place.transform_descriptors = transforms_of(item);
    metadata.storage_data.insert({leaf.fqn, tensor.chunks[0].offsets, 0}, std::move(place));
    metadata.state_dict_metadata.insert(leaf.fqn, std::move(tensor));
  }
  return metadata;
}

}  // namespace

TorchSaveReader::TorchSaveReader(std::string file, TorchSaveReaderOptions options, FileSystem& file_system)
    : file_(std::move(file)), options_(options), file_system_(file_system) {}
TorchSaveReader::~TorchSaveReader() = default;

const TorchSaveReader::Contents& TorchSaveReader::contents() {
  if (contents_) return *contents_;
  return with_error_context({.file = file_}, [&]() -> const Contents& {
    if (!file_system_.status(file_)) throw Error(ErrorCode::kNotFound, "there is no such file");
    auto contents = std::make_unique<Contents>(file_system_.open(file_));
    refuse_other_formats(*contents->file);
    contents->archive = decode_value_archive(contents->source);
    contents->leaves = flatten_archive(contents->archive);
    for (size_t i = 0; i < contents->leaves.size(); ++i) contents->index[contents->leaves[i].fqn] = i;
    contents->metadata = metadata_of(file_, contents->file->size(), contents->archive, contents->leaves);
    contents_ = std::move(contents);
    return *contents_;
  });
}

Metadata TorchSaveReader::read_metadata() { return contents().metadata; }

void TorchSaveReader::set_up_storage_reader(const Metadata& metadata) {
  const Metadata& mine = contents().metadata;
  if (mine.state_dict_metadata != metadata.state_dict_metadata || mine.storage_data != metadata.storage_data) {
    throw Error(ErrorCode::kFailedPrecondition, "the file is not the one that the catalogue was read from",
                {.file = file_});
  }
  counters_ = {};
}

namespace {

/// Reads regions of one tensor of the file.
class RegionReader {
 public:
  using OnRead = std::function<void(uint64_t at, ByteSpan bytes)>;  // of the storage
  RegionReader(const RandomAccessFile& file, const TensorItem& item, ReadCounters& counters, OnRead on_read,
               std::function<void(uint64_t)> on_done)
      : file_(file),
        item_(item),
        counters_(counters),
        on_read_(std::move(on_read)),
        on_done_(std::move(on_done)),
        size_(element_size(item.dtype)) {}

  /// `region` of the tensor goes to `to`, whose strides are `strides`.
  void read(const Box& region, std::byte* to, const Dims& strides) {
    const auto needed = static_cast<uint64_t>(volume(region.sizes) * size_);
    if (needed == 0) return;
    const ByteRange range = payload_range(item_, region);
    const uint64_t length = range.end - range.begin;
    const bool dense = length == needed && is_contiguous(region.sizes, item_.strides) && !item_.conj && !item_.neg;
    if (dense && is_contiguous(region.sizes, strides) && needed <= kReadBytes) {
      const MutableByteSpan out(to, static_cast<size_t>(needed));
      read_bytes(range, out);
      if (item_.dtype == DType::kBool) normalize_bools(out);
      on_done_(needed);
      return;
    }
    const bool stage = length <= kSmallRange || (length <= kStageBytes && length <= 2 * needed);
    if (stage && needed <= kStageBytes) {
      Bytes payload(static_cast<size_t>(length));
      read_bytes(range, payload);
      Bytes elements(static_cast<size_t>(needed));
      copy_region(item_, payload, region, elements);
      copy_strided(elements.data(), contiguous_strides(region.sizes), to, strides, region.sizes, size_);
      counters_.bytes_staged += needed;
      on_done_(needed);
      return;
    }
    // Halve it along the dimension that lies widest apart in the file.
    size_t widest = region.sizes.size();
    for (size_t d = 0; d < region.sizes.size(); ++d) {
      if (region.sizes[d] < 2) continue;
      if (widest == region.sizes.size() || item_.strides[d] > item_.strides[widest]) widest = d;
    }
    const int64_t half = region.sizes[widest] / 2;
    Box part = region;
    part.sizes[widest] = half;
    read(part, to, strides);
    part.offsets[widest] += half;
    part.sizes[widest] = region.sizes[widest] - half;
    read(part, to + half * strides[widest] * size_, strides);
  }

 private:
  void read_bytes(const ByteRange& range, MutableByteSpan out) {
    file_.read_exactly(item_.payload_offset + range.begin, out, "elements of a tensor");
    ++counters_.reads;
    counters_.bytes_read += out.size();
    counters_.bytes_payload += out.size();
    on_read_(range.begin, out);
  }

  const RandomAccessFile& file_;
  const TensorItem& item_;
  ReadCounters& counters_;
  OnRead on_read_;
  std::function<void(uint64_t)> on_done_;
  const int64_t size_;
};

}  // namespace

void TorchSaveReader::read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) {
  if (!contents_) {
    throw Error(ErrorCode::kFailedPrecondition, "read_data before set_up_storage_reader", {.rank = context.rank});
  }
  Contents& contents = *contents_;
  uint64_t done = 0;
  uint64_t total = 0;
  const auto leaf_of = [&](const ReadItem& want) -> const StateLeaf& {
    const auto it = contents.index.find(want.storage_index.fqn);
    if (it == contents.index.end() || contents.leaves[it->second].tensor.has_value() == want.is_bytes) {
      throw Error(ErrorCode::kInternal, "the plan wants what the file does not hold", {.key = want.storage_index.fqn});
    }
    return contents.leaves[it->second];
  };
  for (const ReadItem& want : plan.items) {
    const StateLeaf& leaf = leaf_of(want);
    if (want.is_bytes) continue;
    if (!is_inside({want.storage_offsets, want.lengths}, leaf.tensor->sizes)) {
      throw Error(ErrorCode::kInternal, "the plan wants a region outside its tensor", {.key = leaf.fqn});
    }
    total += static_cast<uint64_t>(volume(want.lengths) * element_size(leaf.tensor->dtype));
  }
  counters_.bytes_needed += total;
  const auto on_done = [&](uint64_t bytes) {
    done += bytes;
    if (context.progress) context.progress({"read", std::min(done, total), total});
  };

  for (const ReadItem& want : plan.items) {
    const StateLeaf& leaf = leaf_of(want);
    with_error_context([&] { return ErrorContext{.rank = context.rank, .key = leaf.fqn, .file = file_}; },
                       [&] {
                         if (want.is_bytes) {
                           const Bytes archive = extract_value(contents.archive, leaf.value, contents.source);
                           counters_.bytes_read += archive.size();
                           planner.load_bytes(want, archive);
                           return;
                         }
                         const TensorItem& item = *leaf.tensor;
                         const MutableTensorView view = planner.resolve_tensor(want);
                         if (view.dtype != item.dtype || view.sizes != want.lengths) {
                           throw Error(ErrorCode::kInternal, "destination is not as planned",
                                       {.wanted = std::string(to_string(item.dtype)) + " " + to_string(want.lengths),
                                        .found = std::string(to_string(view.dtype)) + " " + to_string(view.sizes)});
                         }
                         const auto on_read = [&](uint64_t at, ByteSpan bytes) {
                           if (!options_.verify_checksums || !item.crc32) return;
                           Contents::Run& run = contents.runs[item.payload_offset];
                           if (at != run.length) return;
                           run.crc = crc32(bytes, run.crc);
                           run.length += bytes.size();
                           if (run.length == item.payload_size && run.crc != *item.crc32) {
                             throw Error(ErrorCode::kCorruptData, "the stored elements do not match their CRC-32",
                                         {.offset = item.payload_offset,
                                          .wanted = std::to_string(*item.crc32),
                                          .found = std::to_string(run.crc)});
                           }
                         };
                         RegionReader(*contents.file, item, counters_, on_read, on_done)
                             .read({want.storage_offsets, want.lengths}, view.data, view.strides);
                         planner.commit_tensor(want, view);
                       });
  }
}

}  // namespace reshard
