// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>

#include "storage/hugging_face_runs.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const HuggingFaceWriterOptions kConsolidated{.sync_files = false};
const HuggingFaceWriterOptions kSharded{.consolidate = false, .sync_files = false};

class HuggingFaceWriterTest : public testing::Test {
 protected:
  std::vector<std::string> files() const { return local_file_system().list(directory_.path()); }
  std::string path(const std::string& name) const { return directory_ / name; }
  SafetensorsHeader header(const std::string& name) const {
    const Bytes file = read_bytes(path(name));
    return decode_safetensors_header(ByteSpan(file).first(safetensors_data_begin(file, file.size())), file.size());
  }
  void expect_loads(std::vector<std::vector<StateEntry>> entries) {
    auto ranks = states<MemoryLoadState>(std::move(entries));
    load_safetensors(directory_.path(), ranks);
    EXPECT_EQ(first_difference(ranks), "");
  }

  TemporaryDirectory directory_;
};

/// What a small model has on each of two ranks.
std::vector<std::vector<StateEntry>> model_on_two() {
  std::vector<std::vector<StateEntry>> ranks;
  for (int64_t rank = 0; rank < 2; ++rank) {
    ranks.push_back({tensor_entry("w", {5, 6}, {split_evenly(whole_box({5, 6}), 0, 2, rank)}),
                     tensor_entry("columns", {4, 10}, {split_evenly(whole_box({4, 10}), 1, 2, rank)}, DType::kBFloat16),
                     replica_entry("step", {}, DType::kInt64), replica_entry("mask", {3}, DType::kUInt8),
                     replica_entry("none", {0, 4})});
  }
  return ranks;
}
std::vector<StateEntry> model_on_one() {
  return {replica_entry("w", {5, 6}), replica_entry("columns", {4, 10}, DType::kBFloat16),
          replica_entry("step", {}, DType::kInt64), replica_entry("mask", {3}, DType::kUInt8),
          replica_entry("none", {0, 4})};
}

TEST_F(HuggingFaceWriterTest, ConsolidatedIsOneFileAndItsIndex) {
  const SaveResult result = save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), kConsolidated);
  EXPECT_THAT(files(), ElementsAre("model-00001-of-00001.safetensors", "model.safetensors.index.json"));
  const SafetensorsHeader file = header("model-00001-of-00001.safetensors");
  ASSERT_EQ(file.tensors.size(), 5u);
  EXPECT_EQ(file.metadata.size(), 1u);
  EXPECT_EQ(*file.metadata.find("format"), "pt");
  const SafetensorsIndex index = decode_safetensors_index(read_bytes(path("model.safetensors.index.json")));
  EXPECT_EQ(index.total_size, 5u * 6 * 4 + 4 * 10 * 2 + 8 + 3);
  EXPECT_EQ(index.total_size, result.bytes_written);
  EXPECT_EQ(index.weight_map.size(), 5u);
  expect_loads({model_on_one()});
  expect_loads(model_on_two());
}

TEST_F(HuggingFaceWriterTest, ConsolidatedBytesDoNotDependOnTheRanks) {
  save_safetensors(path("two"), states<MemorySaveState>(model_on_two()), kConsolidated);
  save_safetensors(path("one"), states<MemorySaveState>({model_on_one()}), kConsolidated);
  for (const char* name : {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}) {
    EXPECT_EQ(read_bytes(path("one/" + std::string(name))), read_bytes(path("two/" + std::string(name)))) << name;
  }
}

TEST_F(HuggingFaceWriterTest, MappingSaysWhichFile) {
  HuggingFaceWriterOptions options = kConsolidated;
  options.fqn_to_index_mapping = {{"w", 1}, {"columns", 3}, {"step", 1}, {"mask", 3}, {"none", 2}, {"not saved", 3}};
  save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), options);
  EXPECT_THAT(files(), ElementsAre("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                   "model-00003-of-00003.safetensors", "model.safetensors.index.json"));
  EXPECT_EQ(header("model-00001-of-00003.safetensors").tensors.size(), 2u);
  EXPECT_EQ(header("model-00002-of-00003.safetensors").tensors[0].name, "none");
  expect_loads({model_on_one()});
}

TEST_F(HuggingFaceWriterTest, ShardedIsAFileARank) {
  const SaveResult result = save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), kSharded);
  EXPECT_THAT(files(), ElementsAre("model.safetensors.shards.json", "shard-00001-model-00001-of-00001.safetensors",
                                   "shard-00002-model-00001-of-00001.safetensors"));
  EXPECT_EQ(result.bytes_written, 5u * 6 * 4 + 4 * 10 * 2 + 8 + 3);
  const SafetensorsHeader second = header("shard-00002-model-00001-of-00001.safetensors");
  EXPECT_EQ(*second.metadata.find("DCP_VERSION"), "1.0");
  const SafetensorsSharding sharding = decode_sharding_info(*second.metadata.find("DCP_SHARDING_INFO"));
  EXPECT_EQ(sharding.at("w"), (SafetensorsShard{{3, 0}, Dims{5, 6}}));
  expect_loads({model_on_one()});
  expect_loads(model_on_two());
}

