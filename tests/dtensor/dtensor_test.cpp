// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/dtensor/dtensor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dtensor/layouts.h"
#include "reshard/state_dict/state_dict.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

void expect_part_of(const DTensor& tensor, const at::Tensor& whole) {
  for (const LocalShard& shard : tensor.shards()) {
    at::Tensor part = whole;
    for (size_t d = 0; d < shard.box.sizes.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), shard.box.offsets[d], shard.box.sizes[d]);
    EXPECT_TRUE(shard.tensor.equal(part)) << to_string(shard.box);
    EXPECT_TRUE(shard.tensor.numel() == 0 || shard.tensor.is_alias_of(tensor.to_local()));
  }
}

RESHARD_DEVICE_TEST(DTensorTest, EveryPlacementBecomesWholeAndEveryOther, .ranks = {4}, .one_gpu_ranks = {4},
                    .deadline = std::chrono::seconds(120)) {
  process_group();
  const at::Tensor whole = counting({5, 3}, at::TensorOptions(at::kFloat).device(device()));
  const at::Tensor tiny = counting({1, 3}, at::TensorOptions(at::kHalf).device(device()));
  for (const DeviceMesh& mesh : {init_device_mesh({4}), init_device_mesh({2, 2})}) {
    const auto placements =
        all_placements(mesh.ndim(), {Replicate(), Shard(0), Shard(1), StridedShard(0, 2), StridedShard(1, 2)});
    for (const Placements& from : placements) {
      SCOPED_TRACE(to_string(from) + " over " + to_string(mesh.shape()));
      const DTensor tensor = distribute_tensor(whole, mesh, from);
      EXPECT_EQ(tensor.size(), (Dims{5, 3}));
      EXPECT_EQ(tensor.placements(), from);
      expect_part_of(tensor, whole);
      const at::Tensor full = tensor.full_tensor();
      EXPECT_TRUE(full.equal(whole));
      EXPECT_FALSE(full.is_alias_of(tensor.to_local())) << "memory of its own";
      EXPECT_TRUE(distribute_tensor(tiny, mesh, from).full_tensor().equal(tiny));
      for (const Placements& to : placements) {
        SCOPED_TRACE("to " + to_string(to));
        const DTensor moved = tensor.redistribute(to);
        EXPECT_EQ(moved.placements(), to);
        EXPECT_TRUE(moved.to_local().equal(distribute_tensor(whole, mesh, to).to_local()));
        expect_part_of(moved, whole);
      }
    }
  }
}

RESHARD_DISTRIBUTED_TEST(DTensorTest, MovesTheBytesThatAreNeeded, .ranks = 4) {
  process_group();
  const DeviceMesh mesh = init_device_mesh({2, 2}, {.dim_names = {"replicate", "shard"}});
  const auto sent = [&](size_t dim) { return mesh.get_group(dim)->traffic().bytes; };
  const auto calls = [&](size_t dim) { return mesh.get_group(dim)->traffic().collectives; };
  const at::Tensor whole = counting({8, 4}, at::kInt);
  const DTensor rows = distribute_tensor(whole, mesh, {Replicate(), Shard(0)});
  EXPECT_EQ(calls(0) + calls(1), 0u) << "cutting sends nothing";
  EXPECT_TRUE(rows.full_tensor().equal(whole));
  EXPECT_EQ(calls(0), 0u) << "replicas have nothing to tell";
  EXPECT_EQ(sent(1), 4u * 4 * 4) << "this rank's half, once";
  // Finer costs nothing; what does not depend on the change stays where it is.
  const DTensor finer = rows.redistribute({Shard(1), Shard(0)});
  EXPECT_EQ(calls(0), 0u);
  EXPECT_EQ(sent(1), 4u * 4 * 4);
  const DTensor back = finer.redistribute({Replicate(), Shard(0)});
  EXPECT_EQ(sent(0), 4u * 2 * 4);
  EXPECT_EQ(sent(1), 4u * 4 * 4);
  EXPECT_TRUE(back.to_local().equal(rows.to_local()));
  // One dimension after the other, so that the gathered part goes on with the next.
  const DTensor quarters = distribute_tensor(whole, mesh, {Shard(0), Shard(0)});
  EXPECT_TRUE(quarters.full_tensor().equal(whole));
  EXPECT_EQ(sent(1), 4u * 4 * 4 + 2 * 4 * 4);
  EXPECT_EQ(sent(0), 4u * 2 * 4 + 4 * 4 * 4);
}

