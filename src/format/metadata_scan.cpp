// SPDX-License-Identifier: BSD-3-Clause
#include "format/metadata_scan.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "format/pickle_opcodes.h"
#include "format/utf8.h"

namespace reshard {
namespace {

using pickle::Op;

/// The stream is not one that the scanner is for.
struct NotUsual {};

void require(bool ok) {
  if (!ok) [[unlikely]]
    throw NotUsual();
}

enum class Class : uint8_t {
  kMetadata,
  kTensor,
  kBytes,
  kChunk,
  kProperties,
  kMemoryFormat,
  kLayout,
  kSize,
  kIndex,
  kInfo,
  kStorageMeta,
  kPath,
};

std::optional<Class> class_of(std::string_view module, std::string_view name) {
  static constexpr std::string_view kCatalogue = "torch.distributed.checkpoint.metadata";
  static constexpr std::string_view kBefore23 = "torch.distributed._shard.sharded_tensor.metadata";
  struct Known {
    std::string_view module, name;
    Class id;
  };
  static constexpr Known kClasses[] = {
      {kCatalogue, "Metadata", Class::kMetadata},
      {kCatalogue, "TensorStorageMetadata", Class::kTensor},
      {kCatalogue, "BytesStorageMetadata", Class::kBytes},
      {kCatalogue, "ChunkStorageMetadata", Class::kChunk},
      {kCatalogue, "TensorProperties", Class::kProperties},
      {kBefore23, "TensorProperties", Class::kProperties},
      {kCatalogue, "_MEM_FORMAT_ENCODING", Class::kMemoryFormat},
      {kBefore23, "MEM_FORMAT_ENCODING", Class::kMemoryFormat},
      {"torch.serialization", "_get_layout", Class::kLayout},
      {"torch", "Size", Class::kSize},
      {kCatalogue, "MetadataIndex", Class::kIndex},
      {"torch.distributed.checkpoint.filesystem", "_StorageInfo", Class::kInfo},
      {kCatalogue, "StorageMeta", Class::kStorageMeta},
      {"pathlib", "PosixPath", Class::kPath},
      {"pathlib._local", "PosixPath", Class::kPath},
  };
  for (const Known& known : kClasses) {
    if (name == known.name && module == known.module) return known.id;
  }
  return std::nullopt;
}

enum class Kind : uint8_t {
  kNone,
  kBool,          // number
  kInt,           // number
  kText,          // pointer, size: in the file
  kBytes,         // pointer, size: in the file
  kClass,         // number
  kDType,         // number
  kTuple,         // number: where in tuples_; size
  kList,          // number: in lists_, plus one; 0: empty
  kDict,          // number: in dicts_, plus one; 0: empty
  kStorageData,   // the dict whose items are in storage_data_
  kObject,        // number: the class; not yet built
  kDims,          // number: in dims_
  kChunk,         // is chunk_
  kIndex,         // is index_
  kInfo,          // is info_
  kTensor,        // number: in tensors_
  kProperties,    // number: in properties_
  kLayout,        // pointer, size
  kMemoryFormat,  // number
  kOwnText,       // number: in own_texts_
  kStorageMeta,   // number: in dicts_, plus one
  kMetadata,      // the result
};

struct Value {
  Kind kind = Kind::kNone;
  uint32_t size = 0;
  union {
    int64_t number = 0;
    const char* pointer;
  };
  static Value of(Kind kind, int64_t number, uint32_t size = 0) {
    Value value;
    value.kind = kind;
    value.size = size;
    value.number = number;
    return value;
  }
  static Value text(Kind kind, ByteSpan data) {
    require(data.size() <= std::numeric_limits<uint32_t>::max());
    Value value;
    value.kind = kind;
    value.size = static_cast<uint32_t>(data.size());
    value.pointer = reinterpret_cast<const char*>(data.data());
    return value;
  }
  std::string_view view() const {
    require(kind == Kind::kText || kind == Kind::kLayout || kind == Kind::kBytes);
    return {pointer, size};
  }
  bool is(Kind wanted, Class id) const { return kind == wanted && number == static_cast<int64_t>(id); }
};

/// As a vector, whose operations on one value are most of what the scanner does.
class Stack {
 public:
  size_t size() const { return static_cast<size_t>(top_ - values_.data()); }
  bool empty() const { return top_ == values_.data(); }
  Value* begin() { return values_.data(); }
  Value* end() { return top_; }
  const Value* begin() const { return values_.data(); }
  const Value* end() const { return top_; }
  Value& back() { return top_[-1]; }
  Value& operator[](size_t i) { return values_[i]; }
  [[gnu::always_inline]] void push_back(const Value& value) {
    if (top_ == limit_) [[unlikely]]
      grow();
    *top_++ = value;
  }
  void pop_back() { --top_; }
  void shrink(size_t size) { top_ = values_.data() + size; }

