// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/device_mesh.h"

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

using Ranks = std::vector<int>;

RESHARD_DEVICE_TEST(DeviceMeshTest, GroupsRunAlongEachDimension, .ranks = {4}, .one_gpu_ranks = {4}) {
  const auto world = process_group();
  const DeviceMesh mesh = init_device_mesh({2, 2}, {.dim_names = {"replicate", "shard"}});
  EXPECT_EQ(mesh.ndim(), 2u);
  EXPECT_EQ(mesh.shape(), (Dims{2, 2}));
  EXPECT_EQ(mesh.size(), 4);
  EXPECT_EQ(mesh.size("shard"), 2);
  EXPECT_EQ(mesh.ranks(), (Ranks{0, 1, 2, 3}));
  EXPECT_EQ(mesh.get_coordinate(), (Dims{rank() / 2, rank() % 2}));
  EXPECT_EQ(mesh.get_local_rank(0), rank() / 2);
  EXPECT_EQ(mesh.get_local_rank("shard"), rank() % 2);
  EXPECT_EQ(mesh.get_group("shard")->ranks(), rank() < 2 ? (Ranks{0, 1}) : (Ranks{2, 3}));
  EXPECT_EQ(mesh.get_group(0)->ranks(), rank() % 2 == 0 ? (Ranks{0, 2}) : (Ranks{1, 3}));
  EXPECT_EQ(mesh.get_group("replicate"), mesh.get_group(0));
  at::Tensor sum = at::full({}, rank(), at::TensorOptions(at::kInt).device(device()));
  mesh.get_group("shard")->all_reduce_sum(sum);
  EXPECT_EQ(sum.item<int>(), rank() < 2 ? 1 : 5);
  mesh.get_group("replicate")->all_reduce_sum(sum);
  EXPECT_EQ(sum.item<int>(), 6);

  const DeviceMesh shard = mesh["shard"];
  EXPECT_EQ(shard.shape(), Dims{2});
  EXPECT_EQ(shard.ranks(), mesh.get_group("shard")->ranks());
  EXPECT_EQ(shard.get_coordinate(), Dims{rank() % 2});
  EXPECT_EQ(shard.get_group(0), mesh.get_group(1));
  const DeviceMesh turned = mesh.submesh({"shard", "replicate"});
  EXPECT_EQ(turned.ranks(), (Ranks{0, 2, 1, 3}));
  EXPECT_EQ(turned.get_coordinate(), (Dims{rank() % 2, rank() / 2}));
  EXPECT_EQ(turned.get_group("replicate"), mesh.get_group("replicate"));

  // Of one dimension over all ranks: no other group than the default one.
  EXPECT_EQ(init_device_mesh({4}).get_group(0), world);
  EXPECT_NE(init_device_mesh({4}, {.ranks = {3, 2, 1, 0}}).get_group(0), world);
}

RESHARD_DISTRIBUTED_TEST(DeviceMeshTest, GridsHaveAnyNumberOfDimensionsAndAnyRanks, .ranks = 4) {
  process_group();
  const DeviceMesh cube = init_device_mesh({2, 1, 2}, {.dim_names = {"pp", "cp", "tp"}, .ranks = {3, 1, 0, 2}});
  const Dims places[] = {{1, 0, 0}, {0, 0, 1}, {1, 0, 1}, {0, 0, 0}};
  EXPECT_EQ(cube.get_coordinate(), places[rank()]);
  EXPECT_EQ(cube.get_group("pp")->ranks(), rank() == 3 || rank() == 0 ? (Ranks{3, 0}) : (Ranks{1, 2}));
  EXPECT_EQ(cube.get_group("cp")->ranks(), (Ranks{rank()}));
  EXPECT_EQ(cube.get_group("tp")->ranks(), rank() == 3 || rank() == 1 ? (Ranks{3, 1}) : (Ranks{0, 2}));
  EXPECT_EQ(cube.submesh({"pp", "cp"}).ranks(), cube.get_group("pp")->ranks());

  // Of the even ranks: the odd ones have it too, but no place in it.
  const DeviceMesh even = init_device_mesh({2}, {.dim_names = {"x"}, .ranks = {0, 2}});
  EXPECT_EQ(even.size(), 2);
  if (rank() % 2 == 0) {
    EXPECT_EQ(even.get_coordinate(), Dims{rank() / 2});
    EXPECT_EQ(even.get_group("x")->ranks(), (Ranks{0, 2}));
    return;
  }
  EXPECT_FALSE(even.get_coordinate());
  EXPECT_FALSE(even["x"].get_coordinate());
  EXPECT_EQ(even["x"].ranks(), (Ranks{0, 2}));
  const std::string found = "wanted one of the global ranks [0, 2], found global rank " + std::to_string(rank());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, found, even.get_group(0));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, found, even.get_local_rank("x"));
}

RESHARD_DISTRIBUTED_TEST(DeviceMeshTest, NamesWhatDoesNotFit, .ranks = 2) {
  process_group();
  const auto code = ErrorCode::kInvalidArgument;
  EXPECT_ERROR(code, "wanted 2 ranks, found [2, 2]", init_device_mesh({2, 2}));
  EXPECT_ERROR(code, "wanted 1 ranks, found [2]", init_device_mesh({2}, {.ranks = {1}}));
  EXPECT_ERROR(code, "found []", init_device_mesh({}));
  EXPECT_ERROR(code, "wanted sizes from 1, found [2, 0]", init_device_mesh({2, 0}));
  EXPECT_ERROR(code, "wanted some of 0..1, found [1, 1]", init_device_mesh({2}, {.ranks = {1, 1}}));
  EXPECT_ERROR(code, "wanted some of 0..1, found [0, 2]", init_device_mesh({2}, {.ranks = {0, 2}}));
  EXPECT_ERROR(code, "wanted some of 0..1, found [-1, 0]", init_device_mesh({2}, {.ranks = {-1, 0}}));
  EXPECT_ERROR(code, "wanted 1 names, found [\"a\", \"b\"]", init_device_mesh({2}, {.dim_names = {"a", "b"}}));
  EXPECT_ERROR(code, "wanted distinct names, found [\"a\", \"a\"]",
               init_device_mesh({2, 1}, {.dim_names = {"a", "a"}}));

  const DeviceMesh mesh = init_device_mesh({2, 1}, {.dim_names = {"a", "b"}});
  EXPECT_ERROR(code, "wanted one of [\"a\", \"b\"], found \"c\"", mesh["c"]);
  EXPECT_ERROR(code, "found \"c\"", mesh.get_group("c"));
  EXPECT_ERROR(code, "wanted distinct names, found [\"a\", \"a\"]", mesh.submesh({"a", "a"}));
  EXPECT_ERROR(code, "found none", mesh.submesh({}));
  EXPECT_ERROR(code, "wanted one of its 2, found dimension 2", mesh.get_group(2));
  EXPECT_ERROR(code, "found dimension 2", mesh.size(2));
  EXPECT_ERROR(code, "wanted one of [], found \"a\"", init_device_mesh({2})["a"]);
}

}  // namespace
}  // namespace reshard
