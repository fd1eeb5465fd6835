// SPDX-License-Identifier: BSD-3-Clause
// Tensors of a type of the user's own through a checkpoint. Counterpart of test_dtensor_resharding.py:
// test_uneven_reshard_with_checkpointable_api.
#include "reshard/state_dict/checkpointable.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

/// Rows of a tensor of one column, kept in blocks that are no views of one another.
class Rows : public Checkpointable {
 public:
  Rows(int64_t rows, std::vector<std::pair<int64_t, int64_t>> blocks) : rows_(rows), blocks_(std::move(blocks)) {
    for (const auto& [offset, length] : blocks_) memory.push_back(at::zeros({length, 1}));
  }
  Dims size() const override { return {rows_, 1}; }
  at::ScalarType dtype() const override { return at::kFloat; }
  std::vector<Box> chunk_list() const override {
    std::vector<Box> chunks;
    for (const auto& [offset, length] : blocks_) chunks.push_back({{offset, 0}, {length, 1}});
    return chunks;
  }
  at::Tensor tensor_shard(const Box& chunk) const override {
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].first == chunk.offsets[0]) return memory[i];
    }
    return {};
  }
  at::Tensor wanted(size_t block) const {
    const auto& [offset, length] = blocks_[block];
    return at::arange(offset, offset + length, at::kFloat).view({length, 1});
  }
  std::vector<at::Tensor> memory;

 protected:
  int64_t rows_;
  std::vector<std::pair<int64_t, int64_t>> blocks_;
};

RESHARD_DISTRIBUTED_TEST(CheckpointableTest, LoadsIntoOtherBlocksThanItWasSavedFrom, .ranks = 4) {
  const auto world = process_group();
  const std::pair<int64_t, int64_t> saved[] = {{0, 4}, {4, 3}, {7, 4}, {11, 5}};
  const std::pair<int64_t, int64_t> loaded[] = {{0, 2}, {2, 4}, {6, 6}, {12, 4}};
  const auto at_rank = [&](const auto& blocks) { return blocks[static_cast<size_t>(rank())]; };
  Rows rows(16, {at_rank(saved)});
  rows.memory[0].copy_(rows.wanted(0));
  const std::string dir = (temp_dir() / "checkpoint").string();
  save(StateDict{{"rows", rows}}, FileSystemWriter(dir));

  Rows target(16, {at_rank(loaded)});
  StateDict state;
  state["rows"] = target;
  load(state, FileSystemReader(dir));
  EXPECT_TRUE(at::equal(target.memory[0], target.wanted(0))) << "in place: " << target.memory[0];

  // Two blocks a rank, dealt out crosswise, and what is plain there.
  Rows crosswise(16, {{2 * rank(), 2}, {14 - 2 * rank(), 2}});
  StateDict other{{"rows", crosswise}};
  load(other, FileSystemReader(dir));
  for (const size_t block : {0, 1}) EXPECT_TRUE(at::equal(crosswise.memory[block], crosswise.wanted(block)));
  StateDict whole{{"rows", at::zeros({16, 1})}};
  load(whole, FileSystemReader(dir));
  EXPECT_TRUE(at::equal(whole.at("rows").as<at::Tensor>().flatten(), at::arange(16, at::kFloat)));
}

RESHARD_DISTRIBUTED_TEST(CheckpointableTest, NamesWhatDoesNotFit, .ranks = 1) {
  struct Broken : Rows {
    using Rows::Rows;
    at::Tensor tensor_shard(const Box&) const override { return replaced; }
    at::Tensor replaced;
  } rows(4, {{0, 4}});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "has no tensor", StateDict({{"rows", rows}}));
  rows.replaced = at::zeros({3, 1});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "another shape", StateDict({{"rows", rows}}));
  rows.replaced = at::zeros({4, 1}, at::kDouble);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "another dtype", StateDict({{"rows", rows}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "does not lie inside", StateDict({{"rows", Rows(4, {{2, 3}})}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "overlaps", StateDict({{"rows", Rows(4, {{0, 3}, {2, 2}})}}));
}

}  // namespace
}  // namespace reshard
