// SPDX-License-Identifier: BSD-3-Clause
// Counterparts of PyTorch's test_state_dict_utils.py.

#include "reshard/training/state_dict_utils.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "fsdp/test_model.h"
#include "reshard/core/error.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

using fsdp_test::expect_error;

/// Rows [begin, end) of `whole` as this rank's only shard.
ShardedTensor rows(const at::Tensor& whole, int64_t begin, int64_t end) {
  return ShardedTensor(to_dims(whole.sizes()), whole.scalar_type(),
                       {{{{begin, 0}, {end - begin, whole.size(1)}}, whole.slice(0, begin, end)}});
}

RESHARD_DISTRIBUTED_TEST(StateDictUtilsTest, GathersNestedShardsForTheRanksThatWantThem, .ranks = 4) {
  const auto world = process_group();
  const int64_t r = world->rank();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kInt, at::kComplexDouble, at::kBool, at::kUInt16}) {
    SCOPED_TRACE(c10::toString(dtype));
    const at::Tensor a = at::arange(7 * 3).reshape({7, 3}).to(dtype);
    const at::Tensor b = at::arange(100, 100 + 2 * 5).reshape({2, 5}).to(dtype);
    // 7 rows over 4 ranks: 2, 2, 2, 1. Columns of b lie on ranks 1 and 3, whole rows of a never do.
    StateList mixed;
    for (int i = 0; i < 4; ++i) {
      mixed.emplace_back(rows(a, std::min<int64_t>(2 * r, 7), std::min<int64_t>(2 * r + 2, 7)));
      mixed.emplace_back(at::ones({3}));
    }
    std::vector<LocalShard> columns;
    if (r == 1) columns.push_back({{{0, 0}, {2, 2}}, b.slice(1, 0, 2)});
    if (r == 3) columns.push_back({{{0, 2}, {2, 3}}, b.slice(1, 2, 5)});
    const StateDict state{{"list", mixed},
                          {"nested", StateDict{{"b", ShardedTensor({2, 5}, dtype, columns)}, {"lr", 0.5}}},
                          {"text", "x"}};
    for (const std::vector<int>& ranks : {std::vector<int>{}, {0, 2}}) {
      const uint64_t before = world->traffic().bytes;
      const StateDict whole = gather_state_dict(state, *world, {.cpu_offload = !ranks.empty(), .ranks_only = ranks});
      // Tied parts of the list travel once, and each element once (a broadcast counts on every rank).
      EXPECT_EQ(world->traffic().bytes - before, static_cast<uint64_t>(a.nbytes() + b.nbytes()));
      if (!ranks.empty() && r % 2 == 1) {
        EXPECT_TRUE(whole.empty());
        continue;
      }
      for (size_t i = 0; i < 8; i += 2) EXPECT_TRUE(at::equal(whole.at("list").as<StateList>()[i].as<at::Tensor>(), a));
      EXPECT_TRUE(at::equal(whole.at("list").as<StateList>()[1].as<at::Tensor>(), at::ones({3})));
      EXPECT_TRUE(at::equal(whole.at("nested").as<StateDict>().at("b").as<at::Tensor>(), b));
      EXPECT_EQ(whole.at("nested").as<StateDict>().at("lr").as<double>(), 0.5);
      EXPECT_EQ(whole.at("text").as<std::string>(), "x");
    }
  }
}

RESHARD_DISTRIBUTED_TEST(StateDictUtilsTest, RefusesOnAllRanksWhatCannotBeGathered, .ranks = 2) {
  const auto world = process_group();
  const int64_t r = world->rank();
  const at::Tensor a = at::arange(8).reshape({4, 2});
  expect_error(ErrorCode::kInvalidArgument, {"do not make the whole tensor", "a", "hole"}, [&] {
    gather_state_dict({{"a", rows(a, r, r + 1)}}, *world);
  });
  expect_error(ErrorCode::kInvalidArgument, {"do not make the whole tensor", "overlap"}, [&] {
    gather_state_dict({{"a", rows(a, r, r + 3)}}, *world);
  });
  expect_error(ErrorCode::kInvalidArgument, {"different sharded tensors", "\"a\"", "\"b\"", "rank 1"}, [&] {
    gather_state_dict({{r == 0 ? "a" : "b", rows(a, 2 * r, 2 * r + 2)}}, *world);
  });
  const at::Tensor wide = at::arange(12).reshape({4, 3});
  expect_error(ErrorCode::kInvalidArgument, {"different sizes", "[4, 2]", "[4, 3]", "rank 1"}, [&] {
    gather_state_dict({{"a", rows(r == 0 ? a : wide, 2 * r, 2 * r + 2)}}, *world);
  });
  // Replicas are sent by one rank only, and the group goes on after errors.
  const uint64_t before = world->traffic().bytes;
  const StateDict whole = gather_state_dict({{"a", rows(a, 0, 4)}, {"e", rows(at::empty({0, 2}), 0, 0)}}, *world);
  EXPECT_EQ(world->traffic().bytes - before, a.nbytes());
  EXPECT_TRUE(at::equal(whole.at("a").as<at::Tensor>(), a));
  EXPECT_EQ(whole.at("e").as<at::Tensor>().sizes(), (at::IntArrayRef{0, 2}));
}

TEST(OffloadStateDictTest, WhatIsOnTheHostIsSharedByAnOffload) {
  const at::Tensor a = at::rand({3, 2});
  const StateDict state{{"a", a}, {"s", ShardedTensor({3, 2}, at::kFloat, {{{{0, 0}, {3, 2}}, a}})}, {"n", 3}};
  const StateDict offloaded = offload_state_dict_to_cpu(state);
  EXPECT_EQ(offloaded.at("a").as<at::Tensor>().const_data_ptr(), a.const_data_ptr());
  EXPECT_EQ(offloaded.at("s").as<ShardedTensor>().shards()[0].tensor.const_data_ptr(), a.const_data_ptr());
  EXPECT_EQ(offloaded.at("n").as<int64_t>(), 3);
}

}  // namespace
}  // namespace reshard
