// SPDX-License-Identifier: BSD-3-Clause
// Writer and reader together: what one set of ranks saves, another loads. Counterparts of PyTorch's
// test_file_system_checkpoint.py and test_file_system_checkpoint_cpu.py.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include "storage/checkpoint_runs.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

struct WriterCase {
  const char* name;
  FileSystemWriterOptions options;
};

class FileSystemTest : public testing::TestWithParam<WriterCase> {
 protected:
  void save(const std::vector<MemorySaveState>& ranks) {
    FileSystemWriterOptions options = GetParam().options;
    options.sync_files = false;
    save_checkpoint(directory_.path(), ranks, options);
  }
  std::vector<ReadCounters> load(std::vector<MemoryLoadState>& ranks) {
    return load_checkpoint(directory_.path(), ranks);
  }
  TemporaryDirectory directory_;
};

INSTANTIATE_TEST_SUITE_P(Writers, FileSystemTest,
                         testing::Values(WriterCase{"OneThread", {}}, WriterCase{"TwoThreads", {.thread_count = 2}},
                                         WriterCase{"FileAnItem", {.single_file_per_rank = false}},
                                         WriterCase{"FileAnItemTwoThreads",
                                                    {.single_file_per_rank = false, .thread_count = 2}},
                                         WriterCase{"PageAligned", {.storage_alignment = 4096}}),
                         [](const auto& c) { return c.param.name; });

