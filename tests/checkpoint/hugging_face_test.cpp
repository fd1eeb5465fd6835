// SPDX-License-Identifier: BSD-3-Clause
// State dicts in safetensors files.
#include <gtest/gtest.h>

#include <filesystem>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/storage/hugging_face.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

at::Tensor whole() { return at::arange(40, at::kFloat).view({5, 8}) + 1; }

/// Part `rank` of two along `dim`, filled or zero.
ShardedTensor part(int64_t dim, int rank, bool filled, at::ScalarType dtype = at::kFloat) {
  const Box box = split_evenly(whole_box({5, 8}), static_cast<size_t>(dim), 2, rank);
  const at::Tensor values = whole().narrow(0, box.offsets[0], box.sizes[0]).narrow(1, box.offsets[1], box.sizes[1]);
  return ShardedTensor(
      {5, 8}, dtype,
      {{box, filled ? values.to(dtype)
                    : at::zeros_like(values, values.options().dtype(dtype), at::MemoryFormat::Contiguous)}});
}

void save_load(bool consolidate, const std::string& directory, int rank) {
  const at::Tensor flags = at::arange(6) % 2 == 0;
  StateDict state{{"model", StateDict{{"w", part(0, rank, true)},
                                      {"transposed", whole().t()},
                                      {"step", at::scalar_tensor(7, at::kLong)},
                                      {"flags", flags}}}};
  save(state, HuggingFaceStorageWriter(directory, {.consolidate = consolidate, .fqn_to_index_mapping = {}}));

  StateDict target{{"model", StateDict{{"w", part(1, rank, false)},
                                       {"transposed", at::zeros({8, 5})},
                                       {"step", at::scalar_tensor(0, at::kLong)},
                                       {"flags", at::zeros({6}, at::kBool)}}}};
  HuggingFaceStorageReader reader(directory);
  load(target, reader);
  EXPECT_EQ(reader.counters().bytes_read, reader.counters().bytes_needed);
  const StateDict& model = target.at("model").as<StateDict>();
  const LocalShard& local = model.at("w").as<ShardedTensor>().shards()[0];
  EXPECT_TRUE(local.tensor.equal(whole().narrow(1, local.box.offsets[1], local.box.sizes[1])));
  EXPECT_TRUE(model.at("transposed").as<at::Tensor>().equal(whole().t()));
  EXPECT_EQ(model.at("step").as<at::Tensor>().item<int64_t>(), 7);
  EXPECT_TRUE(model.at("flags").as<at::Tensor>().equal(flags));

  // A part of it, in another dtype.
  StateDict half{{"model", StateDict{{"w", part(1, rank, false, at::kHalf)}}}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "dtype mismatch", load(half, HuggingFaceStorageReader(directory)));
  const LoadReport report = load(half, HuggingFaceStorageReader(directory), {.allow_cast = true});
  EXPECT_EQ(report.unexpected.size(), 3u);
  const LocalShard& cast = half.at("model").as<StateDict>().at("w").as<ShardedTensor>().shards()[0];
  EXPECT_TRUE(cast.tensor.equal(whole().narrow(1, cast.box.offsets[1], cast.box.sizes[1]).to(at::kHalf)));
}

RESHARD_DISTRIBUTED_TEST(HuggingFaceCheckpointTest, ConsolidatedFilesLoadInAnotherLayout, .ranks = 2) {
  process_group();
  save_load(true, (temp_dir() / "hf").string(), rank());
}

RESHARD_DISTRIBUTED_TEST(HuggingFaceCheckpointTest, ShardsLoadInAnotherLayout, .ranks = 2) {
  process_group();
  save_load(false, (temp_dir() / "hf").string(), rank());
}

RESHARD_DISTRIBUTED_TEST(HuggingFaceCheckpointTest, ValuesAreRefusedOnEveryRankAndNothingIsLeft, .ranks = 2) {
  process_group();
  const std::string directory = (temp_dir() / "hf").string();
  const StateDict state{{"w", part(0, rank(), true)}, {"epoch", 3}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key epoch", save(state, HuggingFaceStorageWriter(directory)));
  EXPECT_TRUE(std::filesystem::is_empty(directory));
}

}  // namespace
}  // namespace reshard
