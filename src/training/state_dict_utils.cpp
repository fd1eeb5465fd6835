// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/training/state_dict_utils.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <string>

#include "reshard/core/error.h"
#include "reshard/state_dict/wire.h"
#include "training/group_round.h"
#include "training/tensor_bytes.h"

namespace reshard {
namespace {

/// A sharded tensor of a state dict, where a rank sees it.
struct Leaf {
  std::string path;
  const ShardedTensor* tensor;
};

void find_leaves(const StateValue& value, const std::string& path, std::vector<Leaf>& leaves) {
  const auto name = [&](const std::string& key) { return path.empty() ? key : path + "." + key; };
  if (value.is<ShardedTensor>()) {
    leaves.push_back({path, &value.as<ShardedTensor>()});
  } else if (value.is<StateDict>()) {
    for (const auto& [key, item] : value.as<StateDict>().items()) find_leaves(item, name(key), leaves);
  } else if (value.is<StateList>() || value.is<StateTuple>()) {
    const auto& items = value.is<StateList>() ? value.as<StateList>() : value.as<StateTuple>().items;
    for (size_t i = 0; i < items.size(); ++i) find_leaves(items[i], name(std::to_string(i)), leaves);
  }
}

void put_dims(ByteWriter& out, const Dims& dims) {
  out.varint(dims.size());
  for (const int64_t v : dims) out.i64(v);
}

Dims get_dims(ByteReader& in) {
  Dims dims(in.count(8), 0);
  for (int64_t& v : dims) v = in.i64();
  return dims;
}

/// What one rank says of a leaf. `tied_to`: number of an earlier leaf whose shards are the same memory, or its own.
struct Description {
  std::string path;
  at::ScalarType dtype{};
  c10::DeviceType device = c10::kCPU;
  bool has_elements = false;
  size_t tied_to = 0;
  Dims size;
  std::vector<Box> boxes;
};

bool is_same_memory(const ShardedTensor& a, const ShardedTensor& b) {
  return a.size() == b.size() && a.dtype() == b.dtype() &&
         std::ranges::equal(a.shards(), b.shards(), [](const LocalShard& x, const LocalShard& y) {
           return x.box == y.box && x.tensor.strides() == y.tensor.strides() &&
                  (x.tensor.numel() == 0 || x.tensor.const_data_ptr() == y.tensor.const_data_ptr());
         });
}

Bytes describe(const std::vector<Leaf>& leaves) {
  ByteWriter out;
  out.varint(leaves.size());
  std::map<const void*, size_t> first_at;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const ShardedTensor& tensor = *leaves[i].tensor;
    const auto some = std::ranges::find_if(tensor.shards(), [](const LocalShard& s) { return s.tensor.numel() > 0; });
    const bool has_elements = some != tensor.shards().end();
    size_t tied_to = i;
    if (has_elements) {
      const size_t earlier = first_at.try_emplace(some->tensor.const_data_ptr(), i).first->second;
      if (is_same_memory(*leaves[earlier].tensor, tensor)) tied_to = earlier;
    }
    out.string(leaves[i].path);
    out.u8(static_cast<uint8_t>(tensor.dtype()));
    out.u8(static_cast<uint8_t>(has_elements ? some->tensor.device().type() : c10::kCPU));
    out.u8(has_elements ? 1 : 0);
    out.varint(tied_to);
    put_dims(out, tensor.size());
    out.varint(tensor.shards().size());
    for (const LocalShard& shard : tensor.shards()) {
      put_dims(out, shard.box.offsets);
      put_dims(out, shard.box.sizes);
    }
  }
  return out.take();
}

std::vector<Description> read_descriptions(ByteSpan bytes) {
  ByteReader in(bytes, "description of sharded tensors");
  std::vector<Description> result(in.count(6));
  for (Description& d : result) {
    d.path = in.string();
    d.dtype = static_cast<at::ScalarType>(in.u8());
    d.device = static_cast<c10::DeviceType>(in.u8());
    d.has_elements = in.u8() != 0;
    d.tied_to = in.varint();
    d.size = get_dims(in);
    d.boxes.resize(in.count(2));
    for (Box& box : d.boxes) {
      box.offsets = get_dims(in);
      box.sizes = get_dims(in);
    }
  }
  return result;
}

/// A part of a whole tensor, and the rank that sends it.
struct Piece {
  int owner;
  Box box;
};
struct Gathered {
  c10::DeviceType device;
  size_t tied_to;
  std::vector<Piece> pieces;
};

/// Where each part of each leaf comes from: of equal boxes the lowest rank's.
Bytes plan_gather(const std::vector<Bytes>& messages) {
  std::vector<std::vector<Description>> ranks;
  for (const Bytes& message : messages) ranks.push_back(read_descriptions(message));
  const std::vector<Description>& first = ranks[0];
  for (size_t r = 1; r < ranks.size(); ++r) {
    for (size_t i = 0; i < std::max(first.size(), ranks[r].size()); ++i) {
      if (i < first.size() && i < ranks[r].size() && first[i].path == ranks[r][i].path) continue;
      throw Error(ErrorCode::kInvalidArgument, "the ranks hold different sharded tensors",
                  {.wanted = i < first.size() ? "\"" + first[i].path + "\" as on rank 0" : "no more, as on rank 0",
                   .found = (i < ranks[r].size() ? "\"" + ranks[r][i].path + "\"" : "no more") + " on rank " +
                            std::to_string(r)});
    }
  }
  ByteWriter out;
  for (size_t i = 0; i < first.size(); ++i) {
    std::vector<Box> boxes;
    std::vector<int> owners;
    auto device = static_cast<c10::DeviceType>(first[i].device);
    bool is_tied = false;
    bool known = false;
    size_t tied_to = i;
    for (size_t r = 0; r < ranks.size(); ++r) {
      const Description& d = ranks[r][i];
      if (d.size != first[i].size || d.dtype != first[i].dtype) {
        throw Error(ErrorCode::kInvalidArgument, "a sharded tensor has different sizes or dtypes on two ranks",
                    {.key = d.path,
                     .wanted = to_string(first[i].size) + " " + c10::toString(first[i].dtype) + " as on rank 0",
                     .found = to_string(d.size) + " " + c10::toString(d.dtype) + " on rank " + std::to_string(r)});
      }
      if (d.has_elements) {
        if (!known) device = d.device, tied_to = d.tied_to, is_tied = d.tied_to != i;
        is_tied = is_tied && d.tied_to == tied_to;
        known = true;
      }
      for (const Box& box : d.boxes) {
        if (volume(box.sizes) == 0 || std::ranges::find(boxes, box) != boxes.end()) continue;
        boxes.push_back(box);
        owners.push_back(static_cast<int>(r));
      }
    }
    if (const auto error = check_exact_tiling(first[i].size, boxes)) {
      throw Error(ErrorCode::kInvalidArgument, "the shards of all ranks do not make the whole tensor",
                  {.key = first[i].path, .found = to_string(*error, boxes)});
    }
    out.u8(static_cast<uint8_t>(device));
    out.varint(is_tied ? tied_to : i);
    out.varint(boxes.size());
    for (size_t b = 0; b < boxes.size(); ++b) {
      out.varint(static_cast<uint64_t>(owners[b]));
      put_dims(out, boxes[b].offsets);
      put_dims(out, boxes[b].sizes);
    }
  }
  return out.take();
}

std::vector<Gathered> read_plan(ByteSpan bytes, size_t count) {
  ByteReader in(bytes, "plan of a gather");
  std::vector<Gathered> result(count);
  for (Gathered& g : result) {
    g.device = static_cast<c10::DeviceType>(in.u8());
    g.tied_to = in.varint();
    g.pieces.resize(in.count(3));
    for (Piece& piece : g.pieces) {
      piece.owner = static_cast<int>(in.varint());
      piece.box.offsets = get_dims(in);
      piece.box.sizes = get_dims(in);
    }
  }
  return result;
}

at::IntArrayRef sizes_of(const Dims& dims) { return {dims.data(), dims.size()}; }

at::Tensor narrow_to(at::Tensor tensor, const Box& box) {
  for (size_t d = 0; d < box.sizes.size(); ++d)
    tensor = tensor.narrow(static_cast<int64_t>(d), box.offsets[d], box.sizes[d]);
  return tensor;
}

/// The whole tensor, or an undefined one where it is not kept.
at::Tensor gather(const ShardedTensor& tensor, const Gathered& plan, ProcessGroup& group, bool keep, bool on_host) {
  const c10::Device device = plan.device == c10::kCUDA ? rank_device(true) : c10::Device(plan.device);
  const c10::Device carrier = group.size() == 1 || group.has_backend(plan.device) ? device : c10::Device(c10::kCPU);
  const auto dtype = at::TensorOptions().dtype(tensor.dtype());
  at::Tensor whole;
  if (keep) whole = at::empty(sizes_of(tensor.size()), dtype.device(on_host ? c10::Device(c10::kCPU) : device));
  for (const Piece& piece : plan.pieces) {
    const at::Tensor target = keep ? narrow_to(whole, piece.box) : at::Tensor();
    at::Tensor source;
    if (piece.owner == group.rank()) {
      const auto it = std::ranges::find(tensor.shards(), piece.box, &LocalShard::box);
      source = it->tensor.detach();
    }
    if (group.size() > 1) {
      // A target without gaps takes the bytes as they come.
      at::Tensor carried = source.defined() ? source.to(carrier).contiguous()
                           : keep && target.is_contiguous() && target.device() == carrier
                               ? target
                               : at::empty(sizes_of(piece.box.sizes), dtype.device(carrier));
      at::Tensor bytes = byte_alias(carried);
      group.broadcast(bytes, piece.owner);
      source = carried;
    }
    if (keep && !source.is_same(target)) target.copy_(source);
  }
  return whole;
}

/// `value` with its sharded tensors replaced, in the order of find_leaves.
StateValue replace_leaves(const StateValue& value, std::vector<at::Tensor>::const_iterator& next, bool on_host) {
  if (value.is<ShardedTensor>()) return *next++;
  if (value.is<at::Tensor>()) return on_host ? value.as<at::Tensor>().cpu() : value.as<at::Tensor>();
  const auto all = [&](std::vector<StateValue> items) {
    for (StateValue& item : items) item = replace_leaves(item, next, on_host);
    return items;
  };
  if (value.is<StateList>()) return StateList(all(value.as<StateList>()));
  if (value.is<StateTuple>()) return StateTuple{all(value.as<StateTuple>().items)};
  if (!value.is<StateDict>()) return value;
  StateDict result;
  for (const auto& [key, item] : value.as<StateDict>().items()) result[key] = replace_leaves(item, next, on_host);
  return result;
}

}  // namespace

