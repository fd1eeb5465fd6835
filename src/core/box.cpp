// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/box.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>

#include "reshard/core/checked.h"

namespace reshard {
namespace {

// Not for boxes that leave int64: callers have checked them against a shape.
int64_t end_of(const Box& box, size_t dim) { return box.offsets[dim] + box.sizes[dim]; }

bool contains(const Box& box, const Dims& point) {
  for (size_t i = 0; i < point.size(); ++i) {
    if (point[i] < box.offsets[i] || point[i] >= end_of(box, i)) return false;
  }
  return true;
}

TilingError overlap(size_t a, size_t b, Dims at) {
  return {TilingError::Kind::kOverlap, std::move(at), std::min(a, b), std::max(a, b)};
}

TilingError hole(Dims at) { return {TilingError::Kind::kHole, std::move(at), 0, 0}; }

// The signed-corner method. `full` holds the chunks with elements, `cut` the dimensions that they cut.
std::optional<TilingError> check_corners(const Dims& shape, std::span<const Box> chunks, std::vector<size_t> full,
                                         const std::vector<size_t>& cut) {
  // Corners that cancel leave the map at once, and neighbours cancel: in storage order it stays small.
  const auto before = [&](size_t a, size_t b) { return chunks[a].offsets < chunks[b].offsets; };
  if (!std::is_sorted(full.begin(), full.end(), before)) std::sort(full.begin(), full.end(), before);
  if (cut.size() == 1) {  // slices, the usual case: each must begin where the one before ends
    int64_t end = 0;
    const auto follows = [&](size_t i) {
      const bool ok = chunks[i].offsets[cut[0]] == end;
      end = end_of(chunks[i], cut[0]);
      return ok;
    };
    if (std::all_of(full.begin(), full.end(), follows) && end == shape[cut[0]]) return std::nullopt;
  }
  std::unordered_map<Dims, int64_t, DimsHash> corners;
  const auto add_corners = [&](const Box& box, int64_t sign) {
    Dims corner(cut.size(), 0);
    for (uint64_t mask = 0; mask < uint64_t{1} << cut.size(); ++mask) {
      for (size_t i = 0; i < cut.size(); ++i) {
        corner[i] = (mask >> i & 1) != 0 ? end_of(box, cut[i]) : box.offsets[cut[i]];
      }
      const auto it = corners.try_emplace(corner, 0).first;
      it->second += __builtin_popcountll(mask) % 2 == 0 ? sign : -sign;
      if (it->second == 0) corners.erase(it);
    }
  };
  add_corners(whole_box(shape), -1);
  for (size_t i : full) add_corners(chunks[i], 1);
  if (corners.empty()) return std::nullopt;

  // No corner below the smallest one is left, so its own sum is (number of chunks that hold it) - 1.
  const auto smallest =
      std::min_element(corners.begin(), corners.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  Dims at(shape.size(), 0);
  for (size_t i = 0; i < cut.size(); ++i) at[cut[i]] = smallest->first[i];
  if (smallest->second < 0) return hole(std::move(at));
  std::vector<size_t> holders;
  for (size_t i : full) {
    if (contains(chunks[i], at)) holders.push_back(i);
    if (holders.size() == 2) break;
  }
  return overlap(holders.at(0), holders.at(1), std::move(at));
}

// Number of elements that two boxes inside one tensor have in common.
int64_t common_volume(const Box& a, const Box& b) {
  int64_t product = 1;
  for (size_t i = 0; i < a.sizes.size(); ++i) {
    const int64_t size = std::min(end_of(a, i), end_of(b, i)) - std::max(a.offsets[i], b.offsets[i]);
    if (size <= 0) return 0;
    product *= size;
  }
  return product;
}

// Sweep along one dimension for overlapping pairs; without one, the volumes decide.
std::optional<TilingError> check_pairs(const Dims& shape, std::span<const Box> chunks, std::vector<size_t> full,
                                       size_t sweep_dim) {
  std::sort(full.begin(), full.end(),
            [&](size_t a, size_t b) { return chunks[a].offsets[sweep_dim] < chunks[b].offsets[sweep_dim]; });
  for (size_t i = 0; i < full.size(); ++i) {
    const Box& chunk = chunks[full[i]];
    for (size_t j = i + 1; j < full.size() && chunks[full[j]].offsets[sweep_dim] < end_of(chunk, sweep_dim); ++j) {
      if (common_volume(chunk, chunks[full[j]]) == 0) continue;
      return overlap(full[i], full[j], intersect(chunk, chunks[full[j]])->offsets);
    }
  }
  // Nothing overlaps from here on, so sums of volumes are exact and never exceed the tensor's.
  const auto has_hole = [&](const Box& region) {
    int64_t covered = 0;
    for (size_t i : full) covered += common_volume(region, chunks[i]);
    return covered < volume(region.sizes);
  };
  Box region = whole_box(shape);
  if (!has_hole(region)) return std::nullopt;

  // Narrow one dimension after the other to the first slab between two chunk borders that has a hole.
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    std::vector<int64_t> borders{0, shape[dim]};
    for (size_t i : full) {
      borders.push_back(chunks[i].offsets[dim]);
      borders.push_back(end_of(chunks[i], dim));
    }
    std::sort(borders.begin(), borders.end());
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    size_t low = 0;
    size_t high = borders.size() - 1;
    const auto set_region = [&](size_t from, size_t to) {
      region.offsets[dim] = borders[from];
      region.sizes[dim] = borders[to] - borders[from];
    };
    while (high - low > 1) {
      const size_t middle = low + (high - low) / 2;
      set_region(low, middle);
      (has_hole(region) ? high : low) = middle;
    }
    set_region(low, high);
  }
  return hole(std::move(region.offsets));
}

}  // namespace

std::string to_string(const Box& box) { return to_string(box.offsets) + "+" + to_string(box.sizes); }

Box whole_box(const Dims& sizes) { return {Dims(sizes.size(), 0), sizes}; }

bool is_inside(const Box& inner, const Dims& sizes) {
  if (inner.offsets.size() != sizes.size() || inner.sizes.size() != sizes.size()) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (inner.offsets[i] < 0 || inner.sizes[i] < 0 || inner.sizes[i] > sizes[i]) return false;
    if (inner.offsets[i] > sizes[i] - inner.sizes[i]) return false;
  }
  return true;
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  const size_t rank = a.sizes.size();
  if (a.offsets.size() != rank || b.offsets.size() != rank || b.sizes.size() != rank) {
    throw Error(ErrorCode::kInvalidArgument, "boxes of different rank: " + to_string(a) + " and " + to_string(b));
  }
  Box common{Dims(rank, 0), Dims(rank, 0)};
  for (size_t i = 0; i < rank; ++i) {
    const int64_t begin = std::max(a.offsets[i], b.offsets[i]);
    const int64_t end = std::min(checked_add(a.offsets[i], a.sizes[i], "end of box"),
                                 checked_add(b.offsets[i], b.sizes[i], "end of box"));
    if (begin >= end) return std::nullopt;
    common.offsets[i] = begin;
    common.sizes[i] = end - begin;
  }
  return common;
}

