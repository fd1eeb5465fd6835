// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <mutex>
#include <semaphore>
#include <thread>

#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sidecar.h"
#include "reshard/storage/filesystem.h"
#include "storage/checkpoint_runs.h"
#include "storage/file_names.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/memory_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> names_in(const std::string& directory) { return local_file_system().list(directory); }

void put(const std::string& path, std::string_view text) { std::ofstream(path, std::ios::binary) << text; }
std::string get(const std::string& path) { return std::string(as_text(local_file_system().read_file(path, 1 << 30))); }

WriteItem tensor_item(const std::string& fqn, const Dims& size) {
  WriteItem item;
  item.index = {fqn, Dims(size.size(), 0), {}};
  item.chunk = whole_box(size);
  item.size = size;
  return item;
}
WriteItem value_item(const std::string& fqn, uint64_t length) {
  WriteItem item;
  item.index = {fqn, {}, {}};
  item.type = WriteItemType::kByteIo;
  item.length = length;
  return item;
}
uint64_t archive_length(const Dims& size, uint32_t alignment = 64) {
  return TensorArchive(DType::kFloat32, size, {.alignment = alignment}).length();
}

/// Warnings logged while it lives.
class LogCapture {
 public:
  LogCapture() {
    set_log_sink([this](LogLevel level, std::string_view text) {
      const std::lock_guard lock(mutex_);
      if (level == LogLevel::kWarning) text_ += std::string(text) + "\n";
    });
  }
  ~LogCapture() { set_log_sink(nullptr); }
  std::string text() const { return text_; }

 private:
  std::mutex mutex_;
  std::string text_;
};

std::vector<SavePlan> place(std::vector<SavePlan> plans, const FileSystemWriterOptions& options = {}) {
  TemporaryDirectory directory;
  FileSystemWriter writer(directory.path(), options);
  writer.begin_save("id");
  return writer.prepare_global_plan(std::move(plans));
}

TEST(FileSystemWriterTest, PlacesValuesFirstThenTensorsInPlanOrder) {
  SavePlan plan;
  plan.items = {tensor_item("a", {8}), value_item("v", 1261), tensor_item("b", {100}), value_item("w", 64)};
  const SavePlan placed = place({{}, plan})[1];
  // 1261 is rounded up to 1280, and w ends at 1344.
  const uint64_t a = 1344;
  const uint64_t b = (a + archive_length({8}) + 63) / 64 * 64;
  EXPECT_THAT(placed.storage, ElementsAre(StorageInfo{"__1_0.distcp", a, archive_length({8}), {}},
                                          StorageInfo{"__1_0.distcp", 0, 1261, {}},
                                          StorageInfo{"__1_0.distcp", b, archive_length({100}), {}},
                                          StorageInfo{"__1_0.distcp", 1280, 64, {}}));
  EXPECT_EQ(placed.items, plan.items);
}

TEST(FileSystemWriterTest, BalancesTheFilesOfARankByBytes) {
  SavePlan plan;
  plan.items = {tensor_item("a", {1000}), tensor_item("b", {3000}), tensor_item("c", {1000}), tensor_item("d", {900})};
  const auto storage = place({plan}, {.thread_count = 2})[0].storage;
  EXPECT_EQ(storage[1].relative_path, "__0_0.distcp");  // the largest; the others weigh less together
  EXPECT_EQ(storage[0].relative_path, "__0_1.distcp");
  EXPECT_EQ(storage[2].relative_path, "__0_1.distcp");
  EXPECT_EQ(storage[3].relative_path, "__0_1.distcp");
}

TEST(FileSystemWriterTest, GivesEachItemItsFileWhenAsked) {
  SavePlan plan;
  plan.items = {tensor_item("a", {8}), value_item("v", 100)};
  const auto storage = place({plan}, {.single_file_per_rank = false})[0].storage;
  EXPECT_EQ(storage[0], (StorageInfo{"__0_1.distcp", 0, archive_length({8}), {}}));
  EXPECT_EQ(storage[1], (StorageInfo{"__0_0.distcp", 0, 100, {}}));
}

