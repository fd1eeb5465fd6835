// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/state_dict.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reshard/core/error.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;

template <class Body>
Error error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return Error(ErrorCode::kInternal, "none");
}

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
  const Error error = error_of([&] { state.at("modle"); });
  EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  EXPECT_EQ(error.context().key, "modle");
  EXPECT_THAT(error.what(), HasSubstr("model, optim"));
}

TEST(StateDictTest, NamesBothTypesWhenTheyDiffer) {
  const StateValue value = at::zeros({1});
  const Error error = error_of([&] { value.as<int64_t>(); });
  EXPECT_EQ(error.context().wanted, "int");
  EXPECT_EQ(error.context().found, "Tensor");
}

TEST(StateDictTest, RefusesAKeyGivenTwice) {
  EXPECT_EQ(error_of([] { StateDict{{"a", 1}, {"a", 2}}; }).code(), ErrorCode::kInvalidArgument);
}

TEST(ShardedTensorTest, RefusesShardsThatDoNotFit) {
  const at::Tensor two = at::zeros({2, 4});
  EXPECT_EQ(error_of([&] {
              ShardedTensor({3, 4}, at::kFloat, {{{{2, 0}, {2, 4}}, two}});
            }).code(),
            ErrorCode::kInvalidArgument);
  EXPECT_THAT(error_of([&] {
                ShardedTensor({4, 4}, at::kFloat, {{{{0, 0}, {1, 4}}, two}});
              }).what(),
              HasSubstr("another shape"));
  EXPECT_THAT(error_of([&] {
                ShardedTensor({4, 4}, at::kDouble, {{{{0, 0}, {2, 4}}, two}});
              }).what(),
              HasSubstr("another dtype"));
  EXPECT_THAT(error_of([&] {
                ShardedTensor({4, 4}, at::kFloat, {{{{0, 0}, {2, 4}}, two}, {{{1, 0}, {2, 4}}, two}});
              }).what(),
              HasSubstr("overlaps"));
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
