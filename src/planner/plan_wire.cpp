// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/planner/plan_wire.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "reshard/core/checked.h"

namespace reshard {
namespace {

constexpr uint8_t kSavePlanMark = 0xA1;
constexpr uint8_t kCatalogueMark = 0xA2;

#define RESHARD_COUNT_DTYPE(id, name, bytes) +1
constexpr uint8_t kDTypes = 0 RESHARD_FOR_EACH_DTYPE(RESHARD_COUNT_DTYPE);
#undef RESHARD_COUNT_DTYPE

// Bytes of names that decoding may copy for each byte of input.
constexpr uint64_t kMaxTextRatio = 256;

enum PropertyFlags : uint8_t { kRequiresGrad = 1, kPinMemory = 2, kOtherLayout = 4, kOtherMemoryFormat = 8 };

class Encoder {
 public:
  explicit Encoder(uint8_t mark) { out_.u8(mark); }
  Bytes take() {
    const uint64_t needed = copied_text_ / kMaxTextRatio;
    out_.blob(Bytes(needed > out_.size() ? needed - out_.size() : 0));
    return out_.take();
  }

  ByteWriter& out() { return out_; }
  void reserve(size_t bytes) { out_.buffer().reserve(bytes); }
  /// Every text that the decoder copies more often than it is sent is counted.
  void count_copy(size_t text_bytes) { copied_text_ += text_bytes; }

  void number(int64_t value, const char* what, const std::string& fqn) {
    if (value < 0) {
      throw Error(ErrorCode::kInvalidArgument, std::string(what) + " is negative",
                  {.key = fqn, .found = std::to_string(value)});
    }
    out_.varint(static_cast<uint64_t>(value));
  }
  /// Without the count, which the reader knows.
  void numbers(const Dims& dims, const char* what, const std::string& fqn) {
    for (const int64_t value : dims) number(value, what, fqn);
  }
  void dims(const Dims& dims, const char* what, const std::string& fqn) {
    out_.varint(dims.size());
    numbers(dims, what, fqn);
  }
  void box(const Box& box, const std::string& fqn) {
    numbers(box.offsets, "offset of a chunk", fqn);
    numbers(box.sizes, "size of a chunk", fqn);
  }
  void hint(const std::optional<int64_t>& hint, const std::string& fqn) {
    if (!hint) return out_.varint(0);
    if (*hint == std::numeric_limits<int64_t>::max()) {
      throw Error(ErrorCode::kInvalidArgument, "index of a chunk is too large", {.key = fqn});
    }
    number(*hint < 0 ? *hint : *hint + 1, "index of a chunk", fqn);
  }
  void properties(const TensorProperties& p, const std::string& fqn) {
    out_.u8(static_cast<uint8_t>(p.dtype));
    out_.u8(static_cast<uint8_t>((p.requires_grad ? kRequiresGrad : 0) | (p.pin_memory ? kPinMemory : 0) |
                                 (p.layout != strided_layout() ? kOtherLayout : 0) |
                                 (p.memory_format != 0 ? kOtherMemoryFormat : 0)));
    if (p.layout != strided_layout()) out_.string(p.layout);
    if (p.memory_format != 0) number(p.memory_format, "memory format", fqn);
  }
  void path(const std::string& fqn, const ObjectPath& path) {
    // Most paths are the name, cut at its dots.
    if (is_split_of(fqn, path)) return out_.u8(1);
    out_.u8(0);
    out_.varint(path.size());
    for (const PathElement& element : path) {
      if (const auto* name = std::get_if<std::string>(&element)) {
        out_.u8(0);
        out_.string(*name);
      } else {
        out_.u8(1);
        out_.i64(std::get<int64_t>(element));
      }
    }
  }
  void storage(const StorageInfo& info) {
    // Files are few: each is written where it appears first.
    const size_t known = files_.size();
    size_t& id = files_[info.relative_path];
    if (files_.size() != known) {
      id = known;
      out_.varint(0);
      out_.string(info.relative_path);
    } else {
      out_.varint(id + 1);
    }
    count_copy(info.relative_path.size());
    out_.varint(info.offset);
    out_.varint(info.length);
    out_.varint(info.transform_descriptors.size());
    for (const std::string& descriptor : info.transform_descriptors) out_.string(descriptor);
  }

