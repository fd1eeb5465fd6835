// SPDX-License-Identifier: BSD-3-Clause
// One suite over every kind of storage: what a checkpoint promises does not depend on where it is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>

#include "reshard/storage/checkpoint_manager.h"
#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "storage/generations.h"
#include "storage/hugging_face_runs.h"
#include "support/expect_error.h"
#include "support/memory_file_system.h"
#include "support/temporary_directory.h"
#ifdef RESHARD_S3_SERVER
#include "support/s3_server.h"
#endif

namespace reshard {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

/// One place of a kind, for one test.
struct Place {
  std::string root;
  FileSystem* files = nullptr;
  std::shared_ptr<const void> owner{};
};

struct Kind {
  const char* name;
  size_t ranks;  // that may use it at the same time
  std::function<Place()> make;
  std::string (*missing)() = [] { return std::string(); };
  bool locks = true;
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

Place local_place() {
  const auto directory = std::make_shared<TemporaryDirectory>();
  return {directory->path(), &local_file_system(), directory};
}

Place memory_place() {
  const auto files = std::make_shared<MemoryFileSystem>(std::map<std::string, MemoryFileSystem::File>{},
                                                        std::set<std::string>{"/root"});
  return {"/root", files.get(), files};
}

std::vector<Kind> kinds() {
  std::vector<Kind> all{{"Local", 2, local_place}, {"Memory", 1, memory_place}};
#ifdef RESHARD_S3_SERVER
  const auto s3 = [](bool conditional) {
    S3Options options = S3Server::instance().options();
    options.conditional_writes = conditional;
    options.copy_bytes = 5 << 20;
    const auto files = std::make_shared<S3FileSystem>(options);
    return Place{S3Server::instance().new_prefix(), files.get(), files};
  };
  all.push_back({"S3", 2, [s3] { return s3(true); }, [] { return S3Server::instance().missing(); }});
  all.push_back(
      {"S3WithoutConditions", 2, [s3] { return s3(false); }, [] { return S3Server::instance().missing(); }, false});
#endif
  return all;
}

class StorageConformanceTest : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (const std::string missing = GetParam().missing(); !missing.empty()) GTEST_SKIP() << missing;
    place_ = GetParam().make();
    directory_ = place_.root + "/checkpoint";
  }
  FileSystem& files() const { return *place_.files; }
  size_t ranks() const { return GetParam().ranks; }
  void save(int number, const FileSystemWriterOptions& options = {}) {
    save_checkpoint(directory_, generation(number, ranks()), options, files());
  }
  int loaded() { return loaded_generation(directory_, files()); }
  std::string one_data_file() {
    for (const std::string& name : files().list(directory_)) {
      if (name.ends_with(".distcp")) return name;
    }
    return {};
  }
  void replace(const std::string& name, ByteSpan bytes) {
    const auto file = files().create(directory_ + "/" + name, CreateMode::kTruncate);
    file->write(0, bytes);
    file->close();
  }
  Bytes content(const std::string& name) { return files().read_file(directory_ + "/" + name, 1 << 30); }

  Place place_;
  std::string directory_;
};

// --- saving and loading
// ------------------------------------------------------------------------------------------------

TEST_P(StorageConformanceTest, WhatIsSavedIsLoadedBitForBit) {
  save(7);
  EXPECT_EQ(loaded(), 7);
  EXPECT_THAT(verify_checkpoint(directory_, files()).problems, IsEmpty());
}

TEST_P(StorageConformanceTest, EveryLayoutIsLoadedIntoEveryOther) {
  const Dims size{13, 7};
  for (const size_t dim : {size_t{0}, size_t{1}}) {
    save_checkpoint(directory_,
                    sharded<MemorySaveState>("w", size, split(size, dim, static_cast<int64_t>(ranks())), DType::kInt16),
                    {}, files());
    for (const size_t to : {size_t{0}, size_t{1}}) {
      auto target = sharded<MemoryLoadState>("w", size, split(size, to, static_cast<int64_t>(ranks())), DType::kInt16);
      load_checkpoint(directory_, target, {}, files());
      EXPECT_EQ(first_difference(target), "") << dim << " to " << to;
    }
  }
}