 private:
  void grow() {
    const size_t size = values_.size();
    values_.resize(2 * size + 64);
    top_ = values_.data() + size;
    limit_ = values_.data() + values_.size();
  }
  std::vector<Value> values_;
  Value* top_ = nullptr;
  Value* limit_ = nullptr;
};

/// Texts that recur, each made once. They are the same many times in a row or come in the same order again and again, so the
/// last one and the one after it are tried first.
class Names {
 public:
  const SharedString& get(std::string_view text) {
    if (last_ < texts_.size() && text != at(last_) && ++last_ == texts_.size()) last_ = 0;
    if (last_ >= texts_.size() || text != at(last_)) {
      const size_t known = texts_.size();
      SharedString& shared = texts_[text];
      if (texts_.size() != known) shared = text;
      last_ = *texts_.position(text);
    }
    return texts_.begin()[static_cast<ptrdiff_t>(last_)].second;
  }

 private:
  std::string_view at(size_t i) const { return texts_.begin()[static_cast<ptrdiff_t>(i)].first; }
  OrderedMap<std::string_view, SharedString> texts_;  // by the text in the file
  size_t last_ = 0;
};

using Items = std::span<const Value>;  // key, value, key, value, ...

/// Attributes of the objects of one class. Objects in a row have the same ones in the same order, by references to the same
/// texts, so their names are compared once.
template <size_t N>
class Attributes {
 public:
  using Found = std::array<const Value*, N>;  // null: absent
  explicit Attributes(const std::array<std::string_view, N>& names) : names_(names) {}

  Found find(Items state) {
    if (!is_as_before(state)) look_at(state);
    Found found{};
    for (size_t n = 0; n < N; ++n) found[n] = at_[n] == 0 ? nullptr : &state[at_[n]];
    return found;
  }

 private:
  // No two texts of a stream begin at the same place, but for empty ones, which are no attribute's name.
  bool is_as_before(Items state) const {
    if (state.size() != 2 * keys_.size()) return false;
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (state[2 * i].kind != Kind::kText || state[2 * i].pointer != keys_[i]) return false;
    }
    return true;
  }
  void look_at(Items state) {
    keys_.clear();
    at_ = {};
    for (size_t i = 0; i + 1 < state.size(); i += 2) {
      require(state[i].kind == Kind::kText);
      keys_.push_back(state[i].pointer);
      for (size_t n = 0; n < N; ++n) {
        if (state[i].view() == names_[n]) at_[n] = i + 1;  // the last one counts, as when Python builds the dict
      }
    }
  }

  const std::array<std::string_view, N> names_;
  std::vector<const char*> keys_;  // of the last object
  std::array<size_t, N> at_{};     // where the value of each name is in its state; 0: nowhere
};

class Scanner {
 public:
  explicit Scanner(ByteSpan file)
      : p_(file.data()), end_(p_ + file.size()), copies_left_(kMaxCopiedPerByte * (file.size() + 1)) {}