StateDict gather_state_dict(const StateDict& state, ProcessGroup& group, const GatherOptions& options) {
  const at::NoGradGuard no_grad;
  const bool keep =
      options.ranks_only.empty() || std::ranges::find(options.ranks_only, group.rank()) != options.ranks_only.end();
  std::vector<Leaf> leaves;
  const StateValue root(state);  // copies names, and shares tensors
  find_leaves(root, "", leaves);
  GroupRounds rounds(&group);
  const Bytes answer = rounds.round(
      "gather", [&] { return describe(leaves); }, plan_gather);
  const std::vector<Gathered> plan = read_plan(answer, leaves.size());
  std::vector<at::Tensor> whole;
  for (size_t i = 0; i < leaves.size(); ++i) {
    whole.push_back(plan[i].tied_to < i ? whole[plan[i].tied_to]
                                        : gather(*leaves[i].tensor, plan[i], group, keep, options.cpu_offload));
  }
  if (!keep) return {};
  auto next = whole.cbegin();
  return replace_leaves(root, next, options.cpu_offload).as<StateDict>();
}

StateDict offload_state_dict_to_cpu(const StateDict& state) {
  const at::NoGradGuard no_grad;
  std::map<std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>>, at::Tensor> copies;
  return transform_tensors(state,
                           [&](const at::Tensor& tensor) {
                             if (tensor.is_cpu() || !tensor.defined()) return tensor;
                             at::Tensor& copy =
                                 copies[{tensor.numel() == 0 ? nullptr : tensor.const_data_ptr(), tensor.scalar_type(),
                                         tensor.sizes().vec(), tensor.strides().vec()}];
                             if (!copy.defined()) copy = tensor.detach().cpu();
                             return copy;
                           })
      .as<StateDict>();
}

}  // namespace reshard
