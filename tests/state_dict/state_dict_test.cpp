// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/state_dict.h"

#include <gtest/gtest.h>

#include "support/expect_error.h"

namespace reshard {
namespace {

TEST(StateDictTest, KeepsTheOrderOfInsertion) {
  StateDict state{{"z", 1}, {"a", 2.5}, {"m", "text"}};
  state["b"] = None{};
  std::vector<std::string> keys;
  for (const auto& [key, value] : state.items()) keys.push_back(key);
  EXPECT_EQ(keys, (std::vector<std::string>{"z", "a", "m", "b"}));
}

TEST(StateDictTest, CopiesDeeplyButSharesTensors) {
  StateDict state{{"n", StateDict{{"t", at::zeros({2})}, {"i", 1}}}};
  StateDict copy = state;
  copy.at("n").as<StateDict>()["i"] = 2;
  copy.at("n").as<StateDict>().at("t").as<at::Tensor>().fill_(3);
  EXPECT_EQ(state.at("n").as<StateDict>().at("i").as<int64_t>(), 1);
  EXPECT_EQ(state.at("n").as<StateDict>().at("t").as<at::Tensor>()[0].item<float>(), 3);
}

TEST(StateDictTest, NamesTheMissingKeyAndTheKeysThereAre) {
  const StateDict state{{"model", 1}, {"optim", 2}};
  EXPECT_ERROR(ErrorCode::kNotFound, "key modle", state.at("modle"));
  EXPECT_ERROR(ErrorCode::kNotFound, "model, optim", state.at("modle"));
}

TEST(StateDictTest, NamesBothTypesWhenTheyDiffer) {
  const StateValue value = at::zeros({1});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "wanted int, found Tensor", value.as<int64_t>());
}

TEST(StateDictTest, RefusesAKeyGivenTwice) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "given twice", StateDict{{"a", 1}, {"a", 2}});
}

TEST(ShardedTensorTest, RefusesShardsThatDoNotFit) {
  const at::Tensor two = at::zeros({2, 4});
  const auto make = [](at::ScalarType dtype, std::vector<LocalShard> shards) {
    return ShardedTensor({4, 4}, dtype, std::move(shards));
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "does not lie inside", make(at::kFloat, {{{{3, 0}, {2, 4}}, two}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "another shape", make(at::kFloat, {{{{0, 0}, {1, 4}}, two}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "another dtype", make(at::kDouble, {{{{0, 0}, {2, 4}}, two}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "overlaps",
               make(at::kFloat, {{{{0, 0}, {2, 4}}, two}, {{{1, 0}, {2, 4}}, two}}));
  const ShardedTensor fits({4, 4}, at::kFloat, {{{{0, 0}, {2, 4}}, two}, {{{2, 0}, {2, 4}}, two}});
  EXPECT_EQ(fits.local_numel(), 16);
}

TEST(ShardedTensorTest, KnowsEveryDtypeOfC10) {
  for (int i = 0; i < static_cast<int>(at::ScalarType::NumOptions); ++i) {
    const auto type = static_cast<at::ScalarType>(i);
    if (type == at::ScalarType::Undefined) continue;
    const DType ours = to_dtype(type);
    EXPECT_EQ(to_scalar_type(ours), type) << c10::toString(type);
    EXPECT_EQ(element_size(ours), static_cast<int64_t>(c10::elementSize(type))) << c10::toString(type);
  }
}

}  // namespace
}  // namespace reshard
