// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/dims.h"

#include <algorithm>

#include "reshard/core/checked.h"

namespace reshard {

std::string to_string(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i != 0) text += ", ";
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

int64_t volume(const Dims& sizes) {
  int64_t product = 1;
  bool empty = false;
  for (int64_t size : sizes) {
    if (size < 0) throw Error(ErrorCode::kCorruptData, "negative size in " + to_string(sizes));
    empty |= size == 0;
  }
  if (empty) return 0;  // whatever the other sizes multiply to
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) {
      throw Error(ErrorCode::kCorruptData, "number of elements of " + to_string(sizes) + " overflows");
    }
  }
  return product;
}

Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    // LibTorch counts a size of 0 as 1 here.
    strides[i - 1] = checked_mul(strides[i], std::max<int64_t>(sizes[i], 1), "stride");
  }
  return strides;
}

}  // namespace reshard
