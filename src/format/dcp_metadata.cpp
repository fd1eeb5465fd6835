// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/dcp_metadata.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>
#include <string_view>
#include <unordered_map>

#include "format/metadata_scan.h"
#include "format/pickle_opcodes.h"
#include "format/utf8.h"
#include "reshard/format/pickle.h"
#include "reshard/format/sha256.h"

namespace reshard {
namespace {

using pickle::describe;
using pickle::Kind;
using pickle::Op;
using pickle::Value;

constexpr std::string_view kCatalogue = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kCatalogueBefore23 = "torch.distributed._shard.sharded_tensor.metadata";
constexpr std::string_view kFileSystem = "torch.distributed.checkpoint.filesystem";

// Attributes of our own in the state of the Metadata object.
constexpr std::string_view kOurAttributes = "reshard_";
constexpr std::string_view kStorageMetaAttribute = "reshard_storage_meta";
constexpr std::string_view kSidecarsAttribute = "reshard_sidecars";

// How a file of ours ends: the last attribute, whose value is the SHA-256 of all bytes before that value, and three
// opcodes. So the digest is found without parsing, and every byte of the file is either in it or in this fixed frame.
constexpr std::string_view kDigestBegin =
    "\x8c\x0ereshard_digest\x94"
    "C\x20";
constexpr std::string_view kDigestEnd = "ub.";

constexpr size_t kMaxTransforms = 16;

// What a stream shares is copied here, so a small file could ask for a lot of memory. Names of some thousand characters stay far below this.
constexpr uint64_t kMaxCopiedPerByte = 256;
// Text that the encoder writes again each time rather than refer to it, so that no catalogue of ours comes near that.
constexpr size_t kLongText = 1024;

// --- decoding --------------------------------------------------------------------------------------------------------

[[noreturn]] void corrupt(const std::string& message, std::string wanted = {}, std::string found = {}) {
  throw Error(ErrorCode::kCorruptData, "metadata: " + message,
              {.wanted = std::move(wanted), .found = std::move(found)});
}

// A class or function known by one or two names. Globals are shared in any real stream, so the last match is
// remembered.
class Known {
 public:
  Known(std::string_view module, std::string_view name, std::string_view other_module = {},
        std::string_view other_name = {})
      : module_(module), name_(name), other_module_(other_module), other_name_(other_name) {}
  bool is(const Value& global) {
    if (!last_.is_none() && global.is_same(last_)) return true;
    if (!global.is_global(module_, name_) && (other_name_.empty() || !global.is_global(other_module_, other_name_)))
      return false;
    last_ = global;
    return true;
  }
  bool made(const Value& value) { return value.kind() == Kind::kObject && is(value.as_object().callable); }
  // The object's parts; throws if `value` is something else.
  const pickle::Object& get(const Value& value, pickle::Object::Made how) {
    if (!made(value) || value.as_object().made != how)
      corrupt("object of another class", std::string(name_), describe(value));
    return value.as_object();
  }

 private:
  std::string_view module_, name_, other_module_, other_name_;
  Value last_;
};

class Decoder {
 public:
  explicit Decoder(size_t file_size) : copies_left_(kMaxCopiedPerByte * (file_size + 1)) {}

