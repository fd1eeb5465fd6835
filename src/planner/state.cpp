// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/planner/state.h"

#include <algorithm>
#include <utility>

#include "reshard/format/strided_copy.h"

namespace reshard {

bool is_contiguous(const Dims& sizes, const Dims& strides) {
  if (sizes.size() != strides.size()) return false;
  if (volume(sizes) == 0) return true;
  int64_t dense = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != dense) return false;
    dense *= sizes[i];
  }
  return true;
}

void for_each_dense_block(const TensorView& view, uint64_t block_bytes, const std::function<void(Bytes)>& fn) {
  const int64_t size = element_size(view.dtype);
  const int64_t total = volume(view.sizes);
  const int64_t block = std::max<int64_t>(1, static_cast<int64_t>(block_bytes) / size);
  for (int64_t begin = 0; begin < total; begin += block) {
    const int64_t end = std::min(begin + block, total);
    Bytes dense(static_cast<size_t>((end - begin) * size));
    std::byte* to = dense.data();
    for (const Box& box : flat_range_to_boxes(view.sizes, begin, end)) {
      int64_t first = 0;
      for (size_t d = 0; d < box.offsets.size(); ++d) first += box.offsets[d] * view.strides[d];
      copy_strided(view.data + first * size, view.strides, to, contiguous_strides(box.sizes), box.sizes, size);
      to += volume(box.sizes) * size;
    }
    fn(std::move(dense));
  }
}

}  // namespace reshard