RESHARD_DISTRIBUTED_TEST(DTensorTest, SharesItsLocalTensorAndIsAShardedTensor, .ranks = 3) {
  process_group();
  const DeviceMesh mesh = init_device_mesh({3});
  // Columns of a transposed tensor: any strides.
  const at::Tensor local = at::zeros({2, 5}).t().requires_grad_();
  const DTensor tensor = DTensor::from_local(local, mesh, {Shard(-1)}, {5, 6});
  EXPECT_TRUE(tensor.to_local().is_same(local));
  EXPECT_TRUE(tensor.requires_grad());
  EXPECT_EQ(tensor.shards().at(0).box, (Box{{0, 2 * rank()}, {5, 2}}));
  const StateDict state{{"t", tensor}};
  ASSERT_TRUE(state.at("t").is<ShardedTensor>());
  const at::Tensor& shard = state.at("t").as<ShardedTensor>().shards().at(0).tensor;
  EXPECT_TRUE(shard.is_alias_of(local));
  at::Tensor(shard).fill_(rank());
  const at::Tensor full = tensor.full_tensor();
  for (int r = 0; r < 3; ++r) EXPECT_TRUE(at::all(full.narrow(1, 2 * r, 2) == r).item<bool>());

  // Every dtype travels as bytes; conjugated ones with their values.
  for (const at::ScalarType dtype : {at::kBool, at::kChar, at::kBFloat16, at::kDouble, at::kComplexFloat}) {
    const at::Tensor whole = counting({4, 2}, dtype);
    EXPECT_TRUE(distribute_tensor(whole, mesh, {Shard(0)}).full_tensor().equal(whole)) << dtype;
  }
  const at::Tensor conj = at::complex(at::ones({2}), at::ones({2})).conj();
  EXPECT_TRUE(DTensor::from_local(conj, mesh, {Shard(0)}, {6}).full_tensor().equal(conj.repeat({3})));

  const at::Tensor scalar = at::full({}, 2.5);
  EXPECT_TRUE(distribute_tensor(scalar, mesh, {Replicate()}).full_tensor().equal(scalar));
  EXPECT_TRUE(distribute_tensor(at::zeros({0, 2}), mesh, {Shard(0)}).full_tensor().equal(at::zeros({0, 2})));

  const auto code = ErrorCode::kInvalidArgument;
  EXPECT_ERROR(code, "wanted [1], found [2]", DTensor::from_local(at::zeros({2}), mesh, {Shard(0)}, {3}));
  EXPECT_ERROR(code, "wanted 1, found []", DTensor::from_local(at::zeros({2}), mesh, {}, {2}));
  EXPECT_ERROR(code, "found Shard(1)", distribute_tensor(at::zeros({2}), mesh, {Shard(1)}));
  EXPECT_ERROR(code, "found Shard(1)", distribute_tensor(at::zeros({2}), mesh, {Shard(0)}).redistribute({Shard(1)}));
}

RESHARD_DISTRIBUTED_TEST(DTensorTest, RanksOutsideTheMeshHoldNothingAndWaitForNobody, .ranks = 3) {
  process_group();
  const DeviceMesh mesh = init_device_mesh({2}, {.ranks = {0, 2}});
  const at::Tensor whole = counting({3}, at::kDouble);
  const DTensor tensor = distribute_tensor(whole, mesh, {Shard(0)});
  EXPECT_EQ(tensor.size(), Dims{3});
  EXPECT_EQ(tensor.dtype(), at::kDouble);
  if (rank() == 1) {
    EXPECT_TRUE(tensor.shards().empty());
    EXPECT_EQ(tensor.to_local().sizes(), (std::vector<int64_t>{0}));
    EXPECT_EQ(tensor.full_tensor().numel(), 0);
    EXPECT_EQ(tensor.redistribute({Replicate()}).placements(), (Placements{Replicate()}));
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "found Shard(1)", DTensor::zeros({3}, mesh, {Shard(1)}));
    return;
  }
  EXPECT_EQ(tensor.local_numel(), rank() == 0 ? 2 : 1);
  EXPECT_TRUE(tensor.full_tensor().equal(whole));
}

}  // namespace
}  // namespace reshard