TEST_F(HuggingFaceWriterTest, ShardedWithAMapping) {
  HuggingFaceWriterOptions options = kSharded;
  options.fqn_to_index_mapping = {{"w", 1}, {"columns", 2}, {"step", 1}, {"mask", 1}, {"none", 1}};
  save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), options);
  EXPECT_THAT(files(), ElementsAre("model.safetensors.shards.json", "shard-00001-model-00001-of-00002.safetensors",
                                   "shard-00001-model-00002-of-00002.safetensors",
                                   "shard-00002-model-00001-of-00002.safetensors",
                                   "shard-00002-model-00002-of-00002.safetensors"));
  expect_loads({model_on_one()});
}

TEST_F(HuggingFaceWriterTest, SeveralChunksOfATensorOnARankAreInFilesOfTheirOwn) {
  // As FSDP cuts: flat ranges.
  std::vector<std::vector<Box>> boxes;
  for (int64_t rank = 0; rank < 2; ++rank) boxes.push_back(flat_range_to_boxes({4, 4}, rank * 7, rank == 0 ? 7 : 16));
  ASSERT_EQ(boxes[1].size(), 2u);
  save_safetensors(directory_.path(), sharded<MemorySaveState>("w", {4, 4}, boxes), kSharded);
  EXPECT_THAT(files(), ElementsAre("model.safetensors.shards.json", "shard-00001-model-00001-of-00001.safetensors",
                                   "shard-00002-model-00001-of-00001.safetensors",
                                   "shard-00003-model-00001-of-00001.safetensors",
                                   "shard-00004-model-00001-of-00001.safetensors"));
  expect_loads({{replica_entry("w", {4, 4})}});
}

/// After an error: nothing, or, where the save is committed, all.
void expect_nothing_or_all(const std::string& directory, Committed committed) {
  auto left = local_file_system().list(directory);
  // Made by a create that was reported as failed; nobody knows of it.
  std::erase_if(left, [](const std::string& name) {
    return name.starts_with("model.safetensors.index.json.tmp-") ||
           name.starts_with("model.safetensors.shards.json.tmp-");
  });
  if (committed == Committed::kNo) {
    EXPECT_THAT(left, IsEmpty());
    return;
  }
  auto ranks = states<MemoryLoadState>({model_on_one()});
  load_safetensors(directory, ranks);
  EXPECT_EQ(first_difference(ranks), "");
}

class HuggingFaceReshardingTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Layouts, HuggingFaceReshardingTest, testing::Bool(),
                         [](const auto& layout) { return layout.param ? "Consolidated" : "Sharded"; });

/// The tiles of a tensor, dealt to ranks at random.
std::vector<std::vector<Box>> deal(Random& random, const Dims& shape, size_t ranks) {
  std::vector<std::vector<Box>> boxes(ranks);
  for (const Box& box : random_tiling(random, shape)) {
    boxes[static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(ranks) - 1))].push_back(box);
  }
  return boxes;
}

