// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/verify.h"

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "reshard/core/box.h"
#include "reshard/format/crc32.h"
#include "reshard/format/sidecar.h"
#include "reshard/format/torch_archive.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/hugging_face.h"
#include "reshard/storage/torch_save_reader.h"
#include "storage/archive_frames.h"
#include "storage/checked_file.h"
#include "storage/chunks.h"
#include "storage/transformed_item.h"

namespace reshard {
namespace {

constexpr uint64_t kScanBytes = 4 << 20;
constexpr uint64_t kDecodedBytes = 1 << 20;

struct Item {
  const MetadataIndex* index;
  const StorageInfo* place;
};

class FileRange final : public ByteSource {
 public:
  FileRange(const RandomAccessFile& file, const StorageInfo& place) : file_(file), place_(place) {}
  uint64_t size() const override { return place_.length; }
  void read(uint64_t offset, MutableByteSpan out) const override {
    file_.read_exactly(place_.offset + offset, out, "item");
  }

 private:
  const RandomAccessFile& file_;
  const StorageInfo& place_;
};

class Verifier {
 public:
  Verifier(const std::string& directory, FileSystem& file_system, const ProgressFn& progress,
           const FileSystemReaderOptions& options)
      : directory_(directory), file_system_(file_system), progress_(progress), options_(options) {}

  VerifyReport run() {
    metadata_ = FileSystemReader(directory_, {}, file_system_).read_metadata();
    check_tiling();
    for (const auto& [index, place] : metadata_.storage_data) {
      files_[place.relative_path].push_back({&index, &place});
      report_.bytes += place.length;
    }
    report_.items = metadata_.storage_data.size();
    report_.files = files_.size();
    if (metadata_.sidecars) {
      Sidecars sidecars(directory_, file_system_, metadata_);
      for (size_t rank = 0; rank < metadata_.sidecars->size(); ++rank) {
        guard({}, [&] { check_rank(static_cast<int64_t>(rank), sidecars); });
      }
    }
    for (auto& [path, items] : files_) {
      if (checked_.contains(path)) continue;
      const auto rank = sidecar_rank(metadata_, path);
      if (metadata_.sidecars && !(rank && unread_sidecars_.contains(*rank))) {
        problem("no sidecar speaks of this file", {.file = path});
      }
      check_file(path, items, nullptr);
    }
    guard({}, [&] { note_other_files(); });
    if (unsummed_ != 0) {
      report_.notes.push_back(std::to_string(unsummed_) + " zip records have no CRC-32: their bytes are not verified");
    }
    return std::move(report_);
  }

 private:
  template <class Body>
  void guard(const ErrorContext& context, const Body& body) {
    try {
      with_error_context(context, body);
    } catch (const Error& error) {
      report_.problems.push_back(error);
    }
  }
  void problem(const std::string& message, ErrorContext context) {
    report_.problems.emplace_back(ErrorCode::kCorruptData, message, std::move(context));
  }

  void check_tiling() {
    for (const auto& [fqn, entry] : metadata_.state_dict_metadata) {
      const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
      if (tensor == nullptr) {
        ++report_.values;
        continue;
      }
      ++report_.tensors;
      guard({.key = fqn}, [&] {
        if (const auto error = check_exact_tiling(tensor->size, tensor->chunks)) {
          throw Error(ErrorCode::kCorruptData, to_string(*error, tensor->chunks));
        }
      });
    }
  }

  /// One rank's sidecar, and the files that it speaks of.
  void check_rank(int64_t rank, Sidecars& sidecars) {
    own_sidecars_.insert(sidecar_name(metadata_.storage_meta.value_or(StorageMeta{}).save_id.value_or(""), rank));
    unread_sidecars_.insert(rank);
    const std::shared_ptr<const Sidecars::Files> files = sidecars.of_rank(rank);
    unread_sidecars_.erase(rank);
    for (const auto& [path, sums] : *files) {
      const auto file = files_.find(path);
      if (file == files_.end() || sidecar_rank(metadata_, path) != rank) {
        problem("the sidecar of rank " + std::to_string(rank) + " speaks of a file that is not of that rank's save",
                {.file = path});
        continue;
      }
      checked_.insert(path);
      check_file(path, file->second, &sums);
    }
  }

