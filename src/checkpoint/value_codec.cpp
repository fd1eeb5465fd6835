// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/value_codec.h"

#include <ATen/ops/empty.h>

#include "reshard/core/error.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"

namespace reshard {
namespace {

class Encoder {
 public:
  pickle::Value encode(const StateValue& value) {
    return std::visit([this](const auto& v) { return this->visit(v); }, value.variant());
  }
  Bytes archive(const pickle::Value& root) {
    std::vector<ByteSpan> storages;
    for (const at::Tensor& t : tensors_) {
      storages.emplace_back(static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes());
    }
    return encode_value_archive(root, storages);
  }

 private:
  pickle::Value visit(None) { return {}; }
  pickle::Value visit(bool v) { return pickle::Tree::boolean(v); }
  pickle::Value visit(int64_t v) { return pickle::Tree::integer(v); }
  pickle::Value visit(double v) { return pickle::Tree::real(v); }
  pickle::Value visit(const std::string& v) { return tree_.str(v); }
  pickle::Value visit(const ByteString& v) { return tree_.bytes(as_bytes(v.data)); }
  pickle::Value visit(const at::Tensor& v) {
    check_dense(v);
    tensors_.push_back(v.detach().cpu().contiguous().resolve_conj().resolve_neg());
    return make_tensor_value(tree_, to_dtype(v.scalar_type()), to_dims(v.sizes()), tensors_.size() - 1,
                             v.requires_grad());
  }
  pickle::Value visit(const ShardedTensor&) {
    throw Error(ErrorCode::kUnsupported,
                "a sharded tensor inside a tuple (or a list that is one value) cannot be saved");
  }
  pickle::Value visit(const OpaqueValue&) {
    throw Error(ErrorCode::kUnsupported, "an opaque value inside another value cannot be saved");
  }
  std::vector<pickle::Value> encode_all(const std::vector<StateValue>& items) {
    std::vector<pickle::Value> values;
    values.reserve(items.size());
    for (const StateValue& item : items) values.push_back(encode(item));
    return values;
  }
  pickle::Value visit(const StateList& v) { return tree_.list(encode_all(v)); }
  pickle::Value visit(const StateTuple& v) { return tree_.tuple(encode_all(v.items)); }
  pickle::Value visit(const StateDict& v) {
    std::vector<pickle::Entry> entries;
    for (const auto& [key, item] : v.items()) entries.push_back({tree_.str(key), encode(item)});
    return tree_.dict(entries);
  }

  pickle::Tree tree_;
  std::vector<at::Tensor> tensors_;
};

/// Thrown inside decode() where a value has no StateValue; becomes an OpaqueValue.
struct NotRepresentable {};

// Tensors of a value share storages and may be expanded; here each becomes its own dense copy, of so many bytes in all.
constexpr uint64_t kMaxCopiedPerByte = 16;
constexpr uint64_t kFreelyCopied = 64 << 20;

StateValue decode(const ValueArchive& archive, ByteSpan bytes, const pickle::Value& value, uint64_t& copies_left) {
  using pickle::Kind;
  const auto decode_all = [&](std::span<const pickle::Value> items) {
    StateList list;
    list.reserve(items.size());
    for (const pickle::Value& item : items) list.push_back(decode(archive, bytes, item, copies_left));
    return list;
  };
  switch (value.kind()) {
    case Kind::kNone:
      return None{};
    case Kind::kBool:
      return value.as_bool();
    case Kind::kInt:
      return value.as_int();
    case Kind::kFloat:
      return value.as_float();
    case Kind::kStr:
      return std::string(value.as_str());
    case Kind::kList:
      return decode_all(value.items());
    case Kind::kTuple:
      return StateTuple{decode_all(value.items())};
    case Kind::kDict: {
      StateDict dict;
      for (const auto& [key, item] : value.entries()) {
        if (key.kind() != Kind::kStr) throw NotRepresentable{};
        dict[std::string(key.as_str())] = decode(archive, bytes, item, copies_left);
      }
      return dict;
    }
    default:
      break;
  }
  if (value.kind() == Kind::kBytes) return ByteString{std::string(as_text(value.as_bytes()))};
  if (value.kind() == Kind::kObject) {
    const bool is_byte_array = value.as_object().callable.is_global("__builtin__", "bytearray");
    if (auto data = pickle::plain_bytes(value); data && !is_byte_array) return ByteString{std::move(*data)};
    if (const auto item = archive.as_tensor(value)) {
      const auto size = static_cast<uint64_t>(volume(item->sizes) * element_size(item->dtype));
      if (size > copies_left) throw NotRepresentable{};
      copies_left -= size;
      at::Tensor tensor =
          at::empty(at::IntArrayRef(item->sizes.data(), item->sizes.size()), to_scalar_type(item->dtype));
      const ByteRange range = payload_range(*item, whole_box(item->sizes));
      copy_region(*item, bytes.subspan(item->payload_offset + range.begin, range.end - range.begin),
                  whole_box(item->sizes), {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()});
      return tensor.requires_grad_(item->requires_grad && at::isFloatingType(tensor.scalar_type()));
    }
  }
  throw NotRepresentable{};
}

}  // namespace

void check_dense(const at::Tensor& tensor) {
  const char* what = !tensor.defined()                 ? "an undefined tensor"
                     : tensor.layout() != at::kStrided ? "a sparse tensor"
                     : tensor.is_quantized()           ? "a quantized tensor"
                     : tensor.is_meta()                ? "a tensor on the meta device, which has no values"
                                                       : nullptr;
  if (what != nullptr) throw Error(ErrorCode::kUnsupported, std::string("cannot save or load ") + what);
}

Bytes encode_value(const StateValue& value) {
  if (value.is<OpaqueValue>()) {
    const auto& archive = value.as<OpaqueValue>().archive;
    if (!archive) throw Error(ErrorCode::kInvalidArgument, "an opaque value without its archive");
    return *archive;
  }
  Encoder encoder;
  const pickle::Value root = encoder.encode(value);
  return encoder.archive(root);
}

StateValue decode_value(ByteSpan bytes) {
  const MemorySource source(bytes);
  const ValueArchive archive = decode_value_archive(source);
  uint64_t copies_left = kFreelyCopied + kMaxCopiedPerByte * bytes.size();
  try {
    return decode(archive, bytes, archive.root(), copies_left);
  } catch (const NotRepresentable&) {
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported) throw;  // a sparse or quantized tensor, say
  }
  return OpaqueValue{std::make_shared<const Bytes>(bytes.begin(), bytes.end())};
}

}  // namespace reshard
