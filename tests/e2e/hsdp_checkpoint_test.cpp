// SPDX-License-Identifier: BSD-3-Clause
// Counterpart of test_hsdp_checkpoint.py: hybrid sharding through a checkpoint, into itself and to and from FSDP.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/utils.h>

#include <map>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/fsdp/optimizer_state.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

/// Linear layers of these widths, with a ReLU after each.
struct ChainImpl : torch::nn::Module {
  explicit ChainImpl(const std::vector<int64_t>& widths) {
    for (size_t i = 0; i + 1 < widths.size(); ++i)
      layers.push_back(register_module("net" + std::to_string(i + 1), torch::nn::Linear(widths[i], widths[i + 1])));
  }
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) x = at::relu(layer->forward(x));
    return x;
  }
  std::vector<torch::nn::Linear> layers;
};
TORCH_MODULE(Chain);

const std::vector<std::vector<int64_t>> kModels{{5, 8, 4, 12}, {5, 10, 15, 30, 5}};  // Simple and SimpleUneven

/// A sharded model with its optimizer.
struct Training {
  Training(const std::vector<int64_t>& widths, const FsdpOptions& options, uint64_t seed)
      : model((torch::manual_seed(seed), Chain(widths)), options),
        optimizer(model.parameters(), torch::optim::AdamOptions(0.1)),
        device(options.device) {}
  void step() {
    torch::manual_seed(77);  // the same on every rank
    const at::Tensor x = at::rand({4, 5}).to(device);
    optimizer.zero_grad();
    model(x).sum().backward();
    optimizer.step();
  }
  StateDict state() {
    return {{"model", model.state_dict(StateDictType::kSharded)}, {"optim", optimizer_state_dict(optimizer, model)}};
  }
  void load(const StateDict& loaded) {
    model.load_state_dict(loaded.at("model"));
    load_optimizer_state_dict(optimizer, model, loaded.at("optim"));
  }
  /// Whole parameters by name. Collective.
  std::map<std::string, at::Tensor> whole() const {
    std::map<std::string, at::Tensor> result;
    const StateDict full = model.state_dict(StateDictType::kFull);
    for (const auto& [name, value] : full.items()) result[name] = value.as<at::Tensor>();
    return result;
  }
  FullyShardedDataParallel<Chain> model;
  torch::optim::Adam optimizer;
  c10::Device device;
};

/// Copies of all tensors and shards of a state dict, in order.
void collect(const StateValue& value, std::vector<at::Tensor>& to) {
  if (value.is<at::Tensor>()) to.push_back(value.as<at::Tensor>().detach().clone());
  if (value.is<ShardedTensor>()) {
    for (const LocalShard& shard : value.as<ShardedTensor>().shards()) to.push_back(shard.tensor.clone());
  }
  if (!value.is<StateDict>()) return;
  for (const auto& [key, item] : value.as<StateDict>().items()) collect(item, to);
}
std::vector<at::Tensor> copies(const StateDict& state) {
  std::vector<at::Tensor> result;
  collect(StateValue(state), result);
  return result;
}
bool all_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](const at::Tensor& x, const at::Tensor& y) { return x.equal(y); });
}

class HsdpCheckpointFixture : public TorchDistributedTest {
 protected:
  static constexpr ShardLayout kLayouts[] = {ShardLayout::kFlat, ShardLayout::kDim0Chunks};
  DeviceMesh mesh(const Dims& shape = {2, 2}, std::vector<int> ranks = {}) {
    process_group();
    return init_device_mesh(shape, {.dim_names = {"replicate", "shard"}, .ranks = std::move(ranks)});
  }
  std::string next_directory() { return (temp_dir() / std::to_string(directories_++)).string(); }
  /// Loads into `run`, which must then have the parameters of `from`.
  void load_and_compare(Training& run, const Training& from, const std::string& directory) {
    const auto wanted = from.whole();
    for (const auto& [name, value] : run.whole()) EXPECT_FALSE(value.equal(wanted.at(name))) << name;
    StateDict target = run.state();
    load(target, FileSystemReader(directory));
    run.load(target);
    for (const auto& [name, value] : run.whole()) EXPECT_TRUE(value.equal(wanted.at(name))) << name;
  }

 private:
  int directories_ = 0;
};

