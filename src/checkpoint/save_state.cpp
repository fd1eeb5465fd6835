// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/save_state.h"

#include <algorithm>
#include <utility>

#include "checkpoint/value_codec.h"
#include "reshard/core/error.h"
#include "reshard/core/ordered_map.h"

namespace reshard {

TensorEntry make_tensor_entry(const std::string& fqn, const StateValue& value) {
  const auto check = [&](const at::Tensor& tensor) {
    with_error_context([&] { return ErrorContext{.key = fqn}; }, [&] { check_dense(tensor); });
  };
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

namespace {

bool are_same_memory(const at::Tensor& a, const at::Tensor& b) {
  return a.unsafeGetTensorImpl() == b.unsafeGetTensorImpl() ||
         (a.numel() > 0 && a.const_data_ptr() == b.const_data_ptr() && a.is_alias_of(b) && a.dtype() == b.dtype() &&
          a.sizes() == b.sizes() && a.strides() == b.strides() && a.is_conj() == b.is_conj() &&
          a.is_neg() == b.is_neg());
}

bool are_tied(const StateValue& a, const StateValue& b) {
  if (a.is<at::Tensor>()) return b.is<at::Tensor>() && are_same_memory(a.as<at::Tensor>(), b.as<at::Tensor>());
  if (!b.is<ShardedTensor>()) return false;
  const auto& first = a.as<ShardedTensor>();
  const auto& second = b.as<ShardedTensor>();
  return first.size() == second.size() && !first.shards().empty() &&
         std::ranges::equal(first.shards(), second.shards(), [](const LocalShard& x, const LocalShard& y) {
           return x.box == y.box && are_same_memory(x.tensor, y.tensor);
         });
}

/// Where a value's first elements lie: equal for tied values. Null for what cannot be tied.
const void* memory_of(const StateValue& value) {
  if (value.is<at::Tensor>()) return value.as<at::Tensor>().const_data_ptr();
  const std::vector<LocalShard>& shards = value.as<ShardedTensor>().shards();
  return shards.empty() ? nullptr : shards.front().tensor.const_data_ptr();
}

}  // namespace

const std::vector<StateEntry>& StateDictSaveState::entries() const {
  if (flat_) return entries_;
  items_ = flatten(state_);
  archives_.resize(items_.size());
  entries_.clear();
  entries_.reserve(items_.size());
  OrderedMap<const void*, size_t> by_memory;  // the first entry that lies there
  by_memory.reserve(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) {
    auto& item = items_[i];
    StateEntry entry{std::move(item.fqn), std::move(item.path), {}};
    if (item.value->is<at::Tensor>() || item.value->is<ShardedTensor>()) {
      TensorEntry tensor = make_tensor_entry(entry.fqn, *item.value);
      if (const void* memory = memory_of(*item.value); memory != nullptr && !by_memory.insert(memory, i)) {
        const size_t first = *by_memory.find(memory);
        if (are_tied(*items_[first].value, *item.value)) tensor.tied_to = first;
      }
      entry.value = std::move(tensor);
    } else {
      archives_[i] = with_error_context({.key = entry.fqn}, [&] { return encode_value(*item.value); });
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
  std::shared_ptr<const void> owner;  // none: the state dict, which is borrowed for the whole save
  if (tensor.is_conj() || tensor.is_neg() || !tensor.is_cpu()) {
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu();
    owner = std::make_shared<at::Tensor>(tensor);
  }
  return {.data = static_cast<const std::byte*>(tensor.const_data_ptr()),
          .dtype = to_dtype(tensor.scalar_type()),
          .sizes = to_dims(tensor.sizes()),
          .strides = to_dims(tensor.strides()),
          .owner = std::move(owner)};
}

}  // namespace reshard
