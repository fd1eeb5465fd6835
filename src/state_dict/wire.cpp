// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/wire.h"

#include <ATen/ATen.h>

#include <bit>
#include <map>
#include <string>
#include <tuple>

#include "reshard/core/checked.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

constexpr int kMaxDepth = 1000;  // of dicts, lists and tuples in one another

enum class Tag : uint8_t {
  kNone,
  kFalse,
  kTrue,
  kInt,
  kFloat,
  kString,
  kByteString,
  kScalarTensor,
  kTensor,
  kSharded,
  kList,
  kTuple,
  kDict,
  kOpaque,
};

std::string join(const std::string& path, const std::string& key) { return path.empty() ? key : path + "." + key; }

void put_dims(ByteWriter& out, const Dims& dims) {
  out.varint(dims.size());
  for (const int64_t v : dims) out.varint(static_cast<uint64_t>(v));
}

Dims get_dims(ByteReader& in) {
  const size_t rank = in.count();
  if (rank > kMaxTensorRank) throw Error(ErrorCode::kCorruptData, "a tensor of too many dimensions");
  Dims dims(rank, 0);
  for (int64_t& v : dims) {
    const uint64_t wire = in.varint();
    if (wire > static_cast<uint64_t>(INT64_MAX)) throw Error(ErrorCode::kCorruptData, "a size beyond 63 bits");
    v = static_cast<int64_t>(wire);
  }
  return dims;
}

at::ScalarType get_dtype(ByteReader& in) {
  const uint8_t wire = in.u8();
  if (wire >= static_cast<uint8_t>(at::ScalarType::Undefined)) throw Error(ErrorCode::kCorruptData, "an unknown dtype");
  return static_cast<at::ScalarType>(wire);
}

class Encoder {
 public:
  explicit Encoder(std::vector<at::Tensor>& tensors) : tensors_(tensors) {}

  void dict(const StateDict& dict, const std::string& path, int depth) {
    if (depth > kMaxDepth) throw Error(ErrorCode::kUnsupported, "nested too deeply", {.key = path});
    out_.varint(dict.size());
    for (const auto& [key, value] : dict.items()) {
      out_.string(key);
      this->value(value, join(path, key), depth + 1);
    }
  }
  Bytes take() { return out_.take(); }

 private:
  void tag(Tag tag) { out_.u8(static_cast<uint8_t>(tag)); }

  void value(const StateValue& value, const std::string& path, int depth) {
    std::visit([&](const auto& v) { put(v, path, depth); }, value.variant());
  }
  void put(None, const std::string&, int) { tag(Tag::kNone); }
  void put(bool v, const std::string&, int) { tag(v ? Tag::kTrue : Tag::kFalse); }
  void put(int64_t v, const std::string&, int) {
    tag(Tag::kInt);
    out_.i64(v);
  }
  void put(double v, const std::string&, int) {
    tag(Tag::kFloat);
    out_.u64(std::bit_cast<uint64_t>(v));
  }
  void put(const std::string& v, const std::string&, int) {
    tag(Tag::kString);
    out_.string(v);
  }
  void put(const ByteString& v, const std::string&, int) {
    tag(Tag::kByteString);
    out_.string(v.data);
  }
  void put(const at::Tensor& v, const std::string& path, int) {
    if (!v.defined() || v.layout() != at::kStrided || v.is_quantized() || v.is_meta()) {
      throw Error(ErrorCode::kUnsupported, "a tensor without dense elements cannot be sent", {.key = path});
    }
    if (v.dim() == 0) {
      tag(Tag::kScalarTensor);
      out_.u8(static_cast<uint8_t>(v.scalar_type()));
      const at::Tensor host = v.detach().cpu().resolve_conj().resolve_neg();
      out_.bytes({static_cast<const std::byte*>(host.const_data_ptr()), static_cast<size_t>(host.element_size())});
      return;
    }
    tag(Tag::kTensor);
    slot(v);
  }
  void put(const ShardedTensor& v, const std::string&, int) {
    tag(Tag::kSharded);
    out_.u8(static_cast<uint8_t>(v.dtype()));
    out_.u8(v.requires_grad() ? 1 : 0);
    put_dims(out_, v.size());
    out_.varint(v.shards().size());
    for (const LocalShard& shard : v.shards()) {
      put_dims(out_, shard.box.offsets);
      slot(shard.tensor);
    }
  }
  void put(const StateList& v, const std::string& path, int depth) { items(Tag::kList, v, path, depth); }
  void put(const StateTuple& v, const std::string& path, int depth) { items(Tag::kTuple, v.items, path, depth); }
  void put(const StateDict& v, const std::string& path, int depth) {
    tag(Tag::kDict);
    dict(v, path, depth);
  }
  void put(const OpaqueValue& v, const std::string&, int) {
    tag(Tag::kOpaque);
    out_.blob(*v.archive);
  }
  void items(Tag kind, const std::vector<StateValue>& values, const std::string& path, int depth) {
    if (depth > kMaxDepth) throw Error(ErrorCode::kUnsupported, "nested too deeply", {.key = path});
    tag(kind);
    out_.varint(values.size());
    for (size_t i = 0; i < values.size(); ++i) value(values[i], join(path, std::to_string(i)), depth + 1);
  }
  void slot(const at::Tensor& v) {
    const auto [it, is_new] =
        slots_.try_emplace(std::tuple(v.numel() == 0 ? nullptr : v.const_data_ptr(), v.scalar_type(), v.sizes().vec(),
                                      v.strides().vec(), v.device().str()),
                           slots_.size());
    out_.varint(it->second);
    if (!is_new) return;
    out_.u8(static_cast<uint8_t>(v.scalar_type()));
    put_dims(out_, to_dims(v.sizes()));
    tensors_.push_back(v.detach());
  }

