// SPDX-License-Identifier: BSD-3-Clause
// Tensors on meshes through a checkpoint: counterparts of test_dtensor_checkpoint.py, test_dtensor_resharding.py,
// test_tp_checkpoint.py and e2e/test_fsdp_ep.py.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <numeric>

#include "dtensor/layouts.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

uint64_t sent_over(const DeviceMesh& mesh) {
  uint64_t collectives = 0;
  if (!mesh.get_coordinate()) return 0;
  for (size_t d = 0; d < mesh.ndim(); ++d) collectives += mesh.get_group(d)->traffic().collectives;
  return collectives;
}

// test_dtensor_resharding.py: 1-D to 1-D, 1-D to 2-D, 2-D to 1-D, 2-D to 2-D, and with empty shards; here every
// ordered pair, with uneven shards, fewer ranks than there are, and three dimensions.
RESHARD_DEVICE_TEST(DTensorCheckpointTest, EveryMeshAndPlacementLoadsIntoEveryOther, .ranks = {4}, .one_gpu_ranks = {4},
                    .deadline = std::chrono::seconds(180)) {
  const auto world = process_group();
  const std::vector<Layout> layouts = layouts_on_four_ranks();
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device());
  const std::vector<Dims> sizes = layout_sizes();
  std::vector<at::Tensor> wholes;
  for (const Dims& size : sizes) wholes.push_back(counting(size, options));
  const auto key = [](size_t layout, size_t size) { return std::to_string(layout) + "." + std::to_string(size); };

  StateDict state;
  for (size_t from = 0; from < layouts.size(); ++from) {
    for (size_t s = 0; s < sizes.size(); ++s)
      state[key(from, s)] = distribute_tensor(wholes[s], layouts[from].mesh, layouts[from].placements);
  }
  const std::string dir = (temp_dir() / "checkpoint").string();
  save(state, FileSystemWriter(dir), {.verify_replicas = true});
  for (const Layout& layout : layouts) EXPECT_EQ(sent_over(layout.mesh), 0u) << "a save sends nothing over a mesh";

  size_t pairs = 0;
  for (const Layout& to : layouts) {
    StateDict target;
    std::vector<DTensor> tensors;
    for (size_t from = 0; from < layouts.size(); ++from) {
      for (size_t s = 0; s < sizes.size(); ++s) {
        tensors.push_back(DTensor::zeros(sizes[s], to.mesh, to.placements, options));
        target[key(from, s)] = tensors.back();
      }
    }
    FileSystemReader reader(dir);
    load(target, reader);
    EXPECT_EQ(reader.counters().bytes_payload, reader.counters().bytes_needed);
    if (!to.mesh.get_coordinate()) {
      EXPECT_EQ(reader.counters().bytes_needed, 0u) << "nothing to read outside the mesh";
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Layout& from = layouts[i / sizes.size()];
      const size_t s = i % sizes.size();
      const at::Tensor wanted = distribute_tensor(wholes[s], to.mesh, to.placements).to_local();
      EXPECT_TRUE(tensors[i].to_local().equal(wanted))
          << from.name() << " to " << to.name() << ", " << to_string(sizes[s]);
    }
    // And whole, as one that trains on it sees it.
    for (size_t s = 0; s < sizes.size() && to.mesh.get_coordinate(); ++s)
      EXPECT_TRUE(tensors[s].full_tensor().equal(wholes[s])) << to.name();
    pairs += layouts.size() * sizes.size();
  }
  if (rank() == 0) std::printf("%zu pairs of layouts of %zu sizes\n", pairs / sizes.size(), sizes.size());
  world->barrier();
}

