// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "storage/hugging_face_runs.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::UnorderedElementsAre;

constexpr const char* kIndex = kSafetensorsIndexFileName;

class HuggingFaceReaderTest : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return directory_ / name; }
  void put(const std::string& name, std::vector<SafetensorsTensor> tensors, const SafetensorsSharding& sharding = {}) {
    write_bytes(path(name), safetensors_file(std::move(tensors), sharding));
  }
  void put_text(const std::string& name, std::string_view text) { write_bytes(path(name), as_bytes(text)); }
  /// A 4 x 2 tensor of float32.
  static SafetensorsTensor matrix(const std::string& name) { return {name, DType::kFloat32, {4, 2}, 0, 0}; }
  Metadata read() { return HuggingFaceStorageReader(directory_.path()).read_metadata(); }
  std::vector<std::string> names() {
    std::vector<std::string> result;
    for (const auto& [fqn, entry] : read().state_dict_metadata) result.push_back(fqn);
    return result;
  }
  void expect_refused(ErrorCode code, const std::string& text) { EXPECT_ERROR(code, text, read()); }
  /// Loads on one rank and compares.
  ReadCounters expect_loads(std::vector<StateEntry> entries, const HuggingFaceReaderOptions& options = {}) {
    auto ranks = states<MemoryLoadState>({std::move(entries)});
    const auto counters = load_safetensors(directory_.path(), ranks, options);
    EXPECT_EQ(first_difference(ranks), "");
    return counters[0];
  }

  TemporaryDirectory directory_;
};

TEST_F(HuggingFaceReaderTest, OneFile) {
  put("model.safetensors", {matrix("a"),
                            {"b.c", DType::kBFloat16, {3}, 0, 0},
                            {"step", DType::kInt64, {}, 0, 0},
                            {"none", DType::kFloat32, {0, 4}, 0, 0}});
  const Metadata metadata = read();
  const auto& a = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("a"));
  EXPECT_EQ(a.size, (Dims{4, 2}));
  EXPECT_EQ(a.properties.dtype, DType::kFloat32);
  EXPECT_EQ(a.chunks, (std::vector<Box>{{{0, 0}, {4, 2}}}));
  EXPECT_EQ(metadata.storage_data.find({"a", Dims{0, 0}, {}})->length, 32u);
  const ReadCounters counters = expect_loads({replica_entry("a", {4, 2}), replica_entry("b.c", {3}, DType::kBFloat16),
                                              replica_entry("step", {}, DType::kInt64), replica_entry("none", {0, 4})});
  EXPECT_EQ(counters.bytes_needed, 46u);
  EXPECT_EQ(counters.bytes_read, 46u);
  EXPECT_EQ(counters.bytes_staged, 0u);
  EXPECT_EQ(counters.reads, 1u);
}

