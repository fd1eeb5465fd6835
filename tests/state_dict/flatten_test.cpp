// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/flatten.h"

#include <gtest/gtest.h>

#include "support/expect_error.h"

namespace reshard {
namespace {

std::vector<std::string> names(const StateDict& state, FlattenRule rule = FlattenRule::kCurrent) {
  std::vector<std::string> result;
  for (const auto& item : flatten(state, rule)) result.push_back(item.fqn);
  return result;
}
using Names = std::vector<std::string>;

TEST(FlattenTest, EntersDictsAlwaysAndListsThatHoldTensorsOrDicts) {
  const at::Tensor t = at::zeros({1});
  const StateDict state{{"m", StateDict{{"w", t}, {"n", 1}, {"empty", StateDict{}}}},
                        {"scalars", StateList{1, 2}},
                        {"tensors", StateList{t, StateList{t, 5}}},
                        {"dicts", StateList{StateDict{{"lr", 0.1}}}},
                        {"deep", StateList{StateList{StateList{1}}}},
                        {"empty_list", StateList{}},
                        {"tuple", StateTuple{{t, 1}}}};
  EXPECT_EQ(names(state), (Names{"m.w", "m.n", "scalars", "tensors.0", "tensors.1.0", "tensors.1.1", "dicts.0.lr",
                                 "deep", "empty_list", "tuple"}));
}

TEST(FlattenTest, TheOldRuleKeepsContainersWithoutTensorsWhole) {
  const at::Tensor t = at::zeros({1});
  const StateDict state{{"optim", StateDict{{"state", StateDict{{"w", t}, {"step", 1}}},
                                            {"param_groups", StateList{StateDict{{"lr", 0.1}}}}}},
                        {"scalars", StateDict{{"a", 1}}},
                        {"empty", StateDict{}}};
  EXPECT_EQ(names(state, FlattenRule::kBefore24),
            (Names{"optim.state.w", "optim.state.step", "optim.param_groups", "scalars", "empty"}));
}

TEST(FlattenTest, KeepsListPositionsAsNumbersInPaths) {
  const StateDict state{{"l", StateList{at::zeros({1}), StateDict{{"n", 5}}}}};
  const auto items = flatten(state);
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[1].path, (ObjectPath{std::string("l"), int64_t{1}, std::string("n")}));
}

TEST(FlattenTest, RefusesTwoValuesOfOneName) {
  const StateDict state{{"a", StateDict{{"b", 1}}}, {"a.b", 2}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key a.b", flatten(state));
}

// Counterpart of test_nested_dict.py: what is flattened comes back.
TEST(FlattenTest, SetAtPathRebuildsTheNestedDict) {
  const StateDict state{{"k0", StateList{StateDict{{"v", 1}}, StateDict{{"v", 2}}}},
                        {"k1", StateDict{{"a", StateList{at::ones({2})}}}},
                        {"s", "x"}};
  StateDict rebuilt;
  for (const auto& item : flatten(state)) set_at_path(rebuilt, item.path, *item.value);
  EXPECT_EQ(names(rebuilt), names(state));
  EXPECT_EQ(rebuilt.at("k0").as<StateList>()[1].as<StateDict>().at("v").as<int64_t>(), 2);
  EXPECT_TRUE(rebuilt.at("k1").as<StateDict>().at("a").as<StateList>()[0].as<at::Tensor>().equal(at::ones({2})));
}

TEST(FlattenTest, SetAtPathPadsListsAndRefusesWhatIsInTheWay) {
  StateDict state;
  set_at_path(state, {std::string("l"), int64_t{2}}, 7);
  EXPECT_EQ(state.at("l").as<StateList>().size(), 3u);
  EXPECT_TRUE(state.at("l").as<StateList>()[0].is<None>());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "", set_at_path(state, {std::string("l"), std::string("x")}, 1));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "", set_at_path(state, {std::string("l"), int64_t{1} << 40}, 1));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "", set_at_path(state, {std::string("l"), int64_t{-1}}, 1));
}

}  // namespace
}  // namespace reshard
