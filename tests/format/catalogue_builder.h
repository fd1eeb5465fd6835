// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Catalogues as PyTorch writes them, made object by object, to have every broken one that no writer would write.

#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/pickle_opcodes.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/pickle.h"

namespace reshard {

/// The opcodes of a stream, each with its argument.
inline std::vector<std::string> opcodes_of(ByteSpan stream) {
  const std::string_view text = as_text(stream);
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    const auto little = [&](size_t bytes) {
      uint64_t v = 0;
      std::memcpy(&v, text.data() + at + 1, bytes);
      return static_cast<size_t>(v);
    };
    size_t length = 1;
    using pickle::Op;
    switch (static_cast<Op>(text[at])) {
      case Op::kProto:
      case Op::kBinInt1:
      case Op::kBinGet:
      case Op::kBinPut:
        length += 1;
        break;
      case Op::kBinInt2:
        length += 2;
        break;
      case Op::kBinInt:
      case Op::kLongBinGet:
      case Op::kLongBinPut:
        length += 4;
        break;
      case Op::kFrame:
      case Op::kBinFloat:
        length += 8;
        break;
      case Op::kLong1:
      case Op::kShortBinUnicode:
      case Op::kShortBinBytes:
      case Op::kShortBinString:
        length += 1 + little(1);
        break;
      case Op::kBinUnicode:
      case Op::kBinBytes:
        length += 4 + little(4);
        break;
      case Op::kGlobal:
        length = text.find('\n', text.find('\n', at) + 1) + 1 - at;
        break;
      default:
        break;
    }
    parts.emplace_back(text.substr(at, length));
    at += length;
  }
  return parts;
}

/// The same stream in the opcodes of protocol 4, in which PyTorch and this library write catalogues.
inline Bytes in_protocol_4(ByteSpan stream) {
  ByteWriter out;
  for (const std::string& part : opcodes_of(stream)) {
    using pickle::Op;
    const auto op = [&](Op code) { out.u8(static_cast<uint8_t>(code)); };
    const auto name = [&](std::string_view text) {
      op(Op::kBinUnicode);
      out.u32(static_cast<uint32_t>(text.size()));
      out.text(text);
    };
    switch (static_cast<Op>(part[0])) {
      case Op::kProto:
        out.text("\x80\x04");
        break;
      case Op::kBinPut:  // numbered one after the other
      case Op::kLongBinPut:
        op(Op::kMemoize);
        break;
      case Op::kGlobal: {
        const size_t end = part.find('\n');
        name(std::string_view(part).substr(1, end - 1));
        name(std::string_view(part).substr(end + 1, part.size() - end - 2));
        op(Op::kStackGlobal);
        break;
      }
      default:
        out.text(part);
    }
  }
  return out.take();
}

/// A catalogue of one tensor "w" (float32, [4], two chunks) and one value "v", every part of which can be replaced before it is
/// written.
class CatalogueBuilder {
 public:
  static constexpr const char* kModule = "torch.distributed.checkpoint.metadata";
  static constexpr const char* kOldModule = "torch.distributed._shard.sharded_tensor.metadata";
  static constexpr const char* kFileModule = "torch.distributed.checkpoint.filesystem";

  pickle::Tree tree;
  std::string properties_module = kModule, memory_format_name = "_MEM_FORMAT_ENCODING";
  pickle::Value dtype = tree.global("torch", "float32");
  pickle::Value layout = call("torch.serialization", "_get_layout", {tree.str("torch.strided")});
  pickle::Value memory_format_number = pickle::Tree::integer(0);
  std::vector<pickle::Value> more_properties;
  pickle::Value size = dims({4});
  std::vector<pickle::Entry> first_chunk = {{tree.str("offsets"), dims({0})}, {tree.str("sizes"), dims({2})}};
  std::vector<pickle::Entry> first_index = {
      {tree.str("fqn"), tree.str("w")}, {tree.str("index"), pickle::Tree::integer(0)}, {tree.str("offset"), dims({0})}};
  std::vector<pickle::Entry> first_info = {{tree.str("relative_path"), tree.str("__0_0.distcp")},
                                           {tree.str("offset"), pickle::Tree::integer(0)},
                                           {tree.str("length"), pickle::Tree::integer(1577)}};
  std::vector<pickle::Value> more_chunks;
  std::vector<pickle::Entry> more_entries;  // of state_dict_metadata
  std::vector<pickle::Entry> more_storage;
  std::vector<pickle::Entry> more_attributes;
  pickle::Value planner_data = tree.dict({{tree.str("w"), tree.tuple({tree.str("w")})}});
  pickle::Value v_class;  // None: BytesStorageMetadata

