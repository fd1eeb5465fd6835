// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>

#include "fsdp/test_model.h"
#include "fsdp/whole_state.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

RESHARD_DISTRIBUTED_TEST(StateDictTest, MovesBetweenLayoutsAndNumbersOfRanks, .ranks = 3) {
  const auto world = process_group();
  const auto pair = new_group({0, 2});
  at::manual_seed(31);
  LanguageModel reference;
  at::manual_seed(31);
  auto model = FullyShardedDataParallel(on_meta([] { return LanguageModel(); }),
                                        {.process_group = world, .wrap_policy = wrap_by_type<BlockImpl>()});

  // Sharded: no communication, no copy, every name, in the module's order.
  const TrafficCounters before = world->traffic();
  const StateDict state = model.state_dict(StateDictType::kSharded);
  EXPECT_EQ(world->traffic().bytes, before.bytes);
  EXPECT_EQ(world->traffic().collectives, before.collectives);
  std::vector<std::string> wanted_names, names;
  for (const auto& item : reference->named_parameters()) wanted_names.push_back(item.key());
  wanted_names.push_back("positions");
  for (const auto& [name, value] : state.items()) names.push_back(name);
  EXPECT_THAT(names, ::testing::UnorderedElementsAreArray(wanted_names));
  EXPECT_EQ(names.front(), "positions") << "buffers come with their module, before its children";
  EXPECT_EQ(model.tied_names(), (std::vector<std::vector<std::string>>{{"embedding.weight", "head.weight"}}));
  EXPECT_EQ(model.parameters().size(), reference->parameters().size() - 1);
  for (const ShardedParameter& p : model.sharded_parameters()) {
    const ShardedTensor& sharded = state.at(p.names[0]).as<ShardedTensor>();
    EXPECT_EQ(sharded.local_numel(), p.end - p.begin);
    EXPECT_EQ(sharded.requires_grad(), p.slice.requires_grad());
    for (const LocalShard& shard : sharded.shards()) EXPECT_TRUE(shard.tensor.is_alias_of(p.slice));
  }
  EXPECT_TRUE(state.at("positions").as<at::Tensor>().is_same(model.module()->positions));

  // Full.
  const StateDict full = model.state_dict(StateDictType::kFull);
  EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
  EXPECT_EQ(model.memory_stats().peak_unsharded_bytes, model.memory_stats().largest_unit_bytes);
  for (const auto& item : reference->named_parameters())
    EXPECT_TRUE(at::equal(full.at(item.key()).as<at::Tensor>(), item.value()));

  // Assembled from the shards it is the same, and a model of any layout takes it.
  const StateDict whole = whole_state(state, *world);
  for (const auto& item : reference->named_parameters())
    EXPECT_TRUE(at::equal(whole.at(item.key()).as<at::Tensor>(), item.value()));
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    for (const auto& group : {world, pair}) {
      if (!group->is_member()) continue;
      at::manual_seed(32);
      auto other = FullyShardedDataParallel(LanguageModel(), {.process_group = group, .layout = layout});
      EXPECT_GT(difference_to(other, *other.module(), *reference), 0.1);
      other.load_state_dict(whole);
      EXPECT_EQ(difference_to(other, *other.module(), *reference), 0.0);
      if (layout == ShardLayout::kDim0Chunks) {
        const StateDict chunks = other.state_dict(StateDictType::kSharded);
        for (const auto& [name, value] : chunks.items()) {
          if (!value.is<ShardedTensor>()) continue;
          for (const LocalShard& shard : value.as<ShardedTensor>().shards()) {
            EXPECT_EQ(shard.box,
                      split_evenly(whole_box(value.as<ShardedTensor>().size()), 0, group->size(), group->rank()))
                << name;
          }
        }
      }
    }
  }
  world->barrier();
}

