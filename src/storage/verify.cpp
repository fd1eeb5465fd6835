// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/verify.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "reshard/format/crc32.h"
#include "reshard/format/sidecar.h"
#include "reshard/format/torch_archive.h"
#include "reshard/storage/filesystem.h"
#include "storage/chunks.h"

namespace reshard {
namespace {

constexpr uint64_t kMaxSidecarBytes = uint64_t{1} << 30;
constexpr uint64_t kBlockBytes = 4 << 20;

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

uint32_t crc32_of(const ByteSource& source) {
  Bytes block;
  uint32_t crc = 0;
  for (uint64_t begin = 0; begin < source.size(); begin += block.size()) {
    block.resize(static_cast<size_t>(std::min(kBlockBytes, source.size() - begin)));
    source.read(begin, block);
    crc = crc32(block, crc);
  }
  return crc;
}

class Verifier {
 public:
  Verifier(const std::string& directory, FileSystem& file_system, const ProgressFn& progress)
      : directory_(directory), file_system_(file_system), progress_(progress) {}

  VerifyReport run() {
    metadata_ = FileSystemReader(directory_, {}, file_system_).read_metadata();
    check_tiling();
    for (const auto& [index, place] : metadata_.storage_data) {
      files_[place.relative_path].push_back({&index, &place});
      report_.bytes += place.length;
    }
    report_.items = metadata_.storage_data.size();
    report_.files = files_.size();
    guard({}, [&] { read_sidecars(); });
    for (auto& file : files_) {
      guard({.key = file.second.front().index->fqn, .file = file.first}, [&] { check_file(file.first, file.second); });
    }
    check_sidecar_items();
    guard({}, [&] { note_other_files(); });
    if (unsummed_ != 0) {
      report_.notes.push_back(std::to_string(unsummed_) + " zip records have no CRC-32: their bytes are not verified");
    }
    return std::move(report_);
  }

 private:
  /// What a sidecar says of one item.
  struct Claim {
    std::string sidecar;
    const SidecarItem* item;
  };

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

  void read_sidecars() {
    if (!metadata_.sidecars) return;
    if (!metadata_.storage_meta || !metadata_.storage_meta->save_id) {
      throw Error(ErrorCode::kCorruptData, "the catalogue counts sidecars but does not name its save",
                  {.file = kMetadataFileName});
    }
    const std::string& save_id = *metadata_.storage_meta->save_id;
    for (int64_t rank = 0; rank < *metadata_.sidecars; ++rank) {
      const std::string name = sidecar_name(save_id, rank);
      const std::string path = join_path(directory_, name);
      own_sidecars_.insert(name);
      if (!file_system_.status(path)) {
        report_.problems.emplace_back(ErrorCode::kNotFound, "a sidecar is missing", ErrorContext{.file = name});
        if (report_.problems.size() >= kMaxMissing) return;
        continue;
      }
      guard({.file = name}, [&] {
        Sidecar sidecar = decode_sidecar(file_system_.read_file(path, kMaxSidecarBytes));
        if (sidecar.save_id != save_id || sidecar.rank != rank || sidecar.world_size != *metadata_.sidecars) {
          const auto who = [](const std::string& id, int64_t r, int64_t n) {
            return "save " + id + ", rank " + std::to_string(r) + " of " + std::to_string(n);
          };
          throw Error(ErrorCode::kCorruptData, "the sidecar is of another save or rank",
                      {.wanted = who(save_id, rank, *metadata_.sidecars),
                       .found = who(sidecar.save_id, sidecar.rank, sidecar.world_size)});
        }
        sidecars_.push_back(std::move(sidecar));
        take_claims(sidecars_.back(), name);
      });
    }
  }

  void take_claims(const Sidecar& sidecar, const std::string& name) {
    for (const SidecarFile& file : sidecar.files) {
      if (!sizes_.try_emplace(file.relative_path, file.size).second) {
        problem("two sidecars speak of the same file", {.file = file.relative_path, .found = name});
      }
    }
    for (const SidecarItem& item : sidecar.items) {
      claims_[sidecar.files[item.file].relative_path].try_emplace(item.offset, Claim{name, &item});
    }
  }

  void check_file(const std::string& path, std::vector<Item>& items) {
    std::ranges::stable_sort(items, {}, [](const Item& item) { return item.place->offset; });
    const auto file = file_system_.open_beneath(directory_, path);
    if (metadata_.sidecars) {
      const auto size = sizes_.find(path);
      if (size == sizes_.end()) {
        problem("no sidecar speaks of this file", {.file = path});
      } else if (size->second != file->size()) {
        problem("the file's size is not the one of its sidecar",
                {.file = path, .wanted = std::to_string(size->second), .found = std::to_string(file->size())});
      }
    }
    uint64_t end = 0;
    const Item* previous = nullptr;
    for (const Item& item : items) {
      const ErrorContext context{.key = item.index->fqn, .file = path, .offset = item.place->offset};
      const uint64_t item_end = item.place->offset + item.place->length;
      if (previous != nullptr && item.place->offset < end) {
        problem("the item overlaps the one before",
                {.key = item.index->fqn, .file = path, .offset = item.place->offset, .found = previous->index->fqn});
      } else if (metadata_.sidecars) {
        guard(context, [&] { check_gap(*file, end, std::min(item.place->offset, file->size())); });
      }
      if (item_end > file->size()) {
        problem("the file ends before the item", {.key = item.index->fqn,
                                                  .file = path,
                                                  .offset = item.place->offset,
                                                  .wanted = std::to_string(item_end) + " bytes",
                                                  .found = std::to_string(file->size()) + " bytes"});
      } else {
        guard(context, [&] { check_item(*file, item); });
      }
      end = std::max(end, item_end);
      previous = &item;
      done_ += item.place->length;
      if (progress_) progress_({"verify", done_, report_.bytes});
    }
    if (metadata_.sidecars) guard({.file = path}, [&] { check_gap(*file, end, file->size()); });
  }

