// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/strided_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>

#include "support/expect_error.h"

namespace reshard {
namespace {

// Element by element, by the definition of a stride.
void copy_slowly(const std::byte* source, const Dims& source_strides, std::byte* target, const Dims& target_strides,
                 const Dims& sizes, int64_t width) {
  const int64_t count = volume(sizes);
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i, from = 0, to = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      from += rest % sizes[d] * source_strides[d];
      to += rest % sizes[d] * target_strides[d];
      rest /= sizes[d];
    }
    std::memcpy(target + to * width, source + from * width, static_cast<size_t>(width));
  }
}

// Dense strides of `sizes` with its dimensions laid out in a random order, sometimes with gaps or with an expanded dimension.
Dims random_strides(const Dims& sizes, std::mt19937& random, bool may_expand) {
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::ranges::shuffle(order, random);
  Dims strides(sizes.size(), 1);
  int64_t next = 1;
  for (const size_t d : order) {
    strides[d] = next;
    if (may_expand && random() % 5 == 0) {
      strides[d] = 0;
      continue;
    }
    next *= std::max<int64_t>(sizes[d], 1);
    if (random() % 4 == 0) ++next;
  }
  return strides;
}
int64_t reach(const Dims& sizes, const Dims& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += std::max<int64_t>(sizes[i] - 1, 0) * strides[i];
  return last + 1;
}

TEST(CopyStridedTest, EqualsTheDefinitionOnRandomLayouts) {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    Dims sizes;
    for (size_t rank = random() % 6; rank > 0; --rank) sizes.push_back(static_cast<int64_t>(random() % 5));
    const int64_t width = int64_t{1} << random() % 5;
    const Dims from = random_strides(sizes, random, true);
    const Dims to = random_strides(sizes, random, false);
    Bytes source(static_cast<size_t>(reach(sizes, from) * width));
    for (auto& b : source) b = static_cast<std::byte>(random());
    Bytes expected(static_cast<size_t>(reach(sizes, to) * width), std::byte{0xEE});
    Bytes found = expected;
    copy_slowly(source.data(), from, expected.data(), to, sizes, width);
    copy_strided(source.data(), from, found.data(), to, sizes, width);
    ASSERT_EQ(found, expected) << to_string(sizes) << to_string(from) << to_string(to) << width;
  }
}

TEST(CopyStridedTest, AnElementOfA0dTensor) {
  const std::byte source{42};
  std::byte target{};
  copy_strided(&source, {}, &target, {}, {}, 1);
  EXPECT_EQ(target, source);
}

TensorItem item_of(DType dtype, Dims sizes, Dims strides, int64_t offset = 0) {
  TensorItem item;
  item.dtype = dtype;
  item.sizes = std::move(sizes);
  item.strides = std::move(strides);
  item.storage_offset = offset;
  return item;
}

TEST(CopyRegionTest, NeedsOnlyTheBytesOfItsRange) {
  // 4 x 3, stored transposed: element (i, j) at 2 + i + 4 j.
  const TensorItem item = item_of(DType::kInt16, {4, 3}, {1, 4}, 2);
  Bytes payload(28);
  for (size_t i = 0; i < 14; ++i) payload[2 * i] = static_cast<std::byte>(i);
  const Box region{{1, 1}, {2, 2}};
  const ByteRange range = payload_range(item, region);
  EXPECT_EQ(range.begin, 2u * (2 + 1 + 4));
  EXPECT_EQ(range.end, 2u * (2 + 2 + 8 + 1));
  Bytes out(8);
  copy_region(item, ByteSpan(payload).subspan(range.begin, range.end - range.begin), region, out);
  const int expected[] = {7, 11, 8, 12};
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(std::to_integer<int>(out[2 * i]), expected[i]);
}

TEST(CopyRegionTest, RandomRegionsOfRandomLayouts) {
  std::mt19937 random(11);
  for (int round = 0; round < 2000; ++round) {
    Dims sizes, offsets, lengths;
    for (size_t rank = random() % 5; rank > 0; --rank) {
      const auto size = static_cast<int64_t>(random() % 5);
      const auto offset = static_cast<int64_t>(random() % static_cast<uint64_t>(size + 1));
      sizes.push_back(size);
      offsets.push_back(offset);
      lengths.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(size - offset + 1)));
    }
    const TensorItem item =
        item_of(DType::kInt32, sizes, random_strides(sizes, random, true), static_cast<int64_t>(random() % 3));
    Bytes payload(static_cast<size_t>(item.storage_offset + reach(sizes, item.strides)) * 4);
    for (auto& b : payload) b = static_cast<std::byte>(random());
    const Box region{offsets, lengths};
    const ByteRange range = payload_range(item, region);
    ASSERT_LE(range.end, payload.size());
    Bytes found(static_cast<size_t>(volume(lengths) * 4)), expected = found;
    copy_region(item, ByteSpan(payload).subspan(range.begin, range.end - range.begin), region, found);
    int64_t first = item.storage_offset;
    for (size_t d = 0; d < offsets.size(); ++d) first += offsets[d] * item.strides[d];
    if (!expected.empty())
      copy_slowly(payload.data() + first * 4, item.strides, expected.data(), contiguous_strides(lengths), lengths, 4);
    ASSERT_EQ(found, expected);
  }
}

