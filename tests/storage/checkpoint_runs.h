// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Whole saves and loads through the protocol, on ranks that are threads.

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "reshard/format/torch_archive.h"
#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "reshard/protocol/thread_transport.h"
#include "reshard/storage/filesystem.h"
#include "support/memory_state.h"
#include "support/rank_threads.h"

namespace reshard {

inline constexpr std::chrono::seconds kTestSilence{30};

/// Runs body(rank, transport) on every rank; the first error of the lowest rank leaves.
template <class Body>
void on_ranks(size_t world_size, const Body& body) {
  if (world_size == 1) {
    const auto transport = solo_transport();
    body(0, *transport);
    return;
  }
  ThreadHub hub(static_cast<int>(world_size), kTestSilence);
  const auto errors = run_ranks(static_cast<int>(world_size), [&](int rank) {
    const auto transport = hub.transport(rank);
    body(static_cast<size_t>(rank), *transport);
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

/// Saves one state a rank.
inline SaveResult save_checkpoint(const std::string& directory, const std::vector<MemorySaveState>& ranks,
                                  const FileSystemWriterOptions& options = {.sync_files = false},
                                  FileSystem& file_system = local_file_system()) {
  std::vector<SaveResult> results(ranks.size());
  on_ranks(ranks.size(), [&](size_t rank, Transport& transport) {
    DefaultSavePlanner planner;
    FileSystemWriter writer(directory, options, file_system);
    results[rank] = run_save(transport, ranks[rank], planner, writer);
  });
  return results[0];
}

/// Loads into one state a rank; returns what each rank read.
inline std::vector<ReadCounters> load_checkpoint(const std::string& directory, std::vector<MemoryLoadState>& ranks,
                                                 const FileSystemReaderOptions& options = {},
                                                 FileSystem& file_system = local_file_system()) {
  std::vector<ReadCounters> counters(ranks.size());
  on_ranks(ranks.size(), [&](size_t rank, Transport& transport) {
    DefaultLoadPlanner planner;
    FileSystemReader reader(directory, options, file_system);
    run_load(transport, ranks[rank], planner, reader);
    counters[rank] = reader.counters();
  });
  return counters;
}

/// The archive of a string, as the value of a state dict.
inline std::string value_archive(std::string_view text) {
  pickle::Tree tree;
  return std::string(as_text(encode_value_archive(tree.str(text))));
}

/// One state a rank, from one list of entries a rank.
template <class State>
std::vector<State> states(std::vector<std::vector<StateEntry>> ranks) {
  std::vector<State> result;
  for (auto& entries : ranks) result.emplace_back(std::move(entries));
  return result;
}

/// What a list of boxes, one list a rank, makes of the tensor `fqn`.
template <class State>
std::vector<State> sharded(const std::string& fqn, const Dims& size, const std::vector<std::vector<Box>>& boxes,
                           DType dtype = DType::kFloat32) {
  std::vector<State> result;
  for (const auto& mine : boxes) result.push_back(State({tensor_entry(fqn, size, mine, dtype)}));
  return result;
}

/// Part `rank` of `count` along `dim`, for each rank.
inline std::vector<std::vector<Box>> split(const Dims& size, size_t dim, int64_t count) {
  std::vector<std::vector<Box>> boxes;
  for (int64_t rank = 0; rank < count; ++rank) boxes.push_back({split_evenly(whole_box(size), dim, count, rank)});
  return boxes;
}

/// The first rank and key that does not hold its pattern; empty if all do.
inline std::string first_difference(std::vector<MemoryLoadState>& ranks) {
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const std::string difference = ranks[rank].first_difference();
    if (!difference.empty()) return "rank " + std::to_string(rank) + ": " + difference;
  }
  return {};
}

}  // namespace reshard