 private:
  static bool is_split_of(std::string_view fqn, const ObjectPath& path) {
    if (path.empty()) return false;
    for (size_t i = 0; i < path.size(); ++i) {
      const auto* name = std::get_if<std::string>(&path[i]);
      if (name == nullptr || name->find('.') != std::string::npos || !fqn.starts_with(*name)) return false;
      fqn.remove_prefix(name->size());
      if (i + 1 == path.size()) break;
      if (fqn.empty() || fqn.front() != '.') return false;
      fqn.remove_prefix(1);
    }
    return fqn.empty();
  }

  ByteWriter out_;
  uint64_t copied_text_ = 0;
  OrderedMap<SharedString, size_t> files_;
};

class Decoder {
 public:
  Decoder(ByteSpan bytes, uint8_t mark, const char* what) : in_(bytes, what), what_(what) {
    text_budget_ = checked_mul<uint64_t>(bytes.size() + 1, kMaxTextRatio, what);
    if (in_.u8() != mark) fail("starts with another byte than it must");
  }
  void finish() {
    in_.blob();  // padding
    if (!in_.at_end()) fail("has bytes after its end");
  }

  ByteReader& in() { return in_; }
  [[noreturn]] void fail(const std::string& problem) const {
    throw Error(ErrorCode::kCorruptData, std::string(what_) + " " + problem, {.offset = in_.position()});
  }
  void count_copy(size_t text_bytes) {
    if (text_bytes > text_budget_) fail("repeats names more often than its length allows");
    text_budget_ -= text_bytes;
  }

  int64_t number() {
    const uint64_t value = in_.varint();
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) fail("holds a number beyond 63 bits");
    return static_cast<int64_t>(value);
  }
  size_t rank() {
    const size_t rank = in_.count();
    if (rank > kMaxTensorRank) fail("holds a tensor of too many dimensions");
    return rank;
  }
  Dims numbers(size_t rank) {
    Dims dims(rank, 0);
    for (int64_t& value : dims) value = number();
    return dims;
  }
  Dims dims() { return numbers(rank()); }
  Box box(size_t rank) {
    Box box;
    box.offsets = numbers(rank);
    box.sizes = numbers(rank);
    return box;
  }
  std::optional<int64_t> hint() {
    const int64_t value = number();
    return value == 0 ? std::nullopt : std::optional(value - 1);
  }
  template <class E>
  E choice(uint8_t count) {
    const uint8_t value = in_.u8();
    if (value >= count) fail("holds a tag that does not exist");
    return static_cast<E>(value);
  }
  bool flag() { return choice<uint8_t>(2) != 0; }
  TensorProperties properties() {
    TensorProperties p;
    p.dtype = choice<DType>(kDTypes);
    const auto flags = choice<uint8_t>(16);
    p.requires_grad = (flags & kRequiresGrad) != 0;
    p.pin_memory = (flags & kPinMemory) != 0;
    if ((flags & kOtherLayout) != 0) p.layout = in_.string();
    if ((flags & kOtherMemoryFormat) != 0) {
      const int64_t format = number();
      if (format > std::numeric_limits<int32_t>::max()) fail("holds a memory format that does not exist");
      p.memory_format = static_cast<int32_t>(format);
    }
    return p;
  }
  ObjectPath path(const std::string& fqn) {
    ObjectPath path;
    if (flag()) {
      for (size_t begin = 0; begin <= fqn.size();) {
        const size_t end = std::min(fqn.find('.', begin), fqn.size());
        count_copy(sizeof(PathElement));
        path.emplace_back(fqn.substr(begin, end - begin));
        begin = end + 1;
      }
      return path;
    }
    const size_t n = in_.count(2);
    path.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (flag()) {
        path.emplace_back(in_.i64());
      } else {
        path.emplace_back(in_.string());
      }
    }
    return path;
  }
  StorageInfo storage() {
    StorageInfo info;
    const uint64_t file = in_.varint();
    if (file == 0) {
      files_.emplace_back(in_.string());
    } else if (file > files_.size()) {
      fail("names a file that it does not list");
    }
    info.relative_path = file == 0 ? files_.back() : files_[file - 1];
    count_copy(info.relative_path.size());
    info.offset = in_.varint();
    info.length = in_.varint();
    const size_t n = in_.count();
    for (size_t i = 0; i < n; ++i) info.transform_descriptors.push_back(in_.string());
    return info;
  }

