// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sidecar.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/oracle.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::HasSubstr;

/// One load of one rank without the protocol, so that errors come as they are. Every wanted part is handed over once, and
/// progress ends at the total.
ReadCounters read_alone(const std::string& directory, MemoryLoadState& state,
                        const FileSystemReaderOptions& options = {}, FileSystem& files = local_file_system(),
                        const std::function<void(Metadata&)>& change = {}) {
  FileSystemReader reader(directory, options, files);
  Metadata metadata = reader.read_metadata();
  if (change) change(metadata);
  DefaultLoadPlanner planner;
  reader.set_up_storage_reader(metadata);
  planner.set_up_planner(state, metadata, true);
  const LoadPlan plan = planner.create_local_plan();
  const size_t commits = state.commits();
  Progress last;
  reader.read_data(plan, planner, {.save_id = {}, .progress = [&](const Progress& progress) { last = progress; }});
  EXPECT_EQ(last.done, last.total);
  EXPECT_EQ(last.total > 0, !plan.items.empty());
  EXPECT_EQ(state.commits() - commits, static_cast<size_t>(std::ranges::count(plan.items, false, &ReadItem::is_bytes)));
  return reader.counters();
}

void overwrite(const std::string& path, ByteSpan bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
}

class FileSystemReaderTest : public testing::Test {
 protected:
  void save(const std::vector<MemorySaveState>& ranks) { save_checkpoint(directory_.path(), ranks); }
  /// Rows of a tensor of float32, one part a rank.
  void save_rows(const Dims& size, int64_t ranks) { save(sharded<MemorySaveState>("t", size, split(size, 0, ranks))); }
  std::string path(const std::string& name) const { return directory_ / name; }
  StorageInfo place_of(const MetadataIndex& index) const {
    return *FileSystemReader(directory_.path()).read_metadata().storage_data.find(index);
  }
  /// Adds 1 to a byte of a file.
  void change_byte(const std::string& name, uint64_t offset) {
    Bytes bytes = read_test_file(path(name));
    bytes.at(offset) ^= std::byte{1};
    overwrite(path(name), bytes);
  }
  void put_byte(const std::string& name, uint64_t offset, std::byte byte) const {
    std::fstream file(path(name), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(byte));
  }
  TemporaryDirectory directory_;
};

// --- the catalogue -----------------------------------------------------------------------------------------------------

TEST_F(FileSystemReaderTest, NamesWhatIsMissing) {
  EXPECT_ERROR(ErrorCode::kNotFound, "no such checkpoint directory; file " + path("nowhere"),
               FileSystemReader(path("nowhere")).read_metadata());
  EXPECT_ERROR(ErrorCode::kNotFound, "holds no checkpoint", FileSystemReader(directory_.path()).read_metadata());
  overwrite(path("file"), {});
  EXPECT_ERROR(ErrorCode::kNotFound, "this is a file", FileSystemReader(path("file")).read_metadata());
  overwrite(path("__0.metadata"), {});
  EXPECT_ERROR(ErrorCode::kUnsupported, "use_collectives=False", FileSystemReader(directory_.path()).read_metadata());
}

TEST_F(FileSystemReaderTest, RefusesEveryTruncationOfTheCatalogue) {
  save_rows({4, 4}, 2);
  const Bytes whole = read_test_file(path(".metadata"));
  for (size_t size = 0; size < whole.size(); ++size) {
    overwrite(path(".metadata"), ByteSpan(whole).first(size));
    ASSERT_TRUE(throws_error(ErrorCode::kCorruptData, path(".metadata"), [&] {
      FileSystemReader(directory_.path()).read_metadata();
    })) << size;
  }
}

