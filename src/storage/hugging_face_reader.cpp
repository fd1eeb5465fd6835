// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/safetensors.h"
#include "reshard/storage/hugging_face.h"
#include "storage/direct_reader.h"
#include "storage/hugging_face_files.h"
#include "storage/parallel.h"
#include "storage/stored_items.h"

namespace reshard {
namespace {

constexpr uint64_t kPendingBytes = 16 << 20;  // of destinations that are filled together

/// The files of a checkpoint, and where its index, if it has one, says that tensors are.
struct Files {
  std::set<std::string> names;
  std::optional<SafetensorsIndex> index;
};

/// Files that are named as parts of a whole must all be there.
void check_complete(const std::set<std::string>& names, const std::string& directory) {
  for (const std::string& name : names) {
    const auto part = parse_model_file_name(name);
    if (!part) continue;
    for (int64_t i = 1; i <= part->count; ++i) {
      const std::string wanted = model_file_name(i, part->count);
      if (names.contains(wanted)) continue;
      throw Error(ErrorCode::kNotFound,
                  "a file of the checkpoint is missing, and there is no index: was it ever finished?",
                  {.file = directory, .wanted = wanted});
    }
  }
}

Files find_files(FileSystem& file_system, const std::string& directory) {
  const std::string shown = directory.empty() ? "." : directory;
  std::vector<std::string> listed;
  try {
    listed = file_system.list(shown);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    throw Error(ErrorCode::kNotFound, "there is no such checkpoint directory", {.file = shown});
  }
  Files files;
  if (std::ranges::binary_search(listed, std::string(kSafetensorsIndexFileName))) {
    const std::string path = join_path(directory, kSafetensorsIndexFileName);
    with_error_context({.file = path}, [&] {
      files.index =
          decode_safetensors_index(file_system.read_file(file_system.real_path(path), kMaxSafetensorsIndexBytes));
      for (const auto& [fqn, file] : files.index->weight_map) {
        if (files.names.contains(file)) continue;
        validate_relative_path(file, fqn);
        files.names.insert(file);
      }
    });
    return files;
  }
  if (std::ranges::binary_search(listed, std::string(kSafetensorsShardsFileName))) {
    const std::string path = join_path(directory, kSafetensorsShardsFileName);
    with_error_context({.file = path}, [&] {
      for (std::string& name :
           decode_safetensors_shards(file_system.read_file(file_system.real_path(path), kMaxSafetensorsIndexBytes))) {
        if (!std::ranges::binary_search(listed, name)) {
          throw Error(ErrorCode::kNotFound, "a file of a sharded checkpoint is missing: was it ever finished?",
                      {.wanted = name});
        }
        files.names.insert(std::move(name));
      }
    });
    return files;
  }
  if (std::ranges::binary_search(listed, std::string(kSafetensorsFileName))) {
    files.names = {kSafetensorsFileName};
    return files;
  }
  for (const std::string& name : listed) {
    if (name.ends_with(kSafetensorsSuffix)) files.names.insert(name);
  }
  if (files.names.empty()) {
    throw Error(ErrorCode::kNotFound, "the directory holds no safetensors files",
                {.file = shown, .wanted = std::string("*") + std::string(kSafetensorsSuffix)});
  }
  check_complete(files.names, shown);
  return files;
}

/// Collects the tensors of all files.
class Catalogue {
 public:
  void add_file(const std::string& name, const SafetensorsHeader& header, uint64_t data_begin) {
    std::optional<SafetensorsSharding> sharding;
    if (const std::string* text = header.metadata.find(std::string(kShardingInfoKey))) {
      sharding = decode_sharding_info(*text);
    }
    for (const SafetensorsTensor& tensor : header.tensors) {
      with_error_context([&] { return ErrorContext{.key = tensor.name}; },
                         [&] {
                           SafetensorsShard shard{Dims(tensor.shape.size(), 0), std::nullopt};
                           if (sharding) {
                             const auto it = sharding->find(tensor.name);
                             if (it == sharding->end()) {
                               throw Error(ErrorCode::kCorruptData,
                                           "the file's DCP_SHARDING_INFO lacks one of its tensors");
                             }
                             shard = it->second;
                           }
                           add(tensor, shard, {name, data_begin + tensor.begin, tensor.end - tensor.begin, {}});
                         });
    }
  }