TEST(FileSystemWriterTest, StartsItemsAtMultiplesOfTheAlignment) {
  SavePlan plan;
  plan.items = {value_item("v", 1), tensor_item("a", {8}), tensor_item("b", {8})};
  const auto storage = place({plan}, {.storage_alignment = 4096})[0].storage;
  for (const StorageInfo& info : storage) EXPECT_EQ(info.offset % 4096, 0u);
  EXPECT_EQ(storage[1].length, archive_length({8}, 4096));
}

TEST(FileSystemWriterTest, PlacesTheItemsOfThousandsOfRanks) {
  std::vector<SavePlan> plans(1024);
  for (SavePlan& plan : plans) {
    for (int i = 0; i < 20; ++i) plan.items.push_back(tensor_item("t" + std::to_string(i), {64, 64}));
  }
  const auto placed = place(std::move(plans));
  EXPECT_EQ(placed[1023].storage[19].relative_path, "__1023_0.distcp");
  EXPECT_GT(placed[1023].storage[19].offset, 19u * 64 * 64 * 4);
}

TEST(FileSystemWriterTest, RefusesOptionsThatMakeNoSense) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "thread_count", FileSystemWriter("d", {.thread_count = 0}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "storage_alignment", FileSystemWriter("d", {.storage_alignment = 96}));
}

/// Gives one tensor and one value, whatever is asked for.
class StubbornPlanner final : public SavePlanner {
 public:
  Bytes memory = Bytes(64);
  TensorView view{.data = memory.data(), .dtype = DType::kFloat32, .sizes = {8}, .strides = {1}, .owner = nullptr};
  void set_up_planner(const SaveState&, bool) override {}
  SavePlan create_local_plan() override { return {}; }
  GlobalSavePlan create_global_plan(std::vector<SavePlan>) override { return {}; }
  SavePlan finish_plan(SavePlan plan) override { return plan; }
  TensorView resolve_tensor(const WriteItem&) const override { return view; }
  ByteSpan resolve_bytes(const WriteItem&) const override { return ByteSpan(memory).first(10); }
};

TEST(FileSystemWriterTest, NamesWhatIsNotAsPlanned) {
  const auto refuse = [](const char* text, const std::function<void(SavePlan&, StubbornPlanner&)>& change) {
    const TemporaryDirectory directory;
    FileSystemWriter writer(directory.path(), {.sync_files = false});
    SavePlan plan;
    plan.items = {value_item("v", 10), tensor_item("t", {8}), tensor_item("tied", {8})};
    plan.items[2].tied_to = 1;
    writer.begin_save("id");
    plan = writer.prepare_global_plan({plan})[0];
    StubbornPlanner planner;
    change(plan, planner);
    const auto write = [&] { writer.write_data(plan, planner, {.save_id = "id", .progress = {}}); };
    if (text == nullptr) return write();
    EXPECT_ERROR(ErrorCode::kInternal, text, write());
  };
  refuse(nullptr, [](SavePlan&, StubbornPlanner&) {});
  refuse("number of places is not as planned; wanted 3, found 2", [](auto& plan, auto&) { plan.storage.pop_back(); });
  refuse("place of an item is not as planned",
         [](auto& plan, auto&) { plan.storage[1].offset = plan.storage[2].offset = 1; });
  refuse("place of a tied item is not as planned", [](auto& plan, auto&) { plan.storage[2].offset += 64; });
  refuse("length of a value is not as planned", [](auto& plan, auto&) { plan.storage[0].length = 11; });
  refuse("length of an item is not as planned",
         [](auto& plan, auto&) { ++plan.storage[1].length, ++plan.storage[2].length; });
  refuse("dtype of a tensor is not as planned", [](auto&, auto& planner) { planner.view.dtype = DType::kInt32; });
  refuse("shape of a tensor is not as planned", [](auto&, auto& planner) { planner.view.sizes = {4}; });
}