TEST_P(HuggingFaceReshardingTest, RandomTilingsToRandomTilings) {
  Random random(GetParam() ? 7 : 8);
  for (int round = 0; round < 60; ++round) {
    const TemporaryDirectory directory;
    const auto before = static_cast<size_t>(random_between(random, 1, 4));
    const auto after = static_cast<size_t>(random_between(random, 1, 4));
    std::vector<std::vector<StateEntry>> saved(before);
    std::vector<std::vector<StateEntry>> loaded(after);
    for (int t = 0; t < 4; ++t) {
      const Dims shape = random_shape(random);
      const std::string fqn = "t" + std::to_string(t);
      const auto from = deal(random, shape, before);
      const auto to = deal(random, shape, after);
      for (size_t r = 0; r < before; ++r) saved[r].push_back(tensor_entry(fqn, shape, from[r], DType::kInt16));
      for (size_t r = 0; r < after; ++r) loaded[r].push_back(tensor_entry(fqn, shape, to[r], DType::kInt16));
    }
    save_safetensors(directory.path(), states<MemorySaveState>(saved), GetParam() ? kConsolidated : kSharded);
    auto ranks = states<MemoryLoadState>(loaded);
    const auto counters = load_safetensors(directory.path(), ranks);
    EXPECT_EQ(first_difference(ranks), "") << "round " << round;
    for (const ReadCounters& of_rank : counters) EXPECT_EQ(of_rank.bytes_read, of_rank.bytes_needed);
  }
}

/// One tensor of float32, which lies transposed in memory.
class TransposedState final : public SaveState {
 public:
  TransposedState(const Dims& size, const Box& chunk) : entries_{tensor_entry("w", size, {chunk})} {
    const Bytes dense = pattern_of("w", size, chunk, 4);
    const int64_t rows = chunk.sizes[0];
    const int64_t columns = chunk.sizes[1];
    memory_.resize(dense.size());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        std::memcpy(memory_.data() + (c * rows + r) * 4, dense.data() + (r * columns + c) * 4, 4);
      }
    }
  }
  const std::vector<StateEntry>& entries() const override { return entries_; }
  TensorView tensor(size_t, size_t) const override {
    const Dims& sizes = std::get<TensorEntry>(entries_[0].value).chunks[0].sizes;
    return {memory_.data(), DType::kFloat32, sizes, {1, sizes[0]}, nullptr};
  }
  ByteSpan bytes(size_t) const override { return {}; }

 private:
  std::vector<StateEntry> entries_;
  Bytes memory_;
};