 private:
  ByteReader in_;
  const char* what_;
  uint64_t text_budget_ = 0;
  std::vector<SharedString> files_;
};

// Flags of an item.
constexpr uint8_t kShardItem = 1;
constexpr uint8_t kHasContent = 2;
constexpr uint8_t kTied = 4;

// What the items of one key share. Written once, where the key appears first.
struct ItemHead {
  SharedString fqn;
  bool is_bytes = false;
  Dims size;
  TensorProperties properties;
};

bool is_bytes(const WriteItem& item) { return item.type == WriteItemType::kByteIo; }

bool have_one_head(const WriteItem& a, const WriteItem& b) {
  return a.index.fqn == b.index.fqn && is_bytes(a) == is_bytes(b) &&
         (is_bytes(a) || (a.size == b.size && a.properties == b.properties));
}

void check_item(const WriteItem& item) {
  const std::string& fqn = item.index.fqn;
  if (is_bytes(item)) {
    if (!item.index.offset) return;
    throw Error(ErrorCode::kInvalidArgument, "write item of a value has offsets", {.key = fqn});
  }
  const size_t rank = item.size.size();
  if (rank > kMaxTensorRank || item.chunk.offsets.size() != rank || item.chunk.sizes.size() != rank ||
      item.index.offset != item.chunk.offsets) {
    throw Error(ErrorCode::kInvalidArgument, "write item is not named after its chunk",
                {.key = fqn, .wanted = to_string(item.chunk), .found = to_string(item.index)});
  }
}

}  // namespace

Bytes encode_save_plan(const SavePlan& plan) {
  if (!plan.storage.empty() && plan.storage.size() != plan.items.size()) {
    throw Error(ErrorCode::kInvalidArgument, "a save plan with a place for some of its items only",
                {.wanted = std::to_string(plan.items.size()), .found = std::to_string(plan.storage.size())});
  }
  Encoder encoder(kSavePlanMark);
  ByteWriter& out = encoder.out();
  encoder.reserve(64 * plan.items.size());
  std::vector<const WriteItem*> heads;            // the first item of each
  OrderedMap<SharedString, size_t> latest_heads;  // by name
  heads.reserve(plan.items.size());
  latest_heads.reserve(plan.items.size());
  size_t head = 0;

  out.varint(plan.items.size());
  for (const WriteItem& item : plan.items) {
    check_item(item);
    const std::string& fqn = item.index.fqn;
    if (heads.empty() || !have_one_head(item, *heads[head])) {
      const size_t names = latest_heads.size();
      size_t& latest = latest_heads[item.index.fqn];
      if (latest_heads.size() == names && have_one_head(item, *heads[latest])) {
        head = latest;
        out.varint(head + 1);
      } else {
        head = latest = heads.size();
        heads.push_back(&item);
        out.varint(0);
        out.string(fqn);
        out.u8(is_bytes(item));
        if (!is_bytes(item)) {
          encoder.dims(item.size, "size of a tensor", fqn);
          encoder.properties(item.properties, fqn);
        }
      }
    } else {
      out.varint(head + 1);
    }
    encoder.count_copy(fqn.size() + item.properties.layout.size());
    encoder.hint(item.index.index, fqn);
    out.u8((item.type == WriteItemType::kShard ? kShardItem : 0) | (item.content ? kHasContent : 0) |
           (item.tied_to ? kTied : 0));
    if (is_bytes(item)) {
      out.varint(item.length);
    } else {
      encoder.box(item.chunk, fqn);
    }
    if (item.content) out.bytes(*item.content);
    if (item.tied_to) out.varint(*item.tied_to);
  }
  out.u8(!plan.storage.empty());
  for (const StorageInfo& info : plan.storage) encoder.storage(info);
  out.varint(plan.planner_data->size());
  size_t next = 0;  // paths usually come in the order of the heads
  for (const auto& [fqn, path] : *plan.planner_data) {
    const bool is_next = next < heads.size() && heads[next]->index.fqn == fqn;
    const size_t* known = is_next ? &next : latest_heads.find(fqn);
    if (known != nullptr) {
      out.varint(*known + 1);
      next = *known + 1;
    } else {
      out.varint(0);
      out.string(fqn);
    }
    encoder.count_copy(fqn.size() + path.size() * sizeof(PathElement));
    encoder.path(fqn, path);
  }
  return encoder.take();
}

