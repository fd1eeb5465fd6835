// SPDX-License-Identifier: BSD-3-Clause
#include "cli/values.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

#include "reshard/format/strided_copy.h"

namespace reshard::cli {
namespace {

using Json = nlohmann::ordered_json;
using pickle::Kind;
using pickle::Value;

std::string hex(ByteSpan bytes) {
  std::string text;
  for (const std::byte b : bytes) {
    text += "0123456789abcdef"[std::to_integer<unsigned>(b) >> 4];
    text += "0123456789abcdef"[std::to_integer<unsigned>(b) & 15];
  }
  return text;
}

/// Nothing also for a kind of tensor that is not read.
std::optional<TensorItem> tensor_of(const ValueArchive& archive, const Value& value) {
  try {
    return archive.as_tensor(value);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported) throw;
    return std::nullopt;
  }
}

Json json_of(const ValueArchive& archive, const Value& value) {
  const auto list = [&](std::span<const Value> items) {
    Json result = Json::array();
    for (const Value& item : items) result.push_back(json_of(archive, item));
    return result;
  };
  const auto dict = [&](std::span<const pickle::Entry> entries) {
    const bool texts = std::ranges::all_of(entries, [](const auto& entry) { return entry.key.kind() == Kind::kStr; });
    Json result = texts ? Json::object() : Json::array();
    for (const auto& [key, item] : entries) {
      if (texts) {
        result[std::string(key.as_str())] = json_of(archive, item);
      } else {
        result.push_back(Json::array({json_of(archive, key), json_of(archive, item)}));
      }
    }
    return result;
  };
  switch (value.kind()) {
    case Kind::kNone:
      return nullptr;
    case Kind::kBool:
      return value.as_bool();
    case Kind::kInt:
      return value.as_int();
    case Kind::kBigInt: {
      const ByteSpan digits = value.as_bytes();
      Bytes big_endian(digits.rbegin(), digits.rend());
      return {{"int", "0x" + hex(big_endian) + " (two's complement)"}};
    }
    case Kind::kFloat: {
      const double v = value.as_float();
      if (std::isfinite(v)) return v;
      return {{"float", std::isnan(v) ? "nan" : v < 0 ? "-inf" : "inf"}};
    }
    case Kind::kStr:
      return std::string(value.as_str());
    case Kind::kList:
    case Kind::kTuple:
      return list(value.items());
    case Kind::kSet:
    case Kind::kFrozenSet:
      return {{"set", list(value.items())}};
    case Kind::kDict:
      return dict(value.entries());
    case Kind::kBytes:
    case Kind::kByteArray:
      return {{"bytes", hex(value.as_bytes())}};
    case Kind::kGlobal:
      return {{"object", describe(value)}};
    case Kind::kPersistentId:
      return {{"object", "storage"}};
    case Kind::kObject:
      break;
  }
  if (const auto bytes = pickle::plain_bytes(value)) return {{"bytes", hex(as_bytes(*bytes))}};
  if (const auto tensor = tensor_of(archive, value)) {
    return {{"tensor",
             {{"dtype", std::string(to_string(tensor->dtype))},
              {"shape", std::vector<int64_t>(tensor->sizes.begin(), tensor->sizes.end())}}}};
  }
  const pickle::Object& object = value.as_object();
  if (object.callable.is_global("collections", "OrderedDict") && object.args.items().empty()) {
    return dict(object.dict_items());
  }
  if ((object.callable.is_global("__builtin__", "set") || object.callable.is_global("__builtin__", "frozenset")) &&
      object.args.items().size() == 1 && object.args.items()[0].kind() == Kind::kList) {
    return {{"set", list(object.args.items()[0].items())}};
  }
  Json result{{"object", describe(value)}, {"args", list(object.args.items())}};
  if (!object.list_items().empty()) result["items"] = list(object.list_items());
  if (!object.dict_items().empty()) result["entries"] = dict(object.dict_items());
  if (object.has_state) result["state"] = json_of(archive, object.state);
  return result;
}

Bytes elements_of(const StoredValue& stored, const TensorItem& item) {
  const Box all = whole_box(item.sizes);
  const ByteRange range = payload_range(item, all);
  Bytes elements(static_cast<size_t>(volume(item.sizes) * element_size(item.dtype)));
  copy_region(item, ByteSpan(stored.bytes).subspan(item.payload_offset + range.begin, range.end - range.begin), all,
              elements);
  return elements;
}

class Comparison {
 public:
  Comparison(const StoredValue& a, const StoredValue& b) : a_(a), b_(b) {}