// test_hsdp_checkpoint
RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, ComesBackAfterAStep, .ranks = {4}, .one_gpu_ranks = {4}) {
  const DeviceMesh square = mesh();
  for (const auto& widths : kModels) {
    for (const ShardLayout layout : kLayouts) {
      Training run(widths, {.mesh = square, .device = device(), .layout = layout}, 1);
      run.step();
      const std::vector<at::Tensor> saved = copies(run.state());
      const std::string directory = next_directory();
      save(run.state(), FileSystemWriter(directory), {.verify_replicas = true});
      run.step();
      EXPECT_FALSE(all_equal(copies(run.state()), saved));
      StateDict target = run.state();
      load(target, FileSystemReader(directory));
      run.load(target);
      EXPECT_TRUE(all_equal(copies(run.state()), saved));
    }
  }
}

// test_hsdp_fsdp_checkpoint_conversion, and back; with the optimizer, which must go on as if nothing had happened.
RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, BecomesFsdpAndBack, .ranks = {4}, .one_gpu_ranks = {4}) {
  const DeviceMesh square = mesh();
  const DeviceMesh turned = mesh({2, 2}, {3, 1, 0, 2});
  const DeviceMesh replicas = mesh({4, 1});
  for (const auto& widths : kModels) {
    for (const ShardLayout layout : kLayouts) {
      Training hybrid(widths, {.mesh = square, .device = device(), .layout = layout}, 1);
      hybrid.step();
      const std::string first = next_directory();
      save(hybrid.state(), FileSystemWriter(first), {.verify_replicas = true});
      // On four ranks the 5 rows of the last layer leave one rank without.
      Training flat(widths, {.device = device(), .layout = layout}, 2);
      load_and_compare(flat, hybrid, first);
      hybrid.step();
      flat.step();
      const auto wanted = hybrid.whole();
      for (const auto& [name, value] : flat.whole()) EXPECT_TRUE(at::allclose(value, wanted.at(name))) << name;

      const std::string second = next_directory();
      save(flat.state(), FileSystemWriter(second));
      for (const DeviceMesh& other : {turned, replicas}) {
        Training back(widths, {.mesh = other, .device = device()}, 3);
        load_and_compare(back, flat, second);
        // Equal replicas hold equal state: a save that compares them says so.
        save(back.state(), FileSystemWriter(next_directory()), {.verify_replicas = true});
      }
    }
  }
}

// e2e/test_fsdp_ep.py: experts are sharded over a dimension of a mesh, the rest over all ranks; each rank knows its own
// expert alone. Then the experts move to other ranks.
RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, ExpertsAreShardedOverTheirOwnRanks, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  const auto world = process_group();
  const DeviceMesh here = init_device_mesh({2, 2}, {.dim_names = {"dp", "ep"}});
  const DeviceMesh there = init_device_mesh({2, 2}, {.dim_names = {"dp", "ep"}, .ranks = {1, 0, 3, 2}});
  struct Model {
    Model(const DeviceMesh& mesh, c10::Device device, uint64_t seed)
        : name("expert" + std::to_string(mesh.get_local_rank("ep"))),
          dense({5, 5}, {.device = device}, seed),
          expert({5, 7, 5}, {.mesh = mesh["dp"], .device = device}, seed + 1 + mesh.get_local_rank("ep")) {}
    StateDict state() {
      StateDict result{{"dense", dense.state()}};
      result[name] = expert.state();
      return result;
    }
    void load(const StateDict& state) {
      dense.load(state.at("dense"));
      expert.load(state.at(name));
    }
    std::string name;
    Training dense, expert;
  };
  Model model(here, device(), 10);
  model.dense.step();
  model.expert.step();
  EXPECT_EQ(model.expert.model.process_group().ranks(), here.get_group("dp")->ranks());
  const std::string directory = next_directory();
  save(model.state(), FileSystemWriter(directory));

  Model moved(there, device(), 20);
  EXPECT_NE(moved.name, model.name);
  StateDict target = moved.state();
  const LoadReport report = load(target, FileSystemReader(directory));
  for (const std::string& key : report.unexpected) EXPECT_EQ(key.rfind(model.name, 0), 0u) << key;
  EXPECT_FALSE(report.unexpected.empty());
  moved.load(target);
  // An expert of one rank is that of its neighbour now, with its moments: one more step is the same step.
  model.expert.step();
  moved.expert.step();
  for (const auto& [name, value] : model.expert.whole()) {
    at::Tensor all = at::empty({4 * value.numel()}, value.options());
    at::Tensor mine = moved.expert.whole().at(name).contiguous().view(-1);
    world->all_gather_into(all, mine);
    EXPECT_TRUE(all.view({4, -1})[rank() ^ 1].equal(value.reshape(-1))) << name;
  }
}

RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, EachByteIsWrittenByOneReplica, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  const DeviceMesh square = mesh();
  const auto pair = new_group({0, 1});
  const std::vector<int64_t> widths{5, 64, 96, 80, 33};
  Training hybrid(widths, {.mesh = square, .device = device()}, 1);
  hybrid.step();
  const std::string directory = next_directory();
  const SaveResult saved = save(hybrid.state(), FileSystemWriter(directory));

  std::map<std::string, uint64_t> bytes;  // by file, and so by rank
  const Metadata metadata = FileSystemReader(directory).read_metadata();
  for (const auto& [index, place] : metadata.storage_data) bytes[place.relative_path] += place.length;
  ASSERT_EQ(bytes.size(), 4u);
  const uint64_t rows[] = {bytes.at("__0_0.distcp") + bytes.at("__1_0.distcp"),
                           bytes.at("__2_0.distcp") + bytes.at("__3_0.distcp")};
  EXPECT_EQ(rows[0] + rows[1], saved.bytes_written);
  EXPECT_LT(std::max(rows[0], rows[1]), (saved.bytes_written * 55) / 100) << "the rows share the work";
  if (rank() == 0) {
    std::printf("replica 0 wrote %llu bytes, replica 1 %llu, of %llu\n", static_cast<unsigned long long>(rows[0]),
                static_cast<unsigned long long>(rows[1]), static_cast<unsigned long long>(saved.bytes_written));
  }
  // As much as one row writes alone.
  SaveResult alone;
  const std::string other = next_directory();
  if (pair->is_member()) alone = save(hybrid.state(), FileSystemWriter(other), {.process_group = pair});
  process_group()->barrier();
  EXPECT_TRUE(!pair->is_member() || (alone.items == saved.items && alone.bytes_written == saved.bytes_written))
      << alone.bytes_written << " and " << saved.bytes_written;
}

RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, OneReplicaReadsForAll, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  const DeviceMesh square = mesh();
  Training flat(kModels[1], {.device = device()}, 2);
  flat.step();
  const std::string directory = next_directory();
  save(flat.state(), FileSystemWriter(directory));
  // Bytes that the rows read together, without and with.
  const auto load_hybrid = [&](const std::shared_ptr<ProcessGroup>& replicas) {
    Training hybrid(kModels[1], {.mesh = square, .device = device()}, 1);
    StateDict target = hybrid.state();
    FileSystemReader reader(directory);
    load(target, reader, {.replicas = replicas});
    hybrid.load(target);
    EXPECT_EQ(reader.counters().bytes_needed == 0, replicas != nullptr && square.get_local_rank("replicate") == 1);
    hybrid.step();
    save(hybrid.state(), FileSystemWriter(next_directory()), {.verify_replicas = true});
    at::Tensor bytes = at::full({1}, static_cast<double>(reader.counters().bytes_needed), at::kDouble);
    process_group()->all_reduce_sum(bytes);
    return std::pair(hybrid.whole(), bytes.item<double>());
  };
  const auto [each, read_by_each] = load_hybrid(nullptr);
  const auto [one, read_by_one] = load_hybrid(square.get_group("replicate"));
  for (const auto& [name, value] : each) EXPECT_TRUE(value.equal(one.at(name))) << name;
  flat.step();
  for (const auto& [name, value] : flat.whole()) EXPECT_TRUE(at::allclose(value, one.at(name))) << name;
  EXPECT_EQ(read_by_each, 2 * read_by_one);
  if (rank() == 0) std::printf("two replicas read %.0f bytes, one for both %.0f\n", read_by_each, read_by_one);
}

RESHARD_DEVICE_TEST_F(HsdpCheckpointFixture, HsdpCheckpoint, ReplicasThatDifferAreFound, .ranks = {4},
                      .one_gpu_ranks = {4}) {
  const DeviceMesh square = mesh();
  Training run(kModels[0], {.mesh = square, .device = device()}, 1);
  run.step();
  if (rank() == 3) {
    const at::NoGradGuard no_grad;
    for (auto& [name, slice] : run.model.named_parameters()) {
      if (name == "net3.weight") slice.narrow(0, slice.numel() - 1, 1).add_(1);
    }
  }
  try {
    save(run.state(), FileSystemWriter(next_directory()), {.verify_replicas = true});
    ADD_FAILURE() << "saved";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(error.committed(), Committed::kNo);
    EXPECT_THAT(error.what(), testing::HasSubstr("model.net3.weight"));
    EXPECT_THAT(error.what(), testing::HasSubstr("ranks 1 and 3 hold different contents"));
  }
}

}  // namespace
}  // namespace reshard