  /// Our writer leaves only zeros between items.
  static void check_gap(const RandomAccessFile& file, uint64_t begin, uint64_t end) {
    Bytes block;
    for (; begin < end; begin += block.size()) {
      block.resize(static_cast<size_t>(std::min(kBlockBytes, end - begin)));
      file.read_exactly(begin, block, "bytes between items");
      const auto it = std::ranges::find_if(block, [](std::byte b) { return b != std::byte{0}; });
      if (it != block.end()) {
        throw Error(ErrorCode::kCorruptData, "the bytes between items are not zero",
                    {.offset = begin + static_cast<uint64_t>(it - block.begin())});
      }
    }
  }

  void check_item(const RandomAccessFile& file, const Item& item) {
    if (!item.place->transform_descriptors.empty()) {
      throw Error(ErrorCode::kUnsupported, "item is stored with a stream transform",
                  {.found = item.place->transform_descriptors.back()});
    }
    const FileRange source(file, *item.place);
    unsummed_ += verify_archive(source).without_crc;
    uint64_t payload_begin = 0;
    const StorageMetadata* entry = metadata_.state_dict_metadata.find(item.index->fqn);
    if (const auto* tensor = entry != nullptr ? std::get_if<TensorStorageMetadata>(entry) : nullptr) {
      const TensorItem stored = read_tensor_item(source);
      const Box* chunk = find_chunk(*tensor, *item.index);
      if (chunk == nullptr || stored.dtype != tensor->properties.dtype || stored.sizes != chunk->sizes) {
        throw Error(ErrorCode::kCorruptData, "the stored tensor is not the one of the catalogue",
                    {.wanted = std::string(to_string(tensor->properties.dtype)) + " " +
                               (chunk == nullptr ? "?" : to_string(chunk->sizes)),
                     .found = std::string(to_string(stored.dtype)) + " " + to_string(stored.sizes)});
      }
      payload_begin = stored.payload_offset;
    } else {
      decode_value_archive(source);
    }
    // A file without a sidecar was reported once, as a whole.
    if (!sizes_.contains(item.place->relative_path)) return;
    const uint32_t crc = crc32_of(source);
    const auto& claims = claims_[item.place->relative_path];
    const auto claim = claims.find(item.place->offset);
    if (claim == claims.end()) throw Error(ErrorCode::kCorruptData, "no sidecar speaks of this item");
    const SidecarItem& said = *claim->second.item;
    if (said.length != item.place->length || said.payload_offset != payload_begin || said.crc32 != crc) {
      const auto text = [](uint64_t length, uint64_t payload, uint32_t sum) {
        return "length " + std::to_string(length) + ", payload at " + std::to_string(payload) + ", CRC-32 " +
               std::to_string(sum);
      };
      throw Error(ErrorCode::kCorruptData, "the item is not the one of its sidecar " + claim->second.sidecar,
                  {.wanted = text(said.length, said.payload_offset, said.crc32),
                   .found = text(item.place->length, payload_begin, crc)});
    }
  }

  void check_sidecar_items() {
    for (const auto& [path, claims] : claims_) {
      const auto file = files_.find(path);
      if (file == files_.end()) {
        problem("a sidecar speaks of a file that the catalogue does not use", {.file = path});
        continue;
      }
      const auto offset_of = [](const Item& item) { return item.place->offset; };
      for (const auto& [offset, claim] : claims) {
        if (!std::ranges::binary_search(file->second, offset, {}, offset_of)) {
          problem("sidecar " + claim.sidecar + " speaks of an item that the catalogue does not have",
                  {.file = path, .offset = offset});
        }
      }
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

  static constexpr size_t kMaxMissing = 1000;

  const std::string directory_;
  FileSystem& file_system_;
  const ProgressFn& progress_;
  Metadata metadata_;
  VerifyReport report_;
  std::map<std::string, std::vector<Item>> files_;  // each sorted by offset once checked
  std::deque<Sidecar> sidecars_;
  std::unordered_set<std::string> own_sidecars_;                       // names of those that the catalogue counts
  std::unordered_map<std::string, uint64_t> sizes_;                    // of files, as sidecars tell
  std::unordered_map<std::string, std::map<uint64_t, Claim>> claims_;  // file -> offset of an item
  uint64_t done_ = 0;
  uint64_t unsummed_ = 0;
};

}  // namespace

VerifyReport verify_checkpoint(const std::string& directory, FileSystem& file_system, const ProgressFn& progress) {
  return Verifier(directory, file_system, progress).run();
}

}  // namespace reshard
