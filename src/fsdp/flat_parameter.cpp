// SPDX-License-Identifier: BSD-3-Clause
#include "fsdp/flat_parameter.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstring>

#include "reshard/core/error.h"
#include "reshard/core/hooks.h"

namespace reshard {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Elements of a parameter that kDim0Chunks gives to each rank: whole rows, as many as torch.chunk gives to the first.
int64_t chunk_numel(const Dims& shape, int64_t numel, int64_t ranks) {
  if (shape.empty()) return 1;
  return shape[0] == 0 ? 0 : ceil_div(shape[0], ranks) * (numel / shape[0]);
}

/// A tensor over `storage` that carries the shard key. Built by hand, because view operators refuse a storage
/// without memory.
c10::intrusive_ptr<c10::TensorImpl> keyed_tensor(const c10::Storage& storage, const at::Tensor& like, int64_t offset,
                                                 const Dims& shape) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage),
                                                   like.key_set().add(kShardKey), like.dtype());
  const Dims strides = contiguous_strides(shape);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides({shape.data(), shape.size()}, {strides.data(), strides.size()});
  return impl;
}

}  // namespace

at::Tensor byte_view(const at::Tensor& tensor) {
  const int64_t offset = tensor.storage_offset() * tensor.element_size();
  return at::empty({0}, tensor.options().dtype(at::kByte))
      .set_(tensor.storage(), offset, {static_cast<int64_t>(tensor.nbytes())}, {1});
}

at::Tensor alias_range(const at::Tensor& base, int64_t offset, int64_t numel) {
  return at::empty({0}, base.options()).set_(base.storage(), base.storage_offset() + offset, {numel}, {1});
}

ProcessGroup* replica_group(const FsdpOptions& options) {
  if (!options.mesh || options.mesh->ndim() < 2 || options.mesh->size(0) == 1) return nullptr;
  return options.mesh->get_group(0).get();
}

FlatParameter::FlatParameter(std::string unit, std::vector<Member> members, std::vector<ShardedParameter>& parameters,
                             const FsdpOptions& options, FsdpMemoryStats& stats,
                             const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& values)
    : unit_(std::move(unit)),
      members_(std::move(members)),
      parameters_(&parameters),
      group_(options.process_group.get()),
      replicas_(replica_group(options)),
      layout_(options.layout),
      poison_freed_(options.poison_freed),
      requires_grad_(members_.front().handle.requires_grad()),
      stats_(stats) {
  const at::NoGradGuard no_grad;
  const int64_t ranks = group_->size();
  const int64_t rank = group_->rank();
  int64_t& numel = flat_shape_[0];
  for (Member& member : members_) {
    const ShardedParameter& p = parameter(member);
    member.full_offset = numel;
    member.shard_offset = shard_numel_;
    numel += volume(p.shape);
    shard_numel_ += chunk_numel(p.shape, volume(p.shape), ranks);  // kDim0Chunks; replaced below for kFlat
  }
  if (layout_ == ShardLayout::kFlat) shard_numel_ = ceil_div(numel, ranks);
  for (Member& member : members_) {
    ShardedParameter& p = parameter(member);
    const int64_t n = volume(p.shape);
    if (layout_ == ShardLayout::kFlat) {
      const int64_t shard_begin = rank * shard_numel_;
      p.begin = std::clamp<int64_t>(shard_begin - member.full_offset, 0, n);
      p.end = std::clamp<int64_t>(shard_begin + shard_numel_ - member.full_offset, 0, n);
      member.shard_offset = std::clamp<int64_t>(member.full_offset - shard_begin, 0, shard_numel_);
    } else {
      const int64_t chunk = chunk_numel(p.shape, n, ranks);
      p.begin = std::min(rank * chunk, n);
      p.end = std::min((rank + 1) * chunk, n);
    }
  }

  const at::ScalarType own = members_.front().handle.scalar_type();
  const MixedPrecision& mixed = options.mixed_precision;
  const at::ScalarType computed = at::isFloatingType(own) ? mixed.param_dtype.value_or(own) : own;
  reduce_dtype_ = at::isFloatingType(own) ? mixed.reduce_dtype.value_or(computed) : own;
  const auto tensor_options = at::TensorOptions().dtype(own).device(options.device);
  at::Tensor whole = at::empty({layout_ == ShardLayout::kFlat ? shard_numel_ * ranks : numel}, tensor_options);
  const uint64_t whole_bytes = whole.nbytes();
  count_unsharded(whole_bytes);
  whole.narrow(0, numel, whole.numel() - numel).zero_();
  {
    std::vector<at::Tensor> handles;
    for (const Member& member : members_) handles.push_back(member.handle);
    const std::vector<at::Tensor> given = values(handles);
    for (size_t i = 0; i < members_.size(); ++i) {
      whole.narrow(0, members_[i].full_offset, given[i].numel()).view(given[i].sizes()).copy_(given[i]);
    }
  }
  at::Tensor whole_as_bytes = byte_view(whole);
  if (options.sync_module_states && whole.numel() > 0) group_->broadcast(whole_as_bytes, 0);

  shard_ = at::zeros({shard_numel_}, tensor_options);
  write_back(whole);
  // Rows that start apart would stay apart. This is where they get what sync_module_states has sent over the first one, too.
  at::Tensor shard_as_bytes = byte_view(shard_);
  if (replicas_ != nullptr && shard_numel_ > 0) replicas_->broadcast(shard_as_bytes, 0);
  full_ = computed == own ? std::move(whole) : at::empty({whole.numel()}, tensor_options.dtype(computed));
  full_bytes_ = byte_view(full_);
  stats_.unsharded_bytes -= whole_bytes;
  free_whole();
  refused_ = at::Tensor(keyed_tensor(c10::Storage(c10::Storage::use_byte_size_t(), bytes(),
                                                  at::DataPtr(nullptr, full_.device()), nullptr, /*resizable=*/false),
                                     full_, 0, Dims{full_.numel()}));
  refused_.storage().unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "the module's own handle of a sharded parameter has no gradient: it is in ShardedModule::parameters()");
  for (Member& member : members_) {
    ShardedParameter& p = parameter(member);
    const int64_t n = p.end - p.begin;
    const int64_t place = n > 0 ? member.shard_offset : shard_numel_ + (&member - members_.data());
    p.slice = at::Tensor(keyed_tensor(shard_.storage(), shard_, place, Dims{n}));
    p.slice.set_requires_grad(requires_grad_);
    member.refused_grad = at::Tensor(keyed_tensor(refused_.storage(), full_, member.full_offset, p.shape));
  }
  point_handles(full_);
}

