// SPDX-License-Identifier: BSD-3-Clause
// Counterparts of PyTorch's test_pg_transport.py.

#include "reshard/training/pg_transport.h"

#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>

#include <chrono>

#include "fsdp/test_model.h"
#include "reshard/core/error.h"
#include "reshard/testing/torch_distributed_test.h"
#include "reshard/training/state_dict.h"

namespace reshard {
namespace {

using fsdp_test::expect_error;

/// Tensors of several dtypes and strides, ties, shards, values, and nothing at all.
StateDict mixed(double offset) {
  at::manual_seed(4);
  const torch::nn::Linear linear(10, 10);
  const at::Tensor base = at::arange(12, at::kDouble).reshape({3, 4}) + offset;
  return {{"model", get_model_state_dict(linear)},
          {"base", base},
          {"tied", base},
          {"transposed", (base * 2).t()},
          {"half", base.to(at::kBFloat16)},
          {"step", at::scalar_tensor(7 + offset)},
          {"empty", at::empty({0, 3})},
          {"sharded", ShardedTensor({6, 4}, at::kDouble, {{{{2, 0}, {3, 4}}, base + 1}})},
          {"nested", StateDict{{"list", StateList{base + 2, "text", 42}}, {"lr", 0.1 + offset}}}};
}

void expect_mixed(const StateDict& state, double offset) {
  const StateDict wanted = mixed(offset);
  ASSERT_EQ(state.size(), wanted.size());
  for (const char* key : {"base", "tied", "transposed", "half", "step", "empty"})
    EXPECT_TRUE(at::equal(state.at(key).as<at::Tensor>(), wanted.at(key).as<at::Tensor>())) << key;
  for (const char* key : {"weight", "bias"}) {
    EXPECT_TRUE(at::equal(state.at("model").as<StateDict>().at(key).as<at::Tensor>(),
                          wanted.at("model").as<StateDict>().at(key).as<at::Tensor>()));
  }
  EXPECT_EQ(state.at("base").as<at::Tensor>().const_data_ptr(), state.at("tied").as<at::Tensor>().const_data_ptr());
  const LocalShard& shard = state.at("sharded").as<ShardedTensor>().shards().at(0);
  EXPECT_EQ(shard.box, (Box{{2, 0}, {3, 4}}));
  EXPECT_TRUE(at::equal(shard.tensor, wanted.at("base").as<at::Tensor>() + 1));
  const StateDict& nested = state.at("nested");
  EXPECT_TRUE(at::equal(nested.at("list").as<StateList>()[0].as<at::Tensor>(), wanted.at("base").as<at::Tensor>() + 2));
  EXPECT_EQ(nested.at("list").as<StateList>()[1].as<std::string>(), "text");
  EXPECT_EQ(nested.at("list").as<StateList>()[2].as<int64_t>(), 42);
  EXPECT_EQ(nested.at("lr").as<double>(), 0.1 + offset);
}

// test_pg_transport, test_pg_transport_with_mixed_content: once around a ring.
RESHARD_DISTRIBUTED_TEST(PGTransportTest, AStateDictComesBackAroundARing, .ranks = 4) {
  const auto world = process_group();
  const int n = world->size();
  const int r = world->rank();
  PGTransport transport(world, {.timeout = std::chrono::seconds(20)});
  if (r == 0) {
    transport.send_checkpoint({1}, mixed(0.5));
    expect_mixed(transport.recv_checkpoint(n - 1), 0.5);
  } else {
    const StateDict received = transport.recv_checkpoint(r - 1);
    expect_mixed(received, 0.5);
    EXPECT_TRUE(received.at("transposed").as<at::Tensor>().is_contiguous());
    transport.send_checkpoint({(r + 1) % n}, received);
  }
}

RESHARD_DISTRIBUTED_TEST(PGTransportTest, AReplicaIsHealedInPlace, .ranks = 3) {
  const auto world = process_group();
  PGTransport transport(world);
  if (world->rank() == 0) {
    transport.send_checkpoint({1, 2}, mixed(0.25));
    transport.send_checkpoint({2}, {});
    return;
  }
  StateDict state = mixed(9);
  const at::Tensor base = state.at("base").as<at::Tensor>();
  const at::Tensor transposed = state.at("transposed").as<at::Tensor>();
  const at::Tensor step = state.at("step").as<at::Tensor>();
  const at::Tensor shard = state.at("sharded").as<ShardedTensor>().shards()[0].tensor;
  transport.recv_checkpoint(0, state);
  expect_mixed(state, 0.25);
  EXPECT_EQ(base[0][0].item<double>(), 0.25) << "the tensor itself";
  EXPECT_EQ(transposed[1][0].item<double>(), 2.5);
  EXPECT_FALSE(transposed.is_contiguous());
  EXPECT_EQ(step.item<float>(), 7.25f);
  EXPECT_EQ(shard[0][0].item<double>(), 1.25);
  if (world->rank() == 2) {
    EXPECT_TRUE(transport.recv_checkpoint(0).empty());
  }
}

RESHARD_DISTRIBUTED_TEST(PGTransportTest, WhatDoesNotFitOneReceiverIsAnErrorForAllAndTouchesNothing, .ranks = 3) {
  const auto world = process_group();
  PGTransport transport(world);
  const auto sent = [] { return StateDict{{"a", at::ones({4})}, {"b", at::ones({2, 2})}, {"n", 1}}; };
  struct Case {
    const char* what;
    StateDict own;
    std::vector<std::string> text;
  };
  const std::vector<Case> cases = {
      {"sizes", {{"a", at::zeros({4})}, {"b", at::zeros({2, 3})}, {"n", 1}}, {"rank 2", "key b", "[2, 3]", "[2, 2]"}},
      {"dtype", {{"a", at::zeros({4}, at::kInt)}, {"b", at::zeros({2, 2})}, {"n", 1}}, {"rank 2", "key a", "Int"}},
      {"missing", {{"a", at::zeros({4})}, {"n", 1}}, {"rank 2", "key b", "not here"}},
      {"more", {{"a", at::zeros({4})}, {"b", at::zeros({2, 2})}, {"c", 3}, {"n", 1}}, {"rank 2", "key c", "missing"}},
      {"type", {{"a", StateDict()}, {"b", at::zeros({2, 2})}, {"n", 1}}, {"rank 2", "key a", "dict", "Tensor"}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    if (world->rank() == 0) {
      expect_error(ErrorCode::kInvalidArgument, c.text, [&] { transport.send_checkpoint({1, 2}, sent()); });
    } else {
      StateDict own = world->rank() == 2 ? c.own : StateDict{{"a", at::zeros({4})}, {"b", at::zeros({2, 2})}, {"n", 0}};
      const at::Tensor b = own.contains("b") ? own.at("b").as<at::Tensor>() : at::zeros({1});
      expect_error(ErrorCode::kInvalidArgument, c.text, [&] { transport.recv_checkpoint(0, own); });
      EXPECT_EQ(b.sum().item<double>(), 0);
    }
  }
  // The next transfer is not disturbed.
  if (world->rank() == 0) {
    transport.send_checkpoint({1, 2}, sent());
  } else {
    EXPECT_EQ(transport.recv_checkpoint(0).at("b").as<at::Tensor>().sum().item<double>(), 4);
  }
  for (const std::vector<int>& wrong : {std::vector<int>{world->rank()}, {3}, {-1}})
    expect_error(ErrorCode::kInvalidArgument, {"not a peer"}, [&] { transport.send_checkpoint(wrong, {}); });
  const int other = (world->rank() + 1) % 3;
  expect_error(ErrorCode::kInvalidArgument, {"named twice"}, [&] { transport.send_checkpoint({other, other}, {}); });
  expect_error(ErrorCode::kUnsupported, {"bad"}, [&] {
    transport.send_checkpoint({other}, {{"bad", at::ones({2, 2}).to_sparse()}});
  });
}

RESHARD_DISTRIBUTED_TEST(PGTransportTest, ASilentPeerIsAnErrorAtTheDeadline, .ranks = 2) {
  const auto world = process_group();
  PGTransport transport(world, {.timeout = std::chrono::milliseconds(500)});
  if (world->rank() == 1) {
    const auto begin = std::chrono::steady_clock::now();
    try {
      transport.recv_checkpoint(0);
      ADD_FAILURE() << "nothing was sent";
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == ErrorCode::kTimeout || error.code() == ErrorCode::kUnavailable) << error.what();
      EXPECT_NE(std::string(error.what()).find("receive from rank 0"), std::string::npos) << error.what();
    }
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  }
  world->barrier();
}

}  // namespace
}  // namespace reshard
