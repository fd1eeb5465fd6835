// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpointable: a tensor type of the user's own, saved and loaded like a ShardedTensor. The counterpart of PyTorch's _Checkpointable.

#include <ATen/core/Tensor.h>

#include <vector>

#include "reshard/core/box.h"
#include "reshard/state_dict/sharded_tensor.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// What save and load need to know of one rank's part of a tensor. It is asked while it is put into a state dict (`state["w"] = tensor`), on the
/// thread that does so; the state dict then holds the tensors that it gave, and not the object. All ranks give the same size and dtype.
class Checkpointable {
 public:
  virtual ~Checkpointable() = default;
  /// Of the whole tensor.
  virtual Dims size() const = 0;
  virtual at::ScalarType dtype() const = 0;
  virtual bool requires_grad() const { return false; }
  /// The boxes of the whole that this rank holds; over all ranks they tile it, replicas aside. (__create_chunk_list__)
  virtual std::vector<Box> chunk_list() const = 0;
  /// The memory of one of them: of the box's sizes, any strides, any device. A load writes to it. (__get_tensor_shard__)
  virtual at::Tensor tensor_shard(const Box& chunk) const = 0;

  /// What all this describes. Throws kInvalidArgument for boxes and tensors that do not fit together.
  ShardedTensor as_sharded_tensor() const;
  operator StateValue() const { return as_sharded_tensor(); }
};

}  // namespace reshard
