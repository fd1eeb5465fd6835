// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Saves and loads of safetensors checkpoints through the protocol, on ranks that are threads; files made by hand.

#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "reshard/format/safetensors.h"
#include "reshard/storage/hugging_face.h"
#include "storage/checkpoint_runs.h"

namespace reshard {

/// Saves one state a rank.
template <class State = MemorySaveState>
SaveResult save_safetensors(const std::string& directory, const std::vector<State>& ranks,
                            const HuggingFaceWriterOptions& options = {.sync_files = false},
                            FileSystem& file_system = local_file_system()) {
  std::vector<SaveResult> results(ranks.size());
  on_ranks(ranks.size(), [&](size_t rank, Transport& transport) {
    DefaultSavePlanner planner;
    HuggingFaceStorageWriter writer(directory, options, file_system);
    results[rank] = run_save(transport, ranks[rank], planner, writer);
  });
  return results[0];
}

/// Loads into one state a rank; returns what each rank read.
inline std::vector<ReadCounters> load_safetensors(const std::string& directory, std::vector<MemoryLoadState>& ranks,
                                                  const HuggingFaceReaderOptions& options = {},
                                                  FileSystem& file_system = local_file_system()) {
  std::vector<ReadCounters> counters(ranks.size());
  on_ranks(ranks.size(), [&](size_t rank, Transport& transport) {
    DefaultLoadPlanner planner;
    HuggingFaceStorageReader reader(directory, options, file_system);
    run_load(transport, ranks[rank], planner, reader);
    counters[rank] = reader.counters();
  });
  return counters;
}

/// A file of tensors that hold their pattern, each whole or a chunk (`sharding`) of one.
inline Bytes safetensors_file(std::vector<SafetensorsTensor> tensors, const SafetensorsSharding& sharding = {}) {
  SafetensorsHeader header{std::move(tensors)};
  const uint64_t size = lay_out_safetensors(header.tensors);
  if (!sharding.empty()) header.metadata.insert(std::string(kShardingInfoKey), encode_sharding_info(sharding));
  Bytes file = encode_safetensors_header(header);
  file.reserve(file.size() + size);
  for (const SafetensorsTensor& tensor : header.tensors) {
    Box chunk = whole_box(tensor.shape);
    Dims whole = tensor.shape;
    if (const auto it = sharding.find(tensor.name); it != sharding.end()) {
      chunk.offsets = it->second.offsets;
      if (it->second.size) whole = *it->second.size;
    }
    const Bytes elements = pattern_of(tensor.name, whole, chunk, element_size(tensor.dtype));
    file.insert(file.end(), elements.begin(), elements.end());
  }
  return file;
}

inline void write_bytes(const std::string& path, ByteSpan bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
}

inline Bytes read_bytes(const std::string& path) { return local_file_system().read_file(path, uint64_t{1} << 32); }

}  // namespace reshard