// test_read_write_only_tensor
TEST_P(FileSystemTest, ReadsBackPlainTensors) {
  const std::vector<StateEntry> entries{replica_entry("linear_1.weight", {5, 5}), replica_entry("linear_1.bias", {5}),
                                        replica_entry("linear_2.weight", {1, 5}), replica_entry("linear_2.bias", {1}),
                                        replica_entry("emb.weight", {5, 10})};
  save(states<MemorySaveState>({entries}));
  auto loaded = states<MemoryLoadState>({entries});
  ASSERT_NE(first_difference(loaded), "");
  load(loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

// test_read_write_shard_tensor
TEST_P(FileSystemTest, ReadsBackShardedTensorsBesidePlainOnes) {
  std::vector<std::vector<StateEntry>> ranks;
  for (const auto& mine : split({10, 20}, 0, 2)) {
    ranks.push_back({tensor_entry("sharded_tensor1", {10, 20}, mine), replica_entry("random_tensor1", {2, 2}),
                     tensor_entry("submodule.sharded_tensor2", {10, 20}, mine),
                     replica_entry("submodule.random_tensor2", {2, 2})});
  }
  save(states<MemorySaveState>(ranks));
  auto loaded = states<MemoryLoadState>(ranks);
  load(loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

// test_load_with_different_shard_plan, with the directory never cleaned between saves
TEST_P(FileSystemTest, LoadsWithEveryOtherShardPlan) {
  const auto rows = [](int64_t offset, int64_t length) { return Box{{offset, 0}, {length, 20}}; };
  const std::vector<std::vector<std::vector<Box>>> specs{
      {{rows(0, 5)}, {rows(5, 5)}},
      {{rows(0, 3), rows(9, 1)}, {rows(3, 3), rows(6, 3)}},
      {{rows(0, 2), rows(3, 3), rows(9, 1)}, {rows(2, 1), rows(6, 3)}},
      {{rows(8, 2)}, {rows(0, 8)}},
  };
  for (size_t from = 0; from < specs.size(); ++from) {
    for (size_t to = 0; to < specs.size(); ++to) {
      if (from == to) continue;
      SCOPED_TRACE("saved as S" + std::to_string(from + 1) + ", loaded as S" + std::to_string(to + 1));
      save(sharded<MemorySaveState>("t", {10, 20}, specs[from]));
      auto loaded = sharded<MemoryLoadState>("t", {10, 20}, specs[to]);
      load(loaded);
      ASSERT_EQ(first_difference(loaded), "");
    }
  }
}

// test_load_rowwise_to_colwise
TEST_P(FileSystemTest, LoadsRowsAsColumns) {
  save(sharded<MemorySaveState>("t", {10, 20}, split({10, 20}, 0, 2)));
  auto loaded = sharded<MemoryLoadState>("t", {10, 20}, split({10, 20}, 1, 2));
  load(loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

// test_save_load_bytes
TEST_P(FileSystemTest, ReadsBackValues) {
  std::vector<MemorySaveState> saved(2);
  for (MemorySaveState& state : saved) {
    state.add_value("bytes0", value_archive("one"));
    state.add_value("bytes1", value_archive("string"));
  }
  save(saved);
  std::vector<MemoryLoadState> loaded;
  for (int rank = 0; rank < 2; ++rank)
    loaded.push_back(MemoryLoadState({bytes_entry("bytes0", 3), bytes_entry("bytes1", 0)}));
  load(loaded);
  for (MemoryLoadState& state : loaded) {
    EXPECT_EQ(state.value(0), value_archive("one"));
    EXPECT_EQ(state.value(1), value_archive("string"));
  }
}

// test_switch_between_sharded_tensor_to_tensor
TEST_P(FileSystemTest, KindOfContainerIsNotPartOfTheFile) {
  const auto part = [](int64_t offset, int64_t length) { return Box{{offset}, {length}}; };
  const std::vector<std::vector<std::vector<Box>>> specs{
      {{part(0, 16)}, {part(16, 16)}},
      {{part(0, 8), part(24, 8)}, {part(8, 8), part(16, 8)}},
      {{part(8, 24)}, {part(0, 8)}},
      {{part(0, 10)}, {part(10, 22)}},
  };
  for (const auto& from : specs) {
    std::vector<std::vector<StateEntry>> saved;
    for (const auto& mine : from)
      saved.push_back({tensor_entry("sharded", {32}, mine), replica_entry("replicated", {32})});
    save(states<MemorySaveState>(saved));
    for (const auto& to : specs) {
      std::vector<std::vector<StateEntry>> wanted;
      for (const auto& mine : to)
        wanted.push_back({replica_entry("sharded", {32}), tensor_entry("replicated", {32}, mine)});
      auto loaded = states<MemoryLoadState>(wanted);
      load(loaded);
      ASSERT_EQ(first_difference(loaded), "");
    }
  }
}

TEST_P(FileSystemTest, KeysAreNeverNamesOfFiles) {
  std::vector<StateEntry> entries;
  for (const char* key :
       {"", ".", "..", "../up", "/etc/passwd", "a/b", ".metadata", "__0_0.distcp", "a\nb", "\xE4\xB8\x96"}) {
    entries.push_back(replica_entry(key, {3}));
  }
  save(states<MemorySaveState>({entries}));
  auto loaded = states<MemoryLoadState>({entries});
  load(loaded);
  EXPECT_EQ(first_difference(loaded), "");
  for (const auto& file : std::filesystem::recursive_directory_iterator(directory_.path())) {
    const std::string name = file.path().filename();
    EXPECT_TRUE(name == ".metadata" || name.starts_with("__0_") || name.starts_with(".reshard-")) << name;
  }
}

TEST_P(FileSystemTest, KeepsTensorsWithoutElementsAndWithoutDimensions) {
  const std::vector<StateEntry> entries{replica_entry("empty", {0, 3}), replica_entry("scalar", {}, DType::kInt64),
                                        replica_entry("one", {1})};
  save(states<MemorySaveState>({entries}));
  auto loaded = states<MemoryLoadState>({entries});
  load(loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

// Any tiling into any other, of tensors that take each of the reader's ways: small and whole, small in part, large.
TEST_P(FileSystemTest, LoadsAnyTilingIntoAnyOther) {
  Random random(20260);
  constexpr DType kDTypes[] = {DType::kUInt8, DType::kBFloat16, DType::kFloat32, DType::kInt64, DType::kComplex128};
  for (int round = 0; round < 6; ++round) {
    std::vector<std::vector<StateEntry>> saved(3);
    std::vector<std::vector<StateEntry>> wanted(2);
    for (size_t t = 0; t < 5; ++t) {
      const std::string fqn = "t" + std::to_string(t);
      const Dims shape = t == 0 ? Dims{300, 401} : t == 1 ? Dims{40, 30, 50} : random_shape(random, 7);
      const auto deal = [&](std::vector<std::vector<StateEntry>>& ranks) {
        std::vector<std::vector<Box>> mine(ranks.size());
        for (const Box& box : random_tiling(random, shape)) {
          mine[static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(ranks.size()) - 1))].push_back(box);
        }
        for (size_t r = 0; r < ranks.size(); ++r) {
          ranks[r].push_back(tensor_entry(fqn, shape, mine[r], kDTypes[t]));
        }
      };
      deal(saved);
      deal(wanted);
    }
    save(states<MemorySaveState>(saved));
    auto loaded = states<MemoryLoadState>(wanted);
    for (const ReadCounters& counters : load(loaded)) EXPECT_EQ(counters.bytes_payload, counters.bytes_needed);
    ASSERT_EQ(first_difference(loaded), "") << "round " << round;
  }
}

}  // namespace
}  // namespace reshard