TEST_P(HuggingFaceReshardingTest, MemoryThatIsNotRowMajorIsWrittenRowMajor) {
  // Larger than what is copied at once.
  const Dims size{2000, 1500};
  const TemporaryDirectory directory;
  std::vector<TransposedState> ranks;
  for (const auto& boxes : split(size, 1, 2)) ranks.emplace_back(size, boxes[0]);
  save_safetensors(directory.path(), ranks, GetParam() ? kConsolidated : kSharded);
  auto loaded = states<MemoryLoadState>({{replica_entry("w", size)}});
  load_safetensors(directory.path(), loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

TEST_P(HuggingFaceReshardingTest, TiedTensorsAreWrittenUnderEachName) {
  const TemporaryDirectory directory;
  std::vector<StateEntry> entries = {replica_entry("a", {3}), replica_entry("b", {3})};
  std::get<TensorEntry>(entries[1].value).tied_to = 0;
  MemorySaveState state(entries);
  state.memory().buffer(1) = state.memory().buffer(0);
  std::vector<MemorySaveState> ranks;
  ranks.push_back(std::move(state));
  save_safetensors(directory.path(), ranks, GetParam() ? kConsolidated : kSharded);
  auto loaded = states<MemoryLoadState>({{replica_entry("a", {3}), replica_entry("b", {3})}});
  load_safetensors(directory.path(), loaded);
  EXPECT_EQ(loaded[0].memory().buffer(1), loaded[0].memory().buffer(0));
  EXPECT_EQ(loaded[0].memory().buffer(0), loaded[0].memory().expected(0, 0));
}

TEST_P(HuggingFaceReshardingTest, WithoutTensorsOnSomeRank) {
  const TemporaryDirectory directory;
  save_safetensors(directory.path(), states<MemorySaveState>({{}, {replica_entry("a", {3})}, {}}),
                   GetParam() ? kConsolidated : kSharded);
  auto loaded = states<MemoryLoadState>({{replica_entry("a", {3})}});
  load_safetensors(directory.path(), loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

TEST_P(HuggingFaceReshardingTest, LargeTensorsShowProgress) {
  const TemporaryDirectory directory;
  const Dims size{3000, 2500};
  const auto ranks = sharded<MemorySaveState>("w", size, split(size, 0, 1));
  uint64_t last = 0;
  uint64_t largest = 0;
  on_ranks(1, [&](size_t rank, Transport& transport) {
    DefaultSavePlanner planner;
    HuggingFaceStorageWriter writer(directory.path(), GetParam() ? kConsolidated : kSharded);
    run_save(transport, ranks[rank], planner, writer, [&](const Progress& progress) {
      EXPECT_EQ(progress.step, "write");
      EXPECT_EQ(progress.total, 30'000'000u);
      largest = std::max(largest, progress.done - last);
      last = progress.done;
    });
  });
  EXPECT_EQ(last, 30'000'000u);
  EXPECT_LE(largest, 4u << 20);
}

// --- refusals

TEST_F(HuggingFaceWriterTest, AnEmptyStateIsAnEmptyFile) {
  save_safetensors(directory_.path(), states<MemorySaveState>({{}}), kConsolidated);
  EXPECT_TRUE(header("model-00001-of-00001.safetensors").tensors.empty());
  EXPECT_TRUE(decode_safetensors_index(read_bytes(path("model.safetensors.index.json"))).weight_map.empty());
}

TEST_F(HuggingFaceWriterTest, ValuesAreRefusedByName) {
  for (const auto& options : {kConsolidated, kSharded}) {
    std::vector<MemorySaveState> ranks = states<MemorySaveState>({{replica_entry("w", {2})}});
    ranks[0].add_value("epoch", "12");
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "key epoch", save_safetensors(directory_.path(), ranks, options));
    EXPECT_THAT(files(), IsEmpty());
  }
}

TEST_F(HuggingFaceWriterTest, DtypesOfNoNameAreRefusedByKey) {
  for (const auto& options : {kConsolidated, kSharded}) {
    const auto ranks = states<MemorySaveState>({{replica_entry("c", {2}, DType::kComplex128)}});
    EXPECT_ERROR(ErrorCode::kUnsupported, "key c", save_safetensors(directory_.path(), ranks, options));
    EXPECT_THAT(files(), IsEmpty());
  }
}

TEST_F(HuggingFaceWriterTest, MappingsThatDoNotFitAreRefused) {
  HuggingFaceWriterOptions options = kConsolidated;
  options.fqn_to_index_mapping = {{"other", 1}};
  for (const bool consolidate : {true, false}) {
    options.consolidate = consolidate;
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "has no file for a tensor; key w",
                 save_safetensors(directory_.path(), states<MemorySaveState>({{replica_entry("w", {2})}}), options));
  }
  options.fqn_to_index_mapping = {{"w", 0}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "wanted 1 or more", HuggingFaceStorageWriter(directory_.path(), options));
  EXPECT_THAT(files(), IsEmpty());
}

TEST_F(HuggingFaceWriterTest, DirectoriesWithSafetensorsAreLeftAlone) {
  for (const char* name :
       {"model.safetensors", "model.safetensors.index.json", "model.safetensors.shards.json", "x.safetensors"}) {
    write_bytes(path(name), as_bytes("theirs"));
    for (const auto& options : {kConsolidated, kSharded}) {
      EXPECT_ERROR(ErrorCode::kAlreadyExists, name,
                   save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), options));
    }
    EXPECT_THAT(files(), ElementsAre(name));
    std::filesystem::remove(path(name));
  }
}

TEST_F(HuggingFaceWriterTest, FilesThatAreNoSafetensorsStay) {
  write_bytes(path("config.json"), as_bytes("{}"));
  write_bytes(path("model-00001-of-00001.safetensors.tmp-of-a-killed-save"), as_bytes("x"));
  save_safetensors(directory_.path(), states<MemorySaveState>(model_on_two()), kConsolidated);
  EXPECT_THAT(files(), ElementsAre("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"));
}

TEST_F(HuggingFaceWriterTest, RanksOnDifferentFileSystemsAreTold) {
  const auto ranks = states<MemorySaveState>(model_on_two());
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "do all ranks share the file system",
               on_ranks(2, [&](size_t rank, Transport& transport) {
                 DefaultSavePlanner planner;
                 std::filesystem::create_directories(path("of-rank-1"));
                 HuggingFaceStorageWriter writer(path(rank == 0 ? "of-rank-0" : "of-rank-1"), kConsolidated);
                 run_save(transport, ranks[rank], planner, writer);
               }));
  EXPECT_THAT(local_file_system().list(path("of-rank-0")), IsEmpty());
  EXPECT_THAT(local_file_system().list(path("of-rank-1")), IsEmpty());
}