TEST_F(HuggingFaceReaderTest, SeveralThreadsReadWhatOneReads) {
  std::vector<SafetensorsTensor> tensors;
  std::vector<StateEntry> entries;
  for (int i = 0; i < 12; ++i) {
    tensors.push_back({"t" + std::to_string(i), DType::kFloat32, {500'000}, 0, 0});
    entries.push_back(replica_entry(tensors.back().name, {500'000}));
  }
  put("model.safetensors", tensors);
  const ReadCounters one = expect_loads(entries);
  const ReadCounters four = expect_loads(entries, {.thread_count = 4});
  EXPECT_EQ(four.bytes_needed, one.bytes_needed);
  EXPECT_EQ(four.bytes_read, one.bytes_read);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "thread_count of a HuggingFaceStorageReader",
               expect_loads(entries, {.thread_count = 0}));
}

TEST_F(HuggingFaceReaderTest, FilesOfAnIndexAndNoOthers) {
  put("model-00001-of-00002.safetensors", {matrix("a")});
  put("model-00002-of-00002.safetensors", {matrix("b")});
  put("consolidated.safetensors", {matrix("a"), matrix("b"), matrix("c")});
  put_text(kIndex, R"({"metadata": {"total_size": 64}, "weight_map":
      {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
  expect_loads({replica_entry("a", {4, 2}), replica_entry("b", {4, 2})});
}

TEST_F(HuggingFaceReaderTest, ModelBeforeOtherFiles) {
  put("model.safetensors", {matrix("a")});
  put("adapter_model.safetensors", {matrix("a"), matrix("lora")});
  EXPECT_THAT(names(), UnorderedElementsAre("a"));
}

TEST_F(HuggingFaceReaderTest, AnyFilesWithoutIndex) {
  put("x.safetensors", {matrix("a")});
  put("y.safetensors", {matrix("b")});
  put_text("notes.txt", "nothing");
  put_text("z.safetensors.tmp-1", "nothing");
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
}

TEST_F(HuggingFaceReaderTest, LinksOfTheHubsCache) {
  std::filesystem::create_directories(path("blobs"));
  std::filesystem::create_directories(path("snapshots/main"));
  put("blobs/1", {matrix("a")});
  put_text("blobs/2", R"({"weight_map": {"a": "model-00001-of-00001.safetensors"}})");
  std::filesystem::create_symlink("../../blobs/1", path("snapshots/main/model-00001-of-00001.safetensors"));
  std::filesystem::create_symlink("../../blobs/2", path("snapshots/main/model.safetensors.index.json"));
  auto ranks = states<MemoryLoadState>({{replica_entry("a", {4, 2})}});
  load_safetensors(path("snapshots/main"), ranks);
  EXPECT_EQ(first_difference(ranks), "");
}

TEST_F(HuggingFaceReaderTest, EveryDtypeLoads) {
  std::vector<SafetensorsTensor> tensors;
  std::vector<StateEntry> entries;
#define RESHARD_ADD(id, name, bytes)                                    \
  if (safetensors_dtype_name(DType::id) && DType::id != DType::kBool) { \
    tensors.push_back({name, DType::id, {3, 2}, 0, 0});                 \
    entries.push_back(replica_entry(name, {3, 2}, DType::id));          \
  }
  RESHARD_FOR_EACH_DTYPE(RESHARD_ADD)
#undef RESHARD_ADD
  ASSERT_EQ(tensors.size(), 19u);
  put("model.safetensors", tensors);
  expect_loads(entries);
}

TEST_F(HuggingFaceReaderTest, BoolsAreZeroOrOne) {
  SafetensorsHeader header{{{"flags", DType::kBool, {4}, 0, 0}}};
  lay_out_safetensors(header.tensors);
  Bytes file = encode_safetensors_header(header);
  for (const int value : {0, 1, 2, 255}) file.push_back(static_cast<std::byte>(value));
  write_bytes(path("model.safetensors"), file);
  auto ranks = states<MemoryLoadState>({{replica_entry("flags", {4}, DType::kBool)}});
  load_safetensors(directory_.path(), ranks);
  EXPECT_EQ(ranks[0].memory().buffer(0), (Bytes{std::byte{0}, std::byte{1}, std::byte{1}, std::byte{1}}));
}

TEST_F(HuggingFaceReaderTest, OnlyTheWantedBytesAreRead) {
  put("model.safetensors", {{"w", DType::kFloat32, {100, 64}, 0, 0}, {"big", DType::kFloat32, {1000, 1000}, 0, 0}});
  // Rows are one run, columns one for each row.
  ReadCounters rows = expect_loads({tensor_entry("w", {100, 64}, {{{10, 0}, {5, 64}}})});
  EXPECT_EQ(rows.bytes_read, 5u * 64 * 4);
  EXPECT_EQ(rows.bytes_read, rows.bytes_needed);
  EXPECT_EQ(rows.reads, 1u);
  ReadCounters columns = expect_loads({tensor_entry("w", {100, 64}, {{{0, 16}, {100, 16}}})});
  EXPECT_EQ(columns.bytes_read, 100u * 16 * 4);
  EXPECT_EQ(columns.reads, 100u);
  columns = expect_loads({tensor_entry("w", {100, 64}, {{{0, 16}, {100, 16}}})}, {.coalesce_gap = 192});
  EXPECT_EQ(columns.reads, 1u);
  EXPECT_EQ(columns.bytes_needed, 100u * 16 * 4);
  EXPECT_EQ(columns.bytes_read, 99u * 64 * 4 + 64);
}

TEST_F(HuggingFaceReaderTest, ManySmallTensorsAreFewReads) {
  std::vector<SafetensorsTensor> tensors;
  std::vector<StateEntry> entries;
  for (int i = 0; i < 300; ++i) {
    tensors.push_back({"t" + std::to_string(1000 + i), DType::kFloat32, {100}, 0, 0});
    entries.push_back(replica_entry(tensors.back().name, {100}));
  }
  put("model.safetensors", tensors);
  EXPECT_EQ(expect_loads(entries).reads, 1u);
}

TEST_F(HuggingFaceReaderTest, LargeLoadsAreHandedOverBitByBit) {
  // More than is pending at once.
  put("model.safetensors", {{"x", DType::kFloat32, {3 << 20}, 0, 0}, {"y", DType::kFloat32, {3 << 20}, 0, 0}});
  const ReadCounters counters = expect_loads({replica_entry("x", {3 << 20}), replica_entry("y", {3 << 20})});
  EXPECT_EQ(counters.bytes_read, 24u << 20);
}

TEST_F(HuggingFaceReaderTest, ShardsOfPyTorchAreChunks) {
  const SafetensorsTensor half{"w", DType::kFloat32, {2, 2}, 0, 0};
  const auto at = [](int64_t row) { return SafetensorsSharding{{"w", {{row, 0}, Dims{4, 2}}}}; };
  // Without sizes, as PyTorch has it; the pattern is made with them.
  const auto put_half = [&](const std::string& name, int64_t row) {
    Bytes file = safetensors_file({half}, at(row));
    const Bytes begin = [&] {
      SafetensorsHeader header{{half}};
      lay_out_safetensors(header.tensors);
      header.metadata.insert(std::string(kShardingInfoKey), encode_sharding_info({{"w", {{row, 0}, std::nullopt}}}));
      return encode_safetensors_header(header);
    }();
    file.erase(file.begin(), file.end() - 16);
    file.insert(file.begin(), begin.begin(), begin.end());
    write_bytes(path(name), file);
  };
  put_half("shard-00001-model-00001-of-00001.safetensors", 0);
  put_half("shard-00002-model-00001-of-00001.safetensors", 2);
  const Metadata metadata = read();
  const auto& w = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w"));
  EXPECT_EQ(w.size, (Dims{4, 2}));
  EXPECT_EQ(w.chunks, (std::vector<Box>{{{0, 0}, {2, 2}}, {{2, 0}, {2, 2}}}));
  const ReadCounters counters = expect_loads({tensor_entry("w", {4, 2}, {{{1, 0}, {2, 2}}})});
  EXPECT_EQ(counters.bytes_read, 16u);
}

TEST_F(HuggingFaceReaderTest, ChunksWithoutElementsCountOnlyAlone) {
  const SafetensorsTensor none{"w", DType::kFloat32, {0, 2}, 0, 0};
  put("a.safetensors", {none, {"e", DType::kFloat32, {0}, 0, 0}},
      {{"w", {{0, 0}, std::nullopt}}, {"e", {{0}, std::nullopt}}});
  put("b.safetensors", {{"w", DType::kFloat32, {4, 2}, 0, 0}, {"e", DType::kFloat32, {0}, 0, 0}},
      {{"w", {{0, 0}, std::nullopt}}, {"e", {{0}, std::nullopt}}});
  put("c.safetensors", {none}, {{"w", {{4, 0}, std::nullopt}}});
  const Metadata metadata = read();
  EXPECT_EQ(std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w")).chunks.size(), 1u);
  EXPECT_EQ(std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("e")).chunks,
            (std::vector<Box>{{{0}, {0}}}));
  expect_loads({replica_entry("w", {4, 2}), replica_entry("e", {0})});
}

TEST_F(HuggingFaceReaderTest, RandomBoxesOfRandomChunks) {
  Random random(20);
  for (int round = 0; round < 60; ++round) {
    const TemporaryDirectory directory;
    const Dims shape = random_shape(random, 9);
    const std::vector<Box> tiles = random_tiling(random, shape);
    for (size_t i = 0; i < tiles.size(); ++i) {
      write_bytes(directory / (std::to_string(i) + ".safetensors"),
                  safetensors_file({{"w", DType::kInt16, tiles[i].sizes, 0, 0}}, {{"w", {tiles[i].offsets, shape}}}));
    }
    auto ranks = states<MemoryLoadState>({{tensor_entry("w", shape, {random_box(random, shape)}, DType::kInt16)},
                                          {replica_entry("w", shape, DType::kInt16)}});
    const auto counters = load_safetensors(directory.path(), ranks);
    EXPECT_EQ(first_difference(ranks), "") << to_string(shape);
    for (const ReadCounters& of_rank : counters) EXPECT_EQ(of_rank.bytes_read, of_rank.bytes_needed);
  }
}

// --- defects

TEST_F(HuggingFaceReaderTest, NoDirectoryOrNoFiles) {
  EXPECT_ERROR(ErrorCode::kNotFound, "no such checkpoint directory",
               HuggingFaceStorageReader(path("none")).read_metadata());
  expect_refused(ErrorCode::kNotFound, "holds no safetensors files");
  put_text("file", "x");
  EXPECT_ERROR(ErrorCode::kIo, "list", HuggingFaceStorageReader(path("file")).read_metadata());
}

TEST_F(HuggingFaceReaderTest, FilesThatAreNotAllThere) {
  put("model-00002-of-00002.safetensors", {matrix("b")});
  expect_refused(ErrorCode::kNotFound, "wanted model-00001-of-00002.safetensors");
  put("model-00001-of-00002.safetensors", {matrix("a")});
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
  put("model-00003-of-00004.safetensors", {matrix("c")});
  expect_refused(ErrorCode::kNotFound, "wanted model-00001-of-00004.safetensors");
}

TEST_F(HuggingFaceReaderTest, IndexThatIsWrong) {
  put("a.safetensors", {matrix("a"), matrix("b")});
  put("b.safetensors", {matrix("c")});
  const auto refuse = [&](const char* map, ErrorCode code, const char* text) {
    put_text(kIndex, std::string(R"({"weight_map": {)") + map + "}}");
    expect_refused(code, text);
  };
  refuse(R"("a": "a.safetensors")", ErrorCode::kCorruptData, "found not in the index");
  refuse(R"("a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors")", ErrorCode::kCorruptData,
         "found b.safetensors");
  refuse(R"("a": "a.safetensors", "b": "a.safetensors", "d": "a.safetensors")", ErrorCode::kCorruptData, "key d");
  refuse(R"("a": "c.safetensors")", ErrorCode::kNotFound, "c.safetensors");
  refuse(R"("a": "../a.safetensors")", ErrorCode::kCorruptData, "leaves the checkpoint's directory");
  refuse(R"("a": "/etc/passwd")", ErrorCode::kCorruptData, "is absolute");
  refuse(R"("a": "")", ErrorCode::kCorruptData, "is empty");
  refuse(R"("a": 1)", ErrorCode::kCorruptData, kIndex);
  put_text(kIndex, R"({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}})");
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
}

TEST_F(HuggingFaceReaderTest, ListOfShardsThatIsWrong) {
  put("a.safetensors", {matrix("a")});
  put("b.safetensors", {matrix("b")});
  const auto list = [&](const char* text) { put_text(kSafetensorsShardsFileName, text); };
  list(R"({"files": ["a.safetensors"]})");
  EXPECT_THAT(names(), UnorderedElementsAre("a"));
  list(R"({"files": ["a.safetensors", "c.safetensors"]})");
  expect_refused(ErrorCode::kNotFound, "wanted c.safetensors");
  list(R"({"files": ["../a.safetensors"]})");
  expect_refused(ErrorCode::kNotFound, "wanted ../a.safetensors");
  list(R"({"files": "a.safetensors"})");
  expect_refused(ErrorCode::kCorruptData, kSafetensorsShardsFileName);
}

TEST_F(HuggingFaceReaderTest, FileThatIsNoSafetensors) {
  put_text("model.safetensors", "");
  expect_refused(ErrorCode::kCorruptData, "model.safetensors");
  put_text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n");
  expect_refused(ErrorCode::kCorruptData, "too long");
  std::filesystem::remove(path("model.safetensors"));
  std::filesystem::create_directories(path("model.safetensors"));
  expect_refused(ErrorCode::kCorruptData, "a directory");
  std::filesystem::remove(path("model.safetensors"));
  ASSERT_EQ(::mkfifo(path("model.safetensors").c_str(), 0600), 0);
  expect_refused(ErrorCode::kCorruptData, "a FIFO");
  std::filesystem::remove(path("model.safetensors"));
  std::filesystem::create_symlink("nowhere", path("model.safetensors"));
  expect_refused(ErrorCode::kNotFound, "cannot follow");
}

TEST_F(HuggingFaceReaderTest, FileCutAnywhere) {
  const Bytes whole = safetensors_file({matrix("a")});
  for (size_t n = 0; n < whole.size(); ++n) {
    write_bytes(path("model.safetensors"), ByteSpan(whole).first(n));
    expect_refused(ErrorCode::kCorruptData, "model.safetensors");
  }
}

TEST_F(HuggingFaceReaderTest, FileThatShrinksAfterItsHeaderWasRead) {
  put("model.safetensors", {matrix("a")});
  HuggingFaceStorageReader reader(directory_.path());
  const Metadata metadata = reader.read_metadata();
  reader.set_up_storage_reader(metadata);
  std::filesystem::resize_file(path("model.safetensors"), std::filesystem::file_size(path("model.safetensors")) - 4);
  MemoryLoadState state({replica_entry("a", {4, 2})});
  DefaultLoadPlanner planner;
  planner.set_up_planner(state, metadata, true);
  EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early",
               reader.read_data(planner.create_local_plan(), planner, {.save_id = {}, .progress = {}}));
  EXPECT_EQ(state.commits(), 0u);
}

TEST_F(HuggingFaceReaderTest, ReadBeforeSetUp) {
  HuggingFaceStorageReader reader(directory_.path());
  MemoryLoadState state;
  DefaultLoadPlanner planner;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "before set_up_storage_reader",
               reader.read_data({}, planner, {.save_id = {}, .progress = {}}));
}

TEST_F(HuggingFaceReaderTest, TensorInTwoFiles) {
  put("x.safetensors", {matrix("a")});
  put("y.safetensors", {matrix("a")});
  expect_refused(ErrorCode::kCorruptData, "two files hold the same part of a tensor");
}

TEST_F(HuggingFaceReaderTest, ShardsThatDoNotFitEachOther) {
  const auto with = [&](const SafetensorsTensor& second, const SafetensorsShard& shard, const std::string& text) {
    put("x.safetensors", {{"w", DType::kFloat32, {2, 2}, 0, 0}}, {{"w", {{0, 0}, Dims{4, 2}}}});
    put("y.safetensors", {second}, {{"w", shard}});
    expect_refused(ErrorCode::kCorruptData, text);
  };
  with({"w", DType::kFloat16, {2, 2}, 0, 0}, {{2, 0}, Dims{4, 2}}, "different dtypes");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{2, 0}, Dims{6, 2}}, "tensors of different sizes");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{2, 0}, std::nullopt}, "tensors of different sizes");
  with({"w", DType::kFloat32, {4}, 0, 0}, {{0}, Dims{4}}, "tensors of different sizes");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{3, 0}, Dims{4, 2}}, "key w");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{2}, Dims{4, 2}}, "another number of dimensions");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{2, 0}, Dims{4}}, "another number of dimensions");
  with({"w", DType::kFloat32, {2, 2}, 0, 0}, {{std::numeric_limits<int64_t>::max(), 0}, Dims{4, 2}},
       "end of a chunk overflows");
}

