// SPDX-License-Identifier: BSD-3-Clause
#include "storage/small_floats.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "reshard/core/error.h"

namespace reshard {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// How a float of up to 16 bits keeps its values.
struct Layout {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  enum class Special : uint8_t {
    kIeee,          // the highest exponent is infinity or NaN
    kFiniteNan,     // all ones is NaN, there is no infinity
    kUnsignedZero,  // minus zero is NaN, there is no infinity
    kNone,          // all are numbers
  } special;
};

float decode(unsigned bits, const Layout& layout) {
  const unsigned mantissa_mask = (1u << layout.mantissa_bits) - 1;
  const unsigned exponent_mask = (1u << layout.exponent_bits) - 1;
  const unsigned mantissa = bits & mantissa_mask;
  const unsigned exponent = bits >> layout.mantissa_bits & exponent_mask;
  const bool negative = (bits >> (layout.mantissa_bits + layout.exponent_bits) & 1) != 0;
  if (layout.special == Layout::Special::kIeee && exponent == exponent_mask) {
    if (mantissa != 0) return kNan;
    return negative ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
  }
  if (layout.special == Layout::Special::kFiniteNan && exponent == exponent_mask && mantissa == mantissa_mask) {
    return kNan;
  }
  if (layout.special == Layout::Special::kUnsignedZero && negative && exponent == 0 && mantissa == 0) return kNan;
  const unsigned significand = exponent == 0 ? mantissa : mantissa | 1u << layout.mantissa_bits;
  const float magnitude = std::ldexp(static_cast<float>(significand),
                                     static_cast<int>(std::max(exponent, 1u)) - layout.bias - layout.mantissa_bits);
  return negative ? -magnitude : magnitude;
}

std::optional<Layout> small_layout(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3FN:
      return Layout{4, 3, 7, Layout::Special::kFiniteNan};
    case DType::kFloat8E5M2:
      return Layout{5, 2, 15, Layout::Special::kIeee};
    case DType::kFloat8E4M3FNUZ:
      return Layout{4, 3, 8, Layout::Special::kUnsignedZero};
    case DType::kFloat8E5M2FNUZ:
      return Layout{5, 2, 16, Layout::Special::kUnsignedZero};
    default:
      return std::nullopt;
  }
}
constexpr Layout kHalf{5, 10, 15, Layout::Special::kIeee};

/// Every value of a dtype of one byte.
std::optional<std::array<float, 256>> table_of(DType dtype) {
  std::array<float, 256> table{};
  const auto layout = small_layout(dtype);
  for (unsigned bits = 0; bits < table.size(); ++bits) {
    if (layout) {
      table[bits] = decode(bits, *layout);
    } else if (dtype == DType::kFloat8E8M0FNU) {
      table[bits] = exponent_value(static_cast<uint8_t>(bits));
    } else if (dtype == DType::kInt8) {
      table[bits] = static_cast<float>(static_cast<int8_t>(bits));
    } else if (dtype == DType::kUInt8) {
      table[bits] = static_cast<float>(bits);
    } else {
      return std::nullopt;
    }
  }
  return table;
}

uint16_t round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t round_to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (std::isnan(value)) return sign | 0x7E00;
  const float magnitude = std::abs(value);
  if (magnitude >= 65520.0F) return sign | 0x7C00;  // half way from the largest one to the next
  if (magnitude < 0x1p-14F) {                       // subnormal: a multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24F));
  }
  const uint32_t rest = std::bit_cast<uint32_t>(magnitude) - (uint32_t{127 - 15} << 23);
  return sign | static_cast<uint16_t>((rest + 0xFFF + (rest >> 13 & 1)) >> 13);
}

template <class T>
T load(ByteSpan bytes, size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

[[noreturn]] void unknown(DType dtype) {
  throw Error(ErrorCode::kUnsupported, "no conversion of this dtype", {.found = std::string(to_string(dtype))});
}

}  // namespace

bool is_convertible_to_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 || table_of(dtype);
}

void to_floats(ByteSpan elements, DType dtype, std::span<float> out) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out.data(), elements.data(), out.size_bytes());
      return;
    case DType::kBFloat16:
      for (size_t i = 0; i < out.size(); ++i) {
        out[i] = std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(elements, i)) << 16);
      }
      return;
    case DType::kFloat16:
      for (size_t i = 0; i < out.size(); ++i) out[i] = decode(load<uint16_t>(elements, i), kHalf);
      return;
    default:
      break;
  }
  const auto table = table_of(dtype);
  if (!table) unknown(dtype);
  for (size_t i = 0; i < out.size(); ++i) out[i] = (*table)[std::to_integer<uint8_t>(elements[i])];
}

void from_floats(std::span<const float> values, DType dtype, MutableByteSpan out) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out.data(), values.data(), values.size_bytes());
    return;
  }
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) unknown(dtype);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = dtype == DType::kBFloat16 ? round_to_bfloat16(values[i]) : round_to_float16(values[i]);
    std::memcpy(out.data() + i * sizeof bits, &bits, sizeof bits);
  }
}

float float4_value(unsigned bits) { return decode(bits & 0xF, {2, 1, 1, Layout::Special::kNone}); }

float exponent_value(uint8_t bits) { return bits == 255 ? kNan : std::ldexp(1.0F, bits - 127); }

}  // namespace reshard
