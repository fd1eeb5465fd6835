// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/planner/state.h"

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

}  // namespace reshard
