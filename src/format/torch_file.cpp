// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/torch_file.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <unordered_set>
#include <utility>

#include "reshard/core/checked.h"

namespace reshard {
namespace {

using pickle::Kind;
using pickle::Value;

// Names may take so many times the bytes of the pickle that they come from.
constexpr uint64_t kNameBytesPerByte = 256;
constexpr size_t kMaxDepth = 400;
constexpr uint64_t kMaxPadding = 1 << 20;  // list positions without a leaf

bool is_reduce(const Value& value) {
  return value.kind() == Kind::kObject && value.as_object().made == pickle::Object::Made::kReduce &&
         value.as_object().callable.kind() == Kind::kGlobal;
}

/// Anything that makes a tensor, also of a kind that is not read here.
bool makes_tensor(const Value& value) {
  if (!is_reduce(value)) return false;
  const pickle::Global& function = value.as_object().callable.as_global();
  return (function.module == "torch._utils" || function.module == "torch._tensor") &&
         function.name.starts_with("_rebuild");
}

/// The entries of a dict, an OrderedDict or a defaultdict.
std::optional<std::span<const pickle::Entry>> mapping_entries(const Value& value) {
  if (value.kind() == Kind::kDict) return value.entries();
  if (!is_reduce(value)) return std::nullopt;
  const pickle::Object& object = value.as_object();
  const bool is_mapping = object.callable.is_global("collections", "OrderedDict") ||
                          object.callable.is_global("collections", "defaultdict") ||
                          object.callable.is_global("collections", "Counter");
  if (!is_mapping) return std::nullopt;
  // Python 2 and Counter give the entries as an argument.
  for (const Value& argument : object.args.items()) {
    if (argument.kind() == Kind::kDict) return argument.entries();
    if (argument.kind() == Kind::kList) {
      throw Error(ErrorCode::kUnsupported, "a mapping that is made from a list", {.found = describe(value)});
    }
  }
  return object.dict_items();
}

bool is_entered(const Value& list) {
  return std::ranges::any_of(list.items(), [](const Value& item) {
    return makes_tensor(item) || mapping_entries(item) || (item.kind() == Kind::kList && is_entered(item));
  });
}

std::string python_float(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {  // the shortest that reads back
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  std::string result = text;
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return result;
}

/// str(key).
std::string key_text(const Value& key) {
  switch (key.kind()) {
    case Kind::kStr:
      return std::string(key.as_str());
    case Kind::kInt:
      return std::to_string(key.as_int());
    case Kind::kBool:
      return key.as_bool() ? "True" : "False";
    case Kind::kNone:
      return "None";
    case Kind::kFloat:
      return python_float(key.as_float());
    default:
      throw Error(ErrorCode::kUnsupported, "a key of a dict has no name",
                  {.wanted = "text, a number or None", .found = describe(key)});
  }
}

bool is_quantized(DType dtype) {
  return dtype == DType::kQInt8 || dtype == DType::kQUInt8 || dtype == DType::kQInt32 || dtype == DType::kQUInt4x2 ||
         dtype == DType::kQUInt2x4;
}

/// Parameters with attributes and buffers are wrapped tensors; what they are besides is not kept.
std::optional<TensorItem> tensor_of(const ValueArchive& archive, const Value& value) {
  const pickle::Object& object = value.as_object();
  const auto args = object.args.items();
  pickle::Tree scratch;
  pickle::Object inner;
  if (object.callable.is_global("torch._utils", "_rebuild_parameter_with_state") && args.size() == 4) {
    inner.callable = scratch.global("torch._utils", "_rebuild_parameter");
    inner.args = scratch.tuple(args.first(3));
    return archive.as_tensor(scratch.object(inner));
  }
  if (object.callable.is_global("torch._tensor", "_rebuild_from_type_v2") && args.size() == 4) {
    const bool plain = args[1].is_global("torch", "Tensor") || args[1].is_global("torch.nn.parameter", "Parameter") ||
                       args[1].is_global("torch.nn.parameter", "Buffer");
    if (!plain || args[2].kind() != Kind::kTuple) {
      throw Error(ErrorCode::kUnsupported, "a tensor of a class of its own", {.found = describe(args[1])});
    }
    inner.callable = args[0];
    inner.args = args[2];
    return archive.as_tensor(scratch.object(inner));
  }
  return archive.as_tensor(value);
}

class Flattener {
 public:
  explicit Flattener(const ValueArchive& archive)
      : archive_(archive), bytes_left_(kNameBytesPerByte * std::max<uint64_t>(archive.pickled().size, 64)) {}

  std::vector<StateLeaf> run() {
    const auto entries = mapping_entries(archive_.root());
    if (!entries) {
      throw Error(ErrorCode::kUnsupported, "the file does not hold a state dict",
                  {.wanted = "a dict", .found = describe(archive_.root())});
    }
    visit_entries(*entries);
    return std::move(leaves_);
  }

 private:
  void visit_entries(std::span<const pickle::Entry> entries) {
    for (const auto& [key, value] : entries) {
      with_error_context([&] { return ErrorContext{.key = path_to_fqn(path_)}; },
                         [&, &key = key] { path_.emplace_back(key_text(key)); });
      visit(value);
      path_.pop_back();
    }
  }

  void visit(const Value& value) {
    const auto entries = with_error_context([&] { return ErrorContext{.key = path_to_fqn(path_)}; },
                                            [&] { return mapping_entries(value); });
    if (entries) return visit_entries(*entries);
    if (value.kind() == Kind::kList && is_entered(value)) {
      int64_t position = 0;
      for (const Value& item : value.items()) {
        path_.emplace_back(position++);
        visit(item);
        path_.pop_back();
      }
      return;
    }
    StateLeaf leaf{path_to_fqn(path_), path_, value, {}};
    const uint64_t cost = leaf.fqn.size() + sizeof(StateLeaf) + path_.size() * sizeof(PathElement);
    if (cost > bytes_left_) {
      throw Error(ErrorCode::kUnsupported, "the names of a state dict unfold out of proportion", {.key = leaf.fqn});
    }
    bytes_left_ -= cost;
    if (!names_.insert(leaf.fqn).second) {
      throw Error(ErrorCode::kUnsupported, "two values of the state dict have the same flattened name",
                  {.key = leaf.fqn});
    }
    if (makes_tensor(value)) {
      leaf.tensor = with_error_context({.key = leaf.fqn}, [&] { return tensor_of(archive_, value); });
      if (leaf.tensor && is_quantized(leaf.tensor->dtype)) {
        throw Error(ErrorCode::kUnsupported, "a quantized tensor",
                    {.key = leaf.fqn, .found = std::string(to_string(leaf.tensor->dtype))});
      }
    }
    leaves_.push_back(std::move(leaf));
  }

  const ValueArchive& archive_;
  uint64_t bytes_left_;
  ObjectPath path_;
  std::vector<StateLeaf> leaves_;
  std::unordered_set<std::string> names_;
};

/// Part of a nested dict while it is put together.
struct Node {
  enum class Type : uint8_t { kUnset, kLeaf, kDict, kList };
  Type type = Type::kUnset;
  Value leaf;
  OrderedMap<std::string, Node*> entries;
  std::vector<Node*> items;
};

class Nester {
 public:
  explicit Nester(pickle::Tree& tree) : tree_(tree) { root_.type = Node::Type::kDict; }

  void add(const NestedLeaf& leaf) {
    if (leaf.path.empty() || leaf.path.size() > kMaxDepth) {
      throw Error(ErrorCode::kCorruptData, "a path into a state dict is empty or too deep",
                  {.key = path_to_fqn(leaf.path)});
    }
    Node* node = &root_;
    for (const PathElement& element : leaf.path) node = child(*node, element, leaf.path);
    if (node->type != Node::Type::kUnset) blocked(leaf.path);
    node->type = Node::Type::kLeaf;
    node->leaf = leaf.value;
  }
  Value finish() { return to_value(root_); }

 private:
  [[noreturn]] static void blocked(const ObjectPath& path) {
    throw Error(ErrorCode::kCorruptData, "something else is in the way of a value", {.key = path_to_fqn(path)});
  }

  Node* child(Node& parent, const PathElement& element, const ObjectPath& path) {
    const auto* key = std::get_if<std::string>(&element);
    const Node::Type wanted = key != nullptr ? Node::Type::kDict : Node::Type::kList;
    if (parent.type == Node::Type::kUnset) parent.type = wanted;
    if (parent.type != wanted) blocked(path);
    if (key != nullptr) {
      Node*& slot = parent.entries[*key];
      if (slot == nullptr) slot = &nodes_.emplace_back();
      return slot;
    }
    const auto position = std::get<int64_t>(element);
    if (position < 0) blocked(path);
    const auto at = static_cast<uint64_t>(position);
    if (at >= parent.items.size()) {
      padding_ += at - parent.items.size();
      if (at > kMaxPadding || padding_ > kMaxPadding) {
        throw Error(ErrorCode::kCorruptData, "an absurd list position",
                    {.key = path_to_fqn(path), .found = std::to_string(position)});
      }
      parent.items.resize(static_cast<size_t>(at) + 1);
    }
    Node*& slot = parent.items[static_cast<size_t>(at)];
    if (slot == nullptr) slot = &nodes_.emplace_back();
    return slot;
  }

  Value to_value(const Node& node) {
    switch (node.type) {
      case Node::Type::kLeaf:
        return node.leaf;
      case Node::Type::kDict: {
        std::vector<pickle::Entry> entries;
        entries.reserve(node.entries.size());
        for (const auto& [key, item] : node.entries) entries.push_back({tree_.str(key), to_value(*item)});
        return tree_.dict(entries);
      }
      case Node::Type::kList: {
        std::vector<Value> items;
        items.reserve(node.items.size());
        for (const Node* item : node.items) items.push_back(item != nullptr ? to_value(*item) : Value());
        return tree_.list(items);
      }
      default:
        return {};
    }
  }

  pickle::Tree& tree_;
  Node root_;
  std::deque<Node> nodes_;
  uint64_t padding_ = 0;
};

}  // namespace

std::vector<StateLeaf> flatten_archive(const ValueArchive& archive) { return Flattener(archive).run(); }

std::vector<std::string> referenced_storages(const Value& value) {
  std::vector<std::string> keys;
  std::unordered_set<std::string> known;
  pickle::Tree scratch;
  scratch.copy(value, [&](const Value& id) {
    const auto parts = id.kind() == Kind::kTuple ? id.items() : std::span<const Value>{};
    if (parts.size() != 5 || parts[0].kind() != Kind::kStr || parts[0].as_str() != "storage" ||
        parts[2].kind() != Kind::kStr) {
      throw Error(ErrorCode::kCorruptData, "a persistent id is no storage");
    }
    std::string key(parts[2].as_str());
    if (known.insert(key).second) keys.push_back(std::move(key));
    return Value();
  });
  return keys;
}

Bytes extract_value(const ValueArchive& archive, const Value& value, const ByteSource& source) {
  constexpr uint64_t kBlock = 1 << 20;
  Bytes out;
  TorchArchiveWriter writer(value, [&](ByteSpan bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); });
  Bytes block;
  for (const std::string& key : referenced_storages(value)) {
    const auto storage = archive.storage(key);
    if (!storage) throw Error(ErrorCode::kCorruptData, "tensor: no record data/" + key);
    writer.begin_storage(key, storage->size);
    for (uint64_t done = 0; done < storage->size; done += block.size()) {
      block.resize(static_cast<size_t>(std::min(kBlock, storage->size - done)));
      source.read(storage->offset + done, block);
      writer.write(block);
    }
  }
  writer.finish();
  return out;
}

Value nest(pickle::Tree& tree, const std::vector<NestedLeaf>& leaves) {
  Nester nester(tree);
  for (const NestedLeaf& leaf : leaves) nester.add(leaf);
  return nester.finish();
}

}  // namespace reshard