  Metadata decode(const Value& root) {
    const auto state = attributes(metadata_, root);
    Metadata result;
    const auto entries = required(state, "state_dict_metadata").entries();
    result.state_dict_metadata.reserve(entries.size());
    for (const pickle::Entry& entry : entries) {
      const std::string fqn = text(entry.key);
      at_key(fqn, [&] {
        if (!result.state_dict_metadata.insert(fqn, storage_metadata(entry.value, fqn.size())))
          corrupt("key is there twice");
      });
    }
    if (const Value* planner = find(state, "planner_data")) result.planner_data = planner_data(*planner);
    const Value* storage = find(state, "storage_data");
    if (storage == nullptr || storage->kind() != Kind::kDict)
      corrupt("no storage_data", "dict", storage == nullptr ? "nothing" : describe(*storage));
    result.storage_data.reserve(storage->entries().size());
    for (const auto& [key, value] : storage->entries()) {
      MetadataIndex index = metadata_index(key);
      try {
        StorageInfo info = storage_info(value);
        if (!result.storage_data.insert(std::move(index), std::move(info))) corrupt("item is there twice");
      } catch (const Error& error) {
        throw error.with_context({.key = std::string(required(attributes(index_, key), "fqn").as_str())});
      }
    }
    if (const Value* meta = find(state, "storage_meta"); meta != nullptr && !meta->is_none()) {
      result.storage_meta = storage_meta(attributes(storage_meta_, *meta));
    } else if (const Value* ours = find(state, kStorageMetaAttribute); ours != nullptr && !ours->is_none()) {
      result.storage_meta = storage_meta(ours->entries());
    }
    is_ours_ = std::ranges::any_of(state, [](const auto& attribute) {
      return attribute.key.kind() == Kind::kStr && attribute.key.as_str().starts_with(kOurAttributes);
    });
    if (const Value* version = find(state, "version"); version != nullptr && !version->is_none())
      result.version = text(*version);
    if (const Value* sidecars = find(state, kSidecarsAttribute); sidecars != nullptr && !sidecars->is_none()) {
      const auto digests = pickle::plain_bytes(*sidecars);
      constexpr size_t kSize = std::tuple_size_v<SidecarDigest>;
      if (!digests || digests->size() % kSize != 0)
        corrupt("digests of the sidecars", "32 bytes each", describe(*sidecars));
      auto& list = result.sidecars.emplace(digests->size() / kSize);
      for (size_t i = 0; i < list.size(); ++i) {
        std::ranges::copy(as_bytes(*digests).subspan(i * kSize, kSize), list[i].begin());
      }
    }
    return result;
  }

  /// Whether the catalogue has attributes that only this library writes.
  bool is_ours() const { return is_ours_; }

 private:
  using Made = pickle::Object::Made;
  using State = std::span<const pickle::Entry>;

  template <class Body>
  static void at_key(const std::string& fqn, Body&& body) {
    try {
      body();
    } catch (const Error& error) {
      throw error.with_context({.key = fqn});
    }
  }

  static const Value* find(State state, std::string_view name) {
    const Value* found = nullptr;  // the last one counts, as when Python builds the dict
    for (const auto& [key, value] : state) {
      if (key.kind() == Kind::kStr && key.as_str() == name) found = &value;
    }
    return found;
  }
  static const Value& required(State state, std::string_view name) {
    const Value* value = find(state, name);
    if (value == nullptr) corrupt("attribute " + std::string(name) + " is not there");
    return *value;
  }
  State attributes(Known& known, const Value& value) {
    const pickle::Object& object = known.get(value, Made::kNewObj);
    if (!object.has_state) return {};
    const State state = object.state.entries();
    spend(state.size() * sizeof(pickle::Entry));  // find() walks it
    return state;
  }

  void spend(uint64_t bytes) {
    if (bytes > copies_left_) corrupt("shared parts would take far more memory than the file");
    copies_left_ -= bytes;
  }
  std::string text(const Value& value) {
    const std::string_view text = value.as_str();
    spend(text.size());
    return std::string(text);
  }

  // Text that many items share: streams refer to the one string each time, and so does the catalogue.
  const SharedString& shared_text(const Value& value) {
    const std::string_view view = value.as_str();
    spend(view.size());
    if (view.empty()) return none_;
    const size_t known = shared_.size();
    SharedString& text = shared_[view.data()];
    if (shared_.size() != known) text = view;
    return text;
  }

  Dims size(const Value& value) {
    const Value* tuple = &value;
    if (value.kind() == Kind::kObject) {
      const auto args = size_.get(value, Made::kReduce).args.items();
      if (args.size() != 1) corrupt("arguments of torch.Size");
      tuple = &args[0];
    }
    if (tuple->kind() != Kind::kTuple) corrupt("sizes or offsets", "torch.Size", describe(*tuple));
    const auto items = tuple->items();
    if (items.size() > kMaxTensorRank)
      corrupt("too many dimensions", "at most " + std::to_string(kMaxTensorRank), std::to_string(items.size()));
    spend(items.size() * sizeof(int64_t));
    Dims dims(items.size(), 0);
    for (size_t i = 0; i < items.size(); ++i) dims[i] = items[i].as_int();
    return dims;
  }

