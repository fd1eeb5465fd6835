// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/torch_save_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "reshard/storage/checkpoint_reader.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using pickle::Tree;
using pickle::Value;
using testing::ElementsAre;

class TorchSaveReaderTest : public testing::Test {
 protected:
  std::string write(const TorchFile& file, const Value& root) {
    file.write(path_, root);
    return path_;
  }
  std::vector<float> read(const std::string& fqn, const Box& box, TorchSaveReaderOptions options = {}) {
    TorchSaveReader reader(path_, options);
    const CheckpointReader checkpoint(reader);
    std::vector<float> out(static_cast<size_t>(volume(box.sizes)), -1);
    checkpoint.read_box(fqn, box, std::as_writable_bytes(std::span(out)));
    counters_ = reader.counters();
    return out;
  }
  TemporaryDirectory directory_;
  std::string path_ = directory_ / "model.pt";
  ReadCounters counters_;
};

TEST_F(TorchSaveReaderTest, PlansAndCataloguesOfAnotherFileAreRefused) {
  TorchFile file;
  const size_t s = file.storage(counting(24));
  write(file, file.dict({{"t", file.view(s, 0, {4, 6}, {6, 1})}, {"step", Tree::boolean(true)}}));
  TorchSaveReader reader(path_);
  MemoryLoadState state({replica_entry("t", {4, 6})});
  DefaultLoadPlanner planner;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "before set_up_storage_reader", reader.read_data({}, planner, {}));
  Metadata metadata = reader.read_metadata();
  planner.set_up_planner(state, metadata, true);
  reader.set_up_storage_reader(metadata);
  const auto expect = [&](const char* text, const std::function<void(ReadItem&)>& change) {
    LoadPlan plan = planner.create_local_plan();
    change(plan.items.at(0));
    EXPECT_ERROR(ErrorCode::kInternal, text, reader.read_data(plan, planner, {}));
  };
  expect("what the file does not hold; key u", [](ReadItem& item) { item.storage_index.fqn = "u"; });
  expect("what the file does not hold; key step", [](ReadItem& item) { item.storage_index.fqn = "step"; });
  expect("what the file does not hold; key t", [](ReadItem& item) { item.is_bytes = true; });
  expect("outside its tensor; key t", [](ReadItem& item) { item.storage_offsets = {1, 0}; });
  Metadata other = metadata;
  std::get<TensorStorageMetadata>(*other.state_dict_metadata.find("t")).size = {6, 4};
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "not the one that the catalogue was read from; file " + path_,
               reader.set_up_storage_reader(other));
  other = metadata;
  other.storage_data.find({"t", Dims{0, 0}, {}})->length += 1;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "not the one that the catalogue was read from",
               reader.set_up_storage_reader(other));
}

TEST_F(TorchSaveReaderTest, ReadsViewsOfEveryKind) {
  TorchFile file;
  const size_t s = file.storage(counting(24));
  const Value yes = Tree::boolean(true);
  write(file, file.dict({{"whole", file.view(s, 0, {4, 6}, {6, 1})},
                         {"transposed", file.view(s, 0, {6, 4}, {1, 6})},
                         {"slice", file.view(s, 7, {2, 3}, {12, 2})},
                         {"expanded", file.view(s, 5, {3, 2}, {0, 1})},
                         {"scalar", file.view(s, 23, {}, {})},
                         {"empty", file.view(s, 0, {0, 3}, {3, 1})},
                         {"negative", file.view(s, 1, {2}, {1}, {{file.tree.str("neg"), yes}})}}));
  EXPECT_THAT(read("transposed", whole_box({6, 4})),
              ElementsAre(0, 6, 12, 18, 1, 7, 13, 19, 2, 8, 14, 20, 3, 9, 15, 21, 4, 10, 16, 22, 5, 11, 17, 23));
  EXPECT_THAT(read("transposed", {{2, 1}, {2, 2}}), ElementsAre(8, 14, 9, 15));
  EXPECT_THAT(read("slice", whole_box({2, 3})), ElementsAre(7, 9, 11, 19, 21, 23));
  EXPECT_THAT(read("slice", {{1, 1}, {1, 2}}), ElementsAre(21, 23));
  EXPECT_THAT(read("expanded", whole_box({3, 2})), ElementsAre(5, 6, 5, 6, 5, 6));
  EXPECT_THAT(read("scalar", whole_box({})), ElementsAre(23));
  EXPECT_THAT(read("empty", whole_box({0, 3})), ElementsAre());
  EXPECT_THAT(read("negative", whole_box({2})), ElementsAre(-1, -2));
  EXPECT_THAT(read("whole", {{1, 0}, {1, 6}}), ElementsAre(6, 7, 8, 9, 10, 11));
  EXPECT_EQ(counters_.bytes_read, 24u);
  EXPECT_EQ(counters_.reads, 1u);
}

