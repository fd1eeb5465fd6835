// SPDX-License-Identifier: BSD-3-Clause
// State dicts of sharded models: views of the shard out, any layout in.

#include <ATen/ATen.h>

#include <set>
#include <unordered_map>

#include "fsdp/engine.h"
#include "fsdp/shard_range.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

/// The part of `tensor`, which holds `box`, that lies in `part`.
at::Tensor part_of(at::Tensor tensor, const Box& box, const Box& part) {
  for (size_t d = 0; d < box.sizes.size(); ++d) {
    tensor = tensor.narrow(static_cast<int64_t>(d), part.offsets[d] - box.offsets[d], part.sizes[d]);
  }
  return tensor;
}

void check_equal(const Dims& found_shape, at::ScalarType found_dtype, const ShardRange& range, const std::string& key) {
  if (found_shape != range.shape) {
    throw Error(ErrorCode::kInvalidArgument, "shape differs",
                {.key = key, .wanted = to_string(range.shape), .found = to_string(found_shape)});
  }
  const at::ScalarType dtype = range.local.scalar_type();
  if (found_dtype != dtype) {
    throw Error(ErrorCode::kInvalidArgument, "dtype differs",
                {.key = key,
                 .wanted = std::string(to_string(to_dtype(dtype))),
                 .found = std::string(to_string(to_dtype(found_dtype)))});
  }
}

void require_flat(const FsdpOptions& options) {
  if (options.layout == ShardLayout::kFlat) return;
  throw Error(ErrorCode::kUnsupported, "a local state dict is one of flattened units",
              {.wanted = "ShardLayout::kFlat", .found = "ShardLayout::kDim0Chunks"});
}

ShardRange flat_range(const FlatParameter& flat) {
  return {flat.flat_shape(), flat.shard_begin(), flat.shard_end(), flat.shard()};
}

}  // namespace

ShardedTensor as_sharded_tensor(const at::Tensor& local, const Dims& shape, int64_t begin, int64_t end) {
  const at::NoGradGuard no_grad;
  const at::Tensor plain = local.detach();  // shares memory and version counter
  std::vector<LocalShard> shards;
  int64_t position = 0;
  for (Box& box : flat_range_to_boxes(shape, begin, end)) {
    const int64_t n = volume(box.sizes);
    at::Tensor part = plain.narrow(0, position, n).view({box.sizes.data(), box.sizes.size()});
    shards.push_back({std::move(box), std::move(part)});
    position += n;
  }
  return ShardedTensor(shape, local.scalar_type(), std::move(shards), local.requires_grad());
}

void check_fills(const StateValue& value, const ShardRange& range, const std::string& key) {
  if (value.is<at::Tensor>()) {
    check_equal(to_dims(value.as<at::Tensor>().sizes()), value.as<at::Tensor>().scalar_type(), range, key);
    return;
  }
  if (!value.is<ShardedTensor>()) {
    throw Error(ErrorCode::kInvalidArgument, "a value of the wrong type",
                {.key = key, .wanted = "Tensor or ShardedTensor", .found = value.type_name()});
  }
  const ShardedTensor& sharded = value.as<ShardedTensor>();
  check_equal(sharded.size(), sharded.dtype(), range, key);
  int64_t covered = 0;
  for (const Box& box : flat_range_to_boxes(range.shape, range.begin, range.end)) {
    for (const LocalShard& shard : sharded.shards()) {
      if (const auto common = intersect(box, shard.box)) covered += volume(common->sizes);
    }
  }
  if (covered != range.end - range.begin) {
    throw Error(ErrorCode::kInvalidArgument, "the shards do not hold all of this rank's part",
                {.key = key,
                 .wanted = "elements " + std::to_string(range.begin) + " to " + std::to_string(range.end),
                 .found = std::to_string(covered) + " of " + std::to_string(range.end - range.begin)});
  }
}

