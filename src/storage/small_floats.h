// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Floats that C++ has no type for, to float32 and back.

#include <cstddef>
#include <cstdint>
#include <span>

#include "reshard/core/bytes.h"
#include "reshard/core/dtype.h"

namespace reshard {

/// True for floats and integers of one byte, float16, bfloat16 and float32.
bool is_convertible_to_float(DType dtype);
/// kUnsupported for other dtypes. `out` has one float an element.
void to_floats(ByteSpan elements, DType dtype, std::span<float> out);
/// float32, bfloat16 or float16, rounded to nearest even; kUnsupported for others. `out` has their bytes.
void from_floats(std::span<const float> values, DType dtype, MutableByteSpan out);

/// The value of a four-bit float (E2M1).
float float4_value(unsigned bits);
/// 2^(bits - 127); NaN for 255.
float exponent_value(uint8_t bits);

}  // namespace reshard