TEST_P(HuggingFaceReshardingTest, APlanThatIsKeptServesTheNextDirectory) {
  const TemporaryDirectory directory;
  std::vector<SavePlanCache> caches(2);
  const auto ranks = states<MemorySaveState>(model_on_two());
  for (const char* name : {"first", "second", "third"}) {
    on_ranks(2, [&](size_t rank, Transport& transport) {
      DefaultSavePlanner planner;
      HuggingFaceStorageWriter writer(directory / name, GetParam() ? kConsolidated : kSharded);
      run_save(transport, ranks[rank], planner, writer, {}, &caches[rank]);
    });
    auto loaded = states<MemoryLoadState>({model_on_one()});
    load_safetensors(directory / name, loaded);
    EXPECT_EQ(first_difference(loaded), "");
  }
  EXPECT_EQ(caches[0].hits(), 2u);
}

TEST_P(HuggingFaceReshardingTest, AnErrorAtAnyTestPointLeavesNothing) {
  const auto ranks = states<MemorySaveState>(model_on_two());
  bool reached = true;
  int points = 0;
  for (int nth = 1; reached; ++nth) {
    const TemporaryDirectory directory;
    std::atomic<int> passed = 0;
    set_test_point_handler([&](std::string_view) {
      if (++passed == nth) throw Error(ErrorCode::kIo, "stopped by the test");
    });
    try {
      save_safetensors(directory.path(), ranks, GetParam() ? kConsolidated : kSharded);
      reached = passed >= nth;
    } catch (const CheckpointError& error) {
      ++points;
      expect_nothing_or_all(directory.path(), error.committed());
    }
    set_test_point_handler(nullptr);
  }
  EXPECT_GT(points, 10);
}

// --- failures

TEST_P(HuggingFaceReshardingTest, AfterAnErrorOfAnyCallNothingIsLeft) {
  const auto ranks = states<MemorySaveState>(model_on_two());
  const HuggingFaceWriterOptions options{.consolidate = GetParam(), .fqn_to_index_mapping = {}};
  FaultFileSystem clean;
  {
    const TemporaryDirectory directory;
    save_safetensors(directory.path(), ranks, options, clean);
  }
  ASSERT_GT(clean.calls(), 15u);
  for (uint64_t n = 1; n <= clean.calls(); ++n) {
    for (const bool after_effect : {false, true}) {
      const TemporaryDirectory directory;
      FaultFileSystem faulty;
      faulty.inject({.nth = n, .error = ENOSPC, .after_effect = after_effect});
      set_log_sink([](LogLevel, std::string_view) {});
      try {
        save_safetensors(directory.path(), ranks, options, faulty);
        expect_nothing_or_all(directory.path(), Committed::kYes);
      } catch (const CheckpointError& error) {
        EXPECT_EQ(error.code(), ErrorCode::kIo) << error.what();
        expect_nothing_or_all(directory.path(), error.committed());
      }
      set_log_sink(nullptr);
    }
  }
}

TEST_P(HuggingFaceReshardingTest, AKilledRenameLeavesNoCheckpoint) {
  // Killed after the first of two files has its name. The whole tensors of the other are known to nobody else.
  const TemporaryDirectory directory;
  HuggingFaceWriterOptions options = GetParam() ? kConsolidated : kSharded;
  if (GetParam()) options.fqn_to_index_mapping = {{"a", 1}, {"b", 2}};
  std::atomic<int> renames = 0;
  set_test_point_handler([&](std::string_view name) {
    if (name == "safetensors.before_rename" && ++renames == 2) {
      std::filesystem::copy(directory / "saved", directory / "killed");
    }
  });
  save_safetensors(directory / "saved", states<MemorySaveState>({{replica_entry("a", {3})}, {replica_entry("b", {3})}}),
                   options);
  set_test_point_handler(nullptr);
  EXPECT_EQ(renames, 2);
  EXPECT_EQ(HuggingFaceStorageReader(directory / "saved").read_metadata().state_dict_metadata.size(), 2u);
  EXPECT_ERROR(ErrorCode::kNotFound, "was it ever finished?",
               HuggingFaceStorageReader(directory / "killed").read_metadata());
}

// --- consolidation of files that are there

