// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/placement.h"

#include <algorithm>

#include "reshard/core/error.h"

namespace reshard {
namespace {

/// Positions of one dimension of the whole tensor.
struct Range {
  int64_t begin;
  int64_t size;
};
using Ranges = std::vector<Range>;

int64_t total(const Ranges& ranges) {
  int64_t n = 0;
  for (const Range& range : ranges) n += range.size;
  return n;
}

Range chunk(int64_t size, int64_t count, int64_t index) {
  const Box box = split_evenly({{0}, {size}}, 0, count, index);
  return {box.offsets[0], box.sizes[0]};
}

/// Adds the positions that come [wanted.begin, wanted.begin + wanted.size)-th in `from`.
void append(Ranges& to, const Ranges& from, const Range& wanted) {
  int64_t passed = 0;
  for (const Range& range : from) {
    const int64_t skip = std::max<int64_t>(0, wanted.begin - passed);
    const int64_t end = std::min(range.size, wanted.begin + wanted.size - passed);
    passed += range.size;
    if (skip >= end) continue;
    const int64_t begin = range.begin + skip;
    if (!to.empty() && to.back().begin + to.back().size == begin) {
      to.back().size += end - skip;
    } else {
      to.push_back({begin, end - skip});
    }
  }
}

[[noreturn]] void refuse(const std::string& what, const std::string& wanted, const std::string& found) {
  throw Error(ErrorCode::kInvalidArgument, what, {.wanted = wanted, .found = found});
}

}  // namespace

std::string to_string(const Placement& placement) {
  if (const auto* shard = std::get_if<Shard>(&placement)) return "Shard(" + std::to_string(shard->dim) + ")";
  if (const auto* shard = std::get_if<StridedShard>(&placement))
    return "StridedShard(" + std::to_string(shard->dim) + ", " + std::to_string(shard->split_factor) + ")";
  return "Replicate()";
}

std::string to_string(const Placements& placements) {
  std::string text;
  for (const Placement& placement : placements) text += (text.empty() ? "" : ", ") + to_string(placement);
  return "[" + text + "]";
}

LocalLayout compute_local_layout(const Dims& shape, const Dims& mesh_shape, const Dims& coordinate,
                                 const Placements& placements) {
  if (placements.size() != mesh_shape.size() || coordinate.size() != mesh_shape.size()) {
    refuse("a mesh needs one placement and one coordinate for each of its dimensions",
           std::to_string(mesh_shape.size()), to_string(placements) + " at coordinate " + to_string(coordinate));
  }
  std::vector<Ranges> ranges;
  for (const int64_t size : shape) ranges.push_back({{0, size}});
  for (size_t m = 0; m < placements.size(); ++m) {
    if (coordinate[m] < 0 || coordinate[m] >= mesh_shape[m]) {
      refuse("the coordinate lies outside the mesh", "inside " + to_string(mesh_shape), to_string(coordinate));
    }
    int64_t dim = 0;
    int64_t split_factor = 1;
    if (const auto* shard = std::get_if<Shard>(&placements[m])) {
      dim = shard->dim;
    } else if (const auto* strided = std::get_if<StridedShard>(&placements[m])) {
      dim = strided->dim;
      split_factor = strided->split_factor;
    } else {
      continue;
    }
    const auto rank = static_cast<int64_t>(shape.size());
    if (dim < -rank || dim >= rank) {
      refuse("a placement names a dimension that the tensor lacks",
             "one of the " + std::to_string(rank) + " of " + to_string(shape), to_string(placements[m]));
    }
    if (split_factor < 1) refuse("the split factor is below 1", "at least 1", to_string(placements[m]));
    Ranges& held = ranges[static_cast<size_t>(dim < 0 ? dim + rank : dim)];
    const int64_t size = total(held);
    Ranges mine;
    for (int64_t i = 0; i < split_factor; ++i) {
      const Range outer = chunk(size, split_factor, i);
      if (outer.size == 0) break;
      const Range inner = chunk(outer.size, mesh_shape[m], coordinate[m]);
      append(mine, held, {outer.begin + inner.begin, inner.size});
    }
    held = std::move(mine);
  }

  LocalLayout layout{Dims(shape.size(), 0),
                     {{Box{Dims(shape.size(), 0), Dims(shape.size(), 0)}, Dims(shape.size(), 0)}}};
  for (size_t d = 0; d < shape.size(); ++d) layout.sizes[d] = total(ranges[d]);
  if (volume(layout.sizes) == 0) {
    for (size_t d = 0; d < shape.size(); ++d)
      ranges[d] = {{layout.sizes[d] == 0 ? shape[d] : ranges[d].front().begin, layout.sizes[d]}};
  }
  // The product of the dimensions' ranges, the last dimension's running fastest.
  for (size_t d = 0; d < shape.size(); ++d) {
    std::vector<LocalLayout::Part> parts;
    for (const LocalLayout::Part& part : layout.parts) {
      int64_t local = 0;
      for (const Range& range : ranges[d]) {
        parts.push_back(part);
        parts.back().box.offsets[d] = range.begin;
        parts.back().box.sizes[d] = range.size;
        parts.back().local_offsets[d] = local;
        local += range.size;
      }
    }
    layout.parts = std::move(parts);
  }
  return layout;
}

}  // namespace reshard
