// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Looking up the chunk of a tensor that an item holds.

#include <algorithm>

#include "reshard/metadata/metadata.h"

namespace reshard {

/// The chunk at the index's offsets, null if there is none. The hint of an index is right in every catalogue that
/// PyTorch or this library wrote, and then this is no search.
inline const Box* find_chunk(const TensorStorageMetadata& tensor, const MetadataIndex& index) {
  if (index.index && *index.index >= 0 && static_cast<size_t>(*index.index) < tensor.chunks.size()) {
    const Box& hinted = tensor.chunks[static_cast<size_t>(*index.index)];
    if (hinted.offsets == index.offset) return &hinted;
  }
  const auto it = std::ranges::find_if(tensor.chunks, [&](const Box& chunk) { return chunk.offsets == index.offset; });
  return it == tensor.chunks.end() ? nullptr : &*it;
}

}  // namespace reshard