  StorageMetadata storage_metadata(const Value& value, size_t fqn_size) {
    if (bytes_.made(value)) return BytesStorageMetadata{};
    if (!tensor_.made(value))
      throw Error(ErrorCode::kUnsupported, "metadata: entry of an unknown class", {.found = describe(value)});
    const auto state = attributes(tensor_, value);
    TensorStorageMetadata tensor;
    tensor.properties = properties(required(state, "properties"));
    tensor.size = size(required(state, "size"));
    const Value& chunks = required(state, "chunks");
    if (chunks.kind() != Kind::kList && chunks.kind() != Kind::kTuple) corrupt("chunks", "list", describe(chunks));
    spend(chunks.items().size() * (sizeof(ChunkStorageMetadata) + fqn_size));  // each is looked up under the name
    tensor.chunks.reserve(chunks.items().size());
    for (const Value& chunk : chunks.items()) {
      const auto box = attributes(chunk_, chunk);
      tensor.chunks.push_back({size(required(box, "offsets")), size(required(box, "sizes"))});
    }
    return tensor;
  }

  TensorProperties properties(const Value& value) {
    const pickle::Object& object = properties_.get(value, Made::kNewObj);
    const auto fields = object.state.kind() == Kind::kTuple ? object.state.items() : std::span<const Value>{};
    if (fields.size() != 5 && fields.size() != 6)
      corrupt("state of TensorProperties", "5 or 6 fields", std::to_string(fields.size()));  // 6: strides, since 2.15
    TensorProperties properties;
    const auto& dtype = fields[0].as_global();
    const auto known = dtype.module == "torch" ? dtype_from_string(dtype.name) : std::nullopt;
    if (!known) throw Error(ErrorCode::kUnsupported, "metadata: unknown dtype", {.found = describe(fields[0])});
    properties.dtype = *known;
    properties.layout = fields[1].is_none() ? std::string() : text(only_argument(layout_, fields[1]));
    properties.requires_grad = fields[2].as_bool();
    const int64_t memory_format = only_argument(memory_format_, fields[3]).as_int();
    if (memory_format < 0 || memory_format > 2) corrupt("memory format", "0 to 2", std::to_string(memory_format));
    properties.memory_format = static_cast<int32_t>(memory_format);
    properties.pin_memory = fields[4].as_bool();
    return properties;
  }
  static const Value& only_argument(Known& known, const Value& value) {
    const auto args = known.get(value, Made::kReduce).args.items();
    if (args.size() != 1) corrupt("arguments of " + describe(value), "1", std::to_string(args.size()));
    return args[0];
  }

  // Nothing if another planner stored something else there.
  std::optional<OrderedMap<std::string, ObjectPath>> planner_data(const Value& value) {
    if (value.kind() != Kind::kDict) return std::nullopt;
    OrderedMap<std::string, ObjectPath> result;
    result.reserve(value.entries().size());
    for (const auto& [key, path] : value.entries()) {
      if (key.kind() != Kind::kStr || path.kind() != Kind::kTuple) return std::nullopt;
      ObjectPath elements;
      spend(path.items().size() * sizeof(PathElement));
      elements.reserve(path.items().size());
      for (const Value& element : path.items()) {
        if (element.kind() == Kind::kStr) {
          elements.emplace_back(text(element));
        } else if (element.kind() == Kind::kInt) {
          elements.emplace_back(element.as_int());
        } else {
          return std::nullopt;
        }
      }
      if (!result.insert(text(key), std::move(elements)))
        corrupt("planner_data names " + std::string(key.as_str()) + " twice");
    }
    return result;
  }

  MetadataIndex metadata_index(const Value& value) {
    const auto state = attributes(index_, value);
    MetadataIndex index;
    index.fqn = shared_text(required(state, "fqn"));
    at_key(index.fqn, [&] {
      if (const Value* offset = find(state, "offset"); offset != nullptr && !offset->is_none())
        index.offset = size(*offset);
      if (const Value* hint = find(state, "index"); hint != nullptr && !hint->is_none()) index.index = hint->as_int();
    });
    return index;
  }

  static uint64_t position(const Value& value) {
    if (value.as_int() < 0) corrupt("negative offset or length", {}, std::to_string(value.as_int()));
    return static_cast<uint64_t>(value.as_int());
  }
  StorageInfo storage_info(const Value& value) {
    const auto state = attributes(info_, value);
    StorageInfo info;
    info.relative_path = shared_text(required(state, "relative_path"));
    info.offset = position(required(state, "offset"));
    info.length = position(required(state, "length"));
    if (const Value* transforms = find(state, "transform_descriptors");
        transforms != nullptr && !transforms->is_none()) {
      if (transforms->items().size() > kMaxTransforms)
        corrupt("too many transforms", std::to_string(kMaxTransforms), std::to_string(transforms->items().size()));
      for (const Value& name : transforms->items()) info.transform_descriptors.push_back(text(name));
    }
    return info;
  }

