// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/dims.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <unordered_set>

#include "support/expect_error.h"

namespace reshard {
namespace {

TEST(DimsTest, KeepsItsValuesBelowAndAboveTheInlineRank) {
  for (size_t rank = 0; rank <= 9; ++rank) {
    Dims dims;
    for (size_t i = 0; i < rank; ++i) dims.push_back(static_cast<int64_t>(10 + i));
    ASSERT_EQ(dims.size(), rank);
    for (size_t i = 0; i < rank; ++i) EXPECT_EQ(dims[i], static_cast<int64_t>(10 + i));

    const Dims copy = dims;
    EXPECT_EQ(copy, dims);
    const Dims moved = std::move(dims);
    EXPECT_EQ(moved, copy);
    Dims assigned{1, 2, 3, 4, 5, 6};
    assigned = copy;
    EXPECT_EQ(assigned, copy);
    EXPECT_EQ(Dims(copy.span()), copy);
  }
}

TEST(DimsTest, OrdersLexicographicallyWithPrefixesFirst) {
  EXPECT_LT(Dims(), Dims{0});
  EXPECT_LT((Dims{1}), (Dims{1, 0}));
  EXPECT_LT((Dims{1, 9}), (Dims{2, 0}));
  EXPECT_FALSE((Dims{2, 0}) < (Dims{1, 9}));
  EXPECT_FALSE((Dims{3}) < (Dims{3}));
  EXPECT_NE((Dims{1}), (Dims{1, 1}));
}

TEST(DimsTest, HashTellsRankAndOrderApart) {
  const std::unordered_set<Dims, DimsHash> set{{}, {0}, {0, 0}, {1, 2}, {2, 1}, {1, 2}};
  EXPECT_EQ(set.size(), 5U);
  EXPECT_NE(DimsHash{}({1, 2}), DimsHash{}({2, 1}));
}

TEST(DimsTest, TextIsABracketedList) {
  EXPECT_EQ(to_string(Dims()), "[]");
  EXPECT_EQ(to_string(Dims{4, -8}), "[4, -8]");
}

TEST(DimsTest, VolumeOfNoDimensionsIsOneElement) {
  EXPECT_EQ(volume({}), 1);
  EXPECT_EQ(volume({3, 4}), 12);
  EXPECT_EQ(volume({3, 0, 4}), 0);
}

TEST(DimsTest, VolumeThatLeavesInt64IsCorrupt) {
  const int64_t big = int64_t{1} << 32;
  EXPECT_EQ(volume({std::numeric_limits<int64_t>::max()}), std::numeric_limits<int64_t>::max());
  EXPECT_ERROR(ErrorCode::kCorruptData, "[4294967296, 4294967296]", volume({big, big}));
  EXPECT_EQ(volume({big, big, 0}), 0) << "an empty tensor overflows nothing";
  EXPECT_ERROR(ErrorCode::kCorruptData, "negative size", volume({0, -1}));
}

TEST(DimsTest, StridesAreRowMajorAndCountEmptyDimensionsAsOne) {
  EXPECT_EQ(contiguous_strides({}), Dims());
  EXPECT_EQ(contiguous_strides({2, 3, 4}), (Dims{12, 4, 1}));
  EXPECT_EQ(contiguous_strides({2, 0, 4}), (Dims{4, 4, 1}));
  const int64_t big = int64_t{1} << 32;
  EXPECT_ERROR(ErrorCode::kCorruptData, "stride", contiguous_strides({0, big, big}));
}

}  // namespace
}  // namespace reshard