// Saved by 1 to 4 ranks, loaded by 1 to 4; replicas are written once.
RESHARD_DISTRIBUTED_TEST(DTensorCheckpointTest, AnyNumberOfRanksSavesForAnyOther, .ranks = 4) {
  const auto world = process_group();
  std::vector<std::shared_ptr<ProcessGroup>> groups;
  std::vector<DeviceMesh> meshes;
  for (int n = 1; n <= 4; ++n) {
    std::vector<int> ranks(static_cast<size_t>(n));
    std::iota(ranks.begin(), ranks.end(), 0);
    groups.push_back(new_group(ranks));
    meshes.push_back(n == 4 ? init_device_mesh({2, 2}) : init_device_mesh({n}, {.ranks = ranks}));
  }
  const Dims size{7, 3};
  const at::Tensor whole = counting(size, at::kDouble);
  const auto rows = [](const DeviceMesh& mesh) { return Placements(mesh.ndim(), Shard(0)); };
  const auto replica = [](const DeviceMesh& mesh) { return Placements(mesh.ndim(), Replicate()); };
  for (size_t from = 0; from < groups.size(); ++from) {
    const std::string dir = (temp_dir() / std::to_string(from)).string();
    if (groups[from]->is_member()) {
      const SaveResult saved =
          save(StateDict{{"rows", distribute_tensor(whole, meshes[from], rows(meshes[from]))},
                         {"replica", distribute_tensor(whole, meshes[from], replica(meshes[from]))}},
               FileSystemWriter(dir), {.process_group = groups[from]});
      EXPECT_EQ(saved.items, from + 2) << "a shard a rank and one of the replicas";
    }
    world->barrier();
    for (size_t to = 0; to < groups.size(); ++to) {
      if (!groups[to]->is_member()) continue;
      const DTensor columns = DTensor::zeros(size, meshes[to], Placements(meshes[to].ndim(), Shard(1)), at::kDouble);
      const DTensor halves = DTensor::zeros(size, meshes[to], rows(meshes[to]), at::kDouble);
      StateDict target{{"rows", columns}, {"replica", halves}};
      load(target, FileSystemReader(dir), {.process_group = groups[to]});
      EXPECT_TRUE(columns.full_tensor().equal(whole)) << from + 1 << " ranks to " << to + 1;
      EXPECT_TRUE(halves.full_tensor().equal(whole)) << from + 1 << " ranks to " << to + 1;
    }
  }
  world->barrier();
}

// test_distributed_tensor_planner: tensors of a mesh of the even ranks, beside others and extra state.
RESHARD_DEVICE_TEST(DTensorCheckpointTest, RanksOutsideAMeshJoinAndHoldNothing, .ranks = {4}, .one_gpu_ranks = {4}) {
  process_group();
  const DeviceMesh mesh = init_device_mesh({4});
  const DeviceMesh even = init_device_mesh({2}, {.ranks = {0, 2}});
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device());
  const auto make = [&](double scale) {
    return StateDict{{"sdt", distribute_tensor(at::arange(4, options) * scale, mesh, {Shard(0)})},
                     {"rdt", distribute_tensor(at::arange(4, 8, options) * scale, mesh, {Replicate()})},
                     {"submesh_sdt", distribute_tensor(at::full({6}, scale, options), even, {Shard(0)})},
                     {"submesh_rdt", distribute_tensor(at::full({6}, scale, options), even, {Replicate()})},
                     {"extra", StateDict{{"extra_state", static_cast<int64_t>(scale)},
                                         {"extra_state_tensor", at::full({1}, scale)}}}};
  };
  const std::string dir = (temp_dir() / "checkpoint").string();
  save(make(1), FileSystemWriter(dir), {.verify_replicas = true});
  StateDict target = make(10);
  FileSystemReader reader(dir);
  load(target, reader);
  const StateDict wanted = make(1);
  for (const char* key : {"sdt", "rdt", "submesh_sdt", "submesh_rdt"}) {
    const auto& found = target.at(key).as<ShardedTensor>().shards();
    const auto& shards = wanted.at(key).as<ShardedTensor>().shards();
    const bool outside = std::string(key).starts_with("submesh") && rank() % 2 == 1;
    ASSERT_EQ(found.size(), outside ? 0u : 1u) << key;
    EXPECT_TRUE(outside || found[0].tensor.equal(shards[0].tensor)) << key;
  }
  EXPECT_EQ(target.at("extra").as<StateDict>().at("extra_state").as<int64_t>(), 1);
  EXPECT_EQ(target.at("extra").as<StateDict>().at("extra_state_tensor").as<at::Tensor>().item<float>(), 1.0f);
  // sdt 1, rdt 4, the extra tensor 1; on even ranks also submesh_sdt 3 and submesh_rdt 6.
  EXPECT_EQ(reader.counters().bytes_needed, (rank() % 2 == 0 ? 15u : 6u) * sizeof(float));
}