  // A path object is the list of its parts.
  std::optional<std::string> path_text(const Value& value) {
    if (value.kind() == Kind::kStr) return text(value);
    if (value.kind() != Kind::kObject) return std::nullopt;
    const pickle::Object& object = value.as_object();
    if (object.callable.kind() != Kind::kGlobal || !object.callable.as_global().module.starts_with("pathlib"))
      return std::nullopt;
    std::string path;
    for (const Value& part : object.args.items()) {
      if (part.kind() != Kind::kStr) return std::nullopt;
      if (part.as_str().starts_with('/')) path.clear();
      if (!path.empty() && !path.ends_with('/')) path += '/';
      path += text(part);
    }
    return path.empty() ? "." : path;
  }
  StorageMeta storage_meta(State state) {
    StorageMeta meta;
    const auto optional_text = [&](std::string_view name) -> std::optional<std::string> {
      const Value* value = find(state, name);
      return value == nullptr ? std::nullopt : path_text(*value);
    };
    meta.checkpoint_id = optional_text("checkpoint_id");
    meta.save_id = optional_text("save_id");
    meta.load_id = optional_text("load_id");
    if (const Value* modules = find(state, "modules"); modules != nullptr && modules->kind() == Kind::kList) {
      spend(modules->items().size() * sizeof(std::string));
      for (const Value& name : modules->items()) {
        if (name.kind() == Kind::kStr) meta.modules.push_back(text(name));
      }
    }
    return meta;
  }

