// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/checked.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "support/expect_error.h"

namespace reshard {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

TEST(CheckedTest, ResultsThatFitAreReturned) {
  EXPECT_EQ(checked_add(kMax - 1, int64_t{1}, "sum"), kMax);
  EXPECT_EQ(checked_add(kMin, kMax, "sum"), -1);
  EXPECT_EQ(checked_mul(int64_t{1} << 31, int64_t{1} << 31, "product"), int64_t{1} << 62);
  EXPECT_EQ(checked_add<uint64_t>(~uint64_t{0} - 1, 1, "sum"), ~uint64_t{0});
}

TEST(CheckedTest, ResultsThatDoNotFitAreCorruptDataByName) {
  EXPECT_ERROR(ErrorCode::kCorruptData, "end of range overflows", checked_add(kMax, int64_t{1}, "end of range"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "sum", checked_add(kMin, int64_t{-1}, "sum"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "product", checked_mul(kMin, int64_t{-1}, "product"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "sum", checked_add<uint64_t>(~uint64_t{0}, 1, "sum"));
}

}  // namespace
}  // namespace reshard
