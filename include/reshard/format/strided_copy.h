// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Copies between strided element layouts: how a stored tensor that is transposed, expanded or lazily conjugated becomes
// plain row-major elements. Bit-exact with PyTorch's resolve_conj() and resolve_neg(). Pure and thread-safe.

#include <cstddef>
#include <cstdint>

#include "reshard/core/box.h"
#include "reshard/core/bytes.h"
#include "reshard/core/dims.h"
#include "reshard/core/dtype.h"
#include "reshard/format/torch_archive.h"

namespace reshard {

/// Copies sizes-many elements of `element_size` bytes from `source` to `target`; strides count elements. The two must
/// not overlap.
void copy_strided(const std::byte* source, const Dims& source_strides, std::byte* target, const Dims& target_strides,
                  const Dims& sizes, int64_t element_size);

/// Applies the lazy conjugate (flips the sign of each imaginary part) and negation (flips the sign of each real
/// component; two's complement for integers) to dense elements in place. Throws kUnsupported for a dtype that has no
/// such notion.
void resolve_flags(MutableByteSpan elements, DType dtype, bool conj, bool neg);

/// Makes every byte other than 0 into 1: what a bool tensor may hold when its file is not trusted.
void normalize_bools(MutableByteSpan elements);

/// Byte range of the payload that the elements of `region` lie in; empty for a region without elements. `region` counts
/// from the item's own origin and lies inside its sizes (kInvalidArgument).
struct ByteRange {
  uint64_t begin = 0;  // relative to the start of the payload
  uint64_t end = 0;
};
ByteRange payload_range(const TensorItem& item, const Box& region);

/// Writes `region` of the item as dense row-major elements to `out` (exactly its size): strides, flags and bools
/// resolved. `payload` holds bytes [range.begin, range.end) of the payload, range = payload_range(item, region).
void copy_region(const TensorItem& item, ByteSpan payload, const Box& region, MutableByteSpan out);

}  // namespace reshard