  uint64_t copies_left_;
  bool is_ours_ = false;
  OrderedMap<const char*, SharedString> shared_;  // by the place of the text in the tree
  const SharedString none_;
  Known metadata_{kCatalogue, "Metadata"};
  Known tensor_{kCatalogue, "TensorStorageMetadata"};
  Known bytes_{kCatalogue, "BytesStorageMetadata"};
  Known chunk_{kCatalogue, "ChunkStorageMetadata"};
  Known properties_{kCatalogue, "TensorProperties", kCatalogueBefore23, "TensorProperties"};
  Known memory_format_{kCatalogue, "_MEM_FORMAT_ENCODING", kCatalogueBefore23, "MEM_FORMAT_ENCODING"};
  Known layout_{"torch.serialization", "_get_layout"};
  Known size_{"torch", "Size"};
  Known index_{kCatalogue, "MetadataIndex"};
  Known info_{kFileSystem, "_StorageInfo"};
  Known storage_meta_{kCatalogue, "StorageMeta"};
};

// --- encoding --------------------------------------------------------------------------------------------------------

/// Throws if the digest at the end does not match; false if there is none.
bool check_digest(ByteSpan file) {
  constexpr size_t kSize = std::tuple_size_v<Sha256Digest>;
  constexpr size_t kFrame = kDigestBegin.size() + kSize + kDigestEnd.size();
  if (file.size() < kFrame || !as_text(file).ends_with(kDigestEnd)) return false;
  const ByteSpan frame = file.last(kFrame);
  if (!as_text(frame).starts_with(kDigestBegin)) return false;
  const ByteSpan digest = frame.subspan(kDigestBegin.size(), kSize);
  const ByteSpan body = file.first(file.size() - kSize - kDigestEnd.size());
  if (std::ranges::equal(Sha256::of(body), digest)) return true;
  corrupt("the catalogue does not match its digest: it was changed after it was saved");
}

// Protocol 4. Classes, attribute names, keys, file names and most sizes and offsets are written once and referred to; all else is written out.
class Encoder {
 public:
  Bytes encode(const Metadata& metadata) {
    out_.buffer().reserve(4096 + 128 * metadata.storage_data.size());  // about what two-dimensional chunks take
    op(Op::kProto);
    out_.u8(4);
    op(Op::kFrame);
    const size_t frame = out_.size();
    out_.u64(0);

    strings_.reserve(2 * metadata.state_dict_metadata.size());
    names_.reserve(metadata.state_dict_metadata.size());
    offsets_.resize(metadata.state_dict_metadata.size());
    entries_ = &metadata.state_dict_metadata;

    begin_object(kCatalogue, "Metadata");
    str("state_dict_metadata");
    begin_dict();
    for (size_t i = 0; const auto& [fqn, entry] : metadata.state_dict_metadata) {
      Offsets& offsets = offsets_[i++];
      str(fqn);
      if (const auto* tensor = std::get_if<TensorStorageMetadata>(&entry)) {
        tensor_entry(*tensor, offsets);
      } else {
        new_object(kCatalogue, "BytesStorageMetadata");
      }
    }
    op(Op::kSetItems);

    str("planner_data");
    if (metadata.planner_data) {
      begin_dict();
      for (const auto& [fqn, path] : *metadata.planner_data) {
        str(fqn);
        op(Op::kMark);
        for (const PathElement& element : path) {
          if (const auto* name = std::get_if<std::string>(&element)) {
            str(*name);
          } else {
            integer(std::get<int64_t>(element));
          }
        }
        op(Op::kTuple);
      }
      op(Op::kSetItems);
    } else {
      op(Op::kNone);
    }

    str("storage_data");
    begin_dict();
    for (const auto& [index, info] : metadata.storage_data) {
      fixed(index_begin_, [&] {
        begin_object(kCatalogue, "MetadataIndex");
        str("fqn");
      });
      const Offsets* offsets = name(index.fqn).offsets;
      fixed(index_hint_, [&] { str("index"); });
      index.index ? integer(*index.index) : op(Op::kNone);
      if (index.offset) {
        fixed(index_offset_, [&] { str("offset"); });
        item_offset(index, offsets);
      }
      fixed(info_begin_, [&] {
        end_object();
        begin_object(kFileSystem, "_StorageInfo");
        str("relative_path");
      });
      name(info.relative_path);
      fixed(info_offset_, [&] { str("offset"); });
      position(info.offset);
      fixed(info_length_, [&] { str("length"); });
      position(info.length);
      if (!info.transform_descriptors.empty()) {
        str("transform_descriptors");
        str_list(info.transform_descriptors);
      }
      end_object();
    }
    op(Op::kSetItems);

    if (metadata.version) {
      str("version");
      str(*metadata.version);
    }
    if (metadata.storage_meta) {
      str(kStorageMetaAttribute);
      begin_dict();
      optional_str("checkpoint_id", metadata.storage_meta->checkpoint_id);
      optional_str("save_id", metadata.storage_meta->save_id);
      optional_str("load_id", metadata.storage_meta->load_id);
      str("modules");
      str_list(metadata.storage_meta->modules);
      op(Op::kSetItems);
    }
    if (metadata.sidecars) {
      str(kSidecarsAttribute);
      op(Op::kBinBytes);
      out_.u32(static_cast<uint32_t>(metadata.sidecars->size() * sizeof(SidecarDigest)));
      for (const SidecarDigest& digest : *metadata.sidecars) out_.bytes(digest);
    }
    out_.text(kDigestBegin);
    const size_t digest_at = out_.size();
    out_.bytes(Sha256Digest{});
    out_.text(kDigestEnd);

    Bytes& buffer = out_.buffer();
    const uint64_t length = buffer.size() - frame - 8;
    std::memcpy(buffer.data() + frame, &length, 8);
    std::ranges::copy(Sha256::of(ByteSpan(buffer).first(digest_at)),
                      buffer.begin() + static_cast<ptrdiff_t>(digest_at));
    return out_.take();
  }

 private:
  struct Offsets {
    std::span<const ChunkStorageMetadata> chunks;
    size_t first_memo = 0;  // in offset_memos_, where those of the chunks begin
  };

  void op(Op v) { out_.u8(static_cast<uint8_t>(v)); }

  void memoize() {
    op(Op::kMemoize);
    ++memo_;
  }
  void recall(uint32_t index) {
    if (index < 256) {
      op(Op::kBinGet);
      out_.u8(static_cast<uint8_t>(index));
    } else {
      op(Op::kLongBinGet);
      out_.u32(index);
    }
  }