  ByteWriter out_;
  std::vector<at::Tensor>& tensors_;
  std::map<std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>, std::string>, size_t>
      slots_;
};

class Decoder {
 public:
  Decoder(ByteSpan message, const std::function<at::Tensor(at::ScalarType, const Dims&)>& make)
      : in_(message, "state dict message"), make_(make) {}

  StateDict whole() {
    StateDict result = dict(0);
    if (!in_.at_end()) throw Error(ErrorCode::kCorruptData, "a state dict message goes on after its end");
    return result;
  }

 private:
  StateDict dict(int depth) {
    if (depth > kMaxDepth) throw Error(ErrorCode::kCorruptData, "a state dict message is nested too deeply");
    StateDict result;
    const size_t n = in_.count(2);
    for (size_t i = 0; i < n; ++i) {
      std::string key = in_.string();
      if (result.contains(key))
        throw Error(ErrorCode::kCorruptData, "a state dict message has a key twice", {.key = key});
      result[key] = value(depth + 1);
    }
    return result;
  }
  std::vector<StateValue> items(int depth) {
    if (depth > kMaxDepth) throw Error(ErrorCode::kCorruptData, "a state dict message is nested too deeply");
    std::vector<StateValue> result(in_.count());
    for (StateValue& item : result) item = value(depth + 1);
    return result;
  }
  StateValue value(int depth) {
    switch (static_cast<Tag>(in_.u8())) {
      case Tag::kNone:
        return None{};
      case Tag::kFalse:
        return false;
      case Tag::kTrue:
        return true;
      case Tag::kInt:
        return in_.i64();
      case Tag::kFloat:
        return std::bit_cast<double>(in_.u64());
      case Tag::kString:
        return in_.string();
      case Tag::kByteString:
        return ByteString{in_.string()};
      case Tag::kScalarTensor: {
        at::Tensor scalar = at::empty({}, get_dtype(in_));
        const ByteSpan bytes = in_.bytes(static_cast<size_t>(scalar.element_size()));
        std::memcpy(scalar.mutable_data_ptr(), bytes.data(), bytes.size());
        return scalar;
      }
      case Tag::kTensor:
        return slot();
      case Tag::kSharded: {
        const at::ScalarType dtype = get_dtype(in_);
        const bool requires_grad = in_.u8() != 0;
        Dims size = get_dims(in_);
        std::vector<LocalShard> shards(in_.count(2));
        for (LocalShard& shard : shards) {
          shard.box.offsets = get_dims(in_);
          shard.tensor = slot();
          shard.box.sizes = to_dims(shard.tensor.sizes());
        }
        return ShardedTensor(std::move(size), dtype, std::move(shards), requires_grad);
      }
      case Tag::kList:
        return StateList(items(depth));
      case Tag::kTuple:
        return StateTuple{items(depth)};
      case Tag::kDict:
        return dict(depth);
      case Tag::kOpaque: {
        const ByteSpan archive = in_.blob();
        return OpaqueValue{std::make_shared<const Bytes>(archive.begin(), archive.end())};
      }
    }
    throw Error(ErrorCode::kCorruptData, "a state dict message has a value of an unknown kind");
  }
  at::Tensor slot() {
    const uint64_t number = in_.varint();
    if (number < slots_.size()) return slots_[number];
    if (number > slots_.size())
      throw Error(ErrorCode::kCorruptData, "a state dict message names a tensor before it comes");
    const at::ScalarType dtype = get_dtype(in_);
    const Dims sizes = get_dims(in_);
    volume(sizes);  // throws where the product leaves 63 bits
    return slots_.emplace_back(make_(dtype, sizes));
  }

  ByteReader in_;
  const std::function<at::Tensor(at::ScalarType, const Dims&)>& make_;
  std::vector<at::Tensor> slots_;
};

}  // namespace

Bytes encode_state_dict(const StateDict& state, std::vector<at::Tensor>& tensors) {
  Encoder encoder(tensors);
  encoder.dict(state, "", 0);
  return encoder.take();
}

StateDict decode_state_dict(ByteSpan message, const std::function<at::Tensor(at::ScalarType, const Dims&)>& make) {
  return Decoder(message, make).whole();
}

StateValue transform_tensors(const StateValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  const auto all = [&](std::vector<StateValue> items) {
    for (StateValue& item : items) item = transform_tensors(item, change);
    return items;
  };
  if (value.is<at::Tensor>()) {
    return change(value.as<at::Tensor>());
  }
  if (value.is<ShardedTensor>()) {
    const ShardedTensor& sharded = value.as<ShardedTensor>();
    std::vector<LocalShard> shards = sharded.shards();
    for (LocalShard& shard : shards) shard.tensor = change(shard.tensor);
    return ShardedTensor(sharded.size(), sharded.dtype(), std::move(shards), sharded.requires_grad());
  }
  if (value.is<StateList>()) return StateList(all(value.as<StateList>()));
  if (value.is<StateTuple>()) return StateTuple{all(value.as<StateTuple>().items)};
  if (!value.is<StateDict>()) return value;
  StateDict result;
  for (const auto& [key, item] : value.as<StateDict>().items()) result[key] = transform_tensors(item, change);
  return result;
}

}  // namespace reshard
