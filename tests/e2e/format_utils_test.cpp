// SPDX-License-Identifier: BSD-3-Clause
// Counterpart of test_format_utils.py. What PyTorch itself writes and reads is in tests/convert.
#include <ATen/ops/rand.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/utils.h>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/convert/format_utils.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/storage/torch_save_reader.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

class FormatUtilsFixture : public TorchDistributedTest {
 protected:
  /// Sizes that no number of ranks divides.
  auto build() {
    return FullyShardedDataParallel(on_meta([] { return torch::nn::Linear(5, 7); }),
                                    {.process_group = process_group(), .device = device()});
  }
  template <class Model>
  void expect_equal(Model& a, Model& b, bool equal) {
    const SummonFullParams full_a(a), full_b(b);
    EXPECT_EQ(a.module()->weight.equal(b.module()->weight), equal);
    EXPECT_EQ(a.module()->bias.equal(b.module()->bias), equal);
  }
};

// test_online_torch_save_to_dcp: one torch.save file into sharded ranks, each reading its own part, nothing broadcast. And from
// the checkpoint that the file is converted to.
RESHARD_DEVICE_TEST_F(FormatUtilsFixture, FormatUtilsDistributed, TorchSaveFileIntoShardedRanks, .ranks = {1, 2, 4},
                      .one_gpu_ranks = {2}) {
  const std::string directory = (temp_dir() / "checkpoint").string();
  const std::string file = (temp_dir() / "model.pt").string();
  const std::string converted = (temp_dir() / "converted").string();
  torch::manual_seed(0);
  auto model = build();
  const StateDict state{{"model", model.state_dict(StateDictType::kSharded)}, {"step", 7}};
  save(state, FileSystemWriter(directory));
  if (rank() == 0) {
    dcp_to_torch_save(directory, file, {.block_bytes = 40});
    torch_save_to_dcp(file, converted, {.block_bytes = 40});
  }
  process_group()->barrier();

  auto from_file = build();
  expect_equal(model, from_file, false);
  StateDict target{{"model", from_file.state_dict(StateDictType::kSharded)}, {"step", 0}};
  TorchSaveReader reader(file);
  load(target, reader);
  from_file.load_state_dict(target.at("model"));
  expect_equal(model, from_file, true);
  EXPECT_EQ(target.at("step").as<int64_t>(), 7);
  // A rank reads its shard and no more; the value and the head of the file are some KiB.
  constexpr uint64_t kWhole = (7 * 5 + 7) * 4;
  const auto ranks = static_cast<uint64_t>(world_size());
  EXPECT_LE(reader.counters().bytes_payload, (kWhole / 4 + ranks - 1) / ranks * 4);

  auto from_dcp = build();
  StateDict other{{"model", from_dcp.state_dict(StateDictType::kSharded)}, {"step", 0}};
  load(other, FileSystemReader(converted));
  from_dcp.load_state_dict(other.at("model"));
  expect_equal(model, from_dcp, true);
}

}  // namespace
}  // namespace reshard