Box split_evenly(const Box& box, size_t dim, int64_t count, int64_t index) {
  if (dim >= box.sizes.size() || count <= 0 || index < 0 || index >= count) {
    throw Error(ErrorCode::kInvalidArgument, "cannot take part " + std::to_string(index) + " of " +
                                                 std::to_string(count) + " along dimension " + std::to_string(dim) +
                                                 " of " + to_string(box));
  }
  const int64_t n = box.sizes[dim];
  const int64_t part = n / count + (n % count != 0 ? 1 : 0);
  const int64_t begin = part != 0 && index <= n / part ? index * part : n;
  Box result = box;
  result.offsets[dim] += begin;
  result.sizes[dim] = std::min(part, n - begin);
  return result;
}

std::vector<Box> flat_range_to_boxes(const Dims& shape, int64_t begin, int64_t end) {
  if (begin < 0 || begin > end || end > volume(shape)) {
    throw Error(ErrorCode::kInvalidArgument, "flat range [" + std::to_string(begin) + ", " + std::to_string(end) +
                                                 ") is not inside a tensor of " + to_string(shape));
  }
  std::vector<Box> boxes;
  if (begin == end) return boxes;
  const size_t rank = shape.size();
  if (rank == 0) return {Box{}};
  const Dims strides = contiguous_strides(shape);
  while (begin < end) {
    // The outermost dimension along which whole slices begin here and fit.
    size_t dim = 0;
    while (begin % strides[dim] != 0 || end - begin < strides[dim]) ++dim;
    Box box{Dims(rank, 0), shape};
    int64_t rest = begin;
    for (size_t i = 0; i <= dim; ++i) {
      box.offsets[i] = rest / strides[i];
      box.sizes[i] = 1;
      rest %= strides[i];
    }
    box.sizes[dim] = std::min(shape[dim] - box.offsets[dim], (end - begin) / strides[dim]);
    begin += box.sizes[dim] * strides[dim];
    boxes.push_back(std::move(box));
  }
  return boxes;
}

