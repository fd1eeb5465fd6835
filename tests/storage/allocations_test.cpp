// SPDX-License-Identifier: BSD-3-Clause
// What a small tensor costs a save and a load in allocations, which are exact on every machine: whoever makes it more
// has to change a number here.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "reshard/format/dcp_metadata.h"
#include "reshard/planner/plan_wire.h"
#include "storage/checkpoint_runs.h"
#include "support/memory_file_system.h"

namespace {

std::atomic<uint64_t> allocations = 0;

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace reshard {
namespace {

std::vector<StateEntry> small_tensors(int64_t count) {
  std::vector<StateEntry> entries;
  for (int64_t i = 0; i < count; ++i) entries.push_back(replica_entry("model." + std::to_string(i), {4, 16}));
  return entries;
}

/// Allocations for each tensor beyond the first thousand. `run(state dict entries)` returns how many it made.
template <class Run>
double allocations_per_tensor(const Run& run) {
  const uint64_t few = run(small_tensors(1000));
  return static_cast<double>(run(small_tensors(3000)) - few) / 2000;
}

template <class Body>
uint64_t count(const Body& body) {
  const uint64_t before = allocations;
  body();
  return allocations - before;
}

TEST(AllocationsTest, ASmallTensorCostsASaveFewAllocations) {
  const double each = allocations_per_tensor([](const std::vector<StateEntry>& entries) {
    MemoryFileSystem file_system({}, {"/checkpoint"});
    const std::vector<MemorySaveState> ranks{MemorySaveState(entries)};
    return count([&] { save_checkpoint("/checkpoint", ranks, {.sync_files = false}, file_system); });
  });
  EXPECT_LT(each, 8.1);
}

TEST(AllocationsTest, ASmallTensorCostsALoadFewAllocations) {
  const double each = allocations_per_tensor([](const std::vector<StateEntry>& entries) {
    MemoryFileSystem file_system({}, {"/checkpoint"});
    save_checkpoint("/checkpoint", {MemorySaveState(entries)}, {.sync_files = false}, file_system);
    std::vector<MemoryLoadState> ranks;
    ranks.emplace_back(entries);
    return count([&] { load_checkpoint("/checkpoint", ranks, {}, file_system); });
  });
  EXPECT_LT(each, 15.3);
}

// Chunks of a tensor share what they have in common, its name above all. A rank's plan costs some, whatever its length.
TEST(AllocationsTest, AChunkMoreInThePlansAndTheCatalogueCostsNoAllocation) {
  constexpr int64_t kTensors = 64;
  const auto of_ranks = [](int64_t ranks) {
    std::vector<SavePlan> plans;
    std::vector<Bytes> messages;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      MemorySaveState state;
      for (int64_t t = 0; t < kTensors; ++t) {
        state.add(tensor_entry("model." + std::to_string(t), {ranks, 4}, {{{rank, 0}, {1, 4}}}));
      }
      DefaultSavePlanner planner;
      planner.set_up_planner(state, rank == 0);
      messages.push_back(encode_save_plan(planner.create_local_plan()));
    }
    return count([&] {
      SavePlanDecoder decoder;
      for (const Bytes& message : messages) plans.push_back(decoder.decode(message));
      Metadata metadata = DefaultSavePlanner().create_global_plan(std::move(plans)).metadata;
      std::vector<std::pair<MetadataIndex, StorageInfo>> stored;
      const SharedString file("__0_0.distcp");
      for (const auto& [name, entry] : metadata.state_dict_metadata) {
        const SharedString fqn(name);
        for (int64_t rank = 0; rank < ranks; ++rank) {
          stored.push_back({{fqn, Dims{rank, 0}, rank}, {file, 0, 16, {}}});
        }
      }
      metadata.storage_data.assign(std::move(stored));
      metadata.version = kMetadataVersion;
      decode_metadata(encode_metadata(metadata));
    });
  };
  EXPECT_LT(static_cast<double>(of_ranks(300) - of_ranks(100)) / (200 * kTensors), 0.3);
}

}  // namespace
}  // namespace reshard