  Metadata finish() {
    for (auto& [fqn, tensor] : tensors_) {
      if (tensor.stored.chunks.empty()) tensor.stored.chunks.push_back(tensor.empty);
      metadata_.state_dict_metadata.insert(fqn, std::move(tensor.stored));
    }
    validate(metadata_);
    return std::move(metadata_);
  }

 private:
  struct Tensor {
    TensorStorageMetadata stored;
    bool is_new = true;
    bool has_size = false;  // stated, not the end of the farthest chunk
    Box empty;              // a chunk without elements, which counts only where there is no other
  };

  void add(const SafetensorsTensor& found, const SafetensorsShard& shard, const StorageInfo& place) {
    const size_t rank = found.shape.size();
    if (shard.offsets.size() != rank || (shard.size && shard.size->size() != rank)) {
      throw Error(ErrorCode::kCorruptData, "the tensor has another number of dimensions than its DCP_SHARDING_INFO",
                  {.wanted = std::to_string(rank), .found = to_string(shard.offsets)});
    }
    Dims end = found.shape;
    for (size_t d = 0; d < rank; ++d) end[d] = checked_add(end[d], shard.offsets[d], "end of a chunk");

    Tensor& tensor = tensors_[found.name];
    TensorStorageMetadata& stored = tensor.stored;
    if (std::exchange(tensor.is_new, false)) {
      stored.properties.dtype = found.dtype;
      stored.size = shard.size ? *shard.size : end;
      tensor.has_size = shard.size.has_value();
    } else if (stored.properties.dtype != found.dtype) {
      throw Error(
          ErrorCode::kCorruptData, "chunks of a tensor have different dtypes",
          {.wanted = std::string(to_string(stored.properties.dtype)), .found = std::string(to_string(found.dtype))});
    } else if (stored.size.size() != rank || tensor.has_size != shard.size.has_value() ||
               (shard.size && *shard.size != stored.size)) {
      throw Error(ErrorCode::kCorruptData, "chunks of a tensor are of tensors of different sizes",
                  {.wanted = to_string(stored.size), .found = to_string(shard.size ? *shard.size : end)});
    } else if (!tensor.has_size) {
      for (size_t d = 0; d < rank; ++d) stored.size[d] = std::max(stored.size[d], end[d]);
    }
    if (volume(found.shape) == 0) {
      tensor.empty = {shard.offsets, found.shape};
      return;
    }
    const auto position = static_cast<int64_t>(stored.chunks.size());
    stored.chunks.push_back({shard.offsets, found.shape});
    if (!metadata_.storage_data.insert({found.name, shard.offsets, position}, place)) {
      throw Error(ErrorCode::kCorruptData, "two files hold the same part of a tensor",
                  {.found = to_string(stored.chunks.back())});
    }
  }

