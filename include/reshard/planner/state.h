// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What planners and storage see of a state dict: names, boxes and memory, without LibTorch. checkpoint/ adapts
// StateDict to these two interfaces; tests use plain buffers.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "reshard/core/box.h"
#include "reshard/core/bytes.h"
#include "reshard/core/dtype.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

/// One rank's part of a tensor.
struct TensorEntry {
  TensorProperties properties;
  Dims size;                // of the whole tensor
  std::vector<Box> chunks;  // this rank's boxes; may be empty on a rank that holds no part
  bool sharded = false;     // false: every rank that has the key holds the whole tensor (one chunk)
  /// Index of an earlier entry of the same state dict, not tied itself, whose chunks are the very same memory: a tied
  /// parameter under its second name. It is written once.
  std::optional<size_t> tied_to = {};
};

/// A value that is not a tensor, serialized: `length` bytes of torch.save archive.
struct BytesEntry {
  uint64_t length = 0;
};

/// One flattened key of a state dict.
struct StateEntry {
  std::string fqn;
  ObjectPath path;
  std::variant<TensorEntry, BytesEntry> value;
};

/// Memory of a tensor part on the host. Strides count elements and are >= 0. `owner` keeps the memory alive (it may be
/// a staging copy).
struct TensorView {
  const std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  Dims sizes;
  Dims strides;
  std::shared_ptr<const void> owner;
};
struct MutableTensorView {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  Dims sizes;
  Dims strides;
  std::shared_ptr<void> owner;
};
/// True if elements lie row-major without gaps (always for a view without elements).
bool is_contiguous(const Dims& sizes, const Dims& strides);

/// The elements of a view, row-major and without gaps, in pieces of about `block_bytes`: one call of fn a piece.
void for_each_dense_block(const TensorView& view, uint64_t block_bytes, const std::function<void(Bytes)>& fn);

/// A state dict to be saved, on this rank. const methods are thread-safe.
class SaveState {
 public:
  virtual ~SaveState() = default;
  /// Flattened, in state dict order, unique names. Valid as long as the object.
  virtual const std::vector<StateEntry>& entries() const = 0;
  /// Host memory of chunk `chunk` of tensor entry `entry`: sizes equal the chunk's. For device tensors a copy is made
  /// here, so ask late.
  virtual TensorView tensor(size_t entry, size_t chunk) const = 0;
  /// The serialized value of bytes entry `entry`, exactly BytesEntry::length bytes.
  virtual ByteSpan bytes(size_t entry) const = 0;
};

/// How nested dicts and lists become flat names (PyTorch changed it in 2.4).
enum class FlattenRule : uint8_t {
  kCurrent,   // dicts are always entered; lists only if they hold a tensor or a dict
  kBefore24,  // a dict or list without any tensor below it is one value
};

/// A state dict to be loaded into, on this rank.
class LoadState {
 public:
  virtual ~LoadState() = default;
  virtual const std::vector<StateEntry>& entries(FlattenRule rule) const = 0;
  /// Host memory where the part `region` (coordinates of the whole tensor, inside chunk `chunk`) goes. dtype is the one
  /// asked for: memory of the tensor itself where it lies on the host with that dtype, else a staging buffer.
  /// Thread-safe.
  virtual MutableTensorView tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region, DType dtype) = 0;
  /// Called once `view` (from tensor()) holds its data: copies a staging buffer to its tensor, casting if the dtypes
  /// differ. Thread-safe.
  virtual void commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                             const MutableTensorView& view) = 0;
  /// Replaces the value of entry `entry` by the value in `archive` (a whole torch.save archive). Not thread-safe.
  virtual void load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) = 0;
};

}  // namespace reshard