TEST_P(StorageConformanceTest, TensorsOfManyPartsAndNone) {
  // 12 MB a rank and more, so that object stores take it in parts.
  const Dims size{6'000'000};
  std::vector<MemorySaveState> source;
  std::vector<MemoryLoadState> target;
  for (size_t rank = 0; rank < ranks(); ++rank) {
    const auto mine = split(size, 0, static_cast<int64_t>(ranks()))[rank];
    source.push_back(MemorySaveState(
        {tensor_entry("large", size, mine), replica_entry("empty", {0, 3}), replica_entry("scalar", {})}));
    target.push_back(MemoryLoadState(
        {tensor_entry("large", size, mine), replica_entry("empty", {0, 3}), replica_entry("scalar", {})}));
  }
  save_checkpoint(directory_, source, {}, files());
  load_checkpoint(directory_, target, {}, files());
  EXPECT_EQ(first_difference(target), "");
}

TEST_P(StorageConformanceTest, APartOfATensorIsReadWithoutTheRest) {
  const Dims size{1'000'000};
  save_checkpoint(directory_, sharded<MemorySaveState>("w", size, split(size, 0, static_cast<int64_t>(ranks()))), {},
                  files());
  auto target = sharded<MemoryLoadState>("w", size, {{{{1000}, {500}}}});
  const auto counters = load_checkpoint(directory_, target, {}, files());
  EXPECT_EQ(first_difference(target), "");
  EXPECT_LT(counters[0].bytes_read, 20'000U);
}

TEST_P(StorageConformanceTest, SeveralFilesARank) {
  save(3, {.thread_count = 2});
  EXPECT_EQ(loaded(), 3);
  save(4, {.single_file_per_rank = false});
  EXPECT_EQ(loaded(), 4);
}

TEST_P(StorageConformanceTest, SeveralThreadsReadWhatOneReads) {
  std::vector<StateEntry> entries;
  for (int i = 0; i < 6; ++i) entries.push_back(replica_entry("large" + std::to_string(i), {500'000}));
  for (int i = 0; i < 50; ++i) entries.push_back(replica_entry("small" + std::to_string(i), {100}));
  save_checkpoint(directory_, states<MemorySaveState>({entries}), {}, files());
  auto target = states<MemoryLoadState>({entries});
  load_checkpoint(directory_, target, {.thread_count = 3}, files());
  EXPECT_EQ(first_difference(target), "");
}

TEST_P(StorageConformanceTest, SafetensorsAreSavedConsolidatedAndExported) {
  const Dims size{40, 3};
  const auto parts = split(size, 0, static_cast<int64_t>(ranks()));
  const auto source = sharded<MemorySaveState>("w", size, parts);
  const std::string shards = place_.root + "/shards";
  save_safetensors(shards, source, {.consolidate = false}, files());
  const auto expect_in = [&](const std::string& directory) {
    auto target = sharded<MemoryLoadState>("w", size, split(size, 1, static_cast<int64_t>(ranks())));
    load_safetensors(directory, target, {}, files());
    EXPECT_EQ(first_difference(target), "") << directory;
    for (const std::string& name : files().list(directory)) EXPECT_THAT(name, Not(HasSubstr(".tmp-")));
  };
  expect_in(shards);
  EXPECT_ERROR(ErrorCode::kAlreadyExists, shards, save_safetensors(shards, source, {.consolidate = false}, files()));
  const std::string whole = place_.root + "/whole";
  consolidate_safetensors_files(shards, whole, {}, files());
  expect_in(whole);

  const std::string together = place_.root + "/together";
  if (files().publishes_on_close() && ranks() > 1) {
    EXPECT_ERROR(ErrorCode::kUnsupported, "consolidate = false", save_safetensors(together, source, {}, files()));
    EXPECT_THAT(files().list(together), IsEmpty());
  } else {
    save_safetensors(together, source, {}, files());
    expect_in(together);
  }
  // One rank, and tensors whose order is not that of the state dict.
  const auto alone = states<MemorySaveState>(
      {{replica_entry("b", {5}), replica_entry("a", {7}), replica_entry("c", {2'000'000}, DType::kFloat64)}});
  const std::string one = place_.root + "/one";
  save_safetensors(one, alone, {}, files());
  auto target = states<MemoryLoadState>({alone[0].entries()});
  load_safetensors(one, target, {}, files());
  EXPECT_EQ(first_difference(target), "");
}

TEST_P(StorageConformanceTest, AManagerKeepsTheLastStepsAndIsAlone) {
  const std::string root = place_.root + "/run";
  const auto save_step = [&](int64_t step) {
    save_checkpoint(step_directory(root, step), generation(static_cast<int>(step), ranks()), {}, files());
  };
  if (!GetParam().locks) {
    EXPECT_ERROR(ErrorCode::kUnsupported, root, CheckpointManager(root, {}, files()));
    return;
  }
  {
    CheckpointManager manager(root, {.keep_last = 2}, files());
    EXPECT_EQ(manager.resume(), std::nullopt);
    for (const int64_t step : {1, 2, 10}) {
      save_step(step);
      manager.saved(step);
    }
    EXPECT_THAT(manager.steps(), testing::ElementsAre(2, 10));
    EXPECT_THAT(files().list(root), Not(Contains("step-1")));
    EXPECT_ERROR(ErrorCode::kFailedPrecondition, "process " + std::to_string(::getpid()) + " on host",
                 CheckpointManager(root, {}, files()));
    EXPECT_ERROR(ErrorCode::kFailedPrecondition, "the step was not saved", manager.saved(11));
  }
  set_test_point_handler([](std::string_view name) {
    if (name == "commit.before_write") throw Error(ErrorCode::kIo, "injected");
  });
  EXPECT_THROW(save_step(20), CheckpointError);
  set_test_point_handler(nullptr);
  const auto stray = files().create(step_directory(root, 20) + "/__0_0.distcp", CreateMode::kExclusive);
  stray->write(0, as_bytes("of a save that was killed"));
  stray->close();
  CheckpointManager next(root, {}, files());
  EXPECT_EQ(next.resume(), 10);
  EXPECT_THAT(files().list(root), Not(Contains("step-20")));
  EXPECT_EQ(loaded_generation(step_directory(root, 10), files()), 10);
}

TEST_P(StorageConformanceTest, SavingAgainLeavesTheNewOneAlone) {
  save(1);
  const auto count = files().list(directory_).size();
  save(2);
  EXPECT_EQ(loaded(), 2);
  EXPECT_EQ(files().list(directory_).size(), count) << "files of the first save are left";
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "holds a checkpoint", save(3, {.overwrite = false}));
  EXPECT_EQ(loaded(), 2);
}

TEST_P(StorageConformanceTest, FailedSaveLeavesTheOldOneAndNothingElse) {
  save(1);
  const auto before = files().list(directory_);
  for (const char* place : {"save.before_data_sync", "save.before_sidecar", "save.before_directory_sync",
                            "commit.before_write", "commit.before_sync", "commit.before_rename"}) {
    set_test_point_handler([&](std::string_view name) {
      if (name == place) throw Error(ErrorCode::kIo, "injected");
    });
    try {
      save(2);
      ADD_FAILURE() << place;
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.committed(), Committed::kNo) << place;
    }
    set_test_point_handler(nullptr);
    EXPECT_EQ(loaded(), 1) << place;
    EXPECT_EQ(files().list(directory_), before) << place;
  }
#ifdef RESHARD_S3_SERVER
  if (files().publishes_on_close()) {
    EXPECT_EQ(S3Server::instance().uploads(), 0);
  }
#endif
}

TEST_P(StorageConformanceTest, UnfinishedSaveIsNoCheckpoint) {
  const DefaultSavePlanner planner;
  set_test_point_handler([](std::string_view name) {
    if (name == "commit.before_write") throw Error(ErrorCode::kIo, "injected");
  });
  EXPECT_THROW(save(1), CheckpointError);
  set_test_point_handler(nullptr);
  EXPECT_THROW(loaded(), CheckpointError);
  save(2);
  EXPECT_EQ(loaded(), 2);
}

TEST_P(StorageConformanceTest, ReaderIsBoundToTheSaveWhoseCatalogueItRead) {
  save(1);
  FileSystemReader reader(directory_, {}, files());
  CheckpointReader checkpoint(reader);
  save(2);
  Bytes out(kGenerationRows * 4 * 4);
  // Its files are gone; never those of the new save in their place.
  EXPECT_ERROR(ErrorCode::kNotFound, directory_, checkpoint.read_box("weight", {{0, 0}, {kGenerationRows, 4}}, out));
}

TEST_P(StorageConformanceTest, StepsThatAreCommittedAreFound) {
  const std::string root = place_.root + "/run";
  EXPECT_THAT(committed_steps(root, files()), IsEmpty());
  for (const int64_t step : {100, 20}) save_checkpoint(step_directory(root, step), generation(1, ranks()), {}, files());
  EXPECT_THAT(committed_steps(root, files()), testing::ElementsAre(20, 100));
}

TEST_P(StorageConformanceTest, DigestsAreThoseOfTheSameStateElsewhere) {
  const auto digests = [](const std::string& directory, FileSystem& file_system) {
    std::map<std::string, std::string> result;
    digest_tensors(
        directory, [&](const std::string& fqn, const Sha256Digest& sum) { result[fqn] = to_hex(sum); }, file_system);
    return result;
  };
  save(5);
  const Place local = local_place();
  save_checkpoint(local.root, generation(5, 3));
  EXPECT_EQ(digests(directory_, files()), digests(local.root, *local.files));
}

TEST_P(StorageConformanceTest, FilesAreThoseOfADirectory) {
  save(5);
  const Place local = local_place();
  const std::string copy = local.root + "/copy";
  local_file_system().create_directories(copy);
  for (const std::string& name : files().list(directory_)) {
    const auto file = local_file_system().create(copy + "/" + name, CreateMode::kExclusive);
    file->write(0, content(name));
    file->close();
  }
  EXPECT_EQ(loaded_generation(copy), 5);
  // Bit for bit what a save into a directory writes, which the interop tests show to PyTorch.
  save_checkpoint(local.root + "/other", generation(5, ranks()));
  EXPECT_EQ(local_file_system().read_file(copy + "/__0_0.distcp", 1 << 20),
            local_file_system().read_file(local.root + "/other/__0_0.distcp", 1 << 20));
}

// --- bad input
// ---------------------------------------------------------------------------------------------------------

TEST_P(StorageConformanceTest, NothingThereIsNamed) {
  EXPECT_ERROR(ErrorCode::kNotFound, place_.root + "/checkpoint",
               FileSystemReader(directory_, {}, files()).read_metadata());
  files().create_directories(directory_);
  replace("stray", as_bytes("x"));
  EXPECT_ERROR(ErrorCode::kNotFound, "holds no checkpoint", FileSystemReader(directory_, {}, files()).read_metadata());
  EXPECT_ERROR(ErrorCode::kNotFound, "this is a file",
               FileSystemReader(directory_ + "/stray", {}, files()).read_metadata());
}

TEST_P(StorageConformanceTest, BrokenCatalogueIsCorrupt) {
  save(1);
  const Bytes good = content(".metadata");
  for (const size_t length : {size_t{0}, size_t{1}, good.size() / 2, good.size() - 1}) {
    replace(".metadata", ByteSpan(good).first(length));
    EXPECT_ERROR(ErrorCode::kCorruptData, directory_ + "/.metadata",
                 FileSystemReader(directory_, {}, files()).read_metadata())
        << length;
  }
  replace(".metadata", as_bytes("cos\nsystem\n(S'true'\ntR."));
  EXPECT_ERROR(ErrorCode::kUnsupported, directory_ + "/.metadata",
               FileSystemReader(directory_, {}, files()).read_metadata());
}

TEST_P(StorageConformanceTest, BrokenDataFileIsNamed) {
  save(1);
  const std::string name = one_data_file();
  const Bytes good = content(name);
  const auto expect = [&](ErrorCode code, const char* text) {
    try {
      loaded();
      ADD_FAILURE() << text;
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      EXPECT_THAT(error.what(), HasSubstr(name));
      EXPECT_THAT(error.what(), HasSubstr(text));
    }
    EXPECT_THAT(verify_checkpoint(directory_, files()).problems, Not(IsEmpty()));
  };
  Bytes bad = good;
  bad[good.size() / 2] ^= std::byte{1};
  replace(name, bad);
  expect(ErrorCode::kCorruptData, "checksum");
  replace(name, ByteSpan(good).first(good.size() - 1));
  expect(ErrorCode::kCorruptData, "wanted");
  files().remove(directory_ + "/" + name);
  expect(ErrorCode::kNotFound, name.c_str());
  replace(name, good);
  EXPECT_EQ(loaded(), 1);
}

// --- the seam
// ----------------------------------------------------------------------------------------------------------

TEST_P(StorageConformanceTest, FilesAreListedReadAndRemoved) {
  files().create_directories(directory_);
  for (const char* name : {"b", "a", ".m", "a b+c%d&e\xC3\xA9"}) replace(name, as_bytes("0123456789"));
  EXPECT_THAT(files().list(directory_), testing::ElementsAre(".m", "a", "a b+c%d&e\xC3\xA9", "b"));
  EXPECT_THAT(files().list(place_.root), Contains("checkpoint"));
  EXPECT_EQ(files().status(directory_ + "/a"), (FileStatus{FileKind::kRegular, 10}));
  EXPECT_EQ(files().status(directory_ + "/a b+c%d&e\xC3\xA9"), (FileStatus{FileKind::kRegular, 10}));
  EXPECT_EQ(files().status(directory_), (FileStatus{FileKind::kDirectory, 0}));
  EXPECT_EQ(files().status(directory_ + "/none"), std::nullopt);
  EXPECT_EQ(files().real_path(directory_ + "/a"), directory_ + "/a");

  const auto file = files().open(directory_ + "/a");
  EXPECT_EQ(file->size(), 10U);
  Bytes first(2);
  Bytes second(3);
  const std::vector<MutableByteSpan> parts{first, {}, second};
  file->read_scatter(4, parts, "item");
  EXPECT_EQ(as_text(first), "45");
  EXPECT_EQ(as_text(second), "678");
  file->read_exactly(10, {}, "nothing");
  EXPECT_ERROR(ErrorCode::kCorruptData, "item: the file ends too early", file->read_exactly(8, second, "item"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "item: the file ends too early",
               file->read_exactly(~uint64_t{0}, second, "item"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "path of a data file", files().open_beneath(directory_, "../a"));
  EXPECT_ERROR(ErrorCode::kNotFound, directory_ + "/none", files().open(directory_ + "/none"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted at most 9 bytes", files().read_file(directory_ + "/a", 9));

  EXPECT_TRUE(files().remove(directory_ + "/a"));
  EXPECT_FALSE(files().remove(directory_ + "/a"));
  EXPECT_THAT(files().list(directory_), testing::ElementsAre(".m", "a b+c%d&e\xC3\xA9", "b"));
}

TEST_P(StorageConformanceTest, ExclusiveCreateRefusesWhatExists) {
  files().create_directories(directory_);
  const auto write = [&](std::string_view text) {
    const auto file = files().create(directory_ + "/f", CreateMode::kExclusive);
    file->write(0, as_bytes(text));
    file->close();
  };
  write("one");
  EXPECT_ERROR(ErrorCode::kAlreadyExists, directory_ + "/f", write("two"));
  EXPECT_ERROR(ErrorCode::kAlreadyExists, directory_ + "/f", write(std::string(6 << 20, 'x')));
  EXPECT_EQ(as_text(content("f")), "one");
}

TEST_P(StorageConformanceTest, ARenameMovesTheWholeContent) {
  files().create_directories(directory_);
  for (const std::string& text : {std::string("one"), std::string(), std::string(11 << 20, 'x')}) {
    replace("from a+b%c", as_bytes(text));
    files().rename(directory_ + "/from a+b%c", directory_ + "/to");
    EXPECT_TRUE(as_text(content("to")) == text);
    EXPECT_THAT(files().list(directory_), testing::ElementsAre("to"));
  }
  EXPECT_ERROR(ErrorCode::kNotFound, directory_ + "/none", files().rename(directory_ + "/none", directory_ + "/to"));
}

TEST_P(StorageConformanceTest, ReplacementIsWholeAndTellsHowFarItCame) {
  files().create_directories(directory_);
  for (const std::string& text : {std::string("one"), std::string(), std::string(11 << 20, 'x')}) {
    Committed replaced = Committed::kNo;
    replace_file_atomically(files(), directory_, "f", as_bytes(text), true, &replaced);
    EXPECT_EQ(replaced, Committed::kYes);
    EXPECT_TRUE(as_text(content("f")) == text);
    EXPECT_THAT(files().list(directory_), testing::ElementsAre("f"));
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, StorageConformanceTest, testing::ValuesIn(kinds()),
                         [](const testing::TestParamInfo<Kind>& kind) { return std::string(kind.param.name); });

}  // namespace
}  // namespace reshard