  OrderedMap<std::string, Tensor> tensors_;
  Metadata metadata_;
};

/// Every tensor of the index is in its file, and every tensor of a file is in the index.
void check_index(const SafetensorsIndex& index, const std::string& file, const SafetensorsHeader& header,
                 std::set<std::string>& unseen) {
  for (const SafetensorsTensor& tensor : header.tensors) {
    const auto it = index.weight_map.find(tensor.name);
    if (it == index.weight_map.end() || it->second != file) {
      throw Error(ErrorCode::kCorruptData, "the file holds a tensor that is not there according to the index",
                  {.key = tensor.name, .found = it == index.weight_map.end() ? "not in the index" : it->second});
    }
    unseen.erase(tensor.name);
  }
}

}  // namespace

HuggingFaceStorageReader::HuggingFaceStorageReader(std::string directory, HuggingFaceReaderOptions options,
                                                   FileSystem& file_system)
    : directory_(std::move(directory)), options_(options), file_system_(file_system) {
  require_thread_count(options_.thread_count, "HuggingFaceStorageReader");
}

Metadata HuggingFaceStorageReader::read_metadata() {
  const Files files = find_files(file_system_, directory_);
  std::set<std::string> unseen;
  if (files.index) {
    for (const auto& [fqn, file] : files.index->weight_map) unseen.insert(fqn);
  }
  Catalogue catalogue;
  for (const std::string& name : files.names) {
    with_error_context({.file = join_path(directory_, name)}, [&] {
      const auto file = open_following(file_system_, directory_, name);
      Bytes bytes(static_cast<size_t>(std::min<uint64_t>(kSafetensorsPrefixBytes, file->size())));
      file->read_exactly(0, bytes, "length of the safetensors header");
      const uint64_t data_begin = safetensors_data_begin(bytes, file->size());
      bytes.resize(static_cast<size_t>(data_begin));
      file->read_exactly(kSafetensorsPrefixBytes, MutableByteSpan(bytes).subspan(kSafetensorsPrefixBytes),
                         "safetensors header");
      const SafetensorsHeader header = decode_safetensors_header(bytes, file->size());
      if (files.index) check_index(*files.index, name, header, unseen);
      catalogue.add_file(name, header, data_begin);
    });
  }
  if (!unseen.empty()) {
    throw Error(ErrorCode::kCorruptData, "a file lacks a tensor that is in it according to the index",
                {.key = *unseen.begin(), .file = join_path(directory_, files.index->weight_map.at(*unseen.begin()))});
  }
  return with_error_context({.file = directory_}, [&] { return catalogue.finish(); });
}

void HuggingFaceStorageReader::set_up_storage_reader(const Metadata& metadata) {
  metadata_ = &metadata;
  counters_ = {};
}

void HuggingFaceStorageReader::read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) {
  if (metadata_ == nullptr) {
    throw Error(ErrorCode::kFailedPrecondition, "read_data before set_up_storage_reader", {.rank = context.rank});
  }
  with_error_context({.rank = context.rank}, [&] {
    const StoredItems items(plan, *metadata_, planner, [](const std::vector<std::string>& descriptors) {
      throw Error(ErrorCode::kUnsupported, "item is stored with a stream transform", {.found = descriptors.back()});
    });
    counters_.bytes_needed += items.bytes_wanted();
    uint64_t done = 0;
    std::mutex progress;
    const std::function<void(uint64_t)> on_read = [&](uint64_t bytes) {
      const std::lock_guard lock(progress);
      done += bytes;
      if (context.progress) context.progress({"read", std::min(done, items.bytes_planned()), items.bytes_planned()});
    };
    for_each_batch(items, options_.thread_count, [&](const std::string& path, std::span<const Stored> batch) {
      with_error_context({.file = path}, [&] {
        const auto opened = open_following(file_system_, directory_, path);
        const CountedFile file(*opened, nullptr, counters_);
        DirectReader reader(file, options_.coalesce_gap, nullptr, counters_, on_read);
        // Small tensors are read together with their neighbours.
        std::vector<std::pair<const ReadItem*, MutableTensorView>> pending;
        uint64_t pending_bytes = 0;
        const auto deliver = [&] {
          reader.flush();
          for (const auto& [want, view] : pending) planner.commit_tensor(*want, view);
          pending.clear();
          pending_bytes = 0;
        };
        for (const Stored& stored : batch) {
          with_error_context([&] { return ErrorContext{.key = stored.index->fqn, .offset = stored.place->offset}; },
                             [&] {
                               if (stored.tensor == nullptr) {
                                 throw Error(ErrorCode::kInternal, "a value that is no tensor in a safetensors file");
                               }
                               const DType dtype = stored.tensor->properties.dtype;
                               const DenseElements elements{stored.place->offset, dtype, stored.chunk->sizes};
                               for (const ReadItem* want : stored.wants) {
                                 pending.emplace_back(want, resolve_destination(planner, *want, dtype));
                                 reader.add(elements, {want->storage_offsets, want->lengths}, pending.back().second);
                                 pending_bytes += static_cast<uint64_t>(volume(want->lengths) * element_size(dtype));
                                 if (pending_bytes >= kPendingBytes) deliver();
                               }
                             });
        }
        deliver();
      });
    });
  });
}

}  // namespace reshard