FlatParameter::~FlatParameter() {
  reshard(true);
  drop_gradient();
}

void FlatParameter::point_handles(const at::Tensor& whole) {
  for (Member& member : members_) {
    member.handle.mutable_grad().reset();
    const bool other_dtype = member.handle.scalar_type() != whole.scalar_type();
    member.handle.unsafeGetTensorImpl()->shallow_copy_from(
        keyed_tensor(whole.storage(), whole, member.full_offset, parameter(member).shape));
    // It may be left from a pass before, and would cast gradients to the dtype of then.
    if (other_dtype && requires_grad_)
      torch::autograd::impl::get_autograd_meta(member.handle)->grad_accumulator_.reset();
  }
}

bool FlatParameter::owns(const Member& member) const {
  return member.handle.has_storage() && member.handle.storage().unsafeGetStorageImpl() == storage();
}

void FlatParameter::note_write(int64_t offset) {
  ++writes_;
  // Slices without elements have places of their own behind the shard.
  if (offset >= shard_numel_) {
    ++members_[static_cast<size_t>(offset - shard_numel_)].writes;
    return;
  }
  Member* written = nullptr;
  for (Member& member : members_) {
    if (member.shard_offset <= offset && parameter(member).slice.numel() > 0) written = &member;
  }
  if (written != nullptr) ++written->writes;
}

void FlatParameter::note_writes() {
  ++writes_;
  for (Member& member : members_) ++member.writes;
}

void FlatParameter::count_unsharded(uint64_t bytes) {
  stats_.unsharded_bytes += bytes;
  stats_.peak_unsharded_bytes = std::max(stats_.peak_unsharded_bytes, stats_.unsharded_bytes);
}

void FlatParameter::allocate_whole() {
  c10::StorageImpl* storage = full_.storage().unsafeGetStorageImpl();
  const c10::DeviceGuard device(full_.device());  // allocators work on the current one
  at::DataPtr memory = storage->allocator()->allocate(storage->nbytes());
  storage->clear_data_ptr_access_error_msg_();
  storage->set_data_ptr_noswap(std::move(memory));
  unsharded_ = true;
  count_unsharded(bytes());
}

void FlatParameter::free_whole() {
  c10::StorageImpl* storage = full_.storage().unsafeGetStorageImpl();
  // The size stays, so that view operators work on a sharded parameter; every way to its data throws this text.
  storage->set_data_ptr_noswap(at::DataPtr(nullptr, full_.device()));
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_("parameters of unit '" + unit_ +
                                                                "' were read while sharded");
  if (unsharded_) stats_.unsharded_bytes -= bytes();
  unsharded_ = false;
}