TEST(FileSystemWriterTest, KnowsItsFilesByTheirNames) {
  for (const DataFileName& name : {DataFileName{0, 0}, DataFileName{12, 345}, DataFileName{999'999'999'999'999, 7}}) {
    const auto parsed = parse_data_file_name(to_string(name));
    ASSERT_TRUE(parsed);
    EXPECT_EQ(parsed->rank, name.rank);
    EXPECT_EQ(parsed->number, name.number);
  }
  for (const char* other : {"",
                            "__",
                            "__.distcp",
                            "__0.distcp",
                            "__0_.distcp",
                            "___0.distcp",
                            "__0_0",
                            "0_0.distcp",
                            "_0_0.distcp",
                            "__0_0.distcp.tmp",
                            "__-1_0.distcp",
                            "__0_-1.distcp",
                            "__+1_0.distcp",
                            "__ 1_0.distcp",
                            "__1x_0.distcp",
                            "__0_0x.distcp",
                            "__0_0_0.distcp",
                            "__1000000000000000_0.distcp",
                            "__distcp",
                            "my_model.distcp"}) {
    EXPECT_FALSE(parse_data_file_name(other)) << other;
    EXPECT_FALSE(is_checkpoint_file(other)) << other;
  }
  EXPECT_TRUE(is_checkpoint_file(".metadata.tmp"));
  EXPECT_TRUE(is_checkpoint_file(".metadata.tmp-0123"));
  EXPECT_TRUE(is_checkpoint_file(sidecar_name("id", 3)));
  EXPECT_FALSE(is_checkpoint_file(".metadata"));
  EXPECT_FALSE(is_checkpoint_file(".metadata.bak"));
}

TEST(FileSystemWriterTest, WritesTheFilesOfOneSaveAndNothingElse) {
  TemporaryDirectory directory;
  std::vector<MemorySaveState> ranks(2);
  ranks[0] = MemorySaveState({tensor_entry("t", {4}, {whole_box({4})})});
  ranks[1] = MemorySaveState({tensor_entry("t", {4}, {})});
  const SaveResult result = save_checkpoint(directory / "new/deep", ranks);
  // A rank without items writes its sidecar only.
  EXPECT_THAT(names_in(directory / "new/deep"), ElementsAre(".metadata", ".reshard-" + result.save_id + "-0",
                                                            ".reshard-" + result.save_id + "-1", "__0_0.distcp"));
}

TEST(FileSystemWriterTest, GathersSmallItemsIntoLargeWrites) {
  TemporaryDirectory directory;
  MemorySaveState state;
  for (int i = 0; i < 900; ++i) state.add(replica_entry("t" + std::to_string(i), {1024}));
  FaultFileSystem files;
  const std::string path = directory.path();
  std::vector<MemorySaveState> ranks;
  ranks.push_back(std::move(state));
  save_checkpoint(path, ranks, {}, files);
  // 900 items of 5.6 KB are 5 MB: two writes of data, one of the sidecar, one of the catalogue.
  EXPECT_EQ(files.calls(FileCall::kWrite), 4u);
  EXPECT_EQ(files.calls(FileCall::kRead), 0u);
}

