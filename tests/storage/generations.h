// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints that can be told apart: the same keys, other contents for each number, so that a mixture of two is
// neither.

#include <charconv>
#include <string>
#include <vector>

#include "storage/checkpoint_runs.h"

namespace reshard {

inline constexpr int64_t kGenerationRows = 6;

/// One rank's part of generation `number`: "weight" sharded by rows, "bias" replicated, the value "step".
inline MemorySaveState generation_of_rank(int number, size_t rank, size_t world_size, int64_t rows = kGenerationRows) {
  const auto mine = split({rows, 4}, 0, static_cast<int64_t>(world_size))[rank];
  MemorySaveState state({tensor_entry("weight", {rows, 4}, mine), replica_entry("bias", {5})});
  state.add_value("step", value_archive("step " + std::to_string(number)));
  for (size_t entry = 0; entry < 2; ++entry) {
    for (std::byte& byte : state.memory().buffer(entry)) byte ^= static_cast<std::byte>(number);
  }
  return state;
}

inline std::vector<MemorySaveState> generation(int number, size_t world_size, int64_t rows = kGenerationRows) {
  std::vector<MemorySaveState> ranks;
  for (size_t rank = 0; rank < world_size; ++rank) ranks.push_back(generation_of_rank(number, rank, world_size, rows));
  return ranks;
}

/// Where a generation is loaded to, whole.
inline MemoryLoadState generation_destination(int64_t rows = kGenerationRows) {
  return MemoryLoadState({replica_entry("weight", {rows, 4}), replica_entry("bias", {5}), bytes_entry("step", 0)});
}

/// The number of the generation that the state holds, bit for bit; -1 for anything else.
inline int number_of(MemoryLoadState& state, int64_t rows = kGenerationRows) {
  const std::string value = state.value(2);
  const size_t at = value.find("step ");
  int number = 0;
  if (at == std::string::npos ||
      std::from_chars(value.data() + at + 5, value.data() + value.size(), number).ec != std::errc{}) {
    return -1;
  }
  MemorySaveState saved = generation_of_rank(number, 0, 1, rows);
  for (size_t entry = 0; entry < 3; ++entry) {
    if (saved.memory().buffer(entry) != state.memory().buffer(entry)) return -1;
  }
  return number;
}

/// The number of the generation that the directory holds; -1 for a mixture. Errors leave.
inline int loaded_generation(const std::string& directory, FileSystem& file_system = local_file_system(),
                             int64_t rows = kGenerationRows) {
  std::vector<MemoryLoadState> ranks;
  ranks.push_back(generation_destination(rows));
  load_checkpoint(directory, ranks, {}, file_system);
  return number_of(ranks[0], rows);
}

}  // namespace reshard