void FlatParameter::copy_chunks(const at::Tensor& chunks, const at::Tensor& whole, bool to_whole) const {
  const int64_t ranks = group_->size();
  for (const Member& member : members_) {
    const Dims& shape = parameter(member).shape;
    const int64_t n = volume(shape);
    const int64_t chunk = chunk_numel(shape, n, ranks);
    for (int64_t rank = 0; rank < ranks && rank * chunk < n; ++rank) {
      const int64_t length = std::min(chunk, n - rank * chunk);
      const at::Tensor part = chunks.narrow(0, rank * shard_numel_ + member.shard_offset, length);
      const at::Tensor place = whole.narrow(0, member.full_offset + rank * chunk, length);
      to_whole ? place.copy_(part) : part.copy_(place);
    }
  }
}

FlatParameter::Gather FlatParameter::begin_gather(at::Tensor& whole) {
  Gather gather;
  if (whole.numel() == 0) return gather;
  gather.sent = byte_view(shard_.to(whole.scalar_type()));
  at::Tensor filled = whole;
  if (layout_ == ShardLayout::kDim0Chunks) {
    filled = gather.chunks = at::empty({shard_numel_ * group_->size()}, whole.options());
    count_unsharded(filled.nbytes());
  }
  at::Tensor filled_bytes = byte_view(filled);
  try {
    gather.collective = group_->begin_all_gather_into(filled_bytes, gather.sent);
  } catch (...) {
    if (gather.chunks.defined()) stats_.unsharded_bytes -= gather.chunks.nbytes();
    throw;
  }
  return gather;
}

void FlatParameter::end_gather(Gather& gather, at::Tensor& whole) {
  if (gather.chunks.defined()) stats_.unsharded_bytes -= gather.chunks.nbytes();  // whatever comes
  gather.collective.wait();
  if (gather.chunks.defined()) copy_chunks(gather.chunks, whole, /*to_whole=*/true);
}

void FlatParameter::begin_unshard() {
  if (unsharded_ || gathering_) return;
  const at::NoGradGuard no_grad;
  allocate_whole();
  try {
    gathering_ = begin_gather(full_);
  } catch (...) {
    free_whole();
    throw;
  }
  unsharded_ = false;  // to others; its memory is there
  gathered_writes_ = writes_;
}

void FlatParameter::unshard() {
  const at::NoGradGuard no_grad;
  if (is_prefetched()) {
    ++stats_.prefetches;
  } else {
    begin_unshard();
  }
  unsharded_ = true;
  try {
    Gather gather = std::move(*gathering_);
    gathering_.reset();
    end_gather(gather, full_);
  } catch (...) {
    free_whole();
    throw;
  }
  ++stats_.gathers;
  for (Member& member : members_) member.handle_version = member.handle._version();
}

void FlatParameter::warn_of_lost_writes() {
  for (const Member& member : members_) {
    if (warned_ || member.handle._version() == member.handle_version) continue;
    warned_ = true;
    log(LogLevel::kWarning,
        "parameter '" + parameter(member).names.front() +
            "' was written to while it was gathered; the write is lost. Write through SummonFullParams with writeback");
  }
}

void FlatParameter::reshard(bool writes_kept) {
  if (gathering_) {
    try {
      unshard();  // the others send all the same
      --stats_.prefetches;
    } catch (const Error&) {
      return;  // nobody asked for it; a group that is broken says so at the next collective
    }
    writes_kept = true;
  }
  if (!unsharded_) return;
  if (!writes_kept) warn_of_lost_writes();
  if (poison_freed_) full_bytes_.fill_(0xFF);
  free_whole();
}

void FlatParameter::summon() {
  if (is_stale() || is_mixed()) reshard();
  if (!is_mixed()) {
    if (!unsharded_) unshard();
    return;
  }
  const at::NoGradGuard no_grad;
  at::Tensor whole = at::empty(full_.sizes(), shard_.options());
  Gather gather = begin_gather(whole);
  end_gather(gather, whole);
  ++stats_.gathers;
  count_unsharded(whole.nbytes());
  summoned_ = std::move(whole);
  point_handles(summoned_);
  for (Member& member : members_) member.handle_version = member.handle._version();
}

void FlatParameter::end_summon(bool written_back) {
  if (!is_mixed()) {
    if (written_back) write_back(full_);
    reshard(written_back);
    return;
  }
  if (!summoned_.defined()) return;
  written_back ? write_back(summoned_) : warn_of_lost_writes();
  point_handles(full_);
  stats_.unsharded_bytes -= summoned_.nbytes();
  summoned_ = at::Tensor();
}

std::vector<at::Tensor> FlatParameter::full_parameters() {
  const at::NoGradGuard no_grad;
  at::Tensor whole = at::empty(full_.sizes(), shard_.options());
  const uint64_t extra = whole.nbytes();
  Gather gather = begin_gather(whole);
  end_gather(gather, whole);
  ++stats_.gathers;
  count_unsharded(extra);
  stats_.unsharded_bytes -= extra;
  std::vector<at::Tensor> result;
  for (const Member& member : members_) {
    const Dims& shape = parameter(member).shape;
    result.push_back(whole.narrow(0, member.full_offset, volume(shape)).view({shape.data(), shape.size()}).clone());
  }
  return result;
}