SavePlan decode_save_plan(ByteSpan bytes) { return SavePlanDecoder().decode(bytes); }

SavePlan SavePlanDecoder::decode(ByteSpan bytes) {
  Decoder decoder(bytes, kSavePlanMark, "save plan");
  ByteReader& in = decoder.in();
  SavePlan plan;
  std::vector<ItemHead> heads;
  const auto read_head_id = [&] {
    const uint64_t id = in.varint();
    if (id > heads.size()) decoder.fail("names a key that it does not list");
    return static_cast<size_t>(id);
  };

  const size_t n = in.count(3);
  plan.items.resize(n);
  for (size_t i = 0; i < n; ++i) {
    WriteItem& item = plan.items[i];
    size_t id = read_head_id();
    if (id == 0) {
      ItemHead head;
      head.fqn = names_.get(in.text());
      head.is_bytes = decoder.flag();
      if (!head.is_bytes) {
        head.size = decoder.dims();
        head.properties = decoder.properties();
      }
      heads.push_back(std::move(head));
      id = heads.size();
    }
    const ItemHead& head = heads[id - 1];
    item.index.fqn = head.fqn;
    item.size = head.size;
    item.properties = head.properties;
    decoder.count_copy(head.fqn.size() + head.properties.layout.size());
    item.index.index = decoder.hint();
    const auto flags = decoder.choice<uint8_t>(8);
    if (head.is_bytes) {
      if ((flags & kShardItem) != 0) decoder.fail("holds a value that is a shard");
      item.type = WriteItemType::kByteIo;
      item.length = in.varint();
    } else {
      item.type = (flags & kShardItem) != 0 ? WriteItemType::kShard : WriteItemType::kTensor;
      item.chunk = decoder.box(head.size.size());
      item.index.offset = item.chunk.offsets;
    }
    if ((flags & kHasContent) != 0) std::ranges::copy(in.bytes(sizeof(ContentDigest)), item.content.emplace().begin());
    if ((flags & kTied) != 0) {
      item.tied_to = in.varint();
      if (*item.tied_to >= i) decoder.fail("ties an item to one that is not before it");
    }
  }
  if (decoder.flag()) {
    if (n > in.remaining() / 4) decoder.fail("ends before the places of its items");
    plan.storage.reserve(n);
    for (size_t i = 0; i < n; ++i) plan.storage.push_back(decoder.storage());
  }
  // What follows means the same wherever the keys of the plan have the same names.
  std::string meaning(as_text(in.rest()));
  for (const ItemHead& head : heads) {
    const std::string* name = &head.fqn.str();
    meaning.append(reinterpret_cast<const char*>(&name), sizeof(name));
  }
  if (const auto known = paths_.find(meaning); known != paths_.end()) {
    plan.planner_data = known->second;
    return plan;
  }
  const size_t count = in.count(2);
  SharedPaths::Map paths;
  paths.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t id = read_head_id();
    SharedString fqn = id == 0 ? names_.get(in.text()) : heads[id - 1].fqn;
    decoder.count_copy(fqn.size());
    ObjectPath path = decoder.path(fqn);
    if (!paths.insert(std::move(fqn), std::move(path))) decoder.fail("holds two paths for one key");
  }
  decoder.finish();
  plan.planner_data = SharedPaths(std::move(paths));
  paths_.emplace(std::move(meaning), plan.planner_data);
  return plan;
}