TEST(FileSystemWriterTest, SumsEveryBlockOfItsFilesInTheSidecar) {
  TemporaryDirectory directory;
  MemorySaveState state({replica_entry("small", {3}), replica_entry("large", {2500}), replica_entry("block", {1024})});
  state.add_value("v", value_archive("text"));
  DefaultSavePlanner planner;
  FileSystemWriter writer(directory.path());
  planner.set_up_planner(state, true);
  writer.begin_save("the-id");
  GlobalSavePlan global = planner.create_global_plan({planner.create_local_plan()});
  const SavePlan plan = planner.finish_plan(writer.prepare_global_plan(std::move(global.plans))[0]);
  const auto results = writer.write_data(plan, planner, {.save_id = "the-id", .progress = {}});
  const Bytes bytes = local_file_system().read_file(directory / sidecar_name("the-id", 0), 1 << 20);
  const Sidecar sidecar = decode_sidecar(bytes);
  EXPECT_EQ(writer.sidecar_digest(), sidecar_digest(bytes));
  ASSERT_EQ(results.size(), 4u);
  for (size_t i = 0; i < results.size(); ++i) EXPECT_EQ(results[i].storage, plan.storage[i]);
  EXPECT_EQ(sidecar.save_id, "the-id");

  const Bytes file = local_file_system().read_file(directory / "__0_0.distcp", 1 << 20);
  ASSERT_EQ(sidecar.files.size(), 1u);
  EXPECT_EQ(sidecar.files[0].relative_path, "__0_0.distcp");
  EXPECT_EQ(sidecar.files[0].size, file.size());
  // The payloads of a block and more are parts; the others, and all headers, lie between them.
  const auto payload = [&](size_t item, const Dims& size) {
    return plan.storage[item].offset + TensorArchive(DType::kFloat32, size).payload_offset();
  };
  EXPECT_THAT(sidecar.files[0].cuts, ElementsAre(payload(1, {2500}), payload(1, {2500}) + 10000, payload(2, {1024}),
                                                 payload(2, {1024}) + 4096));
  const BlockMap map(sidecar.files[0]);
  for (uint64_t at = 0; at < file.size();) {
    const BlockMap::Block block = map.at(at);
    EXPECT_EQ(crc32(ByteSpan(file).subspan(at, block.end - at), block.seed), block.sum) << at;
    at = block.end;
  }
  // And the archives have right CRC-32s, made from the same sums.
  for (const StorageInfo& place : plan.storage) {
    EXPECT_EQ(verify_archive(MemorySource(ByteSpan(file).subspan(place.offset, place.length))).without_crc, 0u);
  }
  writer.abandon();
  EXPECT_THAT(names_in(directory.path()), ElementsAre());
}

/// Holds its one tensor column by column.
class TransposedState final : public SaveState {
 public:
  explicit TransposedState(const Dims& size) : plain_({replica_entry("t", size)}), size_(size) {
    const int64_t rows = size[0];
    const int64_t columns = size[1];
    const Bytes& dense = plain_.memory().buffer(0);
    columns_.resize(dense.size());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        std::memcpy(&columns_[static_cast<size_t>((c * rows + r) * 4)],
                    &dense[static_cast<size_t>((r * columns + c) * 4)], 4);
      }
    }
  }
  const std::vector<StateEntry>& entries() const override { return plain_.entries(); }
  TensorView tensor(size_t, size_t) const override {
    return {columns_.data(), DType::kFloat32, size_, Dims{1, size_[0]}, nullptr};
  }
  ByteSpan bytes(size_t) const override { return {}; }

 private:
  MemorySaveState plain_;
  Dims size_;
  Bytes columns_;
};

TEST(FileSystemWriterTest, MakesStridedTensorsDenseBlockByBlock) {
  TemporaryDirectory directory;
  const TransposedState state({1500, 1201});  // 7.2 MB: two blocks, cut inside a row
  const auto transport = solo_transport();
  DefaultSavePlanner planner;
  FileSystemWriter writer(directory.path(), {.sync_files = false});
  run_save(*transport, state, planner, writer);
  auto loaded = states<MemoryLoadState>({{replica_entry("t", {1500, 1201})}});
  load_checkpoint(directory.path(), loaded);  // verifies the CRC, too
  EXPECT_EQ(first_difference(loaded), "");
}

