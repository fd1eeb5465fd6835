// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/metadata/metadata.h"

#include <algorithm>
#include <limits>
#include <span>
#include <string_view>
#include <utility>

#include "reshard/core/checked.h"

namespace reshard {
namespace {

[[noreturn]] void corrupt(const std::string& message, const std::string& key, std::string wanted = {},
                          std::string found = {}) {
  throw Error(ErrorCode::kCorruptData, message, {.key = key, .wanted = std::move(wanted), .found = std::move(found)});
}

void validate_tensor(const std::string& fqn, const TensorStorageMetadata& tensor) {
  if (tensor.size.size() > kMaxTensorRank) {
    corrupt("tensor has too many dimensions", fqn, "at most " + std::to_string(kMaxTensorRank),
            std::to_string(tensor.size.size()));
  }
  with_error_context(
      [&] { return ErrorContext{.key = fqn}; },
      [&] { checked_mul(volume(tensor.size), element_size(tensor.properties.dtype), "number of bytes of a tensor"); });
  for (size_t i = 0; i < tensor.chunks.size(); ++i) {
    if (!is_inside(tensor.chunks[i], tensor.size)) {
      corrupt("chunk " + std::to_string(i) + " lies outside its tensor", fqn, "a box inside " + to_string(tensor.size),
              to_string(tensor.chunks[i]));
    }
  }
}

void validate_range(const MetadataIndex& index, const StorageInfo& storage) {
  // Files cannot be longer than off_t can say.
  constexpr auto kMax = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (storage.offset > kMax || storage.length > kMax - storage.offset) {
    corrupt("byte range of " + to_string(index) + " overflows", index.fqn, "",
            std::to_string(storage.offset) + " + " + std::to_string(storage.length));
  }
}

/// The chunks of a tensor, and which of them an item hints at.
struct Hinted {
  std::span<const ChunkStorageMetadata> chunks;
  std::vector<bool> has_item;
  bool is_at(uint64_t hint, const std::optional<Dims>& offset) const {
    return hint < chunks.size() && offset == chunks[static_cast<size_t>(hint)].offsets;
  }
};

}  // namespace

const SharedString& strided_layout() {
  static const SharedString layout = SharedString::permanent("torch.strided");
  return layout;
}

std::string to_string(const MetadataIndex& index) {
  return index.offset ? index.fqn + " " + to_string(*index.offset) : index.fqn.str();
}

std::string path_to_fqn(const ObjectPath& path) {
  std::string fqn;
  for (size_t i = 0; i < path.size(); ++i) {
    if (i != 0) fqn += '.';
    if (const auto* name = std::get_if<std::string>(&path[i])) {
      fqn += *name;
    } else {
      fqn += std::to_string(std::get<int64_t>(path[i]));
    }
  }
  return fqn;
}

void validate(const Metadata& metadata) {
  const auto& storage_data = metadata.storage_data;
  // Items of usual files hint at their chunk. Following the hints is much quicker than looking up a million items.
  OrderedMap<SharedString, Hinted> tensors;
  tensors.reserve(metadata.state_dict_metadata.size());
  for (const auto& [fqn, item] : metadata.state_dict_metadata) {
    if (const auto* tensor = std::get_if<TensorStorageMetadata>(&item)) {
      tensors.insert(fqn, {tensor->chunks, std::vector<bool>(tensor->chunks.size())});
    }
  }
  std::vector<bool> has_item(storage_data.size());
  for (size_t i = 0; const auto& [index, storage] : storage_data) {
    Hinted* tensor = index.index ? tensors.find(index.fqn) : nullptr;
    if (tensor != nullptr && tensor->is_at(static_cast<uint64_t>(*index.index), index.offset)) {
      tensor->has_item[static_cast<size_t>(*index.index)] = has_item[i] = true;
    }
    ++i;
  }
  const auto find_storage = [&](const MetadataIndex& index, bool required) {
    if (const auto position = storage_data.position(index)) {
      has_item[*position] = true;
    } else if (required) {
      corrupt("nothing is stored for " + to_string(index), index.fqn);
    }
  };
  size_t next_tensor = 0;
  for (const auto& [name, item] : metadata.state_dict_metadata) {
    if (const auto* tensor = std::get_if<TensorStorageMetadata>(&item)) {
      const auto& [fqn, hinted] = tensors.begin()[static_cast<ptrdiff_t>(next_tensor++)];
      validate_tensor(fqn, *tensor);
      for (size_t i = 0; i < tensor->chunks.size(); ++i) {
        if (hinted.has_item[i]) continue;
        const Box& chunk = tensor->chunks[i];
        find_storage({fqn, chunk.offsets, {}}, volume(chunk.sizes) != 0);
      }
    } else {
      find_storage({name, {}, {}}, true);
    }
  }
  const SharedString* path = nullptr;  // the last one that is known to be right: items of a file come in a row
  for (size_t i = 0; const auto& [index, storage] : storage_data) {
    if (!has_item[i++])
      corrupt("bytes are stored for an item that is not in the catalogue: " + to_string(index), index.fqn);
    if (path == nullptr || !(*path == storage.relative_path)) validate_relative_path(storage.relative_path, index.fqn);
    path = &storage.relative_path;
    validate_range(index, storage);
  }
}

void validate_relative_path(const std::string& path, const std::string& fqn) {
  const auto refuse = [&](const char* why) {
    corrupt(std::string("path of a data file ") + why, fqn, "", "'" + path + "'");
  };
  if (path.empty()) refuse("is empty");
  if (path.front() == '/') refuse("is absolute");
  if (path.find('\0') != std::string::npos) refuse("holds a NUL byte");
  if (path.find('\\') != std::string::npos) refuse("holds a backslash");
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const auto component = std::string_view(path).substr(begin, end - begin);
    if (component.empty()) refuse("has an empty component");
    if (component == ".") refuse("has the component '.'");
    if (component == "..") refuse("leaves the checkpoint's directory");
    begin = end + 1;
  }
}

}  // namespace reshard