  DecodedMetadata run() {
    while (step()) {
    }
    return std::move(result_);
  }

 private:
  static constexpr uint64_t kMaxCopiedPerByte = 64;
  static constexpr uint32_t kMaxRank = 8;

  struct List {  // of one of them
    std::vector<ChunkStorageMetadata> chunks;
    std::vector<Value> texts;
  };

  // --- the stream ---

  template <class T>
  T little() {
    T v;
    std::memcpy(&v, take(sizeof(T)).data(), sizeof(T));
    return v;
  }
  ByteSpan take(uint64_t n) {
    require(n <= static_cast<uint64_t>(end_ - p_));
    const ByteSpan data(p_, static_cast<size_t>(n));
    p_ += n;
    return data;
  }
  bool next_is(Op op) const { return p_ != end_ && *p_ == static_cast<std::byte>(op); }

  // --- the stack ---

  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  Value pop() {
    require(stack_.size() > floor());
    const Value value = stack_.back();
    stack_.pop_back();
    return value;
  }
  size_t pop_mark() {
    require(!marks_.empty());
    const size_t mark = marks_.back();
    marks_.pop_back();
    return mark;
  }
  [[gnu::always_inline]] void push(const Value& value) { stack_.push_back(value); }

  void memoize() {
    require(stack_.size() > floor());
    const Value& value = stack_.back();
    switch (value.kind) {  // what is whole and costs nothing to repeat
      case Kind::kText:
      case Kind::kClass:
      case Kind::kDType:
      case Kind::kDims:
      case Kind::kLayout:
      case Kind::kMemoryFormat:
        require(memorized_.size() < std::numeric_limits<uint32_t>::max());
        memorized_.push_back(value);
        return memo_.push_back(static_cast<uint32_t>(memorized_.size()));
      default:
        memo_.push_back(0);
    }
  }
  void recall(size_t index) {
    require(index < memo_.size() && memo_[index] != 0);
    push(memorized_[memo_[index] - 1]);
  }

  void text(uint64_t size) {
    const Value value = Value::text(Kind::kText, take(size));
    require(is_utf8(value.view()));
    push(value);
  }
  void tuple(size_t from) {
    const auto value =
        Value::of(Kind::kTuple, static_cast<int64_t>(tuples_.size()), static_cast<uint32_t>(stack_.size() - from));
    tuples_.insert(tuples_.end(), stack_.begin() + from, stack_.end());
    stack_.shrink(from);
    push(value);
  }
  Items items(const Value& tuple) const {
    require(tuple.kind == Kind::kTuple);
    return Items(tuples_).subspan(static_cast<size_t>(tuple.number), tuple.size);
  }

  // --- what the values mean ---

  void spend(uint64_t bytes) {
    require(bytes <= copies_left_);
    copies_left_ -= bytes;
  }
  std::string copy(const Value& value) {
    const std::string_view view = value.view();
    spend(view.size() + sizeof(std::string));
    return std::string(view);
  }
  const SharedString& shared(const Value& value, Names& names) {
    require(value.kind == Kind::kText);
    spend(value.size);  // it is hashed or compared each time
    return names.get(value.view());
  }
  std::optional<std::string> optional_text(const Value& value) {
    if (value.kind == Kind::kOwnText) return own_texts_[static_cast<size_t>(value.number)];
    if (value.kind == Kind::kNone) return std::nullopt;
    require(value.kind == Kind::kText);
    return copy(value);
  }
  const Dims& dims(const Value& value) const {
    require(value.kind == Kind::kDims);
    return dims_[static_cast<size_t>(value.number)];
  }
  static uint64_t position(const Value& value) {
    require(value.kind == Kind::kInt && value.number >= 0);
    return static_cast<uint64_t>(value.number);
  }
  // The last one counts, as when Python builds the dict.
  static const Value* find(Items state, std::string_view name) {
    const Value* found = nullptr;
    for (size_t i = 0; i + 1 < state.size(); i += 2) {
      require(state[i].kind == Kind::kText);
      if (state[i].view() == name) found = &state[i + 1];
    }
    return found;
  }
  static const Value& required(Items state, std::string_view name) { return required(find(state, name)); }
  static const Value& required(const Value* value) {
    require(value != nullptr);
    return *value;
  }

