// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Elements of tensors as numbers.

#include <cstddef>
#include <optional>

#include "reshard/core/dtype.h"

namespace reshard::cli {

/// The parts of an element: 2 for complex dtypes, 1 for others; 0 for dtypes whose elements are no numbers (bits, packed
/// and quantized ones).
int parts_of(DType dtype);

/// Part `part` of the element at `element`. Exact, but for integers of more than 64 significant bits, of which there are none.
long double part_value(DType dtype, const std::byte* element, int part);

/// How numpy writes the dtype in the header of an .npy file ("<f4"); null if it has no such type.
const char* numpy_descr(DType dtype);

}  // namespace reshard::cli
