// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/load_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "checkpoint/save_state.h"
#include "checkpoint/value_codec.h"
#include "reshard/core/error.h"

namespace reshard {

namespace {

void add_stream(const at::Tensor& tensor, std::vector<c10::Stream>& streams) {
  if (tensor.is_cpu() || tensor.is_meta()) return;
  const c10::Device device = tensor.device();
  if (std::ranges::none_of(streams, [&](const c10::Stream& stream) { return stream.device() == device; })) {
    streams.push_back(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
}

}  // namespace

// Both rules are flattened by the thread that plans, before any reader thread runs.
const StateDictLoadState::Flat& StateDictLoadState::flat(FlattenRule rule) const {
  auto& made = flat_[static_cast<size_t>(rule)];
  if (!made) {
    Flat flat{flatten(state_, rule), {}, {}};
    flat.entries.reserve(flat.items.size());
    for (auto& item : flat.items) {
      StateEntry entry{std::move(item.fqn), std::move(item.path), BytesEntry{}};
      if (item.value->is<at::Tensor>() || item.value->is<ShardedTensor>())
        entry.value = make_tensor_entry(entry.fqn, *item.value);
      flat.entries.push_back(std::move(entry));
      if (item.value->is<at::Tensor>()) {
        add_stream(item.value->as<at::Tensor>(), flat.streams);
      } else if (item.value->is<ShardedTensor>()) {
        for (const LocalShard& local : item.value->as<ShardedTensor>().shards()) add_stream(local.tensor, flat.streams);
      }
    }
    made = std::move(flat);
  }
  return *made;
}

const at::Tensor& StateDictLoadState::chunk_tensor(FlattenRule rule, size_t entry, size_t chunk) const {
  const StateValue& value = *flat(rule).items[entry].value;
  return value.is<at::Tensor>() ? value.as<at::Tensor>() : value.as<ShardedTensor>().shards().at(chunk).tensor;
}

MutableTensorView StateDictLoadState::tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                                             DType dtype) {
  const at::Tensor& tensor = chunk_tensor(rule, entry, chunk);
  const StateEntry& named = flat(rule).entries[entry];
  if (tensor.is_conj() || tensor.is_neg()) {
    throw Error(ErrorCode::kUnsupported, "cannot load into a lazily conjugated or negated tensor", {.key = named.fqn});
  }
  for (size_t d = 0; d < region.sizes.size(); ++d) {
    if (region.sizes[d] > 1 && tensor.stride(static_cast<int64_t>(d)) == 0) {
      throw Error(ErrorCode::kInvalidArgument, "cannot load into an expanded tensor, whose elements share memory",
                  {.key = named.fqn});
    }
  }
  if (!tensor.is_cpu() || to_dtype(tensor.scalar_type()) != dtype) {
    const auto staged = std::make_shared<at::Tensor>(at::empty(
        at::IntArrayRef(region.sizes.begin(), region.sizes.size()), at::TensorOptions(to_scalar_type(dtype))));
    return {.data = static_cast<std::byte*>(staged->mutable_data_ptr()),
            .dtype = dtype,
            .sizes = region.sizes,
            .strides = to_dims(staged->strides()),
            .owner = staged};
  }
  // In place, without an owner: the state dict is borrowed for the whole load.
  MutableTensorView view{.data = static_cast<std::byte*>(tensor.mutable_data_ptr()),
                         .dtype = dtype,
                         .sizes = region.sizes,
                         .strides = to_dims(tensor.strides()),
                         .owner = nullptr};
  if (volume(region.sizes) != 0) {
    const Box& box = std::get<TensorEntry>(named.value).chunks.at(chunk);
    int64_t first = 0;  // element of the region's first in the tensor
    for (size_t d = 0; d < region.sizes.size(); ++d) first += (region.offsets[d] - box.offsets[d]) * view.strides[d];
    view.data += first * element_size(dtype);
  }
  return view;
}

void StateDictLoadState::commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                                       const MutableTensorView& view) {
  const at::Tensor& tensor = chunk_tensor(rule, entry, chunk);
  if (!view.owner) {
    // Bytes were written behind autograd's back: those who watch the version (a graph, an FSDP unit) must see it.
    tensor.unsafeGetTensorImpl()->bump_version();
    return;
  }
  const at::NoGradGuard no_grad;
  // Threads of a reader have streams of their own, which do not wait for what the caller has begun.
  c10::OptionalStreamGuard on_stream;
  for (const c10::Stream& stream : flat(rule).streams) {
    if (stream.device() == tensor.device()) on_stream.reset_stream(stream);
  }
  const Box& box = std::get<TensorEntry>(flat(rule).entries[entry].value).chunks.at(chunk);
  at::Tensor part = tensor.detach();  // shares memory and version counter
  for (size_t d = 0; d < region.sizes.size(); ++d) {
    part = part.narrow(static_cast<int64_t>(d), region.offsets[d] - box.offsets[d], region.sizes[d]);
  }
  part.copy_(*static_cast<const at::Tensor*>(view.owner.get()));
}

void StateDictLoadState::load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) {
  *flat(rule).items[entry].value = decode_value(archive);
}

}  // namespace reshard
