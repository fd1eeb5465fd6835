// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Random shapes and random exact tilings of them, for property tests.

#include <random>
#include <utility>
#include <vector>

#include "reshard/core/box.h"

namespace reshard {

using Random = std::mt19937_64;

inline int64_t random_between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

/// Rank 0 to 4, sizes 1 to `max_size`.
inline Dims random_shape(Random& random, int64_t max_size = 6) {
  Dims shape(static_cast<size_t>(random_between(random, 0, 4)), 0);
  for (int64_t& size : shape) size = random_between(random, 1, max_size);
  return shape;
}

/// At most `max_parts` boxes that tile a tensor of `shape`: cut at random, or flat ranges as FSDP cuts them.
inline std::vector<Box> random_tiling(Random& random, const Dims& shape, size_t max_parts = 24) {
  std::vector<Box> boxes;
  if (random_between(random, 0, 2) == 0) {
    const int64_t n = volume(shape);
    int64_t begin = 0;
    while (begin < n) {
      const int64_t end =
          boxes.size() + 8 < max_parts ? random_between(random, begin + 1, n) : n;  // one range is at most 7 boxes
      for (Box& box : flat_range_to_boxes(shape, begin, end)) boxes.push_back(std::move(box));
      begin = end;
    }
    return boxes;
  }
  boxes.push_back(whole_box(shape));
  const auto cuts = random_between(random, 0, static_cast<int64_t>(max_parts) - 1);
  for (int64_t cut = 0; cut < cuts && !shape.empty(); ++cut) {
    const auto which = static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(boxes.size()) - 1));
    const auto dim = static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(shape.size()) - 1));
    Box& low = boxes[which];
    if (low.sizes[dim] < 2) continue;
    Box high = low;
    const int64_t at = random_between(random, 1, low.sizes[dim] - 1);
    low.sizes[dim] = at;
    high.offsets[dim] += at;
    high.sizes[dim] -= at;
    boxes.push_back(std::move(high));
  }
  return boxes;
}

/// A random box with elements inside a tensor of `shape`.
inline Box random_box(Random& random, const Dims& shape) {
  Box box = whole_box(shape);
  for (size_t i = 0; i < shape.size(); ++i) {
    box.offsets[i] = random_between(random, 0, shape[i] - 1);
    box.sizes[i] = random_between(random, 1, shape[i] - box.offsets[i]);
  }
  return box;
}

}  // namespace reshard
