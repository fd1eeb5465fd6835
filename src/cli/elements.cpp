// SPDX-License-Identifier: BSD-3-Clause
#include "cli/elements.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace reshard::cli {
namespace {

template <class T>
T load(const std::byte* from, int index) {
  T value;
  std::memcpy(&value, from + static_cast<size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

/// What the largest exponent and the negative zero mean.
enum class Special {
  kIeee,  // infinities and NaNs
  kFn,    // no infinities; all ones is NaN
  kFnuz,  // no infinities, no negative zero: that is NaN
};

/// A binary floating-point number of few bits: sign, exponent, mantissa.
long double small_float(uint32_t bits, int exponent_bits, int mantissa_bits, int bias, Special special) {
  const uint32_t mantissa_mask = (1u << mantissa_bits) - 1;
  const uint32_t exponent_mask = (1u << exponent_bits) - 1;
  const uint32_t mantissa = bits & mantissa_mask;
  const uint32_t exponent = (bits >> mantissa_bits) & exponent_mask;
  const bool negative = (bits >> (exponent_bits + mantissa_bits)) != 0;
  const auto nan = std::numeric_limits<long double>::quiet_NaN();
  if (special == Special::kIeee && exponent == exponent_mask) {
    if (mantissa != 0) return nan;
    return negative ? -std::numeric_limits<long double>::infinity() : std::numeric_limits<long double>::infinity();
  }
  if (special == Special::kFn && exponent == exponent_mask && mantissa == mantissa_mask) return nan;
  if (special == Special::kFnuz && negative && exponent == 0 && mantissa == 0) return nan;
  const long double value = exponent == 0 ? std::ldexp(static_cast<long double>(mantissa), 1 - bias - mantissa_bits)
                                          : std::ldexp(static_cast<long double>(mantissa | (mantissa_mask + 1)),
                                                       static_cast<int>(exponent) - bias - mantissa_bits);
  return negative ? -value : value;
}

long double half(const std::byte* from, int index) {
  return small_float(load<uint16_t>(from, index), 5, 10, 15, Special::kIeee);
}
long double bfloat16(const std::byte* from, int index) {
  return small_float(load<uint16_t>(from, index), 8, 7, 127, Special::kIeee);
}

}  // namespace

int parts_of(DType dtype) {
  switch (dtype) {
    case DType::kComplex32:
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBComplex32:
      return 2;
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64:
    case DType::kUInt16:
    case DType::kUInt32:
    case DType::kUInt64:
    case DType::kFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kBool:
    case DType::kBFloat16:
    case DType::kFloat8E5M2:
    case DType::kFloat8E4M3FN:
    case DType::kFloat8E5M2FNUZ:
    case DType::kFloat8E4M3FNUZ:
    case DType::kFloat8E8M0FNU:
      return 1;
    default:
      return 0;
  }
}

long double part_value(DType dtype, const std::byte* element, int part) {
  constexpr uint8_t kE8M0NaN = 0xFF;
  switch (dtype) {
    case DType::kUInt8:
    case DType::kBool:
      return load<uint8_t>(element, part);
    case DType::kInt8:
      return load<int8_t>(element, part);
    case DType::kInt16:
      return load<int16_t>(element, part);
    case DType::kInt32:
      return load<int32_t>(element, part);
    case DType::kInt64:
      return static_cast<long double>(load<int64_t>(element, part));
    case DType::kUInt16:
      return load<uint16_t>(element, part);
    case DType::kUInt32:
      return load<uint32_t>(element, part);
    case DType::kUInt64:
      return static_cast<long double>(load<uint64_t>(element, part));
    case DType::kFloat32:
    case DType::kComplex64:
      return load<float>(element, part);
    case DType::kFloat64:
    case DType::kComplex128:
      return load<double>(element, part);
    case DType::kFloat16:
    case DType::kComplex32:
      return half(element, part);
    case DType::kBFloat16:
    case DType::kBComplex32:
      return bfloat16(element, part);
    case DType::kFloat8E5M2:
      return small_float(load<uint8_t>(element, part), 5, 2, 15, Special::kIeee);
    case DType::kFloat8E4M3FN:
      return small_float(load<uint8_t>(element, part), 4, 3, 7, Special::kFn);
    case DType::kFloat8E5M2FNUZ:
      return small_float(load<uint8_t>(element, part), 5, 2, 16, Special::kFnuz);
    case DType::kFloat8E4M3FNUZ:
      return small_float(load<uint8_t>(element, part), 4, 3, 8, Special::kFnuz);
    case DType::kFloat8E8M0FNU: {
      const auto bits = load<uint8_t>(element, part);
      if (bits == kE8M0NaN) return std::numeric_limits<long double>::quiet_NaN();
      return std::ldexp(1.0L, static_cast<int>(bits) - 127);
    }
    default:
      return 0;
  }
}

const char* numpy_descr(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "|b1";
    case DType::kUInt8:
      return "|u1";
    case DType::kInt8:
      return "|i1";
    case DType::kUInt16:
      return "<u2";
    case DType::kInt16:
      return "<i2";
    case DType::kUInt32:
      return "<u4";
    case DType::kInt32:
      return "<i4";
    case DType::kUInt64:
      return "<u8";
    case DType::kInt64:
      return "<i8";
    case DType::kFloat16:
      return "<f2";
    case DType::kFloat32:
      return "<f4";
    case DType::kFloat64:
      return "<f8";
    case DType::kComplex64:
      return "<c8";
    case DType::kComplex128:
      return "<c16";
    default:
      return nullptr;
  }
}

}  // namespace reshard::cli