Bytes encode_catalogue(const Metadata& metadata) {
  Encoder encoder(kCatalogueMark);
  ByteWriter& out = encoder.out();
  encoder.reserve(32 * metadata.storage_data.size());
  out.varint(metadata.state_dict_metadata.size());
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    out.string(fqn);
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    out.u8(tensor == nullptr);
    if (tensor == nullptr) continue;
    encoder.dims(tensor->size, "size of a tensor", fqn);
    encoder.properties(tensor->properties, fqn);
    out.varint(tensor->chunks.size());
    for (const Box& chunk : tensor->chunks) {
      if (chunk.offsets.size() != tensor->size.size() || chunk.sizes.size() != tensor->size.size()) {
        throw Error(ErrorCode::kInvalidArgument, "a chunk has another number of dimensions than its tensor",
                    {.key = fqn, .wanted = to_string(tensor->size), .found = to_string(chunk)});
      }
      if (chunk.sizes.empty()) out.u8(0);  // so that every chunk takes space
      encoder.box(chunk, fqn);
    }
  }

  const auto put_key = [&](const std::string& fqn) {
    const auto known = metadata.state_dict_metadata.position(fqn);
    if (known) {
      out.varint(*known + 1);
    } else {
      out.varint(0);
      out.string(fqn);
    }
    encoder.count_copy(fqn.size());
    return known;
  };
  out.u8(metadata.planner_data.has_value());
  if (metadata.planner_data) {
    out.varint(metadata.planner_data->size());
    for (const auto& [fqn, path] : *metadata.planner_data) {
      put_key(fqn);
      encoder.count_copy(path.size() * sizeof(PathElement));
      encoder.path(fqn, path);
    }
  }

  out.varint(metadata.storage_data.size());
  for (const auto& [index, info] : metadata.storage_data) {
    const auto key = put_key(index.fqn);
    // A file may hint at anything. What can be no position is not sent.
    const bool has_hint = index.index && *index.index >= 0 && *index.index < std::numeric_limits<int64_t>::max();
    encoder.hint(has_hint ? index.index : std::nullopt, index.fqn);
    // Most items lie where the chunk that they hint at lies.
    const Dims* hinted = nullptr;
    if (has_hint && key) {
      const auto* tensor = std::get_if<TensorStorageMetadata>(
          &metadata.state_dict_metadata.begin()[static_cast<ptrdiff_t>(*key)].second);
      if (tensor != nullptr && static_cast<uint64_t>(*index.index) < tensor->chunks.size()) {
        hinted = &tensor->chunks[static_cast<size_t>(*index.index)].offsets;
      }
    }
    if (!index.offset) {
      out.u8(0);
    } else if (hinted != nullptr && *hinted == *index.offset) {
      out.u8(1);
    } else {
      out.u8(2);
      encoder.dims(*index.offset, "offset of a chunk", index.fqn);
    }
    encoder.storage(info);
  }

  const auto put_text = [&](const std::optional<std::string>& text) {
    out.u8(text.has_value());
    if (text) out.string(*text);
  };
  out.u8(metadata.storage_meta.has_value());
  if (metadata.storage_meta) {
    put_text(metadata.storage_meta->checkpoint_id);
    put_text(metadata.storage_meta->save_id);
    put_text(metadata.storage_meta->load_id);
    out.varint(metadata.storage_meta->modules.size());
    for (const std::string& module : metadata.storage_meta->modules) out.string(module);
  }
  put_text(metadata.version);
  out.u8(metadata.sidecars.has_value());
  if (metadata.sidecars) {
    out.varint(metadata.sidecars->size());
    for (const SidecarDigest& digest : *metadata.sidecars) out.bytes(digest);
  }
  return encoder.take();
}