  void reduce() {
    const Value args = pop();
    const Value callable = pop();
    require(callable.kind == Kind::kClass);
    const Items given = items(args);
    switch (static_cast<Class>(callable.number)) {
      case Class::kSize: {
        require(given.size() == 1);
        const Items sizes = items(given[0]);
        require(sizes.size() <= kMaxRank);
        Dims& dims = dims_.emplace_back(sizes.size(), 0);
        for (size_t i = 0; i < sizes.size(); ++i) {
          require(sizes[i].kind == Kind::kInt);
          dims[i] = sizes[i].number;
        }
        push(Value::of(Kind::kDims, static_cast<int64_t>(dims_.size() - 1)));
        // These two tuples are the newest, and nobody can come back to a tuple.
        tuples_.resize(static_cast<size_t>(given[0].number));
        return;
      }
      case Class::kLayout: {
        require(given.size() == 1 && given[0].kind == Kind::kText);
        Value layout = given[0];
        layout.kind = Kind::kLayout;
        return push(layout);
      }
      case Class::kMemoryFormat:
        require(given.size() == 1 && given[0].kind == Kind::kInt && given[0].number >= 0 && given[0].number <= 2);
        return push(Value::of(Kind::kMemoryFormat, given[0].number));
      case Class::kPath: {
        std::string path;
        for (const Value& part : given) {
          const std::string name = copy(part);
          require(part.kind == Kind::kText);
          if (name.starts_with('/')) path.clear();
          if (!path.empty() && !path.ends_with('/')) path += '/';
          path += name;
        }
        own_texts_.push_back(path.empty() ? "." : std::move(path));
        return push(Value::of(Kind::kOwnText, static_cast<int64_t>(own_texts_.size() - 1)));
      }
      default:
        throw NotUsual();
    }
  }

  Value build_properties(Items fields) {
    require(fields.size() == 5 || fields.size() == 6);
    TensorProperties properties;
    require(fields[0].kind == Kind::kDType);
    properties.dtype = static_cast<DType>(fields[0].number);
    if (fields[1].kind == Kind::kNone) {
      properties.layout = {};
    } else {
      require(fields[1].kind == Kind::kLayout);
      spend(fields[1].size);
      if (fields[1].view() == strided_layout().str()) {
        properties.layout = strided_layout();
      } else {
        properties.layout = fields[1].view();
      }
    }
    require(fields[2].kind == Kind::kBool && fields[3].kind == Kind::kMemoryFormat && fields[4].kind == Kind::kBool);
    properties.requires_grad = fields[2].number != 0;
    properties.memory_format = static_cast<int32_t>(fields[3].number);
    properties.pin_memory = fields[4].number != 0;
    properties_.push_back(std::move(properties));
    return Value::of(Kind::kProperties, static_cast<int64_t>(properties_.size() - 1));
  }

  Value build_tensor(Items state) {
    const Value& properties = required(state, "properties");
    require(properties.kind == Kind::kProperties);
    const Value& chunks = required(state, "chunks");
    require(chunks.kind == Kind::kList);
    TensorStorageMetadata tensor{
        properties_[static_cast<size_t>(properties.number)], dims(required(state, "size")), {}};
    if (chunks.number != 0) {
      List& list = lists_[static_cast<size_t>(chunks.number - 1)];
      require(list.texts.empty());
      tensor.chunks = std::move(list.chunks);  // no other tensor can refer to it
      tensor.chunks.shrink_to_fit();
    }
    tensors_.push_back(std::move(tensor));
    return Value::of(Kind::kTensor, static_cast<int64_t>(tensors_.size() - 1));
  }