TEST_F(HuggingFaceWriterTest, ConsolidationOfShardsIsTheConsolidatedSave) {
  HuggingFaceWriterOptions options = kConsolidated;
  options.fqn_to_index_mapping = {{"w", 1}, {"columns", 2}, {"step", 1}, {"mask", 1}, {"none", 2}};
  save_safetensors(path("saved"), states<MemorySaveState>(model_on_two()), options);
  save_safetensors(path("sharded"), states<MemorySaveState>(model_on_two()), kSharded);
  consolidate_safetensors_files(path("sharded"), path("consolidated"), options.fqn_to_index_mapping);
  EXPECT_EQ(local_file_system().list(path("consolidated")), local_file_system().list(path("saved")));
  for (const std::string& name : local_file_system().list(path("saved"))) {
    EXPECT_EQ(read_bytes(path("consolidated/" + name)), read_bytes(path("saved/" + name))) << name;
  }
}

TEST_F(HuggingFaceWriterTest, ConsolidationIsBlockByBlock) {
  // Columns of a tensor of several blocks.
  const Dims size{3000, 2500};
  save_safetensors(path("sharded"), sharded<MemorySaveState>("w", size, split(size, 1, 3)), kSharded);
  FaultFileSystem files;
  consolidate_safetensors_files(path("sharded"), path("whole"), {}, files);
  for (const FileCallRecord& record : files.trace()) {
    if (record.call != FileCall::kWrite && record.call != FileCall::kRead) continue;
    EXPECT_LE(record.bytes, 16u << 20) << to_string(record);
  }
  auto ranks = states<MemoryLoadState>({{replica_entry("w", size)}});
  load_safetensors(path("whole"), ranks);
  EXPECT_EQ(first_difference(ranks), "");
}

TEST_F(HuggingFaceWriterTest, ConsolidationOfMissingShardsLeavesNothing) {
  save_safetensors(path("sharded"), states<MemorySaveState>(model_on_two()), kSharded);
  std::filesystem::remove(path("sharded/shard-00002-model-00001-of-00001.safetensors"));
  EXPECT_ERROR(ErrorCode::kNotFound, "wanted shard-00002-model-00001-of-00001.safetensors",
               consolidate_safetensors_files(path("sharded"), path("whole")));
  EXPECT_FALSE(std::filesystem::exists(path("whole")));
  // Without the list, as PyTorch leaves it.
  std::filesystem::remove(path("sharded/model.safetensors.shards.json"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored at",
               consolidate_safetensors_files(path("sharded"), path("whole")));
  EXPECT_THAT(local_file_system().list(path("whole")), IsEmpty());
}

TEST_F(HuggingFaceWriterTest, AfterAnErrorOfAnyCallOfAConsolidationNothingIsLeft) {
  save_safetensors(path("sharded"), states<MemorySaveState>(model_on_two()), kSharded);
  FaultFileSystem clean;
  consolidate_safetensors_files(path("sharded"), path("clean"), {}, clean);
  for (uint64_t n = 1; n <= clean.calls(); ++n) {
    const TemporaryDirectory directory;
    FaultFileSystem faulty;
    faulty.inject({.nth = n, .error = EIO});
    EXPECT_ERROR(ErrorCode::kIo, "", consolidate_safetensors_files(path("sharded"), directory.path(), {}, faulty));
    const auto left = local_file_system().list(directory.path());
    if (!left.empty()) expect_nothing_or_all(directory.path(), Committed::kYes);
  }
}

TEST_F(HuggingFaceWriterTest, ACheckpointInDcpsFormatIsExported) {
  save_checkpoint(path("dcp"), states<MemorySaveState>(model_on_two()));
  FileSystemReader reader(path("dcp"));
  export_safetensors(reader, path("exported"));
  save_safetensors(path("saved"), states<MemorySaveState>({model_on_one()}), kConsolidated);
  EXPECT_EQ(read_bytes(path("exported/model-00001-of-00001.safetensors")),
            read_bytes(path("saved/model-00001-of-00001.safetensors")));
}

TEST_F(HuggingFaceWriterTest, ACheckpointWithValuesIsNotExported) {
  std::vector<MemorySaveState> ranks = states<MemorySaveState>({{replica_entry("w", {2})}});
  const std::string archive = value_archive("12");
  ranks[0].add_value("epoch", archive);
  save_checkpoint(path("dcp"), ranks);
  FileSystemReader reader(path("dcp"));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key epoch", export_safetensors(reader, path("exported")));
}

}  // namespace
}  // namespace reshard