Metadata decode_catalogue(ByteSpan bytes) {
  Decoder decoder(bytes, kCatalogueMark, "catalogue");
  ByteReader& in = decoder.in();
  Metadata metadata;
  auto& entries = metadata.state_dict_metadata;

  const size_t n = in.count(2);
  entries.reserve(n);
  std::vector<SharedString> names;
  for (size_t i = 0; i < n; ++i) {
    std::string fqn = in.string();
    StorageMetadata entry = BytesStorageMetadata{};
    if (!decoder.flag()) {
      TensorStorageMetadata tensor;
      tensor.size = decoder.dims();
      tensor.properties = decoder.properties();
      const size_t rank = tensor.size.size();
      const size_t chunks = in.count(2 * rank);
      tensor.chunks.reserve(chunks);
      for (size_t c = 0; c < chunks; ++c) {
        if (rank == 0) decoder.flag();
        tensor.chunks.push_back(decoder.box(rank));
      }
      entry = std::move(tensor);
    }
    if (!entries.insert(std::move(fqn), std::move(entry))) decoder.fail("holds a key twice");
  }
  names.reserve(n);
  for (const auto& [fqn, entry] : entries) names.emplace_back(fqn);

  const auto get_key = [&] {
    const uint64_t id = in.varint();
    if (id > names.size()) decoder.fail("names a key that it does not list");
    SharedString fqn = id == 0 ? SharedString(in.text()) : names[id - 1];
    decoder.count_copy(fqn.size());
    return fqn;
  };
  if (decoder.flag()) {
    const size_t paths = in.count(2);
    auto& planner_data = metadata.planner_data.emplace();
    planner_data.reserve(paths);
    for (size_t i = 0; i < paths; ++i) {
      const SharedString fqn = get_key();
      if (!planner_data.insert(fqn, decoder.path(fqn))) decoder.fail("holds two paths for one key");
    }
  }

  const size_t items = in.count(7);
  std::vector<std::pair<MetadataIndex, StorageInfo>> stored(items);
  for (auto& [index, info] : stored) {
    index.fqn = get_key();
    index.index = decoder.hint();
    switch (decoder.choice<uint8_t>(3)) {
      case 0:
        break;
      case 1: {
        const StorageMetadata* entry = entries.find(index.fqn);
        const auto* tensor = entry == nullptr ? nullptr : std::get_if<TensorStorageMetadata>(entry);
        if (tensor == nullptr || !index.index || static_cast<uint64_t>(*index.index) >= tensor->chunks.size()) {
          decoder.fail("names a chunk that it does not list");
        }
        index.offset = tensor->chunks[static_cast<size_t>(*index.index)].offsets;
        break;
      }
      default:
        index.offset = decoder.dims();
    }
    info = decoder.storage();
  }
  if (metadata.storage_data.assign(std::move(stored))) decoder.fail("holds an item twice");

  const auto get_text = [&](std::optional<std::string>& text) {
    if (decoder.flag()) text = in.string();
  };
  if (decoder.flag()) {
    StorageMeta& meta = metadata.storage_meta.emplace();
    get_text(meta.checkpoint_id);
    get_text(meta.save_id);
    get_text(meta.load_id);
    const size_t modules = in.count();
    for (size_t i = 0; i < modules; ++i) meta.modules.push_back(in.string());
  }
  get_text(metadata.version);
  if (decoder.flag()) {
    auto& sidecars = metadata.sidecars.emplace(in.count(sizeof(SidecarDigest)));
    for (SidecarDigest& digest : sidecars) std::ranges::copy(in.bytes(digest.size()), digest.begin());
  }
  decoder.finish();
  return metadata;
}

}  // namespace reshard
