// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/planner/state.h"

#include <gtest/gtest.h>

namespace reshard {
namespace {

TEST(StateTest, DenseRowMajorStridesAreContiguous) {
  EXPECT_TRUE(is_contiguous({2, 3, 4}, {12, 4, 1}));
  EXPECT_TRUE(is_contiguous({}, {}));
  EXPECT_TRUE(is_contiguous({7}, {1}));
}

TEST(StateTest, StrideOfADimensionOfOneElementDoesNotMatter) {
  EXPECT_TRUE(is_contiguous({1, 3}, {99, 1}));
  EXPECT_TRUE(is_contiguous({2, 1, 3}, {3, 0, 1}));
}

TEST(StateTest, TransposedExpandedAndPaddedViewsAreNot) {
  EXPECT_FALSE(is_contiguous({2, 3}, {1, 2}));
  EXPECT_FALSE(is_contiguous({2, 3}, {0, 1}));
  EXPECT_FALSE(is_contiguous({2, 3}, {4, 1}));
  EXPECT_FALSE(is_contiguous({2}, {2}));
}

TEST(StateTest, ViewWithoutElementsIsContiguousWhateverItsStrides) {
  EXPECT_TRUE(is_contiguous({0, 3}, {7, 9}));
  EXPECT_TRUE(is_contiguous({2, 0}, {1, 1}));
}

TEST(StateTest, StridesOfAnotherRankAreNotContiguous) { EXPECT_FALSE(is_contiguous({2, 3}, {1})); }

}  // namespace
}  // namespace reshard