TEST(FileSystemWriterTest, ReportsProgressUpToTheTotal) {
  TemporaryDirectory directory;
  const MemorySaveState state({replica_entry("t", {9 << 18}), replica_entry("u", {5})});
  const auto transport = solo_transport();
  DefaultSavePlanner planner;
  FaultFileSystem files;
  FileSystemWriter writer(directory.path(), {.sync_files = false}, files);
  std::vector<Progress> seen;
  run_save(*transport, state, planner, writer, [&](const Progress& progress) {
    seen.push_back(progress);
    EXPECT_EQ(progress.done, std::min(files.bytes(FileCall::kWrite), progress.total));
  });
  ASSERT_GE(seen.size(), 3u);  // 9 MiB in writes of 4
  for (size_t i = 1; i < seen.size(); ++i) EXPECT_GT(seen[i].done, seen[i - 1].done);
  EXPECT_EQ(seen.back().done, seen.back().total);
  EXPECT_GE(seen.back().total, 9u << 20);
}

TEST(FileSystemWriterTest, UsesNamesThatNothingInTheDirectoryHas) {
  TemporaryDirectory directory;
  put(directory / "__0_0.distcp", "left by a crash");
  put(directory / "__7_12.distcp", "left by a crash");
  put(directory / "__x_99.distcp", "not ours");
  put(directory / "__1_-30.distcp", "not ours");
  put(directory / "__1_77777777777777777777.distcp", "not ours");
  const std::vector<StateEntry> entries{replica_entry("t", {4})};
  save_checkpoint(directory.path(), states<MemorySaveState>({entries}));
  EXPECT_TRUE(local_file_system().status(directory / "__0_13.distcp"));
  EXPECT_EQ(get(directory / "__0_0.distcp"), "left by a crash");
  EXPECT_EQ(get(directory / "__7_12.distcp"), "left by a crash");
}

TEST(FileSystemWriterTest, RemovesWhatItReplacesAndOrphansAndNothingElse) {
  TemporaryDirectory directory;
  const std::vector<StateEntry> entries{replica_entry("t", {4})};
  save_checkpoint(directory.path(), states<MemorySaveState>({entries, entries}), {.thread_count = 2});
  const std::vector<std::string> kept{"__9_3.distcp", "model.safetensors", "notes.txt"};
  for (const std::string& name : kept) put(directory / name, "x");
  put(directory / ".metadata.tmp", "PyTorch's");
  put(directory / ".metadata.tmp-1234", "ours");
  put(directory / sidecar_name("0a0a0a0a-0000-4000-8000-000000000000", 3), "of a crashed save");
  const SaveResult result = save_checkpoint(directory.path(), states<MemorySaveState>({entries}));
  EXPECT_THAT(names_in(directory.path()), ElementsAre(".metadata", ".reshard-" + result.save_id + "-0", "__0_4.distcp",
                                                      "__9_3.distcp", "model.safetensors", "notes.txt"));
}

