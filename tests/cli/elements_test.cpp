// SPDX-License-Identifier: BSD-3-Clause
#include "cli/elements.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <sstream>

#include "support/run_python.h"

namespace reshard::cli {
namespace {

long double value_of(DType dtype, uint64_t bits, int part = 0) {
  std::byte bytes[16] = {};
  std::memcpy(bytes, &bits, sizeof(bits));
  return part_value(dtype, bytes, part);
}

TEST(ElementsTest, IntegersAreExact) {
  EXPECT_EQ(value_of(DType::kInt64, ~uint64_t{0}), -1);
  EXPECT_EQ(value_of(DType::kUInt64, ~uint64_t{0}), 18446744073709551615.0L);
  EXPECT_EQ(value_of(DType::kInt64, (uint64_t{1} << 62) + 1), 4611686018427387905.0L);
  EXPECT_EQ(value_of(DType::kInt8, 0x80), -128);
  EXPECT_EQ(value_of(DType::kBool, 1), 1);
  EXPECT_EQ(value_of(DType::kComplex64, 0xC0000000'3F800000, 1), -2);
}

TEST(ElementsTest, BitsAndPackedElementsAreNoNumbers) {
  for (const DType dtype : {DType::kBits8, DType::kFloat4E2M1FNx2, DType::kQInt8}) EXPECT_EQ(parts_of(dtype), 0);
  EXPECT_EQ(parts_of(DType::kBComplex32), 2);
}

// Every pattern of the small dtypes, as PyTorch reads it.
TEST(ElementsTest, SmallFloatsAreThoseOfPyTorch) {
  if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  const PythonResult run = run_python("pytorch.py elements");
  ASSERT_EQ(run.exit_code, 0) << run.output;
  std::istringstream lines(run.output);
  std::string name;
  std::string text;
  uint64_t bits = 0;
  size_t count = 0;
  while (lines >> name >> bits >> text) {
    const auto dtype = dtype_from_string(name);
    ASSERT_TRUE(dtype) << name;
    const long double found = value_of(*dtype, bits);
    const long double wanted = std::strtold(text.c_str(), nullptr);
    EXPECT_TRUE(found == wanted || (std::isnan(found) && std::isnan(wanted))) << name << " " << bits << " " << text;
    ++count;
  }
  EXPECT_EQ(count, 5u * 256 + 2 * 65536);
}

}  // namespace
}  // namespace reshard::cli