TEST_F(TorchSaveReaderTest, OnlyEqualViewsOfOneStorageAreTied) {
  TorchFile file;
  const size_t s = file.storage(counting(16));
  write(file, file.dict({{"a", file.view(s, 0, {4, 4}, {4, 1})},
                         {"same", file.view(s, 0, {4, 4}, {4, 1})},
                         {"transposed", file.view(s, 0, {4, 4}, {1, 4})},
                         {"transposed_again", file.view(s, 0, {4, 4}, {1, 4})},
                         {"flat", file.view(s, 0, {16}, {1})},
                         {"negative", file.view(s, 0, {4, 4}, {4, 1}, {{file.tree.str("neg"), Tree::boolean(true)}})},
                         {"half", file.view(s, 8, {2, 4}, {4, 1})}}));
  TorchSaveReader reader(path_);
  const CheckpointReader checkpoint(reader);
  for (const char* own : {"a", "transposed", "flat", "negative", "half"}) EXPECT_EQ(checkpoint.tied_to(own), own);
  EXPECT_EQ(checkpoint.tied_to("same"), "a");
  EXPECT_EQ(checkpoint.tied_to("transposed_again"), "transposed");
}

// A block of rows of a large transposed tensor is all over its storage, and yet little more than the block is read.
TEST_F(TorchSaveReaderTest, LargeTransposedTensorsAreReadInParts) {
  constexpr int64_t kRows = 4096;
  constexpr int64_t kColumns = 600;
  TorchFile file;
  const size_t s = file.storage(counting(kRows * kColumns));
  write(file, file.dict({{"t", file.view(s, 0, {kRows, kColumns}, {1, kRows})}}));
  const auto found = read("t", {{1024, 0}, {1024, kColumns}});
  for (int64_t r = 0; r < 1024; r += 97) {
    for (int64_t c = 0; c < kColumns; c += 41) {
      ASSERT_EQ(found[static_cast<size_t>(r * kColumns + c)], static_cast<float>(c * kRows + 1024 + r));
    }
  }
  EXPECT_EQ(counters_.bytes_needed, 1024u * 600 * 4);
  EXPECT_LE(counters_.bytes_read, 4 * counters_.bytes_needed);
}

// As reshard::load does on every rank: each its own part.
TEST_F(TorchSaveReaderTest, RanksReadTheirPartsAlone) {
  const Dims size{10, 64};
  TorchFile file;
  const Box all = whole_box(size);
  const Value w = file.tensor(DType::kFloat32, size, pattern_of("model.w", size, all, 4));
  const Value b = file.tensor(DType::kBFloat16, {6}, pattern_of("model.b", {6}, whole_box({6}), 2));
  write(file, file.dict({{"model", file.ordered_dict({{"w", w}, {"b", b}})}, {"step", Tree::integer(3)}}));
  for (const size_t dim : {0u, 1u}) {
    std::vector<MemoryLoadState> ranks;
    for (const auto& mine : split(size, dim, 3)) {
      ranks.push_back(MemoryLoadState({tensor_entry("model.w", size, mine),
                                       replica_entry("model.b", {6}, DType::kBFloat16), bytes_entry("step", 0)}));
    }
    on_ranks(3, [&](size_t rank, Transport& transport) {
      DefaultLoadPlanner planner;
      TorchSaveReader reader(path_);
      run_load(transport, ranks[rank], planner, reader);
      const auto mine = static_cast<uint64_t>(volume(split(size, dim, 3)[rank][0].sizes)) * 4 + 12;
      EXPECT_EQ(reader.counters().bytes_needed, mine);
      EXPECT_LE(reader.counters().bytes_payload, dim == 0 ? mine : 2560 + 12u);
    });
    EXPECT_EQ(first_difference(ranks), "");
    const std::string archive = ranks[2].value(2);
    EXPECT_EQ(decode_value_archive(MemorySource(as_bytes(archive))).root().as_int(), 3);
  }
}