TEST_F(FileSystemReaderTest, RefusesAForeignCatalogue) {
  overwrite(path(".metadata"), as_bytes("PK\3\4 this is no pickle"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "pickle: opcode PERSID", FileSystemReader(directory_.path()).read_metadata());
  overwrite(path(".metadata"), as_bytes("\x80\x02}."));  // a pickled {}
  EXPECT_ERROR(ErrorCode::kCorruptData, path(".metadata"), FileSystemReader(directory_.path()).read_metadata());
  overwrite(path(".metadata"), as_bytes("\x80\x02"
                                        "cposix\nsystem\n\x8c\x04true\x85R."));
  EXPECT_ERROR(ErrorCode::kUnsupported, "calls posix.system", FileSystemReader(directory_.path()).read_metadata());
  std::filesystem::remove(path(".metadata"));
  std::filesystem::create_directory(path(".metadata"));
  EXPECT_ERROR(ErrorCode::kCorruptData, path(".metadata"), FileSystemReader(directory_.path()).read_metadata());
  std::filesystem::remove(path(".metadata"));
  ASSERT_EQ(::mkfifo(path(".metadata").c_str(), 0600), 0);
  EXPECT_ERROR(ErrorCode::kCorruptData, path(".metadata"), FileSystemReader(directory_.path()).read_metadata());
}

// --- data files that are not what the catalogue says -------------------------------------------------------------------

TEST_F(FileSystemReaderTest, NamesTheDataFileThatIsMissingOrShortOrNoFile) {
  save_rows({4, 4}, 2);
  MemoryLoadState state({replica_entry("t", {4, 4})});
  const uint64_t size = std::filesystem::file_size(path("__1_0.distcp"));
  std::filesystem::resize_file(path("__1_0.distcp"), 1000);
  EXPECT_ERROR(ErrorCode::kCorruptData, "not the one of its sidecar; rank 0, key t, file __1_0.distcp, offset 1000",
               read_alone(directory_.path(), state));
  EXPECT_ERROR(ErrorCode::kCorruptData,
               "ends before the item; rank 0, key t, file __1_0.distcp, offset 0; wanted " + std::to_string(size) +
                   " bytes, found 1000 bytes",
               read_alone(directory_.path(), state, {.verify_checksums = false}));
  std::filesystem::remove(path("__1_0.distcp"));
  EXPECT_ERROR(ErrorCode::kNotFound, "__1_0.distcp", read_alone(directory_.path(), state));
  EXPECT_ERROR(ErrorCode::kNotFound, "key t", read_alone(directory_.path(), state));
  std::filesystem::create_directory(path("__1_0.distcp"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "__1_0.distcp", read_alone(directory_.path(), state));
  std::filesystem::remove(path("__1_0.distcp"));
  ASSERT_EQ(::mkfifo(path("__1_0.distcp").c_str(), 0600), 0);
  EXPECT_ERROR(ErrorCode::kCorruptData, "__1_0.distcp", read_alone(directory_.path(), state));
}

TEST_F(FileSystemReaderTest, RefusesPathsThatLeaveTheDirectory) {
  save_rows({4, 4}, 1);
  MemoryLoadState state({replica_entry("t", {4, 4})});
  std::filesystem::rename(path("__0_0.distcp"), directory_.path() + "-outside");
  const auto with_path = [&](const std::string& relative) {
    return [&, relative] {
      read_alone(directory_.path(), state, {}, local_file_system(), [&](Metadata& metadata) {
        metadata.storage_data.find({"t", Dims{0, 0}, {}})->relative_path = relative;
      });
    };
  };
  const std::string name = std::filesystem::path(directory_.path()).filename();
  EXPECT_TRUE(throws_error(ErrorCode::kCorruptData, "key t", with_path("../" + name + "-outside")));
  EXPECT_TRUE(throws_error(ErrorCode::kCorruptData, "key t", with_path(directory_.path() + "-outside")));
  std::filesystem::create_symlink(directory_.path() + "-outside", path("link"));
  EXPECT_TRUE(throws_error(ErrorCode::kCorruptData, "link", with_path("link")));
  std::filesystem::create_directory_symlink("..", path("up"));
  EXPECT_TRUE(throws_error(ErrorCode::kCorruptData, "up", with_path("up/" + name + "-outside")));
  std::filesystem::remove(directory_.path() + "-outside");
}

/// As a checkpoint of PyTorch's, which has only the CRC-32s of its archives.
void forget_sidecars(Metadata& metadata) { metadata.sidecars.reset(); }

TEST_F(FileSystemReaderTest, ChecksTheSumOfEveryPayloadReadWhole) {
  // Each of the reader's ways: packed, direct into rows, direct in one piece, and in so many runs that they are read
  // before all are known.
  const std::vector<std::pair<Dims, std::vector<Box>>> cases{
      {{8, 8}, {whole_box({8, 8})}},
      {{300, 300}, {whole_box({300, 300})}},
      {{300, 300}, {{{0, 0}, {300, 100}}, {{0, 100}, {300, 200}}}},
      {{40000, 4}, {{{0, 2}, {40000, 2}}, {{0, 0}, {40000, 2}}}},
  };
  for (const auto& [size, chunks] : cases) {
    save_rows(size, 1);
    MemoryLoadState state({tensor_entry("t", size, chunks)});
    read_alone(directory_.path(), state);
    EXPECT_EQ(state.first_difference(), "");
    read_alone(directory_.path(), state, {}, local_file_system(), forget_sidecars);
    const StorageInfo place = place_of({"t", Dims{0, 0}, {}});
    const uint64_t payload = place.offset + TensorArchive(DType::kFloat32, size).payload_offset();
    for (const uint64_t at : {uint64_t{0}, static_cast<uint64_t>(volume(size) * 4 - 1)}) {
      change_byte(place.relative_path, payload + at);
      EXPECT_ERROR(ErrorCode::kCorruptData, "rank 0, key t, file " + place.relative_path + ", offset ",
                   read_alone(directory_.path(), state));
      EXPECT_ERROR(ErrorCode::kCorruptData, "do not match their CRC-32; rank 0, key t, file " + place.relative_path,
                   read_alone(directory_.path(), state, {}, local_file_system(), forget_sidecars));
      read_alone(directory_.path(), state, {.verify_checksums = false});
      EXPECT_NE(state.first_difference(), "");
      change_byte(place.relative_path, payload + at);
    }
  }
}

TEST_F(FileSystemReaderTest, APartIsNotComparedWithTheSumOfTheWhole) {
  constexpr int64_t kSize = 1 << 20;
  save(states<MemorySaveState>({{replica_entry("t", {kSize}, DType::kUInt8)}}));
  for (const Box& part : {Box{{0}, {kSize - 1}}, Box{{1}, {kSize - 1}}}) {
    MemoryLoadState state({tensor_entry("t", {kSize}, {part}, DType::kUInt8)});
    read_alone(directory_.path(), state, {}, local_file_system(), forget_sidecars);
    EXPECT_EQ(state.first_difference(), "");
  }
}

TEST_F(FileSystemReaderTest, ChecksTheSumOfValues) {
  MemorySaveState saved;
  saved.add_value("v", value_archive(std::string(100, 'x')));
  std::vector<MemorySaveState> ranks;
  ranks.push_back(std::move(saved));
  save(ranks);
  MemoryLoadState state({bytes_entry("v", 0)});
  read_alone(directory_.path(), state);
  EXPECT_EQ(state.value(0), value_archive(std::string(100, 'x')));
  change_byte("__0_0.distcp", 64 + 40);  // in the pickle, which begins at 64
  EXPECT_ERROR(ErrorCode::kCorruptData, "key v", read_alone(directory_.path(), state));
  EXPECT_ERROR(ErrorCode::kCorruptData, "key v",
               read_alone(directory_.path(), state, {}, local_file_system(), forget_sidecars));
}

// A part of a stored tensor, where no CRC-32 of an archive helps: what is wanted is right or refused, wherever in the
// file the changed byte is, and only changes in the blocks that are read are seen.
TEST_F(FileSystemReaderTest, ChecksEveryBlockThatAPartialReadTouches) {
  save_rows({300, 300}, 1);  // rows of 1200 bytes
  const uint64_t payload = TensorArchive(DType::kFloat32, {300, 300}).payload_offset();
  const uint64_t size = std::filesystem::file_size(path("__0_0.distcp"));
  struct Case {
    Box wanted;
    std::vector<std::pair<uint64_t, uint64_t>> blocks;  // of the payload, that are read
  };
  const std::vector<Case> cases{
      {{{100, 0}, {50, 300}}, {{29, 43}}},                                      // bytes 120000 to 180000
      {{{0, 0}, {1, 1}}, {{0, 0}}},        {{{299, 299}, {1, 1}}, {{87, 87}}},  // the last block, which is short
      {{{0, 10}, {300, 1}}, {{0, 87}}},                                         // each row: every block
      {{{50, 0}, {100, 2}}, {{14, 43}}},                                        // staged: runs of eight bytes
  };
  for (const Case& c : cases) {
    for (uint64_t at = 0; at < size; at += 509) {
      MemoryLoadState state({tensor_entry("t", {300, 300}, {c.wanted})});
      change_byte("__0_0.distcp", at);
      // The archive's head, and its end with the last block of the payload, are always read.
      bool touched = at < payload || at >= payload + 87 * 4096;
      for (const auto& [first, last] : c.blocks) {
        touched = touched || (at >= payload + first * 4096 && at < payload + (last + 1) * 4096);
      }
      if (touched) {
        EXPECT_ERROR(ErrorCode::kCorruptData, "do not match their checksum", read_alone(directory_.path(), state));
      } else {
        read_alone(directory_.path(), state);
        EXPECT_EQ(state.first_difference(), "");
      }
      change_byte("__0_0.distcp", at);
    }
  }
}

TEST_F(FileSystemReaderTest, NamesASidecarThatIsMissingOrOfAnotherSave) {
  save_rows({300, 300}, 2);
  const std::string save_id = *FileSystemReader(directory_.path()).read_metadata().storage_meta->save_id;
  const std::string name = sidecar_name(save_id, 1);
  MemoryLoadState all({replica_entry("t", {300, 300})});
  MemoryLoadState upper({tensor_entry("t", {300, 300}, {{{0, 0}, {100, 300}}})});
  const Bytes good = read_test_file(path(name));
  overwrite(path(name), ByteSpan(good).first(good.size() - 1));
  EXPECT_ERROR(ErrorCode::kCorruptData, "changed or cut off; rank 0, key t, file " + name,
               read_alone(directory_.path(), all));
  Sidecar other = decode_sidecar(good);
  other.files[0].sums[0] ^= 1;
  overwrite(path(name), encode_sidecar(other));
  EXPECT_ERROR(ErrorCode::kCorruptData, "not the one that this save wrote; rank 0, key t, file " + name,
               read_alone(directory_.path(), all));
  other.save_id = "another";
  overwrite(path(name), encode_sidecar(other));
  EXPECT_ERROR(ErrorCode::kCorruptData, "of another save or rank; rank 0, key t, file " + name,
               read_alone(directory_.path(), all));
  std::filesystem::remove(path(name));
  EXPECT_ERROR(ErrorCode::kNotFound, "is missing; rank 0, key t, file " + name, read_alone(directory_.path(), all));
  // Nobody asks for it without need.
  read_alone(directory_.path(), upper);
  EXPECT_EQ(upper.first_difference(), "");
  read_alone(directory_.path(), all, {.verify_checksums = false});
  EXPECT_EQ(all.first_difference(), "");
}

TEST_F(FileSystemReaderTest, ReadsEachSidecarThatItNeedsOnce) {
  std::vector<StateEntry> entries;
  for (int i = 0; i < 8; ++i) entries.push_back(tensor_entry("t" + std::to_string(i), {4000}, {}));
  std::vector<std::vector<StateEntry>> ranks(3, entries);
  for (size_t rank = 0; rank < 3; ++rank) {
    for (StateEntry& entry : ranks[rank]) {
      std::get<TensorEntry>(entry.value).chunks = {split_evenly(whole_box({4000}), 0, 3, static_cast<int64_t>(rank))};
    }
  }
  save_checkpoint(directory_.path(), states<MemorySaveState>(ranks), {.single_file_per_rank = false});
  FaultFileSystem files;
  for (StateEntry& entry : entries) std::get<TensorEntry>(entry.value).chunks = {{{1000}, {1500}}};  // ranks 0 and 1
  MemoryLoadState state(entries);
  const ReadCounters counters = read_alone(directory_.path(), state, {}, files);
  EXPECT_EQ(state.first_difference(), "");
  std::vector<std::string> opened;
  for (const FileCallRecord& call : files.trace()) {
    const std::string name = std::filesystem::path(call.path).filename();
    if (call.call == FileCall::kOpen && is_sidecar_name(name)) opened.push_back(name);
  }
  ASSERT_EQ(opened.size(), 2u);
  EXPECT_TRUE(opened[0].ends_with("-0") && opened[1].ends_with("-1"));
  EXPECT_EQ(counters.bytes_sidecars,
            std::filesystem::file_size(path(opened[0])) + std::filesystem::file_size(path(opened[1])));
}

TEST_F(FileSystemReaderTest, RefusesATensorThatIsNotTheOneOfTheCatalogue) {
  save(states<MemorySaveState>(
      {{replica_entry("a", {4}), replica_entry("b", {2, 2}), replica_entry("c", {4}, DType::kInt32)}}));
  for (const char* other : {"b", "c"}) {
    MemoryLoadState state({replica_entry("a", {4})});
    const auto swap = [&](Metadata& metadata) {
      const Dims origin(std::string(other) == "b" ? 2 : 1, 0);
      *metadata.storage_data.find({"a", Dims{0}, {}}) = *metadata.storage_data.find({other, origin, {}});
    };
    EXPECT_ERROR(ErrorCode::kCorruptData, "not the one of the catalogue; rank 0, key a",
                 read_alone(directory_.path(), state, {}, local_file_system(), swap));
  }
}

TEST_F(FileSystemReaderTest, ADtypeThatCannotBeSavedIsNoErrorOfSaving) {
  save(states<MemorySaveState>({{replica_entry("a", {4}, DType::kInt8)}}));
  MemoryLoadState state({replica_entry("a", {4}, DType::kQInt8)});
  const auto quantize = [](Metadata& metadata) {
    std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("a")).properties.dtype = DType::kQInt8;
  };
  EXPECT_ERROR(ErrorCode::kCorruptData, "not the one of the catalogue; rank 0, key a",
               read_alone(directory_.path(), state, {}, local_file_system(), quantize));
}

/// The default planner, but for the destination that it gives.
class StubbornLoadPlanner final : public LoadPlanner {
 public:
  explicit StubbornLoadPlanner(std::function<void(MutableTensorView&)> change) : change_(std::move(change)) {}
  void set_up_planner(LoadState& state, const Metadata& metadata, bool is_coordinator) override {
    planner_.set_up_planner(state, metadata, is_coordinator);
  }
  LoadPlan create_local_plan() override { return planner_.create_local_plan(); }
  const LoadReport& report() const override { return planner_.report(); }
  MutableTensorView resolve_tensor(const ReadItem& item) override {
    MutableTensorView view = planner_.resolve_tensor(item);
    change_(view);
    return view;
  }
  void commit_tensor(const ReadItem& item, const MutableTensorView& view) override {
    planner_.commit_tensor(item, view);
  }
  void load_bytes(const ReadItem& item, ByteSpan archive) override { planner_.load_bytes(item, archive); }

 private:
  DefaultLoadPlanner planner_;
  std::function<void(MutableTensorView&)> change_;
};

TEST_F(FileSystemReaderTest, NamesWhatIsNotAsPlanned) {
  save(states<MemorySaveState>({{replica_entry("small", {4, 4}), replica_entry("large", {200, 200})}}));
  const auto refuse = [&](ErrorCode code, const char* text, const std::function<void(LoadPlan&)>& change_plan,
                          const std::function<void(MutableTensorView&)>& change_view) {
    FileSystemReader reader(directory_.path());
    const Metadata metadata = reader.read_metadata();
    MemoryLoadState state({replica_entry("small", {4, 4}), replica_entry("large", {200, 200})});
    StubbornLoadPlanner planner(change_view);
    reader.set_up_storage_reader(metadata);
    planner.set_up_planner(state, metadata, true);
    LoadPlan plan = planner.create_local_plan();
    change_plan(plan);
    const auto read = [&] { reader.read_data(plan, planner, {}); };
    if (text == nullptr) return read();
    EXPECT_ERROR(code, text, read());
  };
  const auto same_plan = [](LoadPlan&) {};
  const auto same_view = [](MutableTensorView&) {};
  refuse(ErrorCode::kInternal, nullptr, same_plan, same_view);
  refuse(ErrorCode::kInternal, "destination is not as planned; rank 0, key small", same_plan,
         [](MutableTensorView& view) { view.dtype = DType::kInt32; });
  refuse(ErrorCode::kInternal, "destination is not as planned; rank 0, key large", same_plan,
         [](MutableTensorView& view) {
           if (view.sizes[0] == 200) view.sizes = {100, 400};
         });
  const auto refuse_plan = [&](ErrorCode code, const char* text, const std::function<void(ReadItem&)>& change) {
    refuse(
        code, text, [&](LoadPlan& plan) { change(plan.items.at(0)); }, same_view);
  };
  refuse_plan(ErrorCode::kCorruptData, "has no item ghost", [](ReadItem& item) { item.storage_index.fqn = "ghost"; });
  refuse_plan(ErrorCode::kCorruptData, "has no item small [1, 0]", [](ReadItem& item) {
    item.storage_index.offset = Dims{1, 0};
  });
  refuse_plan(ErrorCode::kInternal, "differ on what is a tensor", [](ReadItem& item) { item.is_bytes = true; });
  refuse_plan(ErrorCode::kInternal, "a region outside its stored chunk", [](ReadItem& item) {
    item.storage_offsets = {1, 0};
  });
}

/// A checkpoint as PyTorch saves a transposed tensor: its storage as it lies, and strides. `conj`: of complex64.
class TransposedCheckpoint {
 public:
  static constexpr int64_t kRows = 200, kColumns = 100;  // more than is read packed
  explicit TransposedCheckpoint(const std::string& directory, bool conj = false) : directory_(directory) {
    dtype = conj ? DType::kComplex64 : DType::kFloat32;
    payload = pattern_of("t", {kColumns, kRows}, whole_box({kColumns, kRows}), element_size(dtype));
    pickle::Tree tree;
    const auto dense = make_tensor_value(tree, dtype, {kRows, kColumns}, 0).as_object();
    std::vector<pickle::Value> args(dense.args.items().begin(), dense.args.items().end());
    args[3] = tree.tuple({pickle::Tree::integer(1), pickle::Tree::integer(kRows)});
    if (conj) args.push_back(tree.dict({{tree.str("conj"), pickle::Tree::boolean(true)}}));
    pickle::Object rebuild = dense;
    rebuild.args = tree.tuple(args);
    archive = encode_value_archive(tree.object(rebuild), std::vector<ByteSpan>{payload});
    Metadata metadata;
    const Box all = whole_box({kRows, kColumns});
    metadata.state_dict_metadata.insert("t", TensorStorageMetadata{{.dtype = dtype}, {kRows, kColumns}, {all}});
    metadata.storage_data.insert({"t", Dims{0, 0}, 0}, {"__0_0.distcp", 0, archive.size(), {}});
    overwrite(directory_ + "/.metadata", encode_metadata(metadata));
    overwrite(directory_ + "/__0_0.distcp", archive);
  }
  /// What the elements of `chunk` must be.
  Bytes expected(const Box& chunk, bool conj = false) const {
    Bytes result;
    const auto size = static_cast<size_t>(element_size(dtype));
    for (int64_t i = 0; i < chunk.sizes[0]; ++i) {
      for (int64_t j = 0; j < chunk.sizes[1]; ++j) {
        const auto at = static_cast<size_t>((chunk.offsets[1] + j) * kRows + chunk.offsets[0] + i) * size;
        result.insert(result.end(), &payload[at], &payload[at] + size);
        if (conj) result.back() ^= std::byte{0x80};  // the sign of the imaginary part
      }
    }
    return result;
  }
  void change_element(size_t byte) const {
    Bytes bad = archive;
    const auto at = std::ranges::search(bad, payload).begin() + static_cast<ptrdiff_t>(byte);
    *at ^= std::byte{1};
    overwrite(directory_ + "/__0_0.distcp", bad);
  }
  DType dtype = DType::kFloat32;
  Bytes payload;
  Bytes archive;

 private:
  std::string directory_;
};

TEST_F(FileSystemReaderTest, ReadsWhatIsStoredTransposed) {
  for (const bool conj : {false, true}) {
    const TransposedCheckpoint checkpoint(directory_.path(), conj);
    const std::vector<Box> chunks{{{0, 0}, {150, 100}}, {{150, 0}, {50, 60}}, {{150, 60}, {50, 40}}};
    for (const std::vector<Box>& wanted : {std::vector{whole_box({200, 100})}, chunks, {chunks[1]}}) {
      MemoryLoadState state({tensor_entry("t", {200, 100}, wanted, checkpoint.dtype)});
      read_alone(directory_.path(), state);
      for (size_t c = 0; c < wanted.size(); ++c) {
        ASSERT_EQ(state.memory().buffer(0, c), checkpoint.expected(wanted[c], conj)) << to_string(wanted[c]);
      }
    }
  }
}

TEST_F(FileSystemReaderTest, ChecksTheSumOfWhatIsStoredTransposed) {
  const TransposedCheckpoint checkpoint(directory_.path());
  for (const size_t byte : {size_t{0}, checkpoint.payload.size() - 1}) {
    checkpoint.change_element(byte);
    MemoryLoadState state({replica_entry("t", {200, 100})});
    EXPECT_ERROR(ErrorCode::kCorruptData, "do not match their CRC-32; rank 0, key t",
                 read_alone(directory_.path(), state));
    read_alone(directory_.path(), state, {.verify_checksums = false});
    EXPECT_NE(state.memory().buffer(0), checkpoint.expected(whole_box({200, 100})));
  }
}

TEST_F(FileSystemReaderTest, AnEmptyDirectoryNameIsTheWorkingDirectory) {
  struct Restore {
    std::filesystem::path before = std::filesystem::current_path();
    ~Restore() { std::filesystem::current_path(before); }
  } restore;
  std::filesystem::current_path(directory_.path());
  EXPECT_ERROR(ErrorCode::kNotFound, "holds no checkpoint", FileSystemReader("").read_metadata());
  save_checkpoint("", sharded<MemorySaveState>("t", {4, 4}, split({4, 4}, 0, 2)));
  MemoryLoadState state({replica_entry("t", {4, 4})});
  read_alone("", state);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_TRUE(verify_checkpoint("").problems.empty());
  EXPECT_TRUE(std::filesystem::exists(path("__1_0.distcp")));
}

TEST_F(FileSystemReaderTest, NormalizesBoolsThatAFileMadeUp) {
  for (const Dims& size : {Dims{16}, Dims{100'000}}) {                          // packed and direct
    save(states<MemorySaveState>({{replica_entry("t", size, DType::kBool)}}));  // any bytes at all
    MemoryLoadState state({replica_entry("t", size, DType::kBool)});
    read_alone(directory_.path(), state);
    const Bytes expected = state.memory().expected(0, 0);
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(state.memory().buffer(0)[i], expected[i] == std::byte{0} ? std::byte{0} : std::byte{1});
    }
  }
}

// A load of everything refuses every changed byte of every file, headers and padding too.
TEST_F(FileSystemReaderTest, RefusesEveryChangedByte) {
  MemorySaveState saved({replica_entry("a", {3, 5}), replica_entry("b", {2}, DType::kInt64)});
  saved.add_value("v", value_archive("text"));
  std::vector<MemorySaveState> ranks;
  ranks.push_back(std::move(saved));
  save(ranks);
  for (const std::string& name : local_file_system().list(directory_.path())) {
    const Bytes good = read_test_file(path(name));
    for (size_t i = 0; i < good.size(); ++i) {
      put_byte(name, i, good[i] ^ static_cast<std::byte>(1u << (i % 8)));
      MemoryLoadState state({replica_entry("a", {3, 5}), replica_entry("b", {2}, DType::kInt64), bytes_entry("v", 0)});
      EXPECT_THROW(read_alone(directory_.path(), state), Error) << name << ": byte " << i;
      put_byte(name, i, good[i]);
    }
  }
}

TEST_F(FileSystemReaderTest, RefusesEveryRandomBitFlipInALoadOnAnotherNumberOfRanks) {
  constexpr int kFlips = 400;
  std::vector<MemorySaveState> saved;
  for (const auto& mine : split({700, 300}, 0, 3)) {
    saved.push_back(MemorySaveState({tensor_entry("w", {700, 300}, mine), replica_entry("small", {7}),
                                     replica_entry("large", {50'000}, DType::kInt16)}));
    saved.back().add_value("v", value_archive("text"));
  }
  save_checkpoint(directory_.path(), saved, {.thread_count = 2});
  std::vector<std::string> files;
  std::vector<uint64_t> sizes;
  for (const std::string& name : local_file_system().list(directory_.path())) {
    files.push_back(name);
    sizes.push_back(std::filesystem::file_size(path(name)));
  }
  Random random(4);
  std::discrete_distribution<size_t> by_size(sizes.begin(), sizes.end());
  int missed = 0;
  for (int flip = 0; flip < kFlips; ++flip) {
    // Most go where most bytes are; every file gets some.
    const size_t file = flip % 4 == 0 ? static_cast<size_t>(flip / 4) % files.size() : by_size(random);
    const auto at = static_cast<uint64_t>(random_between(random, 0, static_cast<int64_t>(sizes[file]) - 1));
    const std::byte bit{static_cast<uint8_t>(1 << random_between(random, 0, 7))};
    const std::byte good = read_test_file(path(files[file])).at(at);
    put_byte(files[file], at, good ^ bit);
    std::vector<MemoryLoadState> loaded;
    for (const auto& mine : split({700, 300}, 1, 2)) {
      loaded.push_back(MemoryLoadState({tensor_entry("w", {700, 300}, mine), replica_entry("small", {7}),
                                        replica_entry("large", {50'000}, DType::kInt16), bytes_entry("v", 0)}));
    }
    try {
      load_checkpoint(directory_.path(), loaded);
      ++missed;
      ADD_FAILURE() << files[file] << ": byte " << at;
    } catch (const CheckpointError&) {
    }
    put_byte(files[file], at, good);
  }
  RecordProperty("flips", kFlips);
  RecordProperty("missed", missed);
}

// --- what is read ------------------------------------------------------------------------------------------------------

/// Saves on 4 ranks in rows, loads on `ranks` along `dim`; the sums of what all ranks read.
ReadCounters read_by_all(const std::string& directory, const Dims& size, size_t dim, int64_t ranks, bool verify) {
  auto loaded = sharded<MemoryLoadState>("t", size, split(size, dim, ranks));
  ReadCounters sum;
  for (const ReadCounters& counters : load_checkpoint(directory, loaded, {.verify_checksums = verify})) {
    EXPECT_EQ(counters.bytes_payload, counters.bytes_needed);
    EXPECT_EQ(counters.bytes_staged, 0u);
    sum.bytes_needed += counters.bytes_needed;
    sum.bytes_read += counters.bytes_read;
    sum.bytes_verify += counters.bytes_verify;
    sum.bytes_sidecars += counters.bytes_sidecars;
  }
  EXPECT_EQ(first_difference(loaded), "");
  EXPECT_EQ(sum.bytes_needed, static_cast<uint64_t>(volume(size) * 4));
  return sum;
}

struct Resharding {
  const char* name;
  size_t dim;
  int64_t ranks;
};
constexpr Resharding kReshardings[] = {
    {"4 to 4", 0, 4}, {"4 to 3", 0, 3}, {"rows to columns", 1, 4}, {"4 to 16", 0, 16}};

TEST_F(FileSystemReaderTest, ReadsWhatIsNeededAndNoMore) {
  const Dims size{600, 512};
  save_rows(size, 4);
  for (const Resharding& c : kReshardings) {
    SCOPED_TRACE(c.name);
    const ReadCounters plain = read_by_all(directory_.path(), size, c.dim, c.ranks, false);
    EXPECT_EQ(plain.bytes_verify, 0u);
    EXPECT_EQ(plain.bytes_sidecars, 0u);
    // Headers: at most 2 KiB for each stored chunk that a rank touches.
    EXPECT_LE(plain.bytes_read, plain.bytes_needed + static_cast<uint64_t>(c.ranks) * 4 * 2048);
    // Blocks: where rows are cut, less than one on each side; columns of half a KiB take every block.
    const ReadCounters verified = read_by_all(directory_.path(), size, c.dim, c.ranks, true);
    EXPECT_LE(verified.bytes_read - verified.bytes_verify, plain.bytes_read);
    EXPECT_LE(verified.bytes_verify,
              c.dim == 1 ? 3 * plain.bytes_needed + 4 * 4 * 16384 : static_cast<uint64_t>(c.ranks + 4) * 16384);
  }
}

// The payload of large tensors, where headers and the edges of blocks weigh little: all that is read of data files and
// sidecars, verification included.
TEST_F(FileSystemReaderTest, ReadsAHundredthMoreThanIsNeededAtMost) {
  const Dims size{600, 4096};  // columns of a quarter are one block wide
  save_rows(size, 4);
  for (const Resharding& c : {kReshardings[1], kReshardings[2]}) {
    SCOPED_TRACE(c.name);
    const ReadCounters verified = read_by_all(directory_.path(), size, c.dim, c.ranks, true);
    const auto ratio =
        static_cast<double>(verified.bytes_read + verified.bytes_sidecars) / static_cast<double>(verified.bytes_needed);
    RecordProperty(c.dim == 0 ? "four_to_three" : "rows_to_columns", std::to_string(ratio));
    EXPECT_LE(ratio, 1.02);
  }
}

TEST_F(FileSystemReaderTest, CountsExactlyWhatItAsksOfTheFileSystem) {
  save_rows({600, 512}, 2);
  FaultFileSystem files;
  MemoryLoadState state({tensor_entry("t", {600, 512}, {{{100, 7}, {300, 400}}})});
  const ReadCounters counters = read_alone(directory_.path(), state, {}, files);
  EXPECT_EQ(counters.bytes_needed, 300u * 400 * 4);
  EXPECT_EQ(counters.reads + 3, files.calls(FileCall::kRead));  // the catalogue and two sidecars
  const uint64_t catalogue = std::filesystem::file_size(path(".metadata"));
  EXPECT_EQ(counters.bytes_read + counters.bytes_sidecars + catalogue, files.bytes(FileCall::kRead));
}

TEST_F(FileSystemReaderTest, ReadsALargeTensorAsMuchAtATimeAsACacheHolds) {
  save_rows({1024, 1024}, 1);
  MemoryLoadState state({replica_entry("t", {1024, 1024})});
  for (const bool verify : {true, false}) {
    const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = verify});
    EXPECT_EQ(counters.reads, 2u + 32);  // tail, head, 4 MiB of elements
    EXPECT_EQ(counters.bytes_staged, 0u);
  }
}

// Large and small tensors, values and ties, in files of several ranks and threads.
TEST_F(FileSystemReaderTest, SeveralThreadsReadWhatOneReads) {
  constexpr int kRanks = 2;
  std::vector<std::vector<StateEntry>> entries(kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    for (int i = 0; i < 12; ++i) {
      entries[rank].push_back(
          tensor_entry("large." + std::to_string(i), {600, 1024}, {{{300 * rank, 0}, {300, 1024}}}));
    }
    for (int i = 0; i < 500; ++i) {
      const std::string name = std::to_string(rank) + ".small." + std::to_string(i);
      entries[rank].push_back(replica_entry(name, {20, 50}));
    }
    entries[rank].push_back(bytes_entry("value." + std::to_string(rank), 300));
  }
  save_checkpoint(directory_.path(), states<MemorySaveState>(entries));
  std::vector<StateEntry> all;
  for (const auto& of_rank : entries) {
    for (const StateEntry& entry : of_rank) {
      if (!entry.fqn.starts_with("large.")) all.push_back(entry);
    }
  }
  for (int i = 0; i < 12; ++i) all.push_back(replica_entry("large." + std::to_string(i), {600, 1024}));
  for (const bool verify : {true, false}) {
    MemoryLoadState alone(all);
    const ReadCounters one = read_alone(directory_.path(), alone, {.verify_checksums = verify});
    EXPECT_EQ(alone.first_difference(), "");
    for (const int threads : {2, 3, 8}) {
      SCOPED_TRACE(threads);
      FaultFileSystem files;
      MemoryLoadState state(all);
      const ReadCounters several =
          read_alone(directory_.path(), state, {.verify_checksums = verify, .thread_count = threads}, files);
      EXPECT_EQ(state.first_difference(), "");
      EXPECT_EQ(several.bytes_needed, one.bytes_needed);
      EXPECT_EQ(several.bytes_payload, one.bytes_payload);
      EXPECT_EQ(several.bytes_sidecars, one.bytes_sidecars);
      EXPECT_GE(files.calls(FileCall::kOpen), 6u);  // one a batch of 4 MiB
    }
  }
}

// Whichever thread meets it: the error names item and file, and all threads have ended.
TEST_F(FileSystemReaderTest, AnErrorOfOneThreadIsTheLoads) {
  std::vector<StateEntry> entries;
  for (int i = 0; i < 8; ++i) entries.push_back(replica_entry("t" + std::to_string(i), {1 << 20}));
  save(states<MemorySaveState>({entries}));
  const StorageInfo place = place_of({"t6", Dims{0}, {}});
  Bytes bytes = local_file_system().read_file(path("__0_0.distcp"), 1 << 30);
  bytes[static_cast<size_t>(place.offset + place.length / 2)] ^= std::byte{4};
  overwrite(path("__0_0.distcp"), bytes);
  MemoryLoadState state(entries);
  EXPECT_ERROR(ErrorCode::kCorruptData, "key t6, file __0_0.distcp",
               read_alone(directory_.path(), state, {.thread_count = 3}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "thread_count of a FileSystemReader; wanted 1 or more, found 0",
               read_alone(directory_.path(), state, {.thread_count = 0}));
}

TEST_F(FileSystemReaderTest, ReadsSmallItemsTogether) {
  std::vector<StateEntry> entries;
  for (int i = 0; i < 500; ++i) entries.push_back(replica_entry("t" + std::to_string(i), {100}));
  save(states<MemorySaveState>({entries}));
  MemoryLoadState state(entries);
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.reads, 1u);
  EXPECT_EQ(counters.bytes_payload, counters.bytes_needed);
  EXPECT_EQ(counters.bytes_staged, counters.bytes_needed);
}

TEST_F(FileSystemReaderTest, ReadsAMebibyteOfSmallItemsAtATime) {
  std::vector<StateEntry> entries;
  for (int i = 0; i < 100; ++i) entries.push_back(replica_entry("t" + std::to_string(i), {15'000}));
  save(states<MemorySaveState>({entries}));
  FaultFileSystem files;
  MemoryLoadState state(entries);
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false}, files);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.reads, 6u);  // 17 items each
  for (const FileCallRecord& call : files.trace()) {
    if (call.call != FileCall::kRead) continue;
    EXPECT_LE(call.bytes, 1u << 20);
  }
}

// read_alone() wants the last sign of progress to be the total.
TEST_F(FileSystemReaderTest, CompressedItemsAreProgress) {
  std::vector<StateEntry> entries{replica_entry("large", {900'000}), replica_entry("small", {10}),
                                  bytes_entry("value", 300)};
  save_checkpoint(directory_.path(), states<MemorySaveState>({entries}),
                  {.sync_files = false, .extensions = {std::make_shared<ZStandard>()}});
  for (const int threads : {1, 2}) {
    MemoryLoadState state(entries);
    read_alone(directory_.path(), state, {.thread_count = threads});
    EXPECT_EQ(state.first_difference(), "");
  }
}

TEST_F(FileSystemReaderTest, PassesOverWhatNobodyWantsBetweenSmallItems) {
  const std::vector<StateEntry> ends{replica_entry("a", {100}), replica_entry("z", {100})};
  save(states<MemorySaveState>({{ends[0], replica_entry("middle", {100'000}), ends[1]}}));
  MemoryLoadState state(ends);
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.reads, 2u);
  EXPECT_LE(counters.bytes_read, 2u * 2048);
}

TEST_F(FileSystemReaderTest, PartsWithoutGapsGoStraightToTheirPlace) {
  save_rows({300, 300}, 1);
  MemoryLoadState state({tensor_entry("t", {300, 300}, {{{7, 9}, {1, 3}}})});
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.bytes_payload, 12u);
  EXPECT_EQ(counters.bytes_staged, 0u);
}

TEST_F(FileSystemReaderTest, WideRunsGoStraightToTheirPlacesToo) {
  for (const Dims& size : {Dims{300, 300}, Dims{300, 1, 300}}) {
    save(sharded<MemorySaveState>("t", size, split(size, size.size() - 1, 2)));
    MemoryLoadState state({replica_entry("t", size)});
    const ReadCounters counters = read_alone(directory_.path(), state);
    EXPECT_EQ(state.first_difference(), "");
    EXPECT_EQ(counters.bytes_staged, 0u);
  }
}

TEST_F(FileSystemReaderTest, ReadsNeighboursTogetherWhereverTheyGo) {
  // Each stored part is rows of 256 bytes without gaps, and each row has a place of its own.
  save(sharded<MemorySaveState>("t", {900, 128}, split({900, 128}, 1, 2)));
  MemoryLoadState state({replica_entry("t", {900, 128})});
  const ReadCounters counters = read_alone(directory_.path(), state);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.bytes_staged, 0u);
  EXPECT_EQ(counters.reads, 2u * (2 + 2));  // tail, head, elements 128 KiB at a time
}

TEST_F(FileSystemReaderTest, CountsWhatItCopiesOfASmallItem) {
  save_rows({8, 8}, 1);
  MemoryLoadState state({tensor_entry("t", {8, 8}, {{{0, 0}, {3, 8}}, {{3, 0}, {5, 8}}})});
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.bytes_needed, 256u);
  EXPECT_EQ(counters.bytes_staged, 256u);
  EXPECT_EQ(counters.bytes_payload, 256u);
}

TEST_F(FileSystemReaderTest, OrderOfTheWantsDoesNotMatter) {
  save_rows({512, 256}, 1);
  std::vector<Box> chunks;
  for (int64_t i = 16; i-- > 0;) chunks.push_back({{i * 32, 0}, {32, 256}});
  MemoryLoadState state({tensor_entry("t", {512, 256}, chunks)});
  const ReadCounters counters = read_alone(directory_.path(), state);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.reads, 2u + 4);
}

TEST_F(FileSystemReaderTest, ReadsTheHeaderOfAnItemOnceHoweverManyWantIt) {
  save_rows({512, 256}, 1);
  std::vector<Box> chunks;
  for (int64_t i = 0; i < 16; ++i) chunks.push_back({{i * 32, 0}, {32, 256}});
  MemoryLoadState state({tensor_entry("t", {512, 256}, chunks)});
  const ReadCounters counters = read_alone(directory_.path(), state);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.reads, 2u + 4);  // the sixteen ranges are neighbours
}

TEST_F(FileSystemReaderTest, JoinsRangesAcrossTheGapThatItMaySkip) {
  save_rows({256, 256}, 1);
  // The left half of each row: 512 bytes wanted, 512 not.
  MemoryLoadState state({tensor_entry("t", {256, 256}, {{{0, 0}, {256, 128}}})});
  const ReadCounters exact = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(exact.bytes_payload, exact.bytes_needed);
  EXPECT_EQ(exact.reads, 2u + 256);
  MemoryLoadState again({tensor_entry("t", {256, 256}, {{{0, 0}, {256, 128}}})});
  const ReadCounters joined = read_alone(directory_.path(), again, {.verify_checksums = false, .coalesce_gap = 512});
  EXPECT_EQ(again.first_difference(), "");
  EXPECT_EQ(joined.reads, 3u);
  EXPECT_EQ(joined.bytes_payload, 2 * exact.bytes_payload - 512);
  // Verification reads whole blocks, each once.
  const ReadCounters verified = read_alone(directory_.path(), again);
  EXPECT_EQ(verified.reads, 2u + 2);
  EXPECT_EQ(verified.bytes_payload, exact.bytes_payload);
  EXPECT_GE(verified.bytes_verify, exact.bytes_payload);
}

TEST_F(FileSystemReaderTest, StagesWhereADestinationIsMadeOfTinyRuns) {
  save_rows({64, 2000}, 1);
  // Stored chunks of columns would be wide runs; wanted are columns of two elements: staged in one read a row.
  save(sharded<MemorySaveState>("t", {20000, 8}, split({20000, 8}, 1, 4)));
  MemoryLoadState state({replica_entry("t", {20000, 8})});
  const ReadCounters counters = read_alone(directory_.path(), state);
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.bytes_payload, counters.bytes_needed);
  EXPECT_EQ(counters.bytes_staged, counters.bytes_needed);
  EXPECT_EQ(counters.reads, 4u * (2 + 2));
}

TEST_F(FileSystemReaderTest, StagesWhatIsLargerThanTheBufferBlockByBlock) {
  const Dims size{1200000, 2};  // a stored column has 4.6 MiB, the buffer 4
  save(sharded<MemorySaveState>("t", size, split(size, 1, 2)));
  MemoryLoadState state({replica_entry("t", size)});
  const ReadCounters counters = read_alone(directory_.path(), state, {.verify_checksums = false});
  EXPECT_EQ(state.first_difference(), "");
  EXPECT_EQ(counters.bytes_staged, counters.bytes_needed);
}

TEST_F(FileSystemReaderTest, OpensEachFileOnce) {
  const Dims size{64, 64};
  std::vector<std::vector<StateEntry>> ranks;
  for (const std::vector<Box>& rows : split(size, 0, 2)) {
    ranks.push_back({tensor_entry("t", size, rows), tensor_entry("u", size, rows)});
  }
  save(states<MemorySaveState>(ranks));
  FaultFileSystem files;
  const std::vector<Box> columns{{{0, 0}, {64, 32}}, {{0, 32}, {64, 32}}};
  MemoryLoadState state({tensor_entry("t", size, columns), tensor_entry("u", size, columns)});
  read_alone(directory_.path(), state, {}, files);
  EXPECT_EQ(files.calls(FileCall::kOpen), 5u);  // the catalogue, two data files, two sidecars
}

TEST_F(FileSystemReaderTest, ReportsProgressUpToTheTotal) {
  save_rows({3000, 1000}, 1);
  FileSystemReader reader(directory_.path());
  const Metadata metadata = reader.read_metadata();
  MemoryLoadState state({replica_entry("t", {3000, 1000})});
  DefaultLoadPlanner planner;
  reader.set_up_storage_reader(metadata);
  planner.set_up_planner(state, metadata, true);
  std::vector<Progress> seen;
  reader.read_data(planner.create_local_plan(), planner,
                   {.save_id = {}, .progress = [&](const Progress& progress) { seen.push_back(progress); }});
  ASSERT_EQ(seen.size(), 2u);  // 12 MB in reads of 8 MiB
  EXPECT_EQ(seen.back().done, 12'000'000u);
  EXPECT_EQ(seen.back().total, 12'000'000u);
}

TEST_F(FileSystemReaderTest, CountsEachTensorOfOneReadInItsProgress) {
  const std::vector<StateEntry> entries{replica_entry("a", {1}), replica_entry("b", {2}), replica_entry("c", {3})};
  save(states<MemorySaveState>({entries}));
  FileSystemReader reader(directory_.path());
  const Metadata metadata = reader.read_metadata();
  MemoryLoadState state(entries);
  DefaultLoadPlanner planner;
  reader.set_up_storage_reader(metadata);
  planner.set_up_planner(state, metadata, true);
  std::vector<uint64_t> seen;
  reader.read_data(planner.create_local_plan(), planner,
                   {.save_id = {}, .progress = [&](const Progress& progress) { seen.push_back(progress.done); }});
  EXPECT_EQ(reader.counters().reads, 1u);
  std::map<std::string, uint64_t> bytes{{"a", 4}, {"b", 8}, {"c", 12}};
  std::vector<std::pair<uint64_t, uint64_t>> by_place;
  for (const auto& [index, info] : metadata.storage_data) by_place.emplace_back(info.offset, bytes[index.fqn]);
  std::ranges::sort(by_place);
  std::vector<uint64_t> wanted;
  for (uint64_t done = 0; const auto& [offset, length] : by_place) wanted.push_back(done += length);
  EXPECT_EQ(seen, wanted);
}

TEST_F(FileSystemReaderTest, CountsValuesInItsProgress) {
  const std::string small = value_archive("a"), large = value_archive(std::string(100'000, 'b'));
  std::vector<MemorySaveState> ranks(1);
  ranks[0].add_value("small", small);
  ranks[0].add_value("large", large);
  save(ranks);
  FileSystemReader reader(directory_.path(), {.verify_checksums = false});
  const Metadata metadata = reader.read_metadata();
  MemoryLoadState state({bytes_entry("small", small.size()), bytes_entry("large", large.size())});
  DefaultLoadPlanner planner;
  reader.set_up_storage_reader(metadata);
  planner.set_up_planner(state, metadata, true);
  std::vector<uint64_t> done;
  reader.read_data(planner.create_local_plan(), planner, {.save_id = {}, .progress = [&](const Progress& progress) {
                                                            done.push_back(progress.done);
                                                            EXPECT_EQ(progress.total, small.size() + large.size());
                                                          }});
  EXPECT_EQ(done, (std::vector<uint64_t>{small.size(), small.size() + large.size()}));
  EXPECT_EQ(state.value(0), small);
  EXPECT_TRUE(state.value(1) == large);
}

TEST_F(FileSystemReaderTest, NamesTheFileWhicheverCallFails) {
  save(sharded<MemorySaveState>("t", {300, 300}, split({300, 300}, 0, 2)));
  const auto fresh = [] { return MemoryLoadState({replica_entry("t", {300, 300})}); };
  FaultFileSystem clean;
  auto state = fresh();
  read_alone(directory_.path(), state, {}, clean);
  for (uint64_t nth = 1; nth <= clean.calls(); ++nth) {
    FaultFileSystem files;
    files.inject({.nth = nth, .error = EIO});
    state = fresh();
    EXPECT_ERROR(ErrorCode::kIo, clean.trace()[nth - 1].path, read_alone(directory_.path(), state, {}, files));
  }
  EXPECT_GT(clean.calls(), 8u);
}

TEST_F(FileSystemReaderTest, WantsItsCatalogueFirst) {
  MemoryLoadState state;
  DefaultLoadPlanner planner;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "set_up_storage_reader",
               FileSystemReader(directory_.path()).read_data({}, planner, {}));
}

// --- PyTorch's checkpoints ---------------------------------------------------------------------------------------------

/// Holds any boxes of golden tensors.
class OracleState final : public LoadState {
 public:
  void add(const std::string& fqn, DType dtype, const Dims& size, std::vector<Box> chunks) {
    for (const Box& chunk : chunks) {
      buffers_[entries_.size()].emplace_back(static_cast<size_t>(volume(chunk.sizes) * element_size(dtype)));
    }
    entries_.push_back({fqn, {fqn}, TensorEntry{{.dtype = dtype}, size, std::move(chunks), true}});
  }
  const std::vector<StateEntry>& entries(FlattenRule) const override { return entries_; }
  MutableTensorView tensor(FlattenRule, size_t entry, size_t chunk, const Box& region, DType dtype) override {
    const Box& box = std::get<TensorEntry>(entries_[entry].value).chunks[chunk];
    const Dims strides = contiguous_strides(box.sizes);
    int64_t first = 0;
    for (size_t d = 0; d < strides.size(); ++d) first += (region.offsets[d] - box.offsets[d]) * strides[d];
    return {buffers_[entry][chunk].data() + first * element_size(dtype), dtype, region.sizes, strides, nullptr};
  }
  void commit_tensor(FlattenRule, size_t, size_t, const Box&, const MutableTensorView&) override {}
  void load_bytes(FlattenRule, size_t, ByteSpan) override {}

  std::map<size_t, std::vector<Bytes>> buffers_;
  std::vector<StateEntry> entries_;
};

TEST(OracleLoadTest, AnyBoxesOfEveryGoldenTensorAreRight) {
  Random random(99);
  for (const std::string& name : OracleCase::names()) {
    const OracleCase oracle(name);
    FileSystemReader reader(oracle.directory().string());
    const Metadata metadata = reader.read_metadata();
    for (int round = 0; round < 3; ++round) {
      OracleState state;
      for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
        if (const auto* tensor = std::get_if<TensorStorageMetadata>(&entry)) {
          const bool empty = volume(tensor->size) == 0;
          state.add(fqn, tensor->properties.dtype, tensor->size,
                    empty ? std::vector{whole_box(tensor->size)} : random_tiling(random, tensor->size));
        }
      }
      DefaultLoadPlanner planner;
      reader.set_up_storage_reader(metadata);
      planner.set_up_planner(state, metadata, true);
      reader.read_data(planner.create_local_plan(), planner, {});
      for (size_t e = 0; e < state.entries_.size(); ++e) {
        const auto& tensor = std::get<TensorEntry>(state.entries_[e].value);
        const auto size = static_cast<size_t>(element_size(tensor.properties.dtype));
        const ByteSpan whole = oracle.tensor(state.entries_[e].fqn);
        for (size_t c = 0; c < tensor.chunks.size(); ++c) {
          Bytes expected(state.buffers_[e][c].size());
          for_each_run(whole_box(tensor.size), tensor.chunks[c], [&](int64_t from, int64_t to, int64_t length) {
            std::ranges::copy(whole.subspan(static_cast<size_t>(from) * size, static_cast<size_t>(length) * size),
                              expected.begin() + to * static_cast<int64_t>(size));
          });
          ASSERT_EQ(state.buffers_[e][c], expected)
              << name << " " << state.entries_[e].fqn << " " << to_string(tensor.chunks[c]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace reshard