TEST_F(HuggingFaceReaderTest, ShardingInfoThatLacksATensor) {
  put("x.safetensors", {matrix("a"), matrix("b")}, {{"a", {{0, 0}, std::nullopt}}});
  expect_refused(ErrorCode::kCorruptData, "DCP_SHARDING_INFO lacks one of its tensors");
}

TEST_F(HuggingFaceReaderTest, ShardThatIsMissing) {
  put("x.safetensors", {{"w", DType::kFloat32, {2, 2}, 0, 0}}, {{"w", {{0, 0}, Dims{4, 2}}}});
  auto ranks = states<MemoryLoadState>({{replica_entry("w", {4, 2})}});
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored at [2, 0]", load_safetensors(directory_.path(), ranks));
  // What is there can be loaded.
  expect_loads({tensor_entry("w", {4, 2}, {{{0, 0}, {2, 2}}})});
}

TEST_F(HuggingFaceReaderTest, ErrorsOfTheSystemNameTheFile) {
  put("model.safetensors", {matrix("a")});
  FaultFileSystem clean;
  auto ranks = states<MemoryLoadState>({{replica_entry("a", {4, 2})}});
  load_safetensors(directory_.path(), ranks, {}, clean);
  ASSERT_GT(clean.calls(), 5u);
  for (uint64_t n = 1; n <= clean.calls(); ++n) {
    FaultFileSystem faulty;
    faulty.inject({.nth = n, .error = EIO});
    EXPECT_ERROR(ErrorCode::kIo, directory_.path(), load_safetensors(directory_.path(), ranks, {}, faulty));
  }
}

}  // namespace
}  // namespace reshard