// Also on the ranks that do not coordinate, which never begin a save.
TEST(FileSystemWriterTest, UsedAgainItRemovesOnlyWhatTheFailedSaveWrote) {
  TemporaryDirectory directory;
  const std::vector<StateEntry> entries{tensor_entry("t", {8}, {{{0}, {4}}}), tensor_entry("t", {8}, {{{4}, {4}}})};
  const auto saved = states<MemorySaveState>({{entries[0]}, {entries[1]}});
  FaultFileSystem files;
  std::vector<std::unique_ptr<FileSystemWriter>> writers;
  for (int rank = 0; rank < 2; ++rank) {
    writers.push_back(std::make_unique<FileSystemWriter>(directory.path(), FileSystemWriterOptions{}, files));
  }
  const auto save = [&] {
    on_ranks(2, [&](size_t rank, Transport& transport) {
      DefaultSavePlanner planner;
      run_save(transport, saved[rank], planner, *writers[rank]);
    });
  };
  save();
  const std::vector<std::string> good = names_in(directory.path());
  files.inject({.call = FileCall::kRename, .error = EIO});
  EXPECT_ERROR(ErrorCode::kIo, "rename (injected)", save());
  EXPECT_EQ(names_in(directory.path()), good);
  auto loaded = states<MemoryLoadState>({{replica_entry("t", {8})}});
  load_checkpoint(directory.path(), loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

TEST(FileSystemWriterTest, KeepsTheFilesOfACheckpointThatItCannotRead) {
  TemporaryDirectory directory;
  put(directory / ".metadata", "not a pickle");
  put(directory / "__0_0.distcp", "data");
  const LogCapture log;
  const std::vector<StateEntry> entries{replica_entry("t", {4})};
  save_checkpoint(directory.path(), states<MemorySaveState>({entries}));
  EXPECT_THAT(log.text(), HasSubstr("cannot be read; its files are kept"));
  EXPECT_EQ(get(directory / "__0_0.distcp"), "data");
  auto loaded = states<MemoryLoadState>({entries});
  load_checkpoint(directory.path(), loaded);
  EXPECT_EQ(first_difference(loaded), "");
}

TEST(FileSystemWriterTest, RefusesToReplaceWhenOverwritingIsOff) {
  TemporaryDirectory directory;
  const std::vector<StateEntry> entries{replica_entry("t", {4})};
  const FileSystemWriterOptions options{.sync_files = false, .overwrite = false};
  save_checkpoint(directory.path(), states<MemorySaveState>({entries}), options);
  const auto before = names_in(directory.path());
  EXPECT_ERROR(ErrorCode::kAlreadyExists, directory / ".metadata",
               save_checkpoint(directory.path(), states<MemorySaveState>({entries}), options));
  EXPECT_EQ(names_in(directory.path()), before);
}

TEST(FileSystemWriterTest, SaysSoWhenTheDirectoryIsAFile) {
  TemporaryDirectory directory;
  put(directory / "file", "x");
  EXPECT_ERROR(ErrorCode::kAlreadyExists, directory / "file",
               save_checkpoint(directory / "file", states<MemorySaveState>({{replica_entry("t", {4})}})));
}

// The error of any of several writing threads leaves the save, and what was written is removed.
TEST(FileSystemWriterTest, NeverLosesTheErrorOfAWriterThread) {
  const std::vector<StateEntry> entries{replica_entry("a", {5 << 18}), replica_entry("b", {5 << 18}),
                                        replica_entry("c", {100}), replica_entry("d", {100})};
  const auto saved = states<MemorySaveState>({entries});
  for (uint64_t nth = 1; nth <= 6; ++nth) {
    TemporaryDirectory directory;
    FaultFileSystem files;
    files.inject({.call = FileCall::kWrite, .nth = nth, .error = ENOSPC, .forever = true, .torn_bytes = 512});
    const auto body = [&] {
      save_checkpoint(directory.path(), saved, {.thread_count = 2, .sync_files = false}, files);
    };
    EXPECT_ERROR(ErrorCode::kIo, "No space left on device", body());
    EXPECT_THAT(names_in(directory.path()), ElementsAre()) << "write " << nth;
  }
}

/// Fails on a helper thread of the writer; the other one goes on once that has ended.
class FailingHelperPlanner final : public SavePlanner {
 public:
  void set_up_planner(const SaveState&, bool) override {}
  SavePlan create_local_plan() override { return {}; }
  GlobalSavePlan create_global_plan(std::vector<SavePlan>) override { return {}; }
  SavePlan finish_plan(SavePlan plan) override { return plan; }
  TensorView resolve_tensor(const WriteItem&) const override { return {}; }
  ByteSpan resolve_bytes(const WriteItem&) const override {
    if (std::this_thread::get_id() != own_thread_) {
      struct AtExit {
        std::binary_semaphore& ended;
        ~AtExit() { ended.release(); }
      };
      static thread_local const AtExit at_exit{helper_ended_};
      EXPECT_TRUE(own_began_.try_acquire_for(kTestSilence));  // else it would write nothing at all
      throw Error(ErrorCode::kIo, "the helper failed");
    }
    own_began_.release();
    EXPECT_TRUE(helper_ended_.try_acquire_for(kTestSilence));
    return memory_;
  }
  uint64_t length() const { return memory_.size(); }

 private:
  const std::thread::id own_thread_ = std::this_thread::get_id();
  const Bytes memory_ = Bytes(20 << 20);
  mutable std::binary_semaphore own_began_{0};
  mutable std::binary_semaphore helper_ended_{0};
};

TEST(FileSystemWriterTest, AFailureEndsTheOtherThreadsAtTheirNextWrite) {
  const TemporaryDirectory directory;
  FaultFileSystem files;
  FileSystemWriter writer(directory.path(), {.thread_count = 2, .sync_files = false}, files);
  const FailingHelperPlanner planner;
  SavePlan plan;
  plan.items = {value_item("a", planner.length()), value_item("b", planner.length())};
  writer.begin_save("id");
  plan = writer.prepare_global_plan({plan})[0];
  EXPECT_ERROR(ErrorCode::kIo, "the helper failed",
               writer.write_data(plan, planner, {.save_id = "id", .progress = {}}));
  EXPECT_EQ(files.calls(FileCall::kWrite), 1u);
}

TEST(FileSystemWriterTest, TheSidecarOfAnEarlierSaveIsForgotten) {
  const TemporaryDirectory directory;
  FileSystemWriter writer(directory.path(), {.sync_files = false});
  StubbornPlanner planner;
  const auto write = [&] {
    SavePlan plan;
    plan.items = {tensor_item("t", {8})};
    writer.begin_save("id");
    plan = writer.prepare_global_plan({plan})[0];
    writer.write_data(plan, planner, {.save_id = "id", .progress = {}});
  };
  write();
  EXPECT_TRUE(writer.sidecar_digest());
  planner.view.dtype = DType::kInt32;
  EXPECT_ERROR(ErrorCode::kInternal, "dtype of a tensor", write());
  EXPECT_FALSE(writer.sidecar_digest());
}

TEST(FileSystemWriterTest, MakesEverythingDurableBeforeTheCommit) {
  TemporaryDirectory directory;
  FaultFileSystem files;
  save_checkpoint(directory.path(), states<MemorySaveState>({{replica_entry("a", {8}), replica_entry("b", {8})}}),
                  {.thread_count = 2}, files);
  std::vector<std::string> steps;
  for (const FileCallRecord& call : files.trace()) {
    std::string name = std::filesystem::path(call.path).filename();
    if (call.path == directory.path()) name = "directory";
    if (name.starts_with(".reshard-")) name = "sidecar";
    if (name.starts_with(".metadata.tmp")) name = "temporary";
    const bool counts = call.call == FileCall::kSync || call.call == FileCall::kSyncDirectory ||
                        call.call == FileCall::kRename || call.call == FileCall::kRemove;
    if (counts) steps.push_back(std::string(to_string(call.call)) + " " + name);
  }
  ASSERT_EQ(steps.size(), 7u);
  EXPECT_THAT((std::vector(steps.begin(), steps.begin() + 2)),
              testing::UnorderedElementsAre("sync __0_0.distcp", "sync __0_1.distcp"));
  EXPECT_THAT((std::vector(steps.begin() + 2, steps.end())),
              ElementsAre("sync sidecar", "sync_directory directory", "sync temporary", "rename temporary",
                          "sync_directory directory"));
}

// The other ranks wait for a sign of life, and the sync of a large file is one long call.
TEST(FileSystemWriterTest, ShowsProgressWhileALargeFileGoesToTheDevice) {
  MemoryFileSystem memory({}, {"/"});
  FaultFileSystem files(memory);
  const MemorySaveState state({replica_entry("t", {35 << 20})});  // 140 MiB
  const auto transport = solo_transport();
  DefaultSavePlanner planner;
  FileSystemWriter writer("/checkpoint", {}, files);
  std::vector<size_t> signs;  // calls made by the time of each
  run_save(*transport, state, planner, writer, [&](const Progress&) { signs.push_back(files.calls()); });
  const std::vector<FileCallRecord> calls = files.trace();
  std::vector<std::string> written_back;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (calls[i].call != FileCall::kWriteBack) continue;
    written_back.push_back(to_string(calls[i]));
    EXPECT_THAT(signs, testing::Contains(i + 1)) << "no progress after " << to_string(calls[i]);
  }
  EXPECT_THAT(written_back, ElementsAre("write_back /checkpoint/__0_0.distcp [0, 67108864)",
                                        "write_back /checkpoint/__0_0.distcp [67108864, 134217728)"));

  // Long before that, piece by piece and without gaps, the device was asked to begin.
  uint64_t end = 0;
  for (const FileCallRecord& call : calls) {
    if (call.call == FileCall::kWrite && call.offset != 0) {
      EXPECT_LE(call.offset - end, 20u << 20) << to_string(call);
    }
    if (call.call != FileCall::kStartWriteBack) continue;
    EXPECT_EQ(call.offset, end);
    end += call.bytes;
  }
  EXPECT_GE(end, 120u << 20);

  for (const auto& [call, text] : {std::pair(FileCall::kWriteBack, "write_back (injected)"),
                                   std::pair(FileCall::kStartWriteBack, "start_write_back (injected)")}) {
    FaultFileSystem faulty(memory);
    faulty.inject({.call = call, .error = EIO});
    FileSystemWriter second("/second", {}, faulty);
    EXPECT_ERROR(ErrorCode::kIo, text, run_save(*transport, state, planner, second));
  }
}

TEST(FileSystemWriterTest, LeavesOutEverySyncWhenAskedTo) {
  TemporaryDirectory directory;
  FaultFileSystem files;
  save_checkpoint(directory.path(), states<MemorySaveState>({{replica_entry("a", {8})}}), {.sync_files = false}, files);
  EXPECT_EQ(files.calls(FileCall::kSync), 0u);
  EXPECT_EQ(files.calls(FileCall::kSyncDirectory), 0u);
}

/// A file system of one MiB, if this process may mount one.
class SmallDisk {
 public:
  SmallDisk() { mounted_ = ::mount("reshard-test", directory_.path().c_str(), "tmpfs", 0, "size=1m") == 0; }
  ~SmallDisk() {
    if (mounted_) ::umount2(directory_.path().c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  const std::string& path() const { return directory_.path(); }

 private:
  TemporaryDirectory directory_;
  bool mounted_ = false;
};

TEST(FileSystemWriterTest, KeepsTheOldCheckpointWhenTheDiskIsFull) {
  const SmallDisk disk;
  if (!disk.mounted()) GTEST_SKIP() << "needs the right to mount a tmpfs";
  const std::vector<StateEntry> small{replica_entry("t", {50'000})};
  const std::vector<StateEntry> large{replica_entry("t", {50'000}), replica_entry("large", {300'000})};
  save_checkpoint(disk.path(), states<MemorySaveState>({small}));
  const auto before = names_in(disk.path());
  try {
    save_checkpoint(disk.path(), states<MemorySaveState>({large}));
    ADD_FAILURE() << "1.2 MB fitted into 1 MiB";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.committed(), Committed::kNo);
    EXPECT_EQ(error.code(), ErrorCode::kIo);
    EXPECT_THAT(error.what(), HasSubstr("No space left on device"));
    EXPECT_THAT(error.what(), HasSubstr("__0_1.distcp"));
    EXPECT_THAT(error.what(), HasSubstr("rank 0"));
  }
  EXPECT_EQ(names_in(disk.path()), before);
  auto loaded = states<MemoryLoadState>({small});
  load_checkpoint(disk.path(), loaded);
  EXPECT_EQ(first_difference(loaded), "");
  save_checkpoint(disk.path(), states<MemorySaveState>({small}));  // there is room for this one
}

}  // namespace
}  // namespace reshard
