// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Placements: how a tensor lies on a mesh, an N-dimensional grid of ranks. There is one placement for each dimension of
// the mesh; they are applied in the mesh's order, each to what the ones before left. The rules are those of PyTorch's
// DTensor. All functions are pure and thread-safe.
//
//   mesh {2, 2}, shape {8}   {Shard(0), Replicate()}            rows 0-3 | 0-3 | 4-7 | 4-7 for (0,0) (0,1) (1,0) (1,1)
//                            {Shard(0), Shard(0)}                    0-1 | 2-3 | 4-5 | 6-7   cut by dimension 0, then by 1
//                            {StridedShard(0, 2), Shard(0)}          0-1 | 4-5 | 2-3 | 6-7   cut by dimension 1, then by 0

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "reshard/core/box.h"

namespace reshard {

/// Every rank along the dimension of the mesh holds the same.
struct Replicate {
  friend bool operator==(const Replicate&, const Replicate&) = default;
};

/// Each rank along the dimension of the mesh holds a chunk of the tensor's dimension `dim`, cut as torch.chunk does:
/// ceil(n / ranks) each, the last one shorter, the rest empty. A negative `dim` counts from the last dimension.
struct Shard {
  constexpr explicit Shard(int64_t d) : dim(d) {}
  int64_t dim;
  friend bool operator==(const Shard&, const Shard&) = default;
};

/// A shard of what a later dimension of the mesh cuts first, as FSDP over tensor parallelism makes it: `dim` is cut into
/// `split_factor` chunks (the number of ranks by which later dimensions of the mesh shard it), each of these into one
/// chunk a rank, and a rank holds its chunk of each. PyTorch's _StridedShard.
struct StridedShard {
  constexpr StridedShard(int64_t d, int64_t factor) : dim(d), split_factor(factor) {}
  int64_t dim;
  int64_t split_factor;
  friend bool operator==(const StridedShard&, const StridedShard&) = default;
};

using Placement = std::variant<Replicate, Shard, StridedShard>;
/// One for each dimension of a mesh.
using Placements = std::vector<Placement>;

/// "Replicate()", "Shard(0)", "StridedShard(0, 2)".
std::string to_string(const Placement& placement);
/// "[Shard(0), Replicate()]".
std::string to_string(const Placements& placements);

/// What one rank holds of a tensor: a local tensor of `sizes`, put together from parts of the whole.
struct LocalLayout {
  struct Part {
    Box box;             // of the whole
    Dims local_offsets;  // where it begins in the local tensor
    friend bool operator==(const Part&, const Part&) = default;
  };
  Dims sizes;
  /// In row-major order, none bordering on the next. Exactly one where no StridedShard leaves gaps, and for a local
  /// tensor without elements: its offset in an empty dimension is the size of the whole, as PyTorch has it.
  std::vector<Part> parts;
};

/// The local layout at `coordinate` of a mesh of `mesh_shape`. Throws kInvalidArgument for a number of placements or
/// coordinates that is not the mesh's, a coordinate outside it, a dimension that `shape` lacks, and a split factor below
/// 1.
LocalLayout compute_local_layout(const Dims& shape, const Dims& mesh_shape, const Dims& coordinate,
                                 const Placements& placements);

}  // namespace reshard