  Value build_index(Items state) {
    require(!has_index_);
    has_index_ = true;
    const auto [fqn, offset, hint] = index_attributes_.find(state);
    index_.fqn = shared(required(fqn), keys_);
    index_.offset.reset();
    if (offset != nullptr && offset->kind != Kind::kNone) index_.offset = dims(*offset);
    index_.index.reset();
    if (hint != nullptr && hint->kind != Kind::kNone) {
      require(hint->kind == Kind::kInt);
      index_.index = hint->number;
    }
    return Value::of(Kind::kIndex, 0);
  }

  Value build_info(Items state) {
    require(!has_info_);
    has_info_ = true;
    const auto [path, offset, length, transforms] = info_attributes_.find(state);
    info_.relative_path = shared(required(path), paths_);
    info_.offset = position(required(offset));
    info_.length = position(required(length));
    require(transforms == nullptr || transforms->kind == Kind::kNone);  // a compressed checkpoint takes the other way
    return Value::of(Kind::kInfo, 0);
  }

  // `state` is on the stack: nothing may be pushed here.
  Value build(Class id, Items state) {
    switch (id) {
      case Class::kChunk: {
        require(!has_chunk_);
        has_chunk_ = true;
        const auto [offsets, sizes] = chunk_attributes_.find(state);
        chunk_ = {dims(required(offsets)), dims(required(sizes))};
        return Value::of(Kind::kChunk, 0);
      }
      case Class::kTensor:
        return build_tensor(state);
      case Class::kIndex:
        return build_index(state);
      case Class::kInfo:
        return build_info(state);
      case Class::kStorageMeta: {
        dicts_.emplace_back(state.begin(), state.end());
        return Value::of(Kind::kStorageMeta, static_cast<int64_t>(dicts_.size()));
      }
      case Class::kMetadata:
        build_metadata(state);
        return Value::of(Kind::kMetadata, 0);
      default:
        throw NotUsual();
    }
  }

  Items dict(const Value& value) const {
    require(value.kind == Kind::kDict);
    return value.number == 0 ? Items{} : Items(dicts_[static_cast<size_t>(value.number - 1)]);
  }

  void build_metadata(Items state) {
    require(!std::exchange(has_metadata_, true));
    Metadata& metadata = result_.metadata;
    const Items entries = dict(required(state, "state_dict_metadata"));
    metadata.state_dict_metadata.reserve(entries.size() / 2);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      require(entries[i].kind == Kind::kText);
      const Value& value = entries[i + 1];
      StorageMetadata entry = BytesStorageMetadata{};
      if (value.kind == Kind::kTensor) {
        TensorStorageMetadata& tensor = tensors_[static_cast<size_t>(value.number)];  // each is in one dict only
        spend(tensor.chunks.size() * entries[i].size);  // each chunk is looked up under the name
        entry = std::move(tensor);
      } else {
        require(value.is(Kind::kObject, Class::kBytes));
      }
      require(metadata.state_dict_metadata.insert(copy(entries[i]), std::move(entry)));
    }
    if (const Value* planner = find(state, "planner_data"); planner != nullptr && planner->kind != Kind::kNone) {
      const Items paths = dict(*planner);
      auto& planner_data = metadata.planner_data.emplace();
      planner_data.reserve(paths.size() / 2);
      for (size_t i = 0; i + 1 < paths.size(); i += 2) {
        require(paths[i].kind == Kind::kText);
        const Items elements = items(paths[i + 1]);
        ObjectPath path;
        path.reserve(elements.size());
        for (const Value& element : elements) {
          if (element.kind == Kind::kInt) {
            path.emplace_back(element.number);
          } else {
            require(element.kind == Kind::kText);
            path.emplace_back(copy(element));
          }
        }
        require(planner_data.insert(copy(paths[i]), std::move(path)));
      }
    }
    const Value& storage = required(state, "storage_data");
    require(storage.kind == Kind::kStorageData || (dict(storage).empty() && storage_data_.empty()));
    require(!metadata.storage_data.assign(std::move(storage_data_)));