  // Text that the catalogue owns or a literal: it outlives the encoder.
  void str(std::string_view text) {
    if (text.size() > kLongText) return raw_str(text);
    const size_t known = strings_.size();
    uint32_t& memo = strings_[text];
    if (strings_.size() == known) return recall(memo);
    memo = memo_;
    raw_str(text);
    memoize();
  }
  void raw_str(std::string_view text) {
    if (!is_utf8(text))
      throw Error(ErrorCode::kInvalidArgument, "metadata: text is no UTF-8", {.found = std::string(text)});
    if (text.size() < 256) {
      op(Op::kShortBinUnicode);
      out_.u8(static_cast<uint8_t>(text.size()));
    } else {
      if (text.size() > std::numeric_limits<uint32_t>::max())
        throw Error(ErrorCode::kInvalidArgument, "metadata: text of more than 4 GiB");
      op(Op::kBinUnicode);
      out_.u32(static_cast<uint32_t>(text.size()));
    }
    out_.text(text);
  }
  void optional_str(std::string_view name, const std::optional<std::string>& text) {
    str(name);
    text ? str(*text) : op(Op::kNone);
  }
  void str_list(const std::vector<std::string>& texts) {
    op(Op::kEmptyList);
    op(Op::kMark);
    for (const std::string& text : texts) str(text);
    op(Op::kAppends);
  }