void for_each_run(const Box& container, const Box& part,
                  const std::function<void(int64_t container_offset, int64_t part_offset, int64_t length)>& fn) {
  const size_t rank = container.sizes.size();
  Box inner = part;  // in coordinates of the container's own origin
  bool inside = container.offsets.size() == rank && part.offsets.size() == rank;
  for (size_t i = 0; inside && i < rank; ++i) {
    inside = !__builtin_sub_overflow(part.offsets[i], container.offsets[i], &inner.offsets[i]);
  }
  if (!inside || !is_inside(inner, container.sizes)) {
    throw Error(ErrorCode::kInvalidArgument, to_string(part) + " is not inside " + to_string(container));
  }
  if (volume(container.sizes) == 0 || volume(part.sizes) == 0) return;

  // Dimensions [outer, rank) make one run: the full ones at the end and the one before them.
  size_t outer = rank;
  while (outer > 0 && part.sizes[outer - 1] == container.sizes[outer - 1]) --outer;
  if (outer > 0) --outer;
  const Dims strides = contiguous_strides(container.sizes);
  int64_t container_offset = 0;
  int64_t length = 1;
  for (size_t i = 0; i < rank; ++i) {
    container_offset += inner.offsets[i] * strides[i];
    if (i >= outer) length *= part.sizes[i];
  }
  Dims position(outer, 0);
  for (int64_t part_offset = 0;; part_offset += length) {
    fn(container_offset, part_offset, length);
    size_t i = outer;
    for (; i > 0; --i) {  // step the last outer dimension, carrying to the left
      container_offset += strides[i - 1];
      if (++position[i - 1] < part.sizes[i - 1]) break;
      container_offset -= part.sizes[i - 1] * strides[i - 1];
      position[i - 1] = 0;
    }
    if (i == 0) return;
  }
}

std::string to_string(const TilingError& error, std::span<const Box> chunks) {
  const auto chunk = [&](size_t i) {
    return std::to_string(i) + (i < chunks.size() ? " " + to_string(chunks[i]) : std::string());
  };
  switch (error.kind) {
    case TilingError::Kind::kOutOfBounds:
      return "chunk " + chunk(error.first) + " lies outside the tensor";
    case TilingError::Kind::kOverlap:
      return "chunks " + chunk(error.first) + " and " + chunk(error.second) + " overlap at " + to_string(error.at);
    case TilingError::Kind::kHole:
      return "no chunk covers " + to_string(error.at);
  }
  return "unknown tiling error";
}

std::optional<TilingError> check_exact_tiling(const Dims& shape, std::span<const Box> chunks) {
  const int64_t elements = volume(shape);
  std::vector<size_t> full;  // chunks with elements
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (!is_inside(chunks[i], shape)) return TilingError{TilingError::Kind::kOutOfBounds, chunks[i].offsets, i, i};
    if (volume(chunks[i].sizes) != 0) full.push_back(i);
  }
  if (elements == 0 || (full.size() == 1 && chunks[full[0]].sizes == shape)) return std::nullopt;

  std::vector<size_t> cut;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (std::any_of(full.begin(), full.end(), [&](size_t i) { return chunks[i].sizes[dim] != shape[dim]; })) {
      cut.push_back(dim);
    }
  }
  // Real checkpoints cut few dimensions. Many chunks cut along many dimensions would need a corner map out of all
  // proportion to the catalogue.
  constexpr size_t kMaxCorners = size_t{1} << 22;
  if (cut.size() <= 4 || (cut.size() < 22 && full.size() <= kMaxCorners >> cut.size())) {
    return check_corners(shape, chunks, std::move(full), cut);
  }
  return check_pairs(shape, chunks, std::move(full), cut.front());
}

}  // namespace reshard
