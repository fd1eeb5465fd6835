// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/dtype.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "support/expect_error.h"

namespace reshard {
namespace {

constexpr DType kAll[] = {
#define RESHARD_TEST_DTYPE(id, name, bytes) DType::id,
    RESHARD_FOR_EACH_DTYPE(RESHARD_TEST_DTYPE)
#undef RESHARD_TEST_DTYPE
};

TEST(DTypeTest, EveryNameLeadsBackToItsType) {
  std::set<std::string_view> names;
  for (DType dtype : kAll) {
    EXPECT_EQ(dtype_from_string(to_string(dtype)), dtype) << to_string(dtype);
    EXPECT_TRUE(names.insert(to_string(dtype)).second) << to_string(dtype);
  }
  EXPECT_EQ(names.size(), 47U);
}

TEST(DTypeTest, SizesAreThoseOfOneElement) {
  EXPECT_EQ(element_size(DType::kBool), 1);
  EXPECT_EQ(element_size(DType::kBFloat16), 2);
  EXPECT_EQ(element_size(DType::kFloat32), 4);
  EXPECT_EQ(element_size(DType::kInt64), 8);
  EXPECT_EQ(element_size(DType::kComplex128), 16);
  EXPECT_EQ(element_size(DType::kFloat4E2M1FNx2), 1);
}

TEST(DTypeTest, AliasesAndPrefixedNamesAreNoNames) {
  for (const char* name : {"half", "float", "long", "torch.float32", "Float32", "", "float32 "}) {
    EXPECT_EQ(dtype_from_string(name), std::nullopt) << name;
  }
}

TEST(DTypeTest, NumberWithoutATypeIsRefused) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "200", element_size(static_cast<DType>(200)));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "47", to_string(static_cast<DType>(47)));
}

}  // namespace
}  // namespace reshard