at::Tensor FlatParameter::shard() const {
  return shard_.narrow(0, 0, shard_end() - shard_begin()).detach().requires_grad_(requires_grad_);
}

void FlatParameter::write_back(const at::Tensor& whole) {
  const at::NoGradGuard no_grad;
  for (const Member& member : members_) {
    const ShardedParameter& p = parameter(member);
    const int64_t n = p.end - p.begin;
    shard_.narrow(0, member.shard_offset, n).copy_(whole.narrow(0, member.full_offset + p.begin, n));
  }
  note_writes();
}

void FlatParameter::add_gradient(Member& member, const at::Tensor& gradient) {
  const at::NoGradGuard no_grad;
  if (!flat_grad_.defined()) {
    flat_grad_ = at::zeros({full_.numel()}, full_.options().dtype(reduce_dtype_));
    stats_.gradient_bytes += flat_grad_.nbytes();
    stats_.peak_gradient_bytes = std::max(stats_.peak_gradient_bytes, stats_.gradient_bytes);
  }
  const at::Tensor place = flat_grad_.narrow(0, member.full_offset, gradient.numel()).view(gradient.sizes());
  member.has_grad ? place.add_(gradient) : place.copy_(gradient);
  member.has_grad = true;
  if (!member.arrived) ++arrived_;
  member.arrived = true;
}

void FlatParameter::reduce_gradient() {
  const at::NoGradGuard no_grad;
  at::Tensor reduced = at::empty({shard_numel_}, flat_grad_.options());
  if (full_.numel() > 0) {
    at::Tensor input = flat_grad_;
    if (layout_ == ShardLayout::kDim0Chunks) {
      input = at::zeros({shard_numel_ * group_->size()}, flat_grad_.options());
      copy_chunks(input, flat_grad_, /*to_whole=*/false);
    }
    at::Tensor output = reduced;
    if (input.is_complex()) {  // backends sum real numbers
      input = at::view_as_real(input).view(-1);
      output = at::view_as_real(output).view(-1);
    }
    // The sum of what many ranks hold may be too large for half precision where their mean is not: divided by about the
    // root of their number before and after, neither the parts get too small nor the sum too large.
    int64_t before = 1;
    if (input.scalar_type() == at::kHalf) {
      while (before * before < group_->size()) before *= 2;
      input.div_(before);
    }
    group_->reduce_scatter_into(output, input, /*average=*/before == 1);
    if (before > 1) output.mul_(static_cast<double>(before) / group_->size());
    if (replicas_ != nullptr) {
      output.div_(replicas_->size());  // before the sum, which might overflow
      replicas_->all_reduce_sum(output);
    }
  }
  reduced = reduced.to(shard_.scalar_type());
  ++stats_.reductions;
  for (Member& member : members_) {
    if (!member.has_grad)
      continue;  // stays undefined: with zeros, weight decay would move a parameter that was not used
    at::Tensor& slice = parameter(member).slice;
    const at::Tensor part = alias_range(reduced, member.shard_offset, slice.numel());
    if (slice.grad().defined()) {
      slice.mutable_grad().add_(part);
    } else {
      slice.mutable_grad() = part;
    }
  }
  drop_gradient();
  for (Member& member : members_) {
    const at::Tensor& slice = parameter(member).slice;
    member.left_grad = slice.grad().defined() ? slice.grad().unsafeGetTensorImpl() : nullptr;
    member.left_grad_version = slice.grad().defined() ? slice.grad()._version() : 0;
    member.left_writes = member.writes;
  }
}

bool FlatParameter::gradient_is_as_left(const Member& member) const {
  const at::Tensor& gradient = parameter(member).slice.grad();
  return gradient.defined() && gradient.unsafeGetTensorImpl() == member.left_grad &&
         gradient._version() == member.left_grad_version;
}

void FlatParameter::scale_gradients(double factor) {
  const at::NoGradGuard no_grad;
  for (Member& member : members_) {
    at::Tensor& gradient = parameter(member).slice.mutable_grad();
    if (!gradient.defined()) continue;
    const bool as_left = gradient_is_as_left(member);
    gradient.mul_(factor);
    if (as_left) member.left_grad_version = gradient._version();
  }
}

void FlatParameter::end_pass() {
  for (Member& member : members_) member.arrived = false;
  arrived_ = 0;
}

void FlatParameter::drop_gradient() {
  end_pass();
  for (Member& member : members_) member.has_grad = false;
  if (flat_grad_.defined()) stats_.gradient_bytes -= flat_grad_.nbytes();
  flat_grad_ = at::Tensor();
}

}  // namespace reshard