// e2e/test_fsdp_ep.py: each expert is known only to the ranks of its group.
RESHARD_DEVICE_TEST(DTensorCheckpointTest, ExpertsOfDifferentRanksAreDifferentKeys, .ranks = {4},
                    .one_gpu_ranks = {4}) {
  const auto world = process_group();
  const DeviceMesh mesh = init_device_mesh({2, 2}, {.dim_names = {"dp", "ep"}});
  const DeviceMesh turned = init_device_mesh({2, 2}, {.dim_names = {"dp", "ep"}, .ranks = {3, 2, 1, 0}});
  const DeviceMesh flat = init_device_mesh({4});
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device());
  const auto expert = [&](int e) { return counting({5, 2}, options) * (e + 1); };
  const auto key = [](int e) { return "experts." + std::to_string(e) + ".weight"; };
  const std::string dir = (temp_dir() / "checkpoint").string();

  const int own = mesh.get_local_rank("ep");
  StateDict state{{"gate", distribute_tensor(expert(7), flat, {Shard(0)})}};
  state[key(own)] = distribute_tensor(expert(own), mesh["dp"], {Shard(0)});
  const SaveResult saved = save(state, FileSystemWriter(dir));
  EXPECT_EQ(saved.items, 3u + 2 * 2) << "5 rows over 4 ranks, and each expert over 2";

  // The same number of ranks with the experts elsewhere.
  const int other = turned.get_local_rank("ep");
  EXPECT_NE(other, own);
  const DTensor moved = DTensor::zeros({5, 2}, turned["dp"], {Shard(1)}, options);
  StateDict target{{key(other), moved}};
  const LoadReport report = load(target, FileSystemReader(dir));
  EXPECT_EQ(report.unexpected, (std::vector<std::string>{"gate", key(own)}));
  EXPECT_TRUE(moved.full_tensor().equal(expert(other)));

  // All experts on every rank, and one of them on a single rank.
  StateDict everything{{key(0), DTensor::zeros({5, 2}, flat, {Shard(0)}, options)},
                       {key(1), DTensor::zeros({5, 2}, flat, {Replicate()}, options)}};
  if (rank() == 2) everything["gate"] = at::zeros({5, 2}, options);
  load(everything, FileSystemReader(dir));
  EXPECT_TRUE(everything.at(key(1)).as<ShardedTensor>().shards()[0].tensor.equal(expert(1)));
  for (const LocalShard& shard : everything.at(key(0)).as<ShardedTensor>().shards()) {
    EXPECT_TRUE(shard.tensor.equal(expert(0).narrow(0, shard.box.offsets[0], shard.box.sizes[0])));
  }
  EXPECT_TRUE(rank() != 2 || everything.at("gate").as<at::Tensor>().equal(expert(7)));
}

// test_tp_checkpoint.py: a column-wise and a row-wise layer, also uneven, and both under FSDP.
RESHARD_DEVICE_TEST(DTensorCheckpointTest, TensorParallelLayersComeBack, .ranks = {4}, .one_gpu_ranks = {4}) {
  process_group();
  const DeviceMesh flat = init_device_mesh({4});
  const DeviceMesh square = init_device_mesh({2, 2}, {.dim_names = {"dp", "tp"}});
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device());
  struct Parameter {
    const char* name;
    Dims size;
    Placement placement;
  };
  const std::vector<Parameter> parameters{{"net1.weight", {16, 10}, Shard(0)}, {"net1.bias", {16}, Shard(0)},
                                          {"net2.weight", {10, 16}, Shard(1)}, {"net2.bias", {10}, Replicate()},
                                          {"net3.weight", {10, 5}, Shard(1)},  // 2, 2, 1 and no columns
                                          {"net4.weight", {15, 10}, Shard(0)}};
  const auto flat_layout = [&](const Parameter& p) { return Layout{flat, {p.placement}}; };
  // FSDP shards dimension 0, over what tensor parallelism has cut.
  const auto square_layout = [&](const Parameter& p) {
    const bool both = p.placement == Placement(Shard(0));
    return Layout{square, {both ? Placement(StridedShard(0, 2)) : Placement(Shard(0)), p.placement}};
  };
  const auto round_trip = [&](auto&& from, auto&& to, const std::string& name) {
    SCOPED_TRACE(name);
    const std::string dir = (temp_dir() / name).string();
    StateDict state, target;
    for (const Parameter& p : parameters) {
      const Layout layout = from(p), wanted = to(p);
      state[p.name] = distribute_tensor(counting(p.size, options), layout.mesh, layout.placements);
      target[p.name] = DTensor::zeros(p.size, wanted.mesh, wanted.placements, options);
    }
    save(state, FileSystemWriter(dir));
    load(target, FileSystemReader(dir));
    for (const Parameter& p : parameters) {
      const Layout layout = to(p);
      const DTensor wanted = distribute_tensor(counting(p.size, options), layout.mesh, layout.placements);
      const auto& found = target.at(p.name).as<ShardedTensor>().shards();
      ASSERT_EQ(found.size(), wanted.shards().size());
      for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(found[i].tensor.equal(wanted.shards()[i].tensor)) << p.name;
    }
  };
  round_trip(flat_layout, flat_layout, "tp");
  round_trip(flat_layout, square_layout, "tp_to_fsdp_tp");
  round_trip(square_layout, flat_layout, "fsdp_tp_to_tp");
}

}  // namespace
}  // namespace reshard