    if (const Value* meta = find(state, "storage_meta"); meta != nullptr && meta->kind != Kind::kNone) {
      require(meta->kind == Kind::kStorageMeta);
      build_storage_meta(dicts_[static_cast<size_t>(meta->number - 1)]);
    } else if (const Value* ours = find(state, "reshard_storage_meta"); ours != nullptr && ours->kind != Kind::kNone) {
      build_storage_meta(dict(*ours));
    }
    for (size_t i = 0; i + 1 < state.size(); i += 2) result_.is_ours |= state[i].view().starts_with("reshard_");
    if (const Value* version = find(state, "version"); version != nullptr && version->kind != Kind::kNone) {
      require(version->kind == Kind::kText);
      metadata.version = copy(*version);
    }
    if (const Value* sidecars = find(state, "reshard_sidecars"); sidecars != nullptr && sidecars->kind != Kind::kNone) {
      constexpr size_t kSize = std::tuple_size_v<SidecarDigest>;
      require(sidecars->kind == Kind::kBytes && sidecars->size % kSize == 0);
      auto& list = metadata.sidecars.emplace(sidecars->size / kSize);
      for (size_t i = 0; i < list.size(); ++i) std::memcpy(list[i].data(), sidecars->pointer + i * kSize, kSize);
    }
  }

  void build_storage_meta(Items state) {
    StorageMeta& meta = result_.metadata.storage_meta.emplace();
    const auto text_of = [&](std::string_view name) {
      const Value* value = find(state, name);
      return value == nullptr ? std::nullopt : optional_text(*value);
    };
    meta.checkpoint_id = text_of("checkpoint_id");
    meta.save_id = text_of("save_id");
    meta.load_id = text_of("load_id");
    const Value* modules = find(state, "modules");
    if (modules == nullptr || modules->kind == Kind::kNone) return;
    require(modules->kind == Kind::kList);
    if (modules->number == 0) return;
    const List& list = lists_[static_cast<size_t>(modules->number - 1)];
    require(list.chunks.empty());
    for (const Value& name : list.texts) meta.modules.push_back(copy(name));
  }

  // --- containers ---

  void append_to(Value& target, const Value& value) {
    require(target.kind == Kind::kList);
    if (target.number == 0) {
      lists_.emplace_back();
      target.number = static_cast<int64_t>(lists_.size());
    }
    List& list = lists_[static_cast<size_t>(target.number - 1)];
    if (value.kind == Kind::kChunk) {
      has_chunk_ = false;
      list.chunks.push_back(std::move(chunk_));
    } else {
      require(value.kind == Kind::kText);
      list.texts.push_back(value);
    }
  }

  void store_item(Value& target) {
    if (target.kind != Kind::kStorageData) {
      require(target.kind == Kind::kDict && target.number == 0 && storage_data_.empty());
      target.kind = Kind::kStorageData;
      size_t chunks = 0;
      for (const TensorStorageMetadata& tensor : tensors_) chunks += tensor.chunks.size();
      storage_data_.reserve(chunks);
    }
    has_index_ = has_info_ = false;
    storage_data_.emplace_back(std::exchange(index_, {}), std::exchange(info_, {}));
  }