TEST_F(TorchSaveReaderTest, AFileReadFromFrontToBackIsVerified) {
  TorchFile file;
  Bytes bytes = file.bytes(file.dict({{"w", file.tensor(DType::kFloat32, {8, 4}, counting(32))}}));
  const ValueArchive archive = decode_value_archive(MemorySource(bytes));
  bytes.at(archive.storage("0")->offset + 70) ^= std::byte{1};
  std::ofstream(path_, std::ios::binary) << as_text(bytes);
  EXPECT_NO_THROW(read("w", {{0, 0}, {4, 4}}));
  EXPECT_ERROR(ErrorCode::kCorruptData, "the stored elements do not match their CRC-32; rank 0, key w, file " + path_,
               read("w", whole_box({8, 4})));
  EXPECT_NO_THROW(read("w", whole_box({8, 4}), {.verify_checksums = false}));
  TorchSaveReader reader(path_);
  const CheckpointReader checkpoint(reader);
  Bytes half(64);
  checkpoint.read_box("w", {{0, 0}, {4, 4}}, half);
  EXPECT_ERROR(ErrorCode::kCorruptData, "CRC-32", checkpoint.read_box("w", {{4, 0}, {4, 4}}, half));
}

TEST_F(TorchSaveReaderTest, WhatIsNoStateDictIsRefusedByName) {
  const auto content = [&](std::string_view bytes) { std::ofstream(path_, std::ios::binary) << bytes; };
  const auto metadata = [&] { return TorchSaveReader(path_).read_metadata(); };
  EXPECT_ERROR(ErrorCode::kNotFound, "there is no such file; file " + path_, metadata());
  content("");
  EXPECT_ERROR(ErrorCode::kCorruptData, "too short for a zip archive; file " + path_, metadata());
  content(std::string_view("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15));
  EXPECT_ERROR(ErrorCode::kUnsupported, "the file is in the format of torch before 1.6; file " + path_, metadata());
  content("{}");
  EXPECT_ERROR(ErrorCode::kCorruptData, "archive: too short", metadata());
  TorchFile file;
  write(file, file.tree.list({}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "does not hold a state dict; file " + path_, metadata());
  std::filesystem::remove(path_);
  std::filesystem::create_directory(path_);
  EXPECT_ERROR(ErrorCode::kCorruptData, path_, metadata());
}

TEST_F(TorchSaveReaderTest, TensorsThatUnfoldOutOfProportionAreRefused) {
  TorchFile file;
  const size_t s = file.storage(counting(4));
  write(file, file.dict({{"huge", file.view(s, 0, {int64_t{1} << 30, 4}, {0, 1})}}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "unfold to far more bytes than the file has; key huge",
               TorchSaveReader(path_).read_metadata());
}

TEST_F(TorchSaveReaderTest, AnotherFileThanTheCoordinatorsIsNoticed) {
  TorchFile file;
  write(file, file.dict({{"w", file.tensor(DType::kFloat32, {2}, counting(2))}}));
  const Metadata metadata = TorchSaveReader(path_).read_metadata();
  TorchFile other;
  write(other, other.dict({{"w", other.tensor(DType::kFloat32, {3}, counting(3))}}));
  TorchSaveReader reader(path_);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "not the one that the catalogue was read from",
               reader.set_up_storage_reader(metadata));
  MemoryLoadState state;
  DefaultLoadPlanner planner;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "read_data before", TorchSaveReader(path_).read_data({}, planner, {}));
}

TEST_F(TorchSaveReaderTest, EveryTruncationIsNamed) {
  TorchFile file;
  const Bytes bytes = file.bytes(file.dict({{"w", file.tensor(DType::kFloat32, {4}, counting(4))}}));
  for (size_t length = 0; length < bytes.size(); ++length) {
    std::ofstream(path_, std::ios::binary) << as_text(ByteSpan(bytes).first(length));
    EXPECT_ERROR(ErrorCode::kCorruptData, path_, TorchSaveReader(path_).read_metadata());
  }
}

}  // namespace
}  // namespace reshard
