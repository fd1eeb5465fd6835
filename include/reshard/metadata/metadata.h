// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The catalogue of a DCP checkpoint as plain values, named as in torch.distributed.checkpoint.metadata. Bytes, files
// and ranks are not known here; format/dcp_metadata.h turns it into a `.metadata` file and back.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "reshard/core/box.h"
#include "reshard/core/bytes.h"
#include "reshard/core/dtype.h"
#include "reshard/core/ordered_map.h"
#include "reshard/core/shared_string.h"

namespace reshard {

/// "torch.strided", the layout of nearly every tensor.
const SharedString& strided_layout();

/// Properties of a saved tensor. Only dtype matters for loading; the others are what the saver had, kept for parity.
struct TensorProperties {
  DType dtype = DType::kFloat32;
  bool requires_grad = false;
  bool pin_memory = false;
  int32_t memory_format = 0;  // 0 contiguous, 1 channels_last, 2 preserve
  SharedString layout = strided_layout();
  friend bool operator==(const TensorProperties&, const TensorProperties&) = default;
};

/// One saved box of a tensor, in the coordinates of the whole tensor.
using ChunkStorageMetadata = Box;

/// A tensor of the checkpoint: its whole size and the chunks it was saved in.
struct TensorStorageMetadata {
  TensorProperties properties;
  Dims size;
  std::vector<ChunkStorageMetadata> chunks;
  friend bool operator==(const TensorStorageMetadata&, const TensorStorageMetadata&) = default;
};

/// Anything that is not a tensor: one serialized Python value.
struct BytesStorageMetadata {
  friend bool operator==(const BytesStorageMetadata&, const BytesStorageMetadata&) = default;
};

using StorageMetadata = std::variant<TensorStorageMetadata, BytesStorageMetadata>;

/// Names one saved item: a chunk of a tensor (fqn and the chunk's offsets) or a value (fqn alone). `index` is only a
/// hint at the chunk's position in the catalogue and takes no part in comparison, as in PyTorch.
struct MetadataIndex {
  SharedString fqn;
  std::optional<Dims> offset;
  std::optional<int64_t> index;
  friend bool operator==(const MetadataIndex& a, const MetadataIndex& b) {
    return a.fqn == b.fqn && a.offset == b.offset;
  }
};
struct MetadataIndexHash {
  size_t operator()(const MetadataIndex& index) const noexcept {
    const size_t h = index.fqn.hash();
    return index.offset ? h ^ (DimsHash{}(*index.offset) * 31) : h;
  }
};
/// "model.weight [4, 0]", or the fqn alone.
std::string to_string(const MetadataIndex& index);

/// Where one item lies: bytes [offset, offset + length) of a file below the checkpoint's directory.
struct StorageInfo {
  SharedString relative_path;
  uint64_t offset = 0;
  uint64_t length = 0;
  std::vector<std::string> transform_descriptors;  // "stream.zstd/1"; decoded from the last to the first
  friend bool operator==(const StorageInfo&, const StorageInfo&) = default;
};

/// A step into a nested state dict: a dict key or a list position.
using PathElement = std::variant<std::string, int64_t>;
using ObjectPath = std::vector<PathElement>;
/// The flattened name: elements joined by dots.
std::string path_to_fqn(const ObjectPath& path);

/// What the saver said of itself. Nothing here is used for loading.
struct StorageMeta {
  std::optional<std::string> checkpoint_id;
  std::optional<std::string> save_id;
  std::optional<std::string> load_id;
  std::vector<std::string> modules;
  friend bool operator==(const StorageMeta&, const StorageMeta&) = default;
};

/// SHA-256 of a sidecar's contents.
using SidecarDigest = std::array<std::byte, 32>;

/// The whole catalogue. Order of all three maps is the order on disk.
struct Metadata {
  OrderedMap<std::string, StorageMetadata> state_dict_metadata;
  std::optional<OrderedMap<std::string, ObjectPath>> planner_data;  // absent: the saver did not flatten
  OrderedMap<MetadataIndex, StorageInfo, MetadataIndexHash> storage_data;
  std::optional<StorageMeta> storage_meta;
  std::optional<std::string> version;
  /// SHA-256 of each `.reshard-<save_id>-<rank>` sidecar of this save, by rank; absent where PyTorch wrote the
  /// checkpoint.
  std::optional<std::vector<SidecarDigest>> sidecars;
  friend bool operator==(const Metadata&, const Metadata&) = default;
};

/// The release of the catalogue that PyTorch writes since 2.9.
inline constexpr const char* kMetadataVersion = "1.0.0";

/// Checks what every user of a catalogue relies on: ranks, signs and sizes in bounds, chunks inside their tensor, one
/// storage entry for every item that holds elements and none without an item, relative paths that stay below the
/// directory, ranges that do not overflow. Does not check tiling (a catalogue of a partial save is readable). Throws
/// kCorruptData naming the key.
void validate(const Metadata& metadata);

/// Throws kCorruptData naming `fqn` unless `path` is relative, not empty, and holds no NUL, no backslash, and no
/// component that is empty, "." or "..".
void validate_relative_path(const std::string& path, const std::string& fqn);

}  // namespace reshard