  // The items of stack_[from...] into the dict below them. The state of an object is used at once.
  void set_items(size_t from) {
    require(from >= 1 && from - 1 >= floor() && (stack_.size() - from) % 2 == 0);
    Value& target = stack_[from - 1];
    if (from >= 2 && from - 2 >= floor() && stack_[from - 2].kind == Kind::kObject && next_is(Op::kBuild)) {
      require(target.kind == Kind::kDict && target.number == 0);
      ++p_;
      const Value built = build(static_cast<Class>(stack_[from - 2].number), Items(stack_).subspan(from));
      stack_.shrink(from - 2);
      push(built);
      return settle();
    }
    if (stack_.size() == from + 2 && stack_[from].kind == Kind::kIndex && stack_[from + 1].kind == Kind::kInfo) {
      store_item(target);
    } else if (stack_.size() == from) {  // none, or they are where they belong already
      require(target.kind == Kind::kDict || target.kind == Kind::kStorageData);
    } else {
      require(target.kind == Kind::kDict);
      if (target.number == 0) {
        dicts_.emplace_back();
        target.number = static_cast<int64_t>(dicts_.size());
      }
      auto& items = dicts_[static_cast<size_t>(target.number - 1)];
      items.insert(items.end(), stack_.begin() + from, stack_.end());
    }
    stack_.shrink(from);
  }

  // Chunks and items come by the million between one MARK and the operation that adds them all. They are added as soon
  // as they are whole.
  void settle() {
    if (marks_.empty()) return;
    const size_t mark = marks_.back();
    const size_t outer_mark = marks_.size() == 1 ? 0 : marks_[marks_.size() - 2];
    if (mark == outer_mark) return;  // between the two is nothing to add to
    const size_t above = stack_.size() - mark;
    Value& target = stack_[mark - 1];
    if (above == 1 && stack_.back().kind == Kind::kChunk && target.kind == Kind::kList) {
      append_to(target, stack_.back());
      stack_.shrink(mark);
    } else if (above == 2 && stack_.back().kind == Kind::kInfo && stack_[mark].kind == Kind::kIndex) {
      store_item(target);
      stack_.shrink(mark);
    }
  }

