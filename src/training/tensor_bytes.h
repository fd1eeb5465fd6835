// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Elements of any dtype as bytes, which every backend sends.

#include <ATen/ATen.h>

namespace reshard {

/// The memory of a contiguous tensor as a 1-D tensor of bytes.
inline at::Tensor byte_alias(const at::Tensor& dense) {
  return at::from_blob(
      dense.mutable_data_ptr(), {static_cast<int64_t>(dense.nbytes())}, [keep = dense](void*) {},
      at::TensorOptions().dtype(at::kByte).device(dense.device()), dense.device());
}

}  // namespace reshard
