// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Box: an axis-aligned part of an N-dimensional tensor, and the algebra that sharding and resharding are made of.
// All functions are pure and thread-safe. Units are elements, never bytes.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "reshard/core/dims.h"

namespace reshard {

/// Elements with offsets[i] <= x_i < offsets[i] + sizes[i]. `offsets` and `sizes` have the same rank; a rank-0 box is
/// the single element of a 0-d tensor. A box with any size 0 is empty but still has a place.
struct Box {
  Dims offsets;
  Dims sizes;
  friend bool operator==(const Box&, const Box&) = default;
};

/// "[2, 0]+[2, 8]": offsets + sizes.
std::string to_string(const Box& box);

/// The box that covers a whole tensor.
Box whole_box(const Dims& sizes);

/// True if `inner` lies inside a tensor of `sizes`, computed without overflow. False if ranks differ or anything is
/// negative.
bool is_inside(const Box& inner, const Dims& sizes);

/// The common part, or nothing if it holds no element. Ranks must be equal (kInvalidArgument), ends must fit int64
/// (kCorruptData).
std::optional<Box> intersect(const Box& a, const Box& b);

/// Part `index` of `count` when dimension `dim` of `box` is split as torch.chunk does for shards: ceil(n / count) each,
/// the last non-empty part shorter, the rest empty at the end of the dimension. kInvalidArgument if there is no such
/// dimension or part.
Box split_evenly(const Box& box, size_t dim, int64_t count, int64_t index);

/// The boxes of a row-major tensor of `shape` that hold exactly its flat elements [begin, end), in flat order: at most
/// 2 N - 1 for rank N (one for rank 0), each contiguous in the flat range. Empty for an empty range. kInvalidArgument
/// if the range is not inside the tensor.
std::vector<Box> flat_range_to_boxes(const Dims& shape, int64_t begin, int64_t end);

/// Calls fn(container_offset, part_offset, length) for every maximal contiguous run of `part` inside a dense row-major
/// `container`, in row-major order of the part. Offsets and lengths count elements; part_offset counts the elements of
/// the part already passed. `part` is given in the same coordinates as `container` and must lie inside it
/// (kInvalidArgument).
void for_each_run(const Box& container, const Box& part,
                  const std::function<void(int64_t container_offset, int64_t part_offset, int64_t length)>& fn);

/// What is wrong with a set of chunks that should cover a tensor.
struct TilingError {
  enum class Kind { kOutOfBounds, kOverlap, kHole };
  Kind kind;
  Dims at;        // a coordinate in the hole or in the overlap; the offsets of the chunk for kOutOfBounds
  size_t first;   // index of a chunk involved (kOutOfBounds, kOverlap)
  size_t second;  // index of the other chunk (kOverlap)
  friend bool operator==(const TilingError&, const TilingError&) = default;
};

/// "chunks 3 [0, 0]+[2, 8] and 5 [1, 0]+[2, 8] overlap at [1, 0]".
std::string to_string(const TilingError& error, std::span<const Box> chunks);

/// Checks that `chunks` cover a tensor of `shape` exactly: inside it, no two in common, nothing left out. Chunks
/// without elements only have to lie inside. Nothing is returned when all is well.
///
/// O(n 2^d) hash operations, d = the number of dimensions that any chunk cuts. The signed corners of all chunks must
/// cancel to the signed corners of the whole tensor; the lexicographically smallest corner that does not is a point
/// inside a hole or an overlap. (The mixed difference of an indicator function determines it, so the test is exact.)
/// Where n 2^d is out of proportion (d > 4 and more than 4 Mi corners) a sweep for overlapping pairs and a comparison
/// of volumes decide instead. Throws kCorruptData if the number of elements of `shape` leaves int64.
std::optional<TilingError> check_exact_tiling(const Dims& shape, std::span<const Box> chunks);

}  // namespace reshard