  void check_file(const std::string& path, std::vector<Item>& items, const SidecarFile* sums) {
    guard({.key = items.front().index->fqn, .file = path}, [&] {
      std::ranges::stable_sort(items, {}, [](const Item& item) { return item.place->offset; });
      auto opened = file_system_.open_beneath(directory_, path);
      const RandomAccessFile& file = *opened;
      const bool intact = sums == nullptr || check_blocks(file, *sums, path, items);
      shared_ = std::make_shared<const SharedFile>(std::move(opened), nullptr, counters_);
      check_items(file, path, items, intact);
    });
  }

  /// Every byte of the file against its sums. False if some differ: each stretch of a few MiB is reported once.
  bool check_blocks(const RandomAccessFile& file, const SidecarFile& sums, const std::string& path,
                    const std::vector<Item>& items) {
    bool intact = true;
    const auto note = [&](const Error& error) {
      const uint64_t at = error.context().offset.value_or(0);
      std::string key;
      for (const Item& item : items) {
        if (item.place->offset <= at && at < item.place->offset + item.place->length) key = item.index->fqn;
      }
      report_.problems.push_back(error.with_context({.key = key, .file = path, .offset = at}));
      intact = false;
    };
    try {
      const CheckedFile checked(file, &sums);
      Bytes bytes;
      for (uint64_t begin = 0; begin < file.size(); begin += bytes.size()) {
        bytes.resize(static_cast<size_t>(checked.block_end(std::min(begin + kScanBytes, file.size())) - begin));
        const MutableByteSpan part(bytes);
        try {
          checked.read(begin, {&part, 1}, "a data file");
        } catch (const Error& error) {
          note(error);
        }
      }
    } catch (const Error& error) {
      note(error);
    }
    return intact;
  }

  void check_items(const RandomAccessFile& file, const std::string& path, const std::vector<Item>& items, bool intact) {
    uint64_t end = 0;
    const Item* previous = nullptr;
    for (const Item& item : items) {
      const uint64_t item_end = item.place->offset + item.place->length;
      // Tied tensors share one place.
      if (previous != nullptr && item.place->offset < end && *item.place != *previous->place) {
        problem("the item overlaps the one before",
                {.key = item.index->fqn, .file = path, .offset = item.place->offset, .found = previous->index->fqn});
      }
      if (item_end > file.size()) {
        problem("the file ends before the item", {.key = item.index->fqn,
                                                  .file = path,
                                                  .offset = item.place->offset,
                                                  .wanted = std::to_string(item_end) + " bytes",
                                                  .found = std::to_string(file.size()) + " bytes"});
      } else if (intact) {  // else the archive of the item that was changed would be reported once more
        guard({.key = item.index->fqn, .file = path, .offset = item.place->offset}, [&] { check_item(file, item); });
      }
      end = std::max(end, item_end);
      previous = &item;
      done_ += item.place->length;
      if (progress_) progress_({"verify", done_, report_.bytes});
    }
  }

  void check_item(const RandomAccessFile& file, const Item& item) {
    const StorageMetadata* entry = metadata_.state_dict_metadata.find(item.index->fqn);
    const auto* tensor = entry != nullptr ? std::get_if<TensorStorageMetadata>(entry) : nullptr;
    const Box* chunk = tensor != nullptr ? find_chunk(*tensor, *item.index) : nullptr;
    if (item.place->transform_descriptors.empty()) {
      check_archive(FileRange(file, *item.place), tensor, chunk);
    } else {
      check_transformed(item, tensor, chunk);
    }
  }

  void check_transformed(const Item& item, const TensorStorageMetadata* tensor, const Box* chunk) {
    uint64_t limit = options_.max_transformed_value_bytes;
    const auto decode = [&] { return TransformedItem(shared_, *item.place, options_.extension_registry, limit); };
    if (tensor != nullptr && chunk != nullptr) {
      const DType dtype = tensor->properties.dtype;
      const auto bytes = static_cast<uint64_t>(volume(chunk->sizes) * element_size(dtype));
      limit = largest_archive(bytes);
      if (TensorArchiveFrame* frame = frames_.find(dtype, chunk->sizes)) {
        if (auto elements = TransformedTensor::open(decode(), *frame, true)) {
          while (elements->position() < bytes) {
            decoded_.resize(static_cast<size_t>(std::min(bytes - elements->position(), kDecodedBytes)));
            elements->read(decoded_);
          }
          if (elements->ends_well(*frame)) return;
        }
      }
    }
    const Bytes archive = decode().read_rest();
    within_decoded_item([&] { check_archive(MemorySource(archive), tensor, chunk); });
  }

