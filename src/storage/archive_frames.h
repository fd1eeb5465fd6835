// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The frames of tensor archives, one for each dtype and shape that was asked for: a model has few shapes and many
// tensors.

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <utility>

#include "reshard/core/error.h"
#include "reshard/format/torch_archive.h"

namespace reshard {

/// For one thread.
class ArchiveFrames {
 public:
  explicit ArchiveFrames(uint32_t alignment) : alignment_(alignment) {}

  /// Valid until the next call. Throws as TensorArchive does.
  TensorArchiveFrame& get(DType dtype, const Dims& sizes) {
    if (const auto it = frames_.find({dtype, sizes}); it != frames_.end()) return it->second;
    if (frames_.size() == kMostFrames) frames_.clear();
    return frames_.try_emplace({dtype, sizes}, TensorArchive(dtype, sizes, {.alignment = alignment_})).first->second;
  }

  /// Null for what cannot be saved (quantized, overflowing sizes). Valid until the next call.
  TensorArchiveFrame* find(DType dtype, const Dims& sizes) {
    try {
      return &get(dtype, sizes);
    } catch (const Error&) {
      return nullptr;
    }
  }

  /// TensorArchiveFrame::match() with the frame of what a catalogue says. Nothing also where that cannot be saved
  /// (quantized, overflowing sizes): parsing the item names what is wrong with it.
  std::optional<TensorItem> match(DType dtype, const Dims& sizes, ByteSpan item) {
    TensorArchiveFrame* frame = find(dtype, sizes);
    return frame != nullptr ? frame->match(item) : std::nullopt;
  }

 private:
  static constexpr size_t kMostFrames = 1024;
  using Key = std::pair<DType, Dims>;
  struct Hash {
    size_t operator()(const Key& key) const noexcept {
      return DimsHash{}(key.second) * 31 + static_cast<size_t>(key.first);
    }
  };

  uint32_t alignment_;
  std::unordered_map<Key, TensorArchiveFrame, Hash> frames_;
};

}  // namespace reshard