RESHARD_DISTRIBUTED_TEST(StateDictTest, LocalIsOneTensorAFlatParameterOnAnyNumberOfRanks, .ranks = 3) {
  const auto world = process_group();
  const auto pair = new_group({0, 2});
  at::manual_seed(31);
  LanguageModel reference;
  at::manual_seed(31);
  auto model =
      FullyShardedDataParallel(LanguageModel(), {.process_group = world, .wrap_policy = wrap_by_type<BlockImpl>()});
  const TrafficCounters before = world->traffic();
  const StateDict local = model.state_dict(StateDictType::kLocal);
  EXPECT_EQ(world->traffic().collectives, before.collectives);
  std::vector<std::string> names;
  for (const auto& [name, value] : local.items()) names.push_back(name);
  // Two blocks have frozen parameters, which are kept apart.
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("_flat_param", "block0._flat_param", "block1._flat_param",
                                                     "block1._flat_param_1", "block2._flat_param",
                                                     "block2._flat_param_1", "positions"));
  const auto frozen = [&](const char* name) { return !local.at(name).as<ShardedTensor>().requires_grad(); };
  EXPECT_FALSE(frozen("block0._flat_param"));
  EXPECT_NE(frozen("block1._flat_param"), frozen("block1._flat_param_1"));

  // The parameters of a unit one after the other, in their order, and nothing else.
  const StateDict whole = whole_state(local, *world);
  std::vector<at::Tensor> parts;
  for (const auto& item : reference->blocks[0]->named_parameters()) parts.push_back(item.value().flatten());
  EXPECT_TRUE(at::equal(whole.at("block0._flat_param").as<at::Tensor>(), at::cat(parts)));
  int64_t mine = 0;
  for (const auto& [name, value] : local.items()) {
    if (!value.is<ShardedTensor>()) continue;
    for (const LocalShard& shard : value.as<ShardedTensor>().shards()) {
      mine += shard.tensor.numel();
      EXPECT_TRUE(std::ranges::any_of(model.parameters(), [&](const at::Tensor& slice) {
        return slice.is_alias_of(shard.tensor);
      })) << name;
    }
  }
  int64_t owned = 0;
  for (const ShardedParameter& p : model.sharded_parameters()) owned += p.end - p.begin;
  EXPECT_EQ(mine, owned);

  for (const auto& group : {world, pair}) {
    if (!group->is_member()) continue;
    at::manual_seed(32);
    auto other =
        FullyShardedDataParallel(LanguageModel(), {.process_group = group, .wrap_policy = wrap_by_type<BlockImpl>()});
    other.load_state_dict(whole);
    EXPECT_EQ(difference_to(other, *other.module(), *reference), 0.0);
  }

  StateDict less;
  for (const auto& [name, value] : whole.items()) {
    if (name != "block1._flat_param_1") less[name] = value;
  }
  expect_error(ErrorCode::kNotFound, {"block1."}, [&] { model.load_state_dict(less); });
  StateDict other_size = whole;
  other_size["_flat_param"] = at::zeros({7});
  expect_error(ErrorCode::kInvalidArgument, {"_flat_param", "shape differs"},
               [&] { model.load_state_dict(other_size); });
  auto chunks = FullyShardedDataParallel(
      LanguageModel(),
      {.process_group = world, .wrap_policy = wrap_by_type<BlockImpl>(), .layout = ShardLayout::kDim0Chunks});
  expect_error(ErrorCode::kUnsupported, {"kFlat"}, [&] { chunks.state_dict(StateDictType::kLocal); });
  expect_error(ErrorCode::kUnsupported, {"kFlat"}, [&] { chunks.load_state_dict(whole); });
  world->barrier();
}

RESHARD_DISTRIBUTED_TEST(StateDictTest, IsStrictAndChecksBeforeItWrites, .ranks = 2) {
  at::manual_seed(33);
  auto model = FullyShardedDataParallel(torch::nn::Linear(4, 3), {.process_group = process_group()});
  const StateDict before = model.state_dict(StateDictType::kFull);
  const at::Tensor weight = at::ones({3, 4}), bias = at::ones({3});
  expect_error(ErrorCode::kNotFound, {"bias"}, [&] { model.load_state_dict({{"weight", weight}}); });
  expect_error(ErrorCode::kInvalidArgument, {"key extra"}, [&] {
    model.load_state_dict({{"weight", weight}, {"bias", bias}, {"extra", bias}});
  });
  expect_error(ErrorCode::kInvalidArgument, {"key bias", "[3]", "[4]", "shape"}, [&] {
    model.load_state_dict({{"weight", weight}, {"bias", at::ones({4})}});
  });
  expect_error(ErrorCode::kInvalidArgument, {"key bias", "float32", "float64", "dtype"}, [&] {
    model.load_state_dict({{"weight", weight}, {"bias", bias.to(at::kDouble)}});
  });
  expect_error(ErrorCode::kInvalidArgument, {"key bias", "type", "str"}, [&] {
    model.load_state_dict({{"weight", weight}, {"bias", "x"}});
  });
  // Row 0 only, which neither rank's part lies in.
  const ShardedTensor part({3, 4}, at::kFloat, {{Box{{0, 0}, {1, 4}}, at::ones({1, 4})}});
  expect_error(ErrorCode::kInvalidArgument, {"key weight", "do not hold all"}, [&] {
    model.load_state_dict({{"weight", part}, {"bias", bias}});
  });
  const StateDict after = model.state_dict(StateDictType::kFull);
  for (const auto& [name, value] : before.items())
    EXPECT_TRUE(at::equal(value.as<at::Tensor>(), after.at(name).as<at::Tensor>())) << name;

  // Shards of any shape that cover this rank's part will do; here columns.
  const at::Tensor values = at::arange(12, at::kFloat).view({3, 4});
  const ShardedTensor columns(
      {3, 4}, at::kFloat, {{Box{{0, 0}, {3, 1}}, values.slice(1, 0, 1)}, {Box{{0, 1}, {3, 3}}, values.slice(1, 1, 4)}});
  model.load_state_dict({{"weight", columns}, {"bias", bias}});
  EXPECT_TRUE(at::equal(model.state_dict(StateDictType::kFull).at("weight").as<at::Tensor>(), values));
  // Loading what was read in place copies nothing and still is noticed.
  const StateDict own = model.state_dict(StateDictType::kSharded);
  const at::NoGradGuard no_grad;
  const at::Tensor first = model(at::ones({1, 4}));
  for (const LocalShard& shard : own.at("bias").as<ShardedTensor>().shards())
    std::fill_n(shard.tensor.data_ptr<float>(), shard.tensor.numel(), 5.0f);
  model.load_state_dict(own);
  EXPECT_TRUE(at::equal(model(at::ones({1, 4})), first + 4));
}

}  // namespace
}  // namespace reshard::fsdp_test
