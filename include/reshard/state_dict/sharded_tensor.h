// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// ShardedTensor: one rank's view of a tensor that is spread over ranks. It says where this rank's shards lie in the
// whole; it owns no communication and knows nothing of the other ranks.

#include <ATen/core/Tensor.h>

#include <vector>

#include "reshard/core/box.h"
#include "reshard/core/dtype.h"

namespace reshard {

DType to_dtype(at::ScalarType type);
at::ScalarType to_scalar_type(DType dtype);
Dims to_dims(at::IntArrayRef values);

/// A box of the whole tensor and the memory that holds it. tensor.sizes() == box.sizes; any strides; shared with its
/// owner, so loading writes in place. Shards of one tensor on all ranks together must tile it exactly once saved
/// (replicas are allowed).
struct LocalShard {
  Box box;
  at::Tensor tensor;
};

/// A cheap value: copying shares the memory. A rank that holds no part has no shards (or only empty ones).
class ShardedTensor {
 public:
  /// Checks that shards lie inside `size`, have equal dtype and do not overlap one another (kInvalidArgument).
  ShardedTensor(Dims size, at::ScalarType dtype, std::vector<LocalShard> shards, bool requires_grad = false);

  const Dims& size() const { return size_; }
  at::ScalarType dtype() const { return dtype_; }
  bool requires_grad() const { return requires_grad_; }
  const std::vector<LocalShard>& shards() const { return shards_; }
  /// Elements in this rank's shards.
  int64_t local_numel() const;

 private:
  Dims size_;
  at::ScalarType dtype_;
  bool requires_grad_;
  std::vector<LocalShard> shards_;
};

}  // namespace reshard
