// SPDX-License-Identifier: BSD-3-Clause
// Items with stream transforms: saves and loads on any number of ranks, and files that lie.
#include "reshard/format/extension.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>
#include <fstream>

#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "storage/generations.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/oracle.h"
#include "support/random_tiling.h"
#include "support/streams.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::HasSubstr;

const FileSystemWriterOptions kCompressed{.sync_files = false, .extensions = {std::make_shared<ZStandard>()}};

FileSystemReaderOptions with_rot13() {
  FileSystemReaderOptions options;
  options.extension_registry.register_extension("stream.rot13", Rot13::from_descriptor);
  return options;
}

class ExtensionTest : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return directory_ / name; }
  Metadata metadata() const { return FileSystemReader(directory_.path()).read_metadata(); }
  void edit(const std::function<void(Metadata&)>& change) const {
    Metadata changed = metadata();
    change(changed);
    write(path(".metadata"), encode_metadata(changed));
  }
  static void write(const std::string& path, ByteSpan bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
  }
  /// The item becomes `stored`, in a file of its own; no sums speak of it then, as in a checkpoint of PyTorch.
  void replace_item(const MetadataIndex& index, ByteSpan stored, std::vector<std::string> descriptors) const {
    write(path("evil.distcp"), stored);
    edit([&](Metadata& changed) {
      *changed.storage_data.find(index) = {"evil.distcp", 0, stored.size(), std::move(descriptors)};
      changed.sidecars.reset();
    });
  }
  Bytes archive_of(DType dtype, const Dims& sizes, ByteSpan elements) const {
    const TensorArchive archive(dtype, sizes);
    Bytes bytes = archive.head();
    bytes.insert(bytes.end(), elements.begin(), elements.end());
    const Bytes tail = archive.tail(crc32(elements));
    bytes.insert(bytes.end(), tail.begin(), tail.end());
    return bytes;
  }
  std::vector<ReadCounters> load(std::vector<MemoryLoadState>& ranks, const FileSystemReaderOptions& options = {}) {
    return load_checkpoint(directory_.path(), ranks, options);
  }
  void load_one(const FileSystemReaderOptions& options = {}) {
    auto ranks = states<MemoryLoadState>({{replica_entry("t", {40'000})}});
    load(ranks, options);
    EXPECT_EQ(first_difference(ranks), "");
  }
  TemporaryDirectory directory_;
};

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kInt8, DType::kComplex64};

TEST_F(ExtensionTest, AnyNumberOfRanksSavesForAnyOther) {
  Random random(3);
  const Dims size{37, 11, 5};
  int round = 0;
  for (size_t savers = 1; savers <= 4; ++savers) {
    for (size_t loaders = 1; loaders <= 4; ++loaders) {
      const DType dtype = kDTypes[static_cast<size_t>(round++) % std::size(kDTypes)];
      const auto spread = [&](size_t ranks) {
        std::vector<std::vector<Box>> boxes(ranks);
        for (const Box& box : random_tiling(random, size)) boxes[random() % ranks].push_back(box);
        return boxes;
      };
      auto saving = sharded<MemorySaveState>("t", size, spread(savers), dtype);
      for (MemorySaveState& state : saving) {
        state.add(replica_entry("empty", {0, 3}));
        state.add(replica_entry("scalar", {}, dtype));
        state.add_value("step", value_archive(std::string(1000, 's')));
      }
      save_checkpoint(directory_.path(), saving, kCompressed);
      auto loading = sharded<MemoryLoadState>("t", size, spread(loaders), dtype);
      for (size_t rank = 0; rank < loaders; ++rank) {
        auto entries = loading[rank].entries(FlattenRule::kCurrent);
        entries.push_back(replica_entry("empty", {0, 3}));
        entries.push_back(replica_entry("scalar", {}, dtype));
        entries.push_back(bytes_entry("step", 0));
        loading[rank] = MemoryLoadState(std::move(entries));
      }
      load(loading);
      ASSERT_EQ(first_difference(loading), "") << savers << " to " << loaders;
      EXPECT_EQ(loading[0].value(3), value_archive(std::string(1000, 's')));
      const VerifyReport report = verify_checkpoint(directory_.path());
      for (const Error& problem : report.problems) ADD_FAILURE() << problem.what();
    }
  }
}

TEST_F(ExtensionTest, TheCatalogueSaysWhatWasWrittenWhere) {
  auto ranks = sharded<MemorySaveState>("t", {1000, 8}, split({1000, 8}, 0, 2));
  for (MemorySaveState& rank : ranks) {
    for (std::byte& byte : rank.memory().buffer(0)) byte &= std::byte{1};
    rank.add_value("step", value_archive("seven"));
  }
  const SaveResult result = save_checkpoint(directory_.path(), ranks, kCompressed);
  const Metadata written = metadata();
  uint64_t stored = 0;
  for (const auto& [index, place] : written.storage_data) {
    EXPECT_EQ(place.transform_descriptors, std::vector<std::string>{"stream.zstd/1"});
    const Bytes file = read_test_file(path(place.relative_path));
    const Bytes archive = restored(ZStandard(), ByteSpan(file).subspan(place.offset, place.length));
    EXPECT_NO_THROW(verify_archive(MemorySource(archive)));
    stored += place.length;
  }
  uint64_t files = 0;
  for (const char* name : {"__0_0.distcp", "__1_0.distcp"}) files += std::filesystem::file_size(path(name));
  EXPECT_EQ(stored, files);  // one after the other, without a gap
  EXPECT_EQ(result.bytes_written, files);
  EXPECT_LT(files, 32'000U / 2);
}

TEST_F(ExtensionTest, TiesAreWrittenOnce) {
  TemporaryDirectory plain;
  for (const std::string& where : {plain.path(), directory_.path()}) {
    auto ranks = states<MemorySaveState>({{replica_entry("a", {1000})}});
    StateEntry tied = replica_entry("b", {1000});
    std::get<TensorEntry>(tied.value).tied_to = 0;
    ranks[0].add(std::move(tied));
    const SaveResult result =
        save_checkpoint(where, ranks, where == plain.path() ? FileSystemWriterOptions{} : kCompressed);
    const Metadata written = FileSystemReader(where).read_metadata();
    const StorageInfo a = *written.storage_data.find({"a", Dims{0}, {}});
    EXPECT_EQ(a, *written.storage_data.find({"b", Dims{0}, {}}));
    EXPECT_EQ(result.bytes_written, a.length);
    FileSystemReader reader(where);
    EXPECT_EQ(CheckpointReader(reader).tied_to("b"), "a");
  }
}

TEST_F(ExtensionTest, EveryOptionOfTheWriterHolds) {
  int number = 0;
  FileSystemWriterOptions options = kCompressed;
  for (const bool single_file : {true, false}) {
    for (const int threads : {1, 3}) {
      for (const uint32_t alignment : {64U, 4096U}) {  // the second layout is read whole
        options.single_file_per_rank = single_file;
        options.thread_count = threads;
        options.storage_alignment = alignment;
        save_checkpoint(directory_.path(), generation(++number, 3), options);
        EXPECT_EQ(loaded_generation(directory_.path()), number);
        EXPECT_TRUE(verify_checkpoint(directory_.path()).problems.empty());
      }
    }
  }
  save_checkpoint(directory_.path(), generation(++number, 2));
  EXPECT_EQ(loaded_generation(directory_.path()), number);  // over a compressed one
}

// Its plan has guesses for places, which do not change; what is committed are the receipts of each save.
TEST_F(ExtensionTest, ASaveOfTheSameStructureIsPlannedFromTheCache) {
  std::vector<SavePlanCache> caches(2);
  for (const int number : {1, 2, 3}) {
    const auto saving = generation(number, 2);
    on_ranks(2, [&](size_t rank, Transport& transport) {
      DefaultSavePlanner planner;
      FileSystemWriter writer(directory_.path(), kCompressed);
      run_save(transport, saving[rank], planner, writer, {}, &caches[rank]);
    });
    EXPECT_EQ(loaded_generation(directory_.path()), number);
    EXPECT_TRUE(verify_checkpoint(directory_.path()).problems.empty());
  }
  EXPECT_EQ(caches[0].hits(), 2U);
}

// In the order of PyTorch's list: the last one first on the way to the file.
TEST_F(ExtensionTest, TakesExtensionsOfTheUsersOwnAndSeveral) {
  FileSystemWriterOptions options = kCompressed;
  options.extensions.insert(options.extensions.begin(), std::make_shared<Rot13>());
  save_checkpoint(directory_.path(), generation(5, 2), options);
  const StorageInfo place = *metadata().storage_data.find({"step", {}, {}});
  EXPECT_EQ(place.transform_descriptors, (std::vector<std::string>{"stream.zstd/1", "stream.rot13/1"}));
  const Bytes file = read_test_file(path(place.relative_path));
  const Bytes frame = transformed(Rot13(), ByteSpan(file).subspan(place.offset, place.length));
  EXPECT_THAT(std::string(as_text(restored(ZStandard(), frame))), HasSubstr("step 5"));

  std::vector<MemoryLoadState> ranks;
  ranks.push_back(generation_destination());
  load(ranks, with_rot13());
  EXPECT_EQ(number_of(ranks[0]), 5);
  EXPECT_TRUE(verify_checkpoint(directory_.path(), local_file_system(), {}, with_rot13()).problems.empty());
  EXPECT_THAT(verify_checkpoint(directory_.path()).problems.at(0).what(), HasSubstr("stream.rot13/1"));
}

TEST_F(ExtensionTest, RefusesExtensionsThatDoNotFit) {
  FileSystemWriterOptions options = kCompressed;
  options.extensions.push_back(nullptr);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "found 2, 1 of them null", FileSystemWriter(directory_.path(), options));
  options.extensions.assign(17, std::make_shared<ZStandard>());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "at most 16", FileSystemWriter(directory_.path(), options));
}

TEST_F(ExtensionTest, RanksWithOtherExtensionsFailTheSaveOfAll) {
  for (const size_t odd : {0, 1}) {
    const auto saving = generation(1, 2);
    std::vector<std::string> errors(2);
    on_ranks(2, [&](size_t rank, Transport& transport) {
      DefaultSavePlanner planner;
      FileSystemWriter writer(directory_.path(), rank == odd ? FileSystemWriterOptions{} : kCompressed);
      try {
        run_save(transport, saving[rank], planner, writer);
      } catch (const CheckpointError& error) {
        errors[rank] = error.what();
        EXPECT_EQ(error.committed(), Committed::kNo);
      }
    });
    EXPECT_THAT(errors[0], HasSubstr("the extensions of this rank's writer are not those of rank 0's"));
    EXPECT_THAT(errors[0],
                HasSubstr(odd == 0 ? "wanted none, found stream.zstd/1" : "wanted stream.zstd/1, found none"));
    EXPECT_EQ(errors[0], errors[1]);
    EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
  }
}

TEST_F(ExtensionTest, BoolsOfAFileThatMadeThemUpAreOneOrZero) {
  auto saving = states<MemorySaveState>({{replica_entry("t", {5000}, DType::kBool)}});  // any bytes at all
  save_checkpoint(directory_.path(), saving, kCompressed);
  auto loading = states<MemoryLoadState>({{replica_entry("t", {5000}, DType::kBool)}});
  load(loading);
  for (size_t i = 0; i < 5000; ++i) {
    ASSERT_EQ(loading[0].memory().buffer(0)[i] != std::byte{0}, saving[0].memory().buffer(0)[i] != std::byte{0});
    ASSERT_LE(loading[0].memory().buffer(0)[i], std::byte{1});
  }
}

// --- how much is read --------------------------------------------------------------------------------------------------

TEST_F(ExtensionTest, DecodesNoFurtherThanTheLastElementThatIsWanted) {
  constexpr int64_t kRows = 4000;
  save_checkpoint(directory_.path(), sharded<MemorySaveState>("t", {kRows, 1000}, split({kRows, 1000}, 0, 1)),
                  kCompressed);
  auto ranks = sharded<MemoryLoadState>("t", {kRows, 1000}, split({kRows, 1000}, 0, 4));
  const auto counters = load(ranks);
  EXPECT_EQ(first_difference(ranks), "");
  const uint64_t file = std::filesystem::file_size(path("__0_0.distcp"));
  for (size_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(counters[rank].bytes_payload, (rank + 1) * 4'000'000);
    // A buffer of the decoder is read ahead.
    EXPECT_LT(counters[rank].bytes_read, file * (rank + 1) / 4 + 400'000);
  }
}

// What digest, diff, convert and extract do.
TEST_F(ExtensionTest, AWalkInBlocksDecodesATensorOnce) {
  const Dims size{300, 40};
  const uint64_t bytes = 300 * 40 * 4;
  for (const size_t dim : {0, 1}) {
    for (const int64_t parts : {1, 4}) {
      save_checkpoint(directory_.path(), sharded<MemorySaveState>("t", size, split(size, dim, parts)), kCompressed);
      FileSystemReader files(directory_.path());
      const CheckpointReader reader(files);
      Bytes whole;
      for (const Box& box : cut_into_blocks(whole_box(size), 333)) {
        Bytes block(static_cast<size_t>(volume(box.sizes)) * 4);
        reader.read_box("t", box, block);
        whole.insert(whole.end(), block.begin(), block.end());
      }
      EXPECT_EQ(whole, pattern_of("t", size, whole_box(size), 4));
      EXPECT_EQ(files.counters().bytes_payload, bytes) << dim << " " << parts;
      // And backwards, by decoding anew.
      Bytes first(40 * 4);
      reader.read_box("t", {{0, 0}, {1, 40}}, first);
      EXPECT_EQ(first, pattern_of("t", size, {{0, 0}, {1, 40}}, 4));
    }
  }
}

TEST_F(ExtensionTest, OnlyWhatIsWantedIsOpenedAndNothingIsReadTwice) {
  auto saving = sharded<MemorySaveState>("t", {4'000'000}, split({4'000'000}, 0, 2));
  saving[0].add_value("v", value_archive("comes first, so that the tensor begins within a block"));
  save_checkpoint(directory_.path(), saving, kCompressed);
  FaultFileSystem files;
  auto ranks = sharded<MemoryLoadState>("t", {4'000'000}, split({4'000'000}, 0, 2));
  ranks.resize(1);
  load_checkpoint(directory_.path(), ranks, {}, files);
  EXPECT_EQ(first_difference(ranks), "");
  uint64_t end = 0;
  for (const FileCallRecord& record : files.trace()) {
    EXPECT_EQ(record.path.find("__1_0"), std::string::npos);
    if (record.call != FileCall::kRead || !record.path.ends_with(".distcp")) continue;
    EXPECT_GE(record.offset, end);
    end = record.offset + record.bytes;
  }
  EXPECT_EQ(end, std::filesystem::file_size(path("__0_0.distcp")));
}

// --- files that lie ----------------------------------------------------------------------------------------------------

class HostileExtensionTest : public ExtensionTest {
 protected:
  void SetUp() override { save_checkpoint(directory_.path(), one_tensor(), kCompressed); }
  static std::vector<MemorySaveState> one_tensor() { return states<MemorySaveState>({{replica_entry("t", {40'000})}}); }
  static Bytes elements() { return pattern_of("t", {40'000}, {{0}, {40'000}}, 4); }
  /// A load and verify refuse it, with the text and the place.
  void refuse(ErrorCode code, const std::string& text, const FileSystemReaderOptions& options = {}) {
    FileSystemReader reader(directory_.path(), options);
    const Metadata read = reader.read_metadata();
    const StorageInfo place = *read.storage_data.find(kIndex);
    const std::string where = "key t, file " + std::string(place.relative_path) + ", offset ";
    MemoryLoadState state({replica_entry("t", {40'000})});
    DefaultLoadPlanner planner;
    reader.set_up_storage_reader(read);
    planner.set_up_planner(state, read, true);
    const LoadPlan plan = planner.create_local_plan();
    EXPECT_ERROR(code, text, reader.read_data(plan, planner, {}));
    EXPECT_ERROR(code, where, reader.read_data(plan, planner, {}));
    EXPECT_EQ(state.commits(), 0U);
    const VerifyReport report = verify_checkpoint(directory_.path(), local_file_system(), {}, options);
    ASSERT_EQ(report.problems.size(), 1U);
    EXPECT_EQ(report.problems[0].code(), code);
    EXPECT_THAT(report.problems[0].what(), HasSubstr(text));
    EXPECT_THAT(report.problems[0].what(), HasSubstr(where));
  }
  const MetadataIndex kIndex{"t", Dims{0}, {}};
};

TEST_F(HostileExtensionTest, UnknownTransformsAreNamedBeforeAnythingIsTouched) {
  edit([&](Metadata& m) { m.storage_data.find(kIndex)->transform_descriptors = {"stream.rot13/1"}; });
  refuse(ErrorCode::kUnsupported, "not registered; ");
  refuse(ErrorCode::kUnsupported, "wanted stream.zstd, found stream.rot13/1");
  edit([&](Metadata& m) { m.storage_data.find(kIndex)->transform_descriptors = {"stream.zstd/2"}; });
  refuse(ErrorCode::kUnsupported, "found stream.zstd/2");
}

TEST_F(HostileExtensionTest, ChangedBytesAreSeenByTheSumsOrTheArchive) {
  Bytes file = read_test_file(path("__0_0.distcp"));
  file[file.size() / 2] ^= std::byte{1};
  write(path("__0_0.distcp"), file);
  refuse(ErrorCode::kCorruptData, "do not match their checksum");
  // Without sums: each byte once. The pattern is stored as it is, so that what changes are elements.
  const Bytes good = transformed(ZStandard(), archive_of(DType::kFloat32, {40'000}, elements()));
  for (size_t at = 0; at < good.size(); at += at < 40 || at + 400 > good.size() ? 1 : 7919) {
    Bytes bad = good;
    bad[at] ^= std::byte{0x10};
    replace_item(kIndex, bad, {"stream.zstd/1"});
    try {
      auto ranks = states<MemoryLoadState>({{replica_entry("t", {40'000})}});
      load(ranks);
      ASSERT_EQ(first_difference(ranks), "") << at;  // a byte that means nothing
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), HasSubstr("key t, file evil.distcp, offset 0")) << at;
    }
  }
}

TEST_F(HostileExtensionTest, TruncatedItems) {
  const Bytes good = transformed(ZStandard(), archive_of(DType::kFloat32, {40'000}, elements()));
  replace_item(kIndex, good, {"stream.zstd/1"});
  load_one();
  for (size_t size = 1; size < good.size(); size += size < 50 || size + 50 > good.size() ? 1 : 9973) {
    replace_item(kIndex, ByteSpan(good).first(size), {"stream.zstd/1"});
    SCOPED_TRACE(size);
    refuse(ErrorCode::kCorruptData, "the zstd frame is cut off");
  }
  replace_item(kIndex, {}, {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "too short for a zip archive");
}

TEST_F(HostileExtensionTest, DescriptorsThatLie) {
  const Bytes archive = archive_of(DType::kFloat32, {40'000}, elements());
  const Bytes good = transformed(ZStandard(), archive);
  replace_item(kIndex, archive, {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "no zstd frame, or a damaged one");
  replace_item(kIndex, good, {});
  refuse(ErrorCode::kCorruptData, "no end record");
  replace_item(kIndex, good, {"stream.zstd/1", "stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "no zstd frame, or a damaged one");
  replace_item(kIndex, transformed(ZStandard(), good), {"stream.zstd/1", "stream.zstd/1"});
  load_one();
}

TEST_F(HostileExtensionTest, ArchivesThatAreNotTheCataloguesTensor) {
  const auto stored = [&](DType dtype, const Dims& sizes, ByteSpan bytes) {
    replace_item(kIndex, transformed(ZStandard(), archive_of(dtype, sizes, bytes)), {"stream.zstd/1"});
  };
  stored(DType::kInt32, {40'000}, elements());
  refuse(ErrorCode::kCorruptData, "wanted float32 [40000], found int32 [40000]");
  stored(DType::kFloat32, {200, 200}, elements());
  refuse(ErrorCode::kCorruptData, "found float32 [200, 200]");
  stored(DType::kFloat32, {39'999}, ByteSpan(elements()).first(159'996));
  refuse(ErrorCode::kCorruptData, "found float32 [39999]");
  // Its head, and then too little or something else.
  const Bytes archive = archive_of(DType::kFloat32, {40'000}, elements());
  replace_item(kIndex, transformed(ZStandard(), ByteSpan(archive).first(100'000)), {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "ends within the elements; ");
  replace_item(kIndex, transformed(ZStandard(), ByteSpan(archive).first(archive.size() - 1)), {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "cut off (at byte " + std::to_string(archive.size() - 1) + " of the decoded item)");
  Bytes other = archive;
  other[2000] ^= std::byte{1};
  replace_item(kIndex, transformed(ZStandard(), other), {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "CRC-32");
  Bytes longer = archive;
  longer.resize(longer.size() + 100);  // which zip readers skip
  replace_item(kIndex, transformed(ZStandard(), longer), {"stream.zstd/1"});
  load_one();
  EXPECT_TRUE(verify_checkpoint(directory_.path()).problems.empty());
}

/// A frame of a few KiB that decodes to `size` zeros after `head`.
Bytes bomb(ByteSpan head, uint64_t size) {
  MemoryOutputStream out;
  const auto stream = ZStandard().transform_to(out);
  stream->write(head);
  const Bytes zeros(1 << 20);
  for (uint64_t at = 0; at < size; at += zeros.size()) stream->write(zeros);
  stream->finish();
  return std::move(out.bytes);
}

TEST_F(HostileExtensionTest, BombsEndAtWhatTheCatalogueAllows) {
  constexpr uint64_t kHuge = uint64_t{2} << 30;
  rusage before{};
  getrusage(RUSAGE_SELF, &before);
  replace_item(kIndex, bomb({}, kHuge), {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "decodes to more bytes than it can have; ");
  refuse(ErrorCode::kCorruptData, "wanted at most " + std::to_string(160'000 + 65536) + " bytes");
  replace_item(kIndex, bomb(TensorArchive(DType::kFloat32, {40'000}).head(), kHuge), {"stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "decodes to more bytes than it can have");
  // Two of them, one in the other.
  replace_item(kIndex, transformed(ZStandard(), bomb({}, kHuge)), {"stream.zstd/1", "stream.zstd/1"});
  refuse(ErrorCode::kCorruptData, "decodes to more bytes than it can have");
  rusage after{};
  getrusage(RUSAGE_SELF, &after);
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 100 << 10) << "KiB";
}

// A tensor of a terabyte whose item is a few bytes: nothing is taken for it before it comes.
TEST_F(HostileExtensionTest, ATensorThatIsOnlySaidToBeLargeTakesNoMemory) {
  replace_item(kIndex, transformed(ZStandard(), as_bytes("short")), {"stream.zstd/1"});
  edit([&](Metadata& m) {
    auto& tensor = std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("t"));
    tensor.size = {int64_t{1} << 38};
    tensor.chunks = {whole_box(tensor.size)};
  });
  const VerifyReport report = verify_checkpoint(directory_.path());
  ASSERT_EQ(report.problems.size(), 1U);
  EXPECT_THAT(report.problems[0].what(), HasSubstr("too short for a zip archive"));
  FileSystemReader files(directory_.path());
  const CheckpointReader reader(files);
  Bytes four(4);
  EXPECT_ERROR(ErrorCode::kCorruptData, "too short for a zip archive", reader.read_box("t", {{0}, {1}}, four));
}

TEST_F(HostileExtensionTest, ValuesAreBoundByAnOption) {
  auto ranks = one_tensor();
  ranks[0].add_value("v", value_archive(std::string(100'000, 'v')));
  save_checkpoint(directory_.path(), ranks, kCompressed);
  FileSystemReaderOptions options;
  const auto value = [&] {
    FileSystemReader files(directory_.path(), options);
    return CheckpointReader(files).read_value("v");
  };
  EXPECT_EQ(as_text(value()), value_archive(std::string(100'000, 'v')));
  options.max_transformed_value_bytes = 100'000;
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted at most 100000 bytes, found more", value());
  EXPECT_ERROR(ErrorCode::kCorruptData, "key v, file __0_1.distcp, offset 0", value());
  EXPECT_EQ(verify_checkpoint(directory_.path(), local_file_system(), {}, options).problems.size(), 1U);
}

}  // namespace
}  // namespace reshard