void fill(const StateValue& value, const ShardRange& range) {
  const at::NoGradGuard no_grad;
  const at::Tensor local = range.local.detach();
  int64_t position = 0;
  for (const Box& box : flat_range_to_boxes(range.shape, range.begin, range.end)) {
    const int64_t n = volume(box.sizes);
    const at::Tensor target = local.narrow(0, position, n).view({box.sizes.data(), box.sizes.size()});
    position += n;
    const auto take = [&](const at::Tensor& source, const Box& source_box) {
      const auto common = intersect(box, source_box);
      if (!common) return;
      const at::Tensor from = part_of(source, source_box, *common);
      const at::Tensor to = part_of(target, box, *common);
      if (from.device() == to.device() && from.const_data_ptr() == to.const_data_ptr() &&
          from.strides() == to.strides())
        return;
      to.copy_(from);
    };
    if (value.is<at::Tensor>()) {
      take(value.as<at::Tensor>(), whole_box(range.shape));
    } else {
      for (const LocalShard& shard : value.as<ShardedTensor>().shards()) take(shard.tensor, shard.box);
    }
  }
}

void fill_tensor(const StateValue& value, const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const Dims shape = to_dims(tensor.sizes());
  const at::Tensor dense = tensor.detach().contiguous();
  fill(value, {shape, 0, dense.numel(), dense.view(-1)});
  if (!tensor.is_contiguous()) tensor.detach().copy_(dense);
}

StateDict ShardedModule::state_dict(StateDictType type) const {
  // What was gathered is let go, since the caller may write into the shards without a trace.
  engine_->reshard();
  StateDict result;
  std::vector<at::Tensor> full;
  if (type == StateDictType::kFull) full = engine_->full_parameters();
  if (type == StateDictType::kLocal) {
    require_flat(engine_->options());
    for (const auto& [name, flat] : engine_->flat_parameters()) {
      const ShardRange range = flat_range(*flat);
      result[name] = as_sharded_tensor(range.local, range.shape, range.begin, range.end);
    }
  }
  for (const FsdpEngine::Entry& entry : engine_->entries()) {
    if (!entry.parameter) {
      result[entry.name] = entry.buffer;
    } else if (type == StateDictType::kFull) {
      result[entry.name] = full[*entry.parameter];
    } else if (type == StateDictType::kSharded) {
      const ShardedParameter& p = engine_->parameters()[*entry.parameter];
      result[entry.name] = as_sharded_tensor(p.slice, p.shape, p.begin, p.end);
    }
  }
  return result;
}

void ShardedModule::load_state_dict(const StateDict& state) {
  const auto& parameters = engine_->parameters();
  std::unordered_map<std::string, const FsdpEngine::Entry*> entries;
  for (const FsdpEngine::Entry& entry : engine_->entries()) entries[entry.name] = &entry;
  std::unordered_map<std::string, const FlatParameter*> flats;
  for (const auto& [name, flat] : engine_->flat_parameters()) flats[name] = flat;
  const int rank = engine_->global_rank();
  const auto range_of = [&](size_t i) {
    return ShardRange{parameters[i].shape, parameters[i].begin, parameters[i].end, parameters[i].slice};
  };

  std::set<size_t> found;
  with_error_context({.rank = rank}, [&] {
    for (const auto& [key, value] : state.items()) {
      const auto it = entries.find(key);
      if (const auto flat = flats.find(key); it == entries.end() && flat != flats.end()) {
        require_flat(engine_->options());
        check_fills(value, flat_range(*flat->second), key);
        for (const FlatParameter::Member& member : flat->second->members()) found.insert(member.index);
        continue;
      }
      if (it == entries.end())
        throw Error(ErrorCode::kInvalidArgument, "the model has no parameter or buffer of this name", {.key = key});
      if (const auto i = it->second->parameter) {
        check_fills(value, range_of(*i), key);
        found.insert(*i);
      } else {
        const at::Tensor& buffer = it->second->buffer;
        const Dims shape = to_dims(buffer.sizes());
        check_fills(value, {shape, 0, buffer.numel(), buffer}, key);
      }
    }
    for (const FsdpEngine::Entry& entry : engine_->entries()) {
      const bool missing = entry.parameter ? !found.contains(*entry.parameter) : !state.contains(entry.name);
      if (missing) throw Error(ErrorCode::kNotFound, "missing from the state dict", {.key = entry.name});
    }
  });

  const at::NoGradGuard no_grad;
  for (const auto& [key, value] : state.items()) {
    const auto it = entries.find(key);
    if (it == entries.end()) {
      fill(value, flat_range(*flats.at(key)));
    } else if (it->second->parameter) {
      fill(value, range_of(*it->second->parameter));
    } else {
      fill_tensor(value, it->second->buffer);
    }
  }
  engine_->note_load();
}

}  // namespace reshard