  pickle::Value call(const std::string& module, const std::string& name, std::vector<pickle::Value> args,
                     pickle::Object::Made made = pickle::Object::Made::kReduce) {
    pickle::Object object;
    object.made = made;
    object.callable = tree.global(module, name);
    object.args = tree.tuple(args);
    return tree.object(object);
  }
  pickle::Value make(const std::string& module, const std::string& name, const pickle::Value& state) {
    pickle::Object object;
    object.made = pickle::Object::Made::kNewObj;
    object.callable = tree.global(module, name);
    object.args = tree.tuple({});
    object.has_state = !state.is_none();
    object.state = state;
    return tree.object(object);
  }
  pickle::Value dims(std::vector<int64_t> values) {
    std::vector<pickle::Value> items;
    for (const int64_t v : values) items.push_back(pickle::Tree::integer(v));
    return call("torch", "Size", {tree.tuple(items)});
  }
  pickle::Value index(const std::string& fqn, std::optional<std::vector<int64_t>> offset) {
    std::vector<pickle::Entry> state = {{tree.str("fqn"), tree.str(fqn)}};
    if (offset) state.push_back({tree.str("offset"), dims(*offset)});
    return make(kModule, "MetadataIndex", tree.dict(state));
  }
  pickle::Value info(const std::string& path, int64_t offset) {
    return make(kFileModule, "_StorageInfo",
                tree.dict({{tree.str("relative_path"), tree.str(path)},
                           {tree.str("offset"), pickle::Tree::integer(offset)},
                           {tree.str("length"), pickle::Tree::integer(1577)}}));
  }
  pickle::Value tensor() {
    std::vector<pickle::Value> properties = {dtype, layout, pickle::Tree::boolean(false),
                                             call(properties_module, memory_format_name, {memory_format_number}),
                                             pickle::Tree::boolean(false)};
    properties.insert(properties.end(), more_properties.begin(), more_properties.end());
    std::vector<pickle::Value> chunks = {
        make(kModule, "ChunkStorageMetadata", tree.dict(first_chunk)),
        make(kModule, "ChunkStorageMetadata",
             tree.dict({{tree.str("offsets"), dims({2})}, {tree.str("sizes"), dims({2})}}))};
    chunks.insert(chunks.end(), more_chunks.begin(), more_chunks.end());
    return make(
        kModule, "TensorStorageMetadata",
        tree.dict({{tree.str("properties"), make(properties_module, "TensorProperties", tree.tuple(properties))},
                   {tree.str("size"), size},
                   {tree.str("chunks"), tree.list(chunks)}}));
  }
  pickle::Value metadata() {
    std::vector<pickle::Entry> entries = {
        {tree.str("w"), tensor()},
        {tree.str("v"), v_class.is_none() ? make(kModule, "BytesStorageMetadata", {}) : v_class}};
    entries.insert(entries.end(), more_entries.begin(), more_entries.end());
    std::vector<pickle::Entry> storage = {{make(kModule, "MetadataIndex", tree.dict(first_index)),
                                           make(kFileModule, "_StorageInfo", tree.dict(first_info))},
                                          {index("w", {{2}}), info("__1_0.distcp", 0)},
                                          {index("v", {}), info("__0_0.distcp", 1577)}};
    storage.insert(storage.end(), more_storage.begin(), more_storage.end());
    std::vector<pickle::Entry> state = {{tree.str("state_dict_metadata"), tree.dict(entries)},
                                        {tree.str("planner_data"), planner_data},
                                        {tree.str("storage_data"), tree.dict(storage)}};
    state.insert(state.end(), more_attributes.begin(), more_attributes.end());
    return make(kModule, "Metadata", tree.dict(state));
  }
  Bytes encode() { return pickle::write(metadata()); }
  Bytes encode_in_protocol_4() { return in_protocol_4(encode()); }
  Metadata decode() { return decode_metadata(encode()); }
};

inline void replace(std::vector<pickle::Entry>& state, std::string_view name, const pickle::Value& value) {
  for (pickle::Entry& entry : state) {
    if (entry.key.as_str() == name) entry.value = value;
  }
}
inline void drop(std::vector<pickle::Entry>& state, std::string_view name) {
  std::erase_if(state, [&](const pickle::Entry& entry) { return entry.key.as_str() == name; });
}

}  // namespace reshard