  // Carries out one opcode; false after STOP.
  bool step() {
    switch (static_cast<Op>(little<uint8_t>())) {
      case Op::kProto:
        require(little<uint8_t>() <= 5);
        break;
      case Op::kFrame:
        require(little<uint64_t>() <= static_cast<uint64_t>(end_ - p_));
        break;
      case Op::kStop:
        require(pop().kind == Kind::kMetadata && stack_.empty() && marks_.empty());
        return false;
      case Op::kMark:
        marks_.push_back(stack_.size());
        break;
      case Op::kMemoize:
        memoize();
        break;
      case Op::kBinGet:
        recall(little<uint8_t>());
        break;
      case Op::kLongBinGet:
        recall(little<uint32_t>());
        break;
      case Op::kNone:
        push({});
        break;
      case Op::kNewTrue:
        push(Value::of(Kind::kBool, 1));
        break;
      case Op::kNewFalse:
        push(Value::of(Kind::kBool, 0));
        break;
      case Op::kBinInt1:
        push(Value::of(Kind::kInt, little<uint8_t>()));
        break;
      case Op::kBinInt2:
        push(Value::of(Kind::kInt, little<uint16_t>()));
        break;
      case Op::kBinInt:
        push(Value::of(Kind::kInt, little<int32_t>()));
        break;
      case Op::kLong1: {
        const ByteSpan digits = take(little<uint8_t>());
        require(!digits.empty() && digits.size() <= 8);
        int64_t number = (std::to_integer<uint8_t>(digits.back()) & 0x80) != 0 ? -1 : 0;
        std::memcpy(&number, digits.data(), digits.size());
        push(Value::of(Kind::kInt, number));
        break;
      }
      case Op::kShortBinUnicode:
        text(little<uint8_t>());
        break;
      case Op::kBinUnicode:
        text(little<uint32_t>());
        break;
      case Op::kShortBinBytes:
        push(Value::text(Kind::kBytes, take(little<uint8_t>())));
        break;
      case Op::kBinBytes:
        push(Value::text(Kind::kBytes, take(little<uint32_t>())));
        break;
      case Op::kEmptyTuple:
        tuple(stack_.size());
        break;
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3: {
        const auto n = static_cast<size_t>(p_[-1]) - static_cast<size_t>(Op::kTuple1) + 1;
        require(stack_.size() >= floor() + n);
        tuple(stack_.size() - n);
        break;
      }
      case Op::kTuple:
        tuple(pop_mark());
        break;
      case Op::kEmptyList:
        push(Value::of(Kind::kList, 0));
        break;
      case Op::kAppend: {
        const Value value = pop();
        require(stack_.size() > floor());
        append_to(stack_.back(), value);
        break;
      }
      case Op::kAppends: {
        const size_t mark = pop_mark();
        require(mark > floor() && stack_[mark - 1].kind == Kind::kList);
        for (size_t i = mark; i < stack_.size(); ++i) append_to(stack_[mark - 1], stack_[i]);
        stack_.shrink(mark);
        break;
      }
      case Op::kEmptyDict:
        push(Value::of(Kind::kDict, 0));
        break;
      case Op::kSetItem:
        require(stack_.size() >= floor() + 3);
        set_items(stack_.size() - 2);
        break;
      case Op::kSetItems:
        set_items(pop_mark());
        break;
      case Op::kStackGlobal: {
        const Value name = pop();
        const Value module = pop();
        require(name.kind == Kind::kText && module.kind == Kind::kText);
        if (const auto known = class_of(module.view(), name.view())) {
          push(Value::of(Kind::kClass, static_cast<int64_t>(*known)));
        } else {
          const auto dtype = dtype_from_string(name.view());
          require(module.view() == "torch" && dtype.has_value());
          push(Value::of(Kind::kDType, static_cast<int64_t>(*dtype)));
        }
        break;
      }
      case Op::kNewObj: {
        const Value args = pop();
        const Value callable = pop();
        require(args.kind == Kind::kTuple && args.size == 0 && callable.kind == Kind::kClass);
        push(Value::of(Kind::kObject, callable.number));
        break;
      }
      case Op::kReduce:
        reduce();
        break;
      case Op::kBuild: {  // with another state than a dict
        const Value state = pop();
        require(pop().is(Kind::kObject, Class::kProperties));
        push(build_properties(items(state)));
        break;
      }
      default:
        throw NotUsual();
    }
    return true;
  }

  const std::byte* p_;
  const std::byte* end_;
  uint64_t copies_left_;
  Stack stack_;
  std::vector<size_t> marks_;
  std::vector<uint32_t> memo_;  // in memorized_, plus one; 0: nothing that may be recalled
  std::vector<Value> memorized_;
  std::vector<Value> tuples_;  // items of all tuples that can still be needed
  std::deque<Dims> dims_;
  std::vector<List> lists_;
  std::vector<std::vector<Value>> dicts_;  // key, value, key, value, ...
  std::vector<TensorProperties> properties_;
  std::vector<TensorStorageMetadata> tensors_;
  std::vector<std::string> own_texts_;
  Names keys_;
  Names paths_;
  std::vector<std::pair<MetadataIndex, StorageInfo>> storage_data_;
  Attributes<2> chunk_attributes_{{"offsets", "sizes"}};
  Attributes<3> index_attributes_{{"fqn", "offset", "index"}};
  Attributes<4> info_attributes_{{"relative_path", "offset", "length", "transform_descriptors"}};
  ChunkStorageMetadata chunk_;  // the one on the stack
  MetadataIndex index_;
  StorageInfo info_;
  bool has_chunk_ = false;
  bool has_index_ = false;
  bool has_info_ = false;
  bool has_metadata_ = false;  // a second one would add to the first
  DecodedMetadata result_;
};

}  // namespace

std::optional<DecodedMetadata> scan_metadata(ByteSpan file) {
  try {
    return Scanner(file).run();
  } catch (const NotUsual&) {
    return std::nullopt;
  }
}

}  // namespace reshard
