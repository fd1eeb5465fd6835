// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/checkpoint_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reshard/storage/filesystem.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;

TEST(CutIntoBlocksTest, BlocksAreRowMajorRangesOfAtMostTheSize) {
  EXPECT_THAT(cut_into_blocks(whole_box({5, 4}), 8),
              ElementsAre(Box{{0, 0}, {2, 4}}, Box{{2, 0}, {2, 4}}, Box{{4, 0}, {1, 4}}));
  EXPECT_THAT(cut_into_blocks({{3, 1}, {2, 4}}, 3),
              ElementsAre(Box{{3, 1}, {1, 3}}, Box{{3, 4}, {1, 1}}, Box{{4, 1}, {1, 3}}, Box{{4, 4}, {1, 1}}));
  EXPECT_THAT(cut_into_blocks(whole_box({1, 1, 6}), 4),
              ElementsAre(Box{{0, 0, 0}, {1, 1, 4}}, Box{{0, 0, 4}, {1, 1, 2}}));
  EXPECT_THAT(cut_into_blocks(whole_box({}), 1), ElementsAre(whole_box({})));
  EXPECT_THAT(cut_into_blocks(whole_box({0, 3}), 1), ElementsAre(whole_box({0, 3})));
  for (int64_t most = 1; most < 30; ++most) {
    const auto blocks = cut_into_blocks(whole_box({3, 2, 4}), most);
    EXPECT_EQ(check_exact_tiling({3, 2, 4}, blocks), std::nullopt);
    for (const Box& block : blocks) EXPECT_LE(volume(block.sizes), most);
  }
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "blocks of less than one element", cut_into_blocks(whole_box({2}), 0));
}

/// A checkpoint of three ranks: rows, columns, a tied tensor, one without elements, one of no dimension, values.
class CheckpointReaderTest : public testing::Test {
 protected:
  void SetUp() override {
    std::vector<MemorySaveState> ranks;
    for (int64_t rank = 0; rank < 3; ++rank) {
      const auto part = [&](const Dims& size, size_t dim) {
        return std::vector<Box>{split_evenly(whole_box(size), dim, 3, rank)};
      };
      ranks.push_back(MemorySaveState({tensor_entry("rows", {7, 4}, part({7, 4}, 0)),
                                       tensor_entry("columns", {5, 6}, part({5, 6}, 1), DType::kInt16),
                                       replica_entry("scalar", {}), replica_entry("empty", {0, 2})}));
      StateEntry tied = tensor_entry("tied", {7, 4}, part({7, 4}, 0));
      std::get<TensorEntry>(tied.value).tied_to = 0;
      ranks.back().add(std::move(tied));
      ranks.back().add_value("step", value_archive("seven"));
    }
    save_checkpoint(directory_.path(), ranks);
    reader_.emplace(directory_.path());
    checkpoint_.emplace(*reader_);
  }
  TemporaryDirectory directory_;
  std::optional<FileSystemReader> reader_;
  std::optional<CheckpointReader> checkpoint_;
};

TEST_F(CheckpointReaderTest, ReadsBoxesAndValues) {
  for (const Box& box : {Box{{0, 0}, {5, 6}}, Box{{1, 2}, {3, 3}}, Box{{4, 5}, {1, 1}}}) {
    Bytes out(static_cast<size_t>(volume(box.sizes) * 2));
    checkpoint_->read_box("columns", box, out);
    EXPECT_EQ(out, pattern_of("columns", {5, 6}, box, 2)) << to_string(box);
  }
  EXPECT_EQ(as_text(checkpoint_->read_value("step")), value_archive("seven"));
  EXPECT_EQ(checkpoint_->tied_to("tied"), "rows");
  EXPECT_EQ(checkpoint_->tied_to("rows"), "rows");
  EXPECT_EQ(checkpoint_->tied_to("columns"), "columns");
}

TEST_F(CheckpointReaderTest, ReadsOnlyWhatABoxNeeds) {
  Bytes out(4 * 4);
  checkpoint_->read_box("rows", {{6, 0}, {1, 4}}, out);
  EXPECT_EQ(reader_->counters().bytes_payload, 16u);
}

TEST_F(CheckpointReaderTest, WrongQuestionsAreErrors) {
  Bytes out(8);
  EXPECT_ERROR(ErrorCode::kNotFound, "no such key; key nothing", checkpoint_->read_box("nothing", {}, out));
  EXPECT_ERROR(ErrorCode::kNotFound, "no such key", checkpoint_->read_value("nothing"));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key step; wanted a tensor", checkpoint_->read_box("step", {}, out));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key rows; wanted a value", checkpoint_->read_value("rows"));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "memory for a box of a tensor; key rows; wanted 16 bytes, found 8",
               checkpoint_->read_box("rows", {{0, 0}, {1, 4}}, out));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor", checkpoint_->read_box("rows", {{7, 0}, {1, 2}}, out));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "rank of a state",
               CheckpointSaveState(*checkpoint_, {.rank = 2, .world_size = 2}));
}

// What a save of the adapter on any number of ranks gives is the checkpoint again.
TEST_F(CheckpointReaderTest, IsSavedAgainByAnyNumberOfRanks) {
  for (const size_t world_size : {1u, 2u, 5u, 9u}) {
    for (const uint64_t block : {uint64_t{1}, uint64_t{24}, uint64_t{1} << 20}) {
      const TemporaryDirectory copy;
      on_ranks(world_size, [&](size_t rank, Transport& transport) {
        const CheckpointSaveState state(
            *checkpoint_,
            {.block_bytes = block, .rank = static_cast<int>(rank), .world_size = static_cast<int>(world_size)});
        DefaultSavePlanner planner;
        FileSystemWriter writer(copy.path(), {.sync_files = false});
        run_save(transport, state, planner, writer);
      });
      FileSystemReader reader(copy.path());
      const CheckpointReader again(reader);
      const Metadata& from = checkpoint_->metadata();
      const Metadata& to = again.metadata();
      for (const auto& [fqn, path] : *from.planner_data) EXPECT_EQ(*to.planner_data->find(fqn), path);
      ASSERT_EQ(to.state_dict_metadata.size(), from.state_dict_metadata.size());
      for (size_t i = 0; i < from.state_dict_metadata.size(); ++i) {
        EXPECT_EQ(to.state_dict_metadata.begin()[static_cast<ptrdiff_t>(i)].first,
                  from.state_dict_metadata.begin()[static_cast<ptrdiff_t>(i)].first);
      }
      for (const auto& [fqn, size, width] : std::vector<std::tuple<std::string, Dims, int64_t>>{
               {"rows", {7, 4}, 4}, {"columns", {5, 6}, 2}, {"scalar", {}, 4}, {"empty", {0, 2}, 4}}) {
        Bytes out(static_cast<size_t>(volume(size) * width));
        again.read_box(fqn, whole_box(size), out);
        EXPECT_EQ(out, pattern_of(fqn, size, whole_box(size), width)) << fqn;
        for (const Box& chunk : again.tensor(fqn).chunks) {
          EXPECT_LE(static_cast<uint64_t>(volume(chunk.sizes) * width), std::max<uint64_t>(block, 4));
        }
      }
      EXPECT_EQ(again.tied_to("tied"), "rows");
      EXPECT_EQ(as_text(again.read_value("step")), value_archive("seven"));
    }
  }
}

}  // namespace
}  // namespace reshard