  void integer(int64_t v) {
    if (v >= 0 && v <= 0xFF) {
      op(Op::kBinInt1);
      out_.u8(static_cast<uint8_t>(v));
    } else if (v >= 0 && v <= 0xFFFF) {
      op(Op::kBinInt2);
      out_.u16(static_cast<uint16_t>(v));
    } else if (v == static_cast<int32_t>(v)) {
      op(Op::kBinInt);
      out_.u32(static_cast<uint32_t>(v));
    } else {
      op(Op::kLong1);
      out_.u8(8);
      out_.i64(v);
    }
  }
  void position(uint64_t v) {
    if (v > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      throw Error(ErrorCode::kInvalidArgument, "metadata: offset or length overflows");
    integer(static_cast<int64_t>(v));
  }

  // What `write` writes, which is the same each time, made once: from the second time on it only refers to what is there.
  template <class Write>
  void fixed(Bytes& known, Write&& write) {
    if (!known.empty()) return out_.bytes(known);
    const uint32_t memo = memo_;
    const size_t begin = out_.size();
    write();
    if (memo_ == memo) known.assign(out_.buffer().begin() + static_cast<ptrdiff_t>(begin), out_.buffer().end());
  }

  // `name` is a literal; no two classes used here share it.
  void global(std::string_view module, std::string_view name) {
    const auto [it, is_new] = globals_.try_emplace(name, 0);
    if (!is_new) return recall(it->second);
    str(module);
    raw_str(name);
    op(Op::kStackGlobal);
    it->second = memo_;
    memoize();
  }
  void new_object(std::string_view module, std::string_view name) {
    global(module, name);
    op(Op::kEmptyTuple);
    op(Op::kNewObj);
  }
  void begin_object(std::string_view module, std::string_view name) {
    new_object(module, name);
    begin_dict();
  }
  void end_object() {
    op(Op::kSetItems);
    op(Op::kBuild);
  }
  void begin_dict() {
    op(Op::kEmptyDict);
    op(Op::kMark);
  }

  void size(const Dims& dims) {
    fixed(size_begin_, [&] { global("torch", "Size"); });
    if (dims.empty()) {
      op(Op::kEmptyTuple);
    } else {
      if (dims.size() > 3) op(Op::kMark);
      for (const int64_t v : dims) integer(v);
      op(dims.size() > 3 ? Op::kTuple : static_cast<Op>(static_cast<size_t>(Op::kTuple1) + dims.size() - 1));
    }
    op(Op::kTuple1);
    op(Op::kReduce);
  }

  // torch 2.1 knows these two classes under their old module only, and all later releases still resolve it. The layout
  // and the enum are single objects in Python, so they are shared.
  void properties(const TensorProperties& properties) {
    new_object(kCatalogueBefore23, "TensorProperties");
    op(Op::kMark);
    global("torch", to_string(properties.dtype));
    if (properties.layout.empty()) {
      op(Op::kNone);
    } else if (const auto [layout, is_new] = layouts_.try_emplace(properties.layout, 0); is_new) {
      global("torch.serialization", "_get_layout");
      str(properties.layout);
      op(Op::kTuple1);
      op(Op::kReduce);
      layout->second = memo_;
      memoize();
    } else {
      recall(layout->second);
    }
    op(properties.requires_grad ? Op::kNewTrue : Op::kNewFalse);
    if (const auto [format, is_new] = memory_formats_.try_emplace(properties.memory_format, 0); is_new) {
      global(kCatalogueBefore23, "MEM_FORMAT_ENCODING");
      integer(properties.memory_format);
      op(Op::kTuple1);
      op(Op::kReduce);
      format->second = memo_;
      memoize();
    } else {
      recall(format->second);
    }
    op(properties.pin_memory ? Op::kNewTrue : Op::kNewFalse);
    op(Op::kTuple);
    op(Op::kBuild);
  }

  void tensor_entry(const TensorStorageMetadata& tensor, Offsets& offsets) {
    begin_object(kCatalogue, "TensorStorageMetadata");
    str("properties");
    properties(tensor.properties);
    str("size");
    size(tensor.size);
    str("chunks");
    op(Op::kEmptyList);
    op(Op::kMark);
    offsets = {tensor.chunks, offset_memos_.size()};
    const ChunkStorageMetadata* before = nullptr;
    uint32_t sizes = 0;  // where the sizes of `before` are
    for (const ChunkStorageMetadata& chunk : tensor.chunks) {
      fixed(chunk_begin_, [&] {
        begin_object(kCatalogue, "ChunkStorageMetadata");
        str("offsets");
      });
      size(chunk.offsets);
      offset_memos_.push_back(memo_);
      memoize();
      fixed(chunk_sizes_, [&] { str("sizes"); });
      if (before != nullptr && before->sizes == chunk.sizes) {
        recall(sizes);
      } else {
        size(chunk.sizes);
        sizes = memo_;
        memoize();
      }
      before = &chunk;
      end_object();
    }
    op(Op::kAppends);
    end_object();
  }
  // What is known of the name of an item or file, which many items share.
  struct Name {
    std::optional<uint32_t> memo;  // unless it is too long to be referred to
    const Offsets* offsets = nullptr;
  };

  // As str(), faster from the second time on.
  const Name& name(const SharedString& text) {
    const size_t count = names_.size();
    Name& known = names_[text];
    if (names_.size() == count && known.memo) {
      recall(*known.memo);
      return known;
    }
    str(text.str());
    if (const uint32_t* memo = strings_.find(text.str())) known.memo = *memo;
    if (const auto entry = entries_->position(text)) known.offsets = &offsets_[*entry];
    return known;
  }
  // The offsets of an item are those of its chunk, which the index hints at.
  void item_offset(const MetadataIndex& index, const Offsets* offsets) {
    if (offsets != nullptr && index.index) {
      const auto hint = static_cast<size_t>(*index.index);
      if (hint < offsets->chunks.size() && offsets->chunks[hint].offsets == *index.offset)
        return recall(offset_memos_[offsets->first_memo + hint]);
    }
    size(*index.offset);
  }

  ByteWriter out_;
  uint32_t memo_ = 0;
  OrderedMap<std::string_view, uint32_t> strings_;
  std::unordered_map<std::string_view, uint32_t> globals_;
  std::unordered_map<std::string_view, uint32_t> layouts_;
  std::unordered_map<int64_t, uint32_t> memory_formats_;
  const OrderedMap<std::string, StorageMetadata>* entries_ = nullptr;
  std::vector<Offsets> offsets_;        // of each entry
  std::vector<uint32_t> offset_memos_;  // of the offsets of all chunks
  OrderedMap<SharedString, Name> names_;
  Bytes index_begin_, index_hint_, index_offset_, info_begin_, info_offset_, info_length_, size_begin_, chunk_begin_,
      chunk_sizes_;
};

}  // namespace

DecodedMetadata decode_metadata_tree(ByteSpan file) {
  const pickle::Tree tree = pickle::parse(file);
  Decoder decoder(file.size());
  DecodedMetadata decoded{decoder.decode(tree.root()), false};
  decoded.is_ours = decoder.is_ours();
  return decoded;
}

Metadata decode_metadata(ByteSpan file, bool verify_digest) {
  const bool sealed = verify_digest && check_digest(file);
  auto scanned = scan_metadata(file);
  DecodedMetadata decoded = scanned ? std::move(*scanned) : decode_metadata_tree(file);
  // Only a change of the frame around the digest can lead here; or a program that wrote our attributes anew.
  if (verify_digest && !sealed && decoded.is_ours)
    corrupt("the catalogue is of this library and has no digest: it was changed");
  validate(decoded.metadata);
  return std::move(decoded.metadata);
}

Bytes encode_metadata(const Metadata& metadata) { return Encoder().encode(metadata); }

}  // namespace reshard
