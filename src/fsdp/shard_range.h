// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Filling one rank's flat range of a tensor from a state dict value of any layout.

#include <ATen/core/Tensor.h>

#include <string>

#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// The row-major elements [begin, end) of a tensor of `shape`, held by the 1-D tensor `local`.
struct ShardRange {
  const Dims& shape;
  int64_t begin;
  int64_t end;
  at::Tensor local;
};

/// Throws kInvalidArgument naming `key` unless `value` is a tensor or sharded tensor of the range's shape and dtype
/// that holds all of it.
void check_fills(const StateValue& value, const ShardRange& range, const std::string& key);
/// Copies what check_fills accepted. Memory that is the range's own already is left alone.
void fill(const StateValue& value, const ShardRange& range);
/// The same into a whole tensor with any strides.
void fill_tensor(const StateValue& value, const at::Tensor& tensor);

}  // namespace reshard
