// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Reading a checkpoint without a state dict and without LibTorch, piece by piece: any box of any tensor into memory, any
// value as its archive. Works over every StorageReader; tools that convert, compare and print are made with it.
//
//   FileSystemReader files("checkpoint");
//   CheckpointReader checkpoint(files);
//   for (const auto& [fqn, entry] : checkpoint.metadata().state_dict_metadata) ...
//   checkpoint.read_box("model.weight", {{0, 0}, {2, 8}}, out);

#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "reshard/planner/state.h"
#include "reshard/storage/storage.h"

namespace reshard {

/// Thread-safe; reads one thing at a time.
class CheckpointReader {
 public:
  /// Reads the catalogue. `reader` is borrowed and used by nobody else meanwhile. Throws as read_metadata() does.
  explicit CheckpointReader(StorageReader& reader);

  const Metadata& metadata() const { return metadata_; }
  /// Throws kNotFound for a key that is not there, kInvalidArgument for one that is a value.
  const TensorStorageMetadata& tensor(const std::string& fqn) const;
  /// Fills `out`, exactly as large as the box, with the row-major elements of a box of the tensor, and reads no more of the
  /// checkpoint than it needs for that. Throws as tensor(); kInvalidArgument for a box that is not inside the tensor;
  /// kCorruptData where the stored chunks do not cover it.
  void read_box(const std::string& fqn, const Box& box, MutableByteSpan out) const;
  /// The archive of a value. Throws kNotFound for a key that is not there, kInvalidArgument for a tensor.
  Bytes read_value(const std::string& fqn) const;
  /// The first key whose stored elements are the very same place, which is the key itself unless the tensor is tied.
  const std::string& tied_to(const std::string& fqn) const;

 private:
  const StorageMetadata& entry(const std::string& fqn) const;

  StorageReader& reader_;
  Metadata metadata_;
  std::unordered_map<std::string, std::string> ties_;
  mutable std::mutex mutex_;  // of reader_
};

/// `box` cut along its first dimensions into boxes of at most `max_elements` (at least 1), in row-major order. A box without
/// elements is one.
std::vector<Box> cut_into_blocks(const Box& box, int64_t max_elements);

struct CheckpointSaveStateOptions {
  /// Tensors are cut into chunks of at most this many bytes, each of which is in memory only while it is written.
  uint64_t block_bytes = 64 << 20;
  int rank = 0;
  int world_size = 1;
};

/// What a checkpoint holds, as a state to be saved: rank `rank` of `world_size` has its part of each tensor's first dimension,
/// as torch.chunk splits it, in chunks; rank 0 has the values and what cannot be split. Tied tensors stay tied.
/// Values are in memory as long as the object, tensors never.
class CheckpointSaveState final : public SaveState {
 public:
  /// `checkpoint` is borrowed.
  explicit CheckpointSaveState(const CheckpointReader& checkpoint, const CheckpointSaveStateOptions& options = {});
  const std::vector<StateEntry>& entries() const override { return entries_; }
  TensorView tensor(size_t entry, size_t chunk) const override;
  ByteSpan bytes(size_t entry) const override { return values_.at(entry); }

 private:
  const CheckpointReader& checkpoint_;
  std::vector<StateEntry> entries_;
  std::unordered_map<size_t, Bytes> values_;  // by entry
};

}  // namespace reshard