TEST(CopyRegionTest, WrongRegionsAndBuffersAreRefused) {
  const TensorItem item = item_of(DType::kInt8, {4}, {1});
  Bytes payload(4), out(4), small(3);
  constexpr auto kInvalid = ErrorCode::kInvalidArgument;
  EXPECT_ERROR(kInvalid, "not inside", payload_range(item, {{1}, {4}}));
  EXPECT_ERROR(kInvalid, "not inside", payload_range(item, {{-1}, {1}}));
  EXPECT_ERROR(kInvalid, "not inside", payload_range(item, {{0, 0}, {1, 1}}));
  EXPECT_ERROR(kInvalid, "buffers do not fit", copy_region(item, small, {{0}, {4}}, out));
  EXPECT_ERROR(kInvalid, "buffers do not fit", copy_region(item, payload, {{0}, {4}}, small));
}

TEST(CopyRegionTest, BoolsBecomeZeroOrOne) {
  const TensorItem item = item_of(DType::kBool, {4}, {1});
  const Bytes payload = {std::byte{0}, std::byte{1}, std::byte{2}, std::byte{0xFF}};
  Bytes out(4);
  copy_region(item, payload, {{0}, {4}}, out);
  EXPECT_EQ(out, (Bytes{std::byte{0}, std::byte{1}, std::byte{1}, std::byte{1}}));
}

template <class T>
std::vector<T> resolved(std::vector<T> values, DType dtype, bool conj, bool neg) {
  resolve_flags(std::as_writable_bytes(std::span(values)), dtype, conj, neg);
  return values;
}

TEST(ResolveFlagsTest, SignBitsOfFloatsFlipAlsoForZerosAndNans) {
  using U = std::vector<uint32_t>;
  EXPECT_EQ(resolved(U{0x3F800000, 0x00000000, 0x80000000, 0x7FC00001}, DType::kFloat32, false, true),
            (U{0xBF800000, 0x80000000, 0x00000000, 0xFFC00001}));
  using H = std::vector<uint16_t>;
  EXPECT_EQ(resolved(H{0x3C00, 0x8000}, DType::kFloat16, false, true), (H{0xBC00, 0x0000}));
  EXPECT_EQ(resolved(H{0x3F80, 0x8000}, DType::kBFloat16, false, true), (H{0xBF80, 0x0000}));
  using D = std::vector<double>;
  EXPECT_EQ(resolved(D{1.5, -2.0}, DType::kFloat64, false, true), (D{-1.5, 2.0}));
}

TEST(ResolveFlagsTest, ComplexNumbersFlipPartByPart) {
  using F = std::vector<float>;
  EXPECT_EQ(resolved(F{1, 2, -3, -4}, DType::kComplex64, true, false), (F{1, -2, -3, 4}));
  EXPECT_EQ(resolved(F{1, 2, -3, -4}, DType::kComplex64, false, true), (F{-1, -2, 3, 4}));
  EXPECT_EQ(resolved(F{1, 2, -3, -4}, DType::kComplex64, true, true), (F{-1, 2, 3, -4}));
  using D = std::vector<double>;
  EXPECT_EQ(resolved(D{1, 2}, DType::kComplex128, true, false), (D{1, -2}));
  using H = std::vector<uint16_t>;
  EXPECT_EQ(resolved(H{0x3C00, 0x3C00}, DType::kComplex32, true, false), (H{0x3C00, 0xBC00}));
  EXPECT_EQ(resolved(H{0x3F80, 0x3F80}, DType::kBComplex32, true, true), (H{0xBF80, 0x3F80}));
}

TEST(ResolveFlagsTest, IntegersNegateInTwosComplement) {
  EXPECT_EQ(resolved(std::vector<int8_t>{1, -128, 0}, DType::kInt8, false, true), (std::vector<int8_t>{-1, -128, 0}));
  EXPECT_EQ(resolved(std::vector<uint16_t>{1, 0}, DType::kUInt16, false, true), (std::vector<uint16_t>{0xFFFF, 0}));
  EXPECT_EQ(resolved(std::vector<int32_t>{7, -7}, DType::kInt32, false, true), (std::vector<int32_t>{-7, 7}));
  EXPECT_EQ(resolved(std::vector<int64_t>{int64_t{1} << 40}, DType::kInt64, false, true),
            (std::vector<int64_t>{-(int64_t{1} << 40)}));
}

TEST(ResolveFlagsTest, DtypesWithoutTheNotionAreRefused) {
  Bytes bytes(4);
  EXPECT_ERROR(ErrorCode::kUnsupported, "float32 elements have no conjugate",
               resolve_flags(bytes, DType::kFloat32, true, false));
  EXPECT_ERROR(ErrorCode::kUnsupported, "bool elements have no negation",
               resolve_flags(bytes, DType::kBool, false, true));
  EXPECT_ERROR(ErrorCode::kUnsupported, "float8_e4m3fnuz elements have no negation",
               resolve_flags(bytes, DType::kFloat8E4M3FNUZ, false, true));
}

}  // namespace
}  // namespace reshard