  void check_archive(const ByteSource& source, const TensorStorageMetadata* tensor, const Box* chunk) {
    unsummed_ += verify_archive(source).without_crc;
    if (tensor != nullptr) {
      const TensorItem stored = read_tensor_item(source);
      if (chunk == nullptr || stored.dtype != tensor->properties.dtype || stored.sizes != chunk->sizes) {
        throw Error(ErrorCode::kCorruptData, "the stored tensor is not the one of the catalogue",
                    {.wanted = std::string(to_string(tensor->properties.dtype)) + " " +
                               (chunk == nullptr ? "?" : to_string(chunk->sizes)),
                     .found = std::string(to_string(stored.dtype)) + " " + to_string(stored.sizes)});
      }
    } else {
      decode_value_archive(source);
    }
  }

  void note_other_files() {
    for (const std::string& name : file_system_.list(directory_.empty() ? "." : directory_)) {
      if (name == kMetadataFileName || files_.contains(name) || own_sidecars_.contains(name)) continue;
      const char* what = ": not part of the checkpoint";
      if (is_sidecar_name(name)) {
        what = metadata_.sidecars ? ": sidecar of another save than the committed one"
                                  : ": sidecar of a save that PyTorch saved over";
      }
      report_.notes.push_back(name + what);
    }
  }

  const std::string directory_;
  FileSystem& file_system_;
  const ProgressFn& progress_;
  const FileSystemReaderOptions& options_;
  ReadCounters counters_;
  std::shared_ptr<const SharedFile> shared_;  // the one that is being checked
  ArchiveFrames frames_{TensorArchiveOptions{}.alignment};
  Bytes decoded_;
  Metadata metadata_;
  VerifyReport report_;
  std::map<std::string, std::vector<Item>> files_;  // each sorted by offset once checked
  std::unordered_set<int64_t> unread_sidecars_;     // of these ranks, reported
  std::unordered_set<std::string> checked_;         // files that a sidecar speaks of
  std::unordered_set<std::string> own_sidecars_;    // names of those of this save
  uint64_t done_ = 0;
  uint64_t unsummed_ = 0;
};

}  // namespace

VerifyReport verify_checkpoint(const std::string& directory, FileSystem& file_system, const ProgressFn& progress,
                               const FileSystemReaderOptions& options) {
  return Verifier(directory, file_system, progress, options).run();
}

VerifyReport verify_torch_save(const std::string& file, FileSystem& file_system) {
  VerifyReport report;
  const Metadata metadata = TorchSaveReader(file, {}, file_system).read_metadata();
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    ++(std::holds_alternative<TensorStorageMetadata>(entry) ? report.tensors : report.values);
  }
  const auto opened = file_system.open(file);
  const StorageInfo whole{.relative_path = file, .offset = 0, .length = opened->size(), .transform_descriptors = {}};
  report.files = 1;
  report.bytes = whole.length;
  try {
    const ArchiveSummary summary =
        with_error_context({.file = file}, [&] { return verify_archive(FileRange(*opened, whole)); });
    report.items = summary.records;
    if (summary.without_crc > 0) {
      report.notes.push_back(std::to_string(summary.without_crc) + " records have no CRC-32 and cannot be checked");
    }
  } catch (const Error& error) {
    report.problems.push_back(error);
  }
  return report;
}

VerifyReport verify_safetensors(const std::string& directory, FileSystem& file_system) {
  VerifyReport report;
  const Metadata metadata = HuggingFaceStorageReader(directory, {}, file_system).read_metadata();
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) continue;
    ++report.tensors;
    if (const auto error = check_exact_tiling(tensor->size, tensor->chunks)) {
      report.problems.emplace_back(ErrorCode::kCorruptData, "the chunks of a tensor do not make it",
                                   ErrorContext{.key = fqn, .found = to_string(*error, tensor->chunks)});
    }
  }
  std::set<std::string> files;
  for (const auto& [index, place] : metadata.storage_data) {
    ++report.items;
    report.bytes += place.length;
    files.insert(place.relative_path);
  }
  report.files = files.size();
  report.notes.emplace_back("safetensors files have no checksums: a changed byte of a tensor cannot be seen");
  return report;
}

}  // namespace reshard
