// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/save_state.h"

#include "checkpoint/value_codec.h"
#include "reshard/core/error.h"

namespace reshard {

TensorEntry make_tensor_entry(const std::string& fqn, const StateValue& value) {
  const auto check = [&](const at::Tensor& tensor) { with_error_context({.key = fqn}, [&] { check_dense(tensor); }); };
  TensorEntry entry;
  if (value.is<at::Tensor>()) {
    const auto& tensor = value.as<at::Tensor>();
    check(tensor);
    entry.properties = {.dtype = to_dtype(tensor.scalar_type()), .requires_grad = tensor.requires_grad()};
    entry.size = to_dims(tensor.sizes());
    entry.chunks = {whole_box(entry.size)};
    return entry;
  }
  const auto& tensor = value.as<ShardedTensor>();
  entry.properties = {.dtype = to_dtype(tensor.dtype()), .requires_grad = tensor.requires_grad()};
  entry.size = tensor.size();
  entry.sharded = true;
  for (const LocalShard& shard : tensor.shards()) {
    check(shard.tensor);
    entry.chunks.push_back(shard.box);
  }
  return entry;
}

const std::vector<StateEntry>& StateDictSaveState::entries() const {
  if (flat_) return entries_;
  items_ = flatten(state_);
  archives_.resize(items_.size());
  entries_.clear();
  entries_.reserve(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) {
    const auto& item = items_[i];
    StateEntry entry{item.fqn, item.path, {}};
    if (item.value->is<at::Tensor>() || item.value->is<ShardedTensor>()) {
      entry.value = make_tensor_entry(item.fqn, *item.value);
    } else {
      archives_[i] = with_error_context({.key = item.fqn}, [&] { return encode_value(*item.value); });
      entry.value = BytesEntry{archives_[i].size()};
    }
    entries_.push_back(std::move(entry));
  }
  flat_ = true;
  return entries_;
}

TensorView StateDictSaveState::tensor(size_t entry, size_t chunk) const {
  const StateValue& value = *items_[entry].value;
  at::Tensor tensor =
      value.is<at::Tensor>() ? value.as<at::Tensor>() : value.as<ShardedTensor>().shards().at(chunk).tensor;
  tensor = tensor.detach();
  if (tensor.is_conj() || tensor.is_neg()) tensor = tensor.resolve_conj().resolve_neg();
  if (!tensor.is_cpu()) tensor = tensor.cpu();
  auto owner = std::make_shared<at::Tensor>(tensor);
  return {.data = static_cast<const std::byte*>(tensor.const_data_ptr()),
          .dtype = to_dtype(tensor.scalar_type()),
          .sizes = to_dims(tensor.sizes()),
          .strides = to_dims(tensor.strides()),
          .owner = std::move(owner)};
}

}  // namespace reshard
