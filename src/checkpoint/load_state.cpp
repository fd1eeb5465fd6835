// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/load_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include "checkpoint/save_state.h"
#include "checkpoint/value_codec.h"
#include "reshard/core/error.h"

namespace reshard {

// Both rules are flattened by the thread that plans, before any reader thread runs.
const StateDictLoadState::Flat& StateDictLoadState::flat(FlattenRule rule) const {
  auto& made = flat_[static_cast<size_t>(rule)];
  if (!made) {
    Flat flat{flatten(state_, rule), {}};
    flat.entries.reserve(flat.items.size());
    for (const auto& item : flat.items) {
      StateEntry entry{item.fqn, item.path, BytesEntry{}};
      if (item.value->is<at::Tensor>() || item.value->is<ShardedTensor>())
        entry.value = make_tensor_entry(item.fqn, *item.value);
      flat.entries.push_back(std::move(entry));
    }
    made = std::move(flat);
  }
  return *made;
}

/// The part of chunk `chunk` that holds `region`, as a view.
at::Tensor StateDictLoadState::part(FlattenRule rule, size_t entry, size_t chunk, const Box& region) const {
  const Flat& flat = this->flat(rule);
  const StateValue& value = *flat.items[entry].value;
  const Box& box = std::get<TensorEntry>(flat.entries[entry].value).chunks.at(chunk);
  at::Tensor tensor =
      value.is<at::Tensor>() ? value.as<at::Tensor>() : value.as<ShardedTensor>().shards().at(chunk).tensor;
  const at::NoGradGuard no_grad;
  tensor = tensor.detach();  // shares memory and version counter
  if (tensor.is_conj() || tensor.is_neg()) {
    throw Error(ErrorCode::kUnsupported, "cannot load into a lazily conjugated or negated tensor",
                {.key = flat.items[entry].fqn});
  }
  for (size_t d = 0; d < region.sizes.size(); ++d) {
    if (region.sizes[d] > 1 && tensor.stride(static_cast<int64_t>(d)) == 0) {
      throw Error(ErrorCode::kInvalidArgument, "cannot load into an expanded tensor, whose elements share memory",
                  {.key = flat.items[entry].fqn});
    }
    tensor = tensor.narrow(static_cast<int64_t>(d), region.offsets[d] - box.offsets[d], region.sizes[d]);
  }
  return tensor;
}

MutableTensorView StateDictLoadState::tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                                             DType dtype) {
  at::Tensor tensor = part(rule, entry, chunk, region);
  if (!tensor.is_cpu() || to_dtype(tensor.scalar_type()) != dtype) {
    tensor = at::empty(tensor.sizes(), at::TensorOptions(to_scalar_type(dtype)));
  }
  auto owner = std::make_shared<at::Tensor>(tensor);
  return {.data = static_cast<std::byte*>(tensor.mutable_data_ptr()),
          .dtype = dtype,
          .sizes = to_dims(tensor.sizes()),
          .strides = to_dims(tensor.strides()),
          .owner = std::move(owner)};
}

void StateDictLoadState::commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                                       const MutableTensorView& view) {
  at::Tensor tensor = part(rule, entry, chunk, region);
  const auto& read = *static_cast<const at::Tensor*>(view.owner.get());
  const at::NoGradGuard no_grad;
  if (read.const_data_ptr() != tensor.const_data_ptr()) {
    tensor.copy_(read);
  } else {
    // Bytes were written behind autograd's back: those who watch the version (a graph, an FSDP unit) must see it.
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void StateDictLoadState::load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) {
  *flat(rule).items[entry].value = decode_value(archive);
}

}  // namespace reshard
