// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Interception of the operations that read sharded parameters.
//
// Each sharded parameter carries one dispatch key that LibTorch leaves to out-of-tree code. A boxed fallback on that
// key sees every operator call with such a parameter, or a view of one, among its arguments, asks the owner of the
// parameter's storage to have the values there, and passes the call on. Operators without such arguments pay nothing.
// This is why modules work unmodified, and why backward needs no more: tensors saved for backward are the parameters or
// their views.

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/StorageImpl.h>

#include <string>

namespace reshard {

/// Also on the slices that optimizers update, so that every write to a shard is noticed. Autograd's version counters would miss
/// those through Tensor::data(), which is how torch::optim::SGD writes.
inline constexpr c10::DispatchKey kShardKey = c10::DispatchKey::DeferredInit;

/// Who answers for a storage.
class TouchTarget {
 public:
  virtual ~TouchTarget() = default;
  /// Brings the values in and keeps them there until unpin(), or throws. `op` is the operator's name, `tensor` the
  /// argument, `written` whether the operator writes to it. Calls nest.
  virtual void pin(const std::string& op, const at::Tensor& tensor, bool written) = 0;
  virtual void unpin() noexcept = 0;
};

/// From now on operators that read tensors on `storage` call `target`, on any thread. Both must live until
/// forget_storage.
void watch_storage(const c10::StorageImpl* storage, TouchTarget* target);
void forget_storage(const c10::StorageImpl* storage) noexcept;

}  // namespace reshard
