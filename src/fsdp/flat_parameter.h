// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// FlatParameter: parameters of one unit that share dtype and requires_grad, flattened, concatenated and padded to a
// multiple of the group size. This rank keeps one shard; the whole lies in one permanent storage that is filled by an
// all-gather and freed again. With mixed precision the whole has the dtype of the computation, the shard its own.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fsdp/interception.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace reshard {

/// The bytes of `tensor` (dense) as a 1-D uint8 tensor over the same memory.
at::Tensor byte_view(const at::Tensor& tensor);
/// A tensor over part of the dense `base` that is no view to autograd: `offset` in elements.
at::Tensor alias_range(const at::Tensor& base, int64_t offset, int64_t numel);

/// The ranks that hold the same shards as this one; null where there are no others.
ProcessGroup* replica_group(const FsdpOptions& options);

class FlatParameter {
 public:
  struct Member {
    size_t index;       // into FsdpEngine::parameters()
    at::Tensor handle;  // the module's own
    int64_t full_offset = 0;
    int64_t shard_offset = 0;
    bool arrived = false;        // its gradient of the running backward pass is in flat_grad_
    bool has_grad = false;       // flat_grad_ holds something for it, from this pass or from no_sync passes before
    int64_t handle_version = 0;  // when last gathered: a change means a write that will be lost
    at::Tensor refused_grad;     // stands for handle.grad() after a backward pass; using it is an error
    bool refusing = false;       // handle.grad() was set to refused_grad
    int64_t writes = 0;          // to its part of the shard
    // Which tensor the last reduction left in slice.grad(), with its version, and the writes until then.
    const void* left_grad = nullptr;
    int64_t left_grad_version = 0;
    int64_t left_writes = 0;
  };

  /// `values(handles)` gives the dense values of the handles, on any device. Builds the shard, points the handles into
  /// the (freed) whole, and fills begin, end and slice of each member's entry in `parameters`.
  FlatParameter(std::string unit, std::vector<Member> members, std::vector<ShardedParameter>& parameters,
                const FsdpOptions& options, FsdpMemoryStats& stats,
                const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& values);
  ~FlatParameter();
  FlatParameter(const FlatParameter&) = delete;
  FlatParameter& operator=(const FlatParameter&) = delete;

  const std::string& unit() const { return unit_; }
  bool requires_grad() const { return requires_grad_; }
  std::vector<Member>& members() { return members_; }
  const std::vector<Member>& members() const { return members_; }
  uint64_t bytes() const { return static_cast<uint64_t>(full_.nbytes()); }

  bool is_unsharded() const { return unsharded_; }
  /// True if the whole is or was gathered, and the shard was written since.
  bool is_stale() const { return gathered_writes_ >= 0 && gathered_writes_ != writes_; }
  /// Someone wrote to the slice, or view of a slice, that begins at this element of the shard.
  void note_write(int64_t offset);
  /// Someone wrote to the shard without an operator that would have shown it.
  void note_writes();
  /// Gathers (a collective), or ends what begin_unshard() began. `is_unsharded()` must be false.
  void unshard();
  /// Begins to gather, where that is not so yet; until unshard() the whole may not be read.
  void begin_unshard();
  bool is_prefetched() const { return gathering_.has_value(); }
  /// Frees the whole. Warns once for each parameter that was written to, unless `writes_kept`.
  void reshard(bool writes_kept = false);
  /// Gathers in the shard's dtype, for the handles (a collective).
  void summon();
  /// Ends it; `written_back`: this rank's part of what the handles hold goes into its shard.
  void end_summon(bool written_back);
  /// A copy of each parameter, whole, in the shard's dtype (a collective).
  std::vector<at::Tensor> full_parameters();
  /// This rank's elements [shard_begin(), shard_end()) of the flattened parameters, which have flat_shape(), 1-D and without
  /// the padding. Only with kFlat is the unit cut so.
  at::Tensor shard() const;
  const Dims& flat_shape() const { return flat_shape_; }
  int64_t shard_begin() const { return std::min(group_->rank() * shard_numel_, flat_shape_[0]); }
  int64_t shard_end() const { return std::min((group_->rank() + 1) * shard_numel_, flat_shape_[0]); }
  /// True while the handle still is what this class made of it. (Module::to and set_data replace it.)
  bool owns(const Member& member) const;

  /// Adds a gradient of full shape into the flat gradient.
  void add_gradient(Member& member, const at::Tensor& gradient);
  bool all_arrived() const { return arrived_ == members_.size(); }
  /// True if nobody has written or replaced the slice's gradient since the last reduction (or scaling).
  bool gradient_is_as_left(const Member& member) const;
  bool has_gradient() const { return flat_grad_.defined(); }
  /// Averages and reduce-scatters the flat gradient into the slices' grads (a collective, then one over the replicas),
  /// and frees it.
  void reduce_gradient();
  /// Forgets which gradients arrived in this pass; the flat gradient stays.
  void end_pass();
  /// True while some gradients of a pass have arrived and others have not; between passes, after one that broke off.
  bool pass_is_open() const { return arrived_ > 0; }
  void drop_gradient();
  /// Multiplies the slices' gradients.
  void scale_gradients(double factor);

  const c10::StorageImpl* storage() const { return full_.storage().unsafeGetStorageImpl(); }
  const c10::StorageImpl* shard_storage() const { return shard_.storage().unsafeGetStorageImpl(); }
  const c10::StorageImpl* gradient_storage() const { return refused_.storage().unsafeGetStorageImpl(); }

  int pins = 0;  // operators that are using the whole right now

 private:
  ShardedParameter& parameter(const Member& member) const { return (*parameters_)[member.index]; }
  bool is_mixed() const { return full_.scalar_type() != shard_.scalar_type(); }
  void point_handles(const at::Tensor& whole);
  void copy_chunks(const at::Tensor& chunks, const at::Tensor& whole, bool to_whole) const;
  /// A gather on its way, with what it reads and, for kDim0Chunks, the chunks that it fills.
  struct Gather {
    at::Tensor sent, chunks;
    PendingCollective collective;
  };
  Gather begin_gather(at::Tensor& whole);
  void end_gather(Gather& gather, at::Tensor& whole);
  void write_back(const at::Tensor& whole);
  void warn_of_lost_writes();
  void count_unsharded(uint64_t bytes);
  void allocate_whole();
  void free_whole();

  std::string unit_;
  std::vector<Member> members_;
  std::vector<ShardedParameter>* parameters_;
  ProcessGroup* group_;
  ProcessGroup* replicas_;  // the ranks that hold the same shard; null: only this one
  ShardLayout layout_;
  bool poison_freed_;
  bool requires_grad_;
  FsdpMemoryStats& stats_;
  Dims flat_shape_{0};
  int64_t shard_numel_ = 0;
  bool unsharded_ = false;
  bool warned_ = false;
  int64_t writes_ = 0;
  int64_t gathered_writes_ = -1;
  size_t arrived_ = 0;
  at::ScalarType reduce_dtype_;
  at::Tensor full_;  // over the permanent storage
  at::Tensor shard_;
  at::Tensor full_bytes_;
  std::optional<Gather> gathering_;
  at::Tensor summoned_;  // in place of full_ where that has another dtype than the shard
  at::Tensor flat_grad_;
  at::Tensor refused_;  // a storage without memory, for Member::refused_grad
};

}  // namespace reshard