  bool equal(const Value& a, const Value& b) const {
    if (a.kind() != b.kind()) return false;
    switch (a.kind()) {
      case Kind::kNone:
        return true;
      case Kind::kBool:
        return a.as_bool() == b.as_bool();
      case Kind::kInt:
        return a.as_int() == b.as_int();
      case Kind::kFloat:
        return std::bit_cast<uint64_t>(a.as_float()) == std::bit_cast<uint64_t>(b.as_float());
      case Kind::kStr:
        return a.as_str() == b.as_str();
      case Kind::kBytes:
      case Kind::kByteArray:
      case Kind::kBigInt:
        return std::ranges::equal(a.as_bytes(), b.as_bytes());
      case Kind::kGlobal:
        return b.is_global(a.as_global().module, a.as_global().name);
      case Kind::kPersistentId:
        return equal_storages(a.persistent_id(), b.persistent_id());
      case Kind::kDict:
        return equal_dicts(a.entries(), b.entries());
      case Kind::kObject:
        return equal_objects(a, b);
      default:
        return equal_lists(a.items(), b.items());
    }
  }

 private:
  bool equal_lists(std::span<const Value> a, std::span<const Value> b) const {
    return std::ranges::equal(a, b, [this](const Value& x, const Value& y) { return equal(x, y); });
  }
  bool equal_dicts(std::span<const pickle::Entry> a, std::span<const pickle::Entry> b) const {
    if (a.size() != b.size()) return false;
    std::multimap<std::string, const pickle::Entry*> by_key;
    for (const pickle::Entry& entry : b) by_key.emplace(dump(json_of(b_.archive, entry.key)), &entry);
    return std::ranges::all_of(a, [&](const pickle::Entry& entry) {
      const auto [begin, end] = by_key.equal_range(dump(json_of(a_.archive, entry.key)));
      return std::any_of(begin, end, [&](const auto& other) {
        return equal(entry.key, other.second->key) && equal(entry.value, other.second->value);
      });
    });
  }
  bool equal_storages(const Value& a, const Value& b) const {
    const auto content = [](const StoredValue& stored, const Value& id) -> std::optional<ByteSpan> {
      if (id.kind() != Kind::kTuple || id.items().size() != 5 || id.items()[2].kind() != Kind::kStr) return {};
      const auto storage = stored.archive.storage(id.items()[2].as_str());
      if (!storage) return {};
      return ByteSpan(stored.bytes).subspan(storage->offset, storage->size);
    };
    const auto x = content(a_, a);
    const auto y = content(b_, b);
    return x && y && std::ranges::equal(*x, *y) && equal(a.items()[1], b.items()[1]);
  }
  bool equal_objects(const Value& a, const Value& b) const {
    const auto x = tensor_of(a_.archive, a);
    const auto y = tensor_of(b_.archive, b);
    if (x.has_value() != y.has_value()) return false;
    if (x) return x->dtype == y->dtype && x->sizes == y->sizes && elements_of(a_, *x) == elements_of(b_, *y);
    const pickle::Object& m = a.as_object();
    const pickle::Object& n = b.as_object();
    const auto kwargs = [](const pickle::Object& object) {
      return object.extras != nullptr ? object.extras->kwargs : Value();
    };
    return m.made == n.made && m.has_state == n.has_state && equal(m.callable, n.callable) && equal(m.args, n.args) &&
           equal(m.state, n.state) && equal(kwargs(m), kwargs(n)) && equal_lists(m.list_items(), n.list_items()) &&
           equal_dicts(m.dict_items(), n.dict_items());
  }

  const StoredValue& a_;
  const StoredValue& b_;
};

}  // namespace

Json to_json(const StoredValue& value) { return json_of(value.archive, value.archive.root()); }

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

bool is_same(const StoredValue& a, const StoredValue& b) {
  return Comparison(a, b).equal(a.archive.root(), b.archive.root());
}

}  // namespace reshard::cli
