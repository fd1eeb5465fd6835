// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/pickle.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "format/pickle_opcodes.h"
#include "format/utf8.h"

namespace reshard::pickle {

// Values and the nodes behind them are trivially destructible and live in blocks, so a tree of any shape goes away by
// freeing blocks.
struct Tree::Arena {
  void* allocate(size_t bytes) {
    bytes = (bytes + 7) & ~size_t{7};
    if (bytes > static_cast<size_t>(end - next)) grow(bytes);
    std::byte* p = next;
    next += bytes;
    return p;
  }
  void grow(size_t bytes) {
    block_size = std::min<size_t>(block_size * 2, 1 << 20);
    const size_t size = std::max(bytes, block_size);
    blocks.push_back(std::make_unique_for_overwrite<std::byte[]>(size));
    next = blocks.back().get();
    end = next + size;
  }
  std::vector<std::unique_ptr<std::byte[]>> blocks;
  std::byte* next = nullptr;
  std::byte* end = nullptr;
  size_t block_size = 2048;
  std::unordered_map<std::string, Value> globals;  // made by Tree::global
};

namespace {

template <class T>
struct Growing {  // contents of a list (T = Value) or dict (T = Entry)
  T* data;
  uint32_t size;
  uint32_t capacity;
};
using ListNode = Growing<Value>;
using DictNode = Growing<Entry>;

constexpr uint32_t kMaxCount = std::numeric_limits<uint32_t>::max() / 2;

}  // namespace

// The only code that sees inside Value.
struct Access {
  using Arena = Tree::Arena;

  static Value make(Kind kind, const void* pointer, uint32_t size) {
    Value v;
    v.kind_ = kind;
    v.size_ = size;
    v.pointer_ = pointer;
    return v;
  }
  static Value boolean(bool b) {
    Value v;
    v.kind_ = Kind::kBool;
    v.bits_ = b ? 1 : 0;
    return v;
  }
  static Value integer(int64_t i) {
    Value v;
    v.kind_ = Kind::kInt;
    v.integer_ = i;
    return v;
  }
  static Value real(double d) {
    Value v;
    v.kind_ = Kind::kFloat;
    v.real_ = d;
    return v;
  }
  static Value text(Arena& arena, Kind kind, ByteSpan data) {
    if (data.size() > kMaxCount) throw Error(ErrorCode::kUnsupported, "pickle: a string of more than 2 GiB");
    auto* copy = static_cast<std::byte*>(arena.allocate(std::max<size_t>(data.size(), 1)));
    if (!data.empty()) std::memcpy(copy, data.data(), data.size());
    return make(kind, copy, static_cast<uint32_t>(data.size()));
  }
  static Value sequence(Arena& arena, Kind kind, const Value* items, size_t count) {
    if (kind != Kind::kTuple && kind != Kind::kFrozenSet) {
      auto* node = new (arena.allocate(sizeof(ListNode))) ListNode{};
      append(arena, *node, items, count);
      return make(kind, node, 0);
    }
    if (count > kMaxCount) throw Error(ErrorCode::kUnsupported, "pickle: a tuple of more than 2^31 items");
    auto* copy = static_cast<Value*>(arena.allocate(std::max<size_t>(count, 1) * sizeof(Value)));
    std::copy_n(items, count, copy);
    return make(kind, copy, static_cast<uint32_t>(count));
  }
  static Value dict(Arena& arena, const Entry* entries, size_t count) {
    auto* node = new (arena.allocate(sizeof(DictNode))) DictNode{};
    append(arena, *node, entries, count);
    return make(Kind::kDict, node, 0);
  }
  static Value global(Arena& arena, std::string_view module, std::string_view name) {
    return global_of(arena, text(arena, Kind::kStr, as_bytes(module)), text(arena, Kind::kStr, as_bytes(name)));
  }
  // Refers to two texts of the tree: a stream can name them for a few bytes, however long they are.
  static Value global_of(Arena& arena, const Value& module, const Value& name) {
    return make(Kind::kGlobal, new (arena.allocate(sizeof(Global))) Global{module.as_str(), name.as_str()}, 0);
  }
  static Value object(Arena& arena, const Object& parts) {
    auto* node = new (arena.allocate(sizeof(Object))) Object(parts);
    if (parts.extras != nullptr)
      node->extras = new (arena.allocate(sizeof(Object::Extras))) Object::Extras(*parts.extras);
    return make(Kind::kObject, node, 0);
  }
  static Value persistent(Arena& arena, const Value& id) {
    return make(Kind::kPersistentId, new (arena.allocate(sizeof(Value))) Value(id), 0);
  }

  template <class T>
  static void append(Arena& arena, Growing<T>& node, const T* items, size_t count) {
    if (count > kMaxCount - node.size)
      throw Error(ErrorCode::kUnsupported, "pickle: a container of more than 2^31 items");
    const uint32_t wanted = node.size + static_cast<uint32_t>(count);
    if (wanted > node.capacity) {
      const uint32_t capacity = node.size == 0 ? wanted : std::max(wanted, 2 * node.size);
      auto* grown = static_cast<T*>(arena.allocate(capacity * sizeof(T)));
      std::copy_n(node.data, node.size, grown);
      node.data = grown;
      node.capacity = capacity;
    }
    std::copy_n(items, count, node.data + node.size);
    node.size = wanted;
  }

  // Nodes are const to the user and mutable while a tree is made.
  template <class T>
  static T& node(const Value& v) {
    return *static_cast<T*>(const_cast<void*>(v.pointer_));
  }
  static Object::Extras& extras(Arena& arena, Object& object) {
    if (object.extras == nullptr) object.extras = new (arena.allocate(sizeof(Object::Extras))) Object::Extras;
    return const_cast<Object::Extras&>(*object.extras);
  }
  static const void* identity(const Value& v) { return v.pointer_; }
  static Arena& arena(Tree& tree) { return *tree.arena_; }
  static void set_root(Tree& tree, const Value& root) { tree.root_ = root; }
};

static_assert(sizeof(Value) == 16 && std::is_trivially_destructible_v<Value> &&
              std::is_trivially_destructible_v<Object>);

// --- Value -----------------------------------------------------------------------------------------------------------

std::string_view to_string(Kind kind) {
  static constexpr std::string_view kNames[] = {"None",      "bool",      "int",    "long int",     "float", "str",
                                                "bytes",     "bytearray", "list",   "tuple",        "dict",  "set",
                                                "frozenset", "global",    "object", "persistent id"};
  return kNames[static_cast<size_t>(kind)];
}

namespace {

void want(bool ok, std::string_view wanted, const Value& found) {
  if (!ok) {
    throw Error(ErrorCode::kCorruptData, "pickle: value of another type",
                {.wanted = std::string(wanted), .found = describe(found)});
  }
}

}  // namespace

std::string describe(const Value& value) {
  constexpr size_t kMaxName = 200;
  const Value& callable = value.kind() == Kind::kObject ? value.as_object().callable : value;
  if (callable.kind() != Kind::kGlobal) return std::string(to_string(value.kind()));
  const Global& global = callable.as_global();
  return std::string(global.module.substr(0, kMaxName)) + "." + std::string(global.name.substr(0, kMaxName));
}

bool Value::as_bool() const {
  want(kind_ == Kind::kBool, "bool", *this);
  return bits_ != 0;
}
int64_t Value::as_int() const {
  want(kind_ == Kind::kInt, "int", *this);
  return integer_;
}
double Value::as_float() const {
  want(kind_ == Kind::kFloat, "float", *this);
  return real_;
}
std::string_view Value::as_str() const {
  want(kind_ == Kind::kStr, "str", *this);
  return {static_cast<const char*>(pointer_), size_};
}
ByteSpan Value::as_bytes() const {
  want(kind_ == Kind::kBytes || kind_ == Kind::kByteArray || kind_ == Kind::kBigInt, "bytes", *this);
  return {static_cast<const std::byte*>(pointer_), size_};
}
std::span<const Value> Value::items() const {
  if (kind_ == Kind::kTuple || kind_ == Kind::kFrozenSet) return {static_cast<const Value*>(pointer_), size_};
  want(kind_ == Kind::kList || kind_ == Kind::kSet, "list, tuple or set", *this);
  const auto& node = Access::node<ListNode>(*this);
  return {node.data, node.size};
}
std::span<const Entry> Value::entries() const {
  want(kind_ == Kind::kDict, "dict", *this);
  const auto& node = Access::node<DictNode>(*this);
  return {node.data, node.size};
}
const Global& Value::as_global() const {
  want(kind_ == Kind::kGlobal, "global", *this);
  return *static_cast<const Global*>(pointer_);
}
const Object& Value::as_object() const {
  want(kind_ == Kind::kObject, "object", *this);
  return *static_cast<const Object*>(pointer_);
}
const Value& Value::persistent_id() const {
  want(kind_ == Kind::kPersistentId, "persistent id", *this);
  return *static_cast<const Value*>(pointer_);
}
bool Value::is_global(std::string_view module, std::string_view name) const {
  if (kind_ != Kind::kGlobal) return false;
  const Global& global = as_global();
  return global.name == name && global.module == module;
}

std::span<const Value> Object::list_items() const {
  return extras == nullptr || extras->list_items.is_none() ? std::span<const Value>{} : extras->list_items.items();
}
std::span<const Entry> Object::dict_items() const {
  return extras == nullptr || extras->dict_items.is_none() ? std::span<const Entry>{} : extras->dict_items.entries();
}

// --- Tree ------------------------------------------------------------------------------------------------------------

Tree::Tree() : arena_(std::make_unique<Arena>()) {}
Tree::~Tree() = default;
Tree::Tree(Tree&&) noexcept = default;
Tree& Tree::operator=(Tree&&) noexcept = default;

Value Tree::boolean(bool v) { return Access::boolean(v); }
Value Tree::integer(int64_t v) { return Access::integer(v); }
Value Tree::real(double v) { return Access::real(v); }
Value Tree::big_integer(ByteSpan digits) { return Access::text(*arena_, Kind::kBigInt, digits); }
Value Tree::str(std::string_view utf8) {
  if (!is_utf8(utf8))
    throw Error(ErrorCode::kInvalidArgument, "a string is no UTF-8, so it would be unreadable; save it as bytes");
  return Access::text(*arena_, Kind::kStr, as_bytes(utf8));
}
Value Tree::bytes(ByteSpan data) { return Access::text(*arena_, Kind::kBytes, data); }
Value Tree::byte_array(ByteSpan data) { return Access::text(*arena_, Kind::kByteArray, data); }
Value Tree::list(std::span<const Value> items) {
  return Access::sequence(*arena_, Kind::kList, items.data(), items.size());
}
Value Tree::tuple(std::span<const Value> items) {
  return Access::sequence(*arena_, Kind::kTuple, items.data(), items.size());
}
Value Tree::dict(std::span<const Entry> entries) { return Access::dict(*arena_, entries.data(), entries.size()); }
Value Tree::object(const Object& parts) { return Access::object(*arena_, parts); }
Value Tree::persistent(const Value& id) { return Access::persistent(*arena_, id); }
Value Tree::global(std::string_view module, std::string_view name) {
  Value& known = arena_->globals[std::string(module) + '\n' + std::string(name)];
  if (known.is_none()) known = Access::global(*arena_, module, name);
  return known;
}

// --- parse -----------------------------------------------------------------------------------------------------------

namespace {

// What no checkpoint calls, and attacks do. Not a complete list, and nothing depends on that: calls are not carried out.
bool runs_code(const Global& global) {
  static constexpr std::string_view kModules[] = {"os",     "posix",    "nt",        "subprocess", "sys",
                                                  "runpy",  "pty",      "importlib", "ctypes",     "socket",
                                                  "shutil", "commands", "webbrowser"};
  static constexpr std::string_view kBuiltins[] = {"eval",       "exec",  "execfile",   "compile", "open",
                                                   "__import__", "input", "breakpoint", "getattr", "apply"};
  if (global.module == "builtins" || global.module == "__builtin__")
    return std::ranges::find(kBuiltins, global.name) != std::end(kBuiltins);
  return std::ranges::find(kModules, global.module.substr(0, global.module.find('.'))) != std::end(kModules);
}

// Longest line of a GLOBAL opcode.
constexpr size_t kMaxGlobalLine = 4096;

// The pickle virtual machine, with every "call" replaced by the making of a node.
class Machine {
 public:
  explicit Machine(ByteSpan stream) : begin_(stream.data()), p_(begin_), end_(begin_ + stream.size()) {
    arena_ = &Access::arena(tree_);
    stack_.reserve(256);
  }

  Tree run() {
    while (step()) {
    }
    return std::move(tree_);
  }

 private:
  [[noreturn]] [[gnu::noinline]] void fail(const std::string& message, ErrorCode code = ErrorCode::kCorruptData) const {
    throw Error(code, "pickle: " + message, {.offset = static_cast<uint64_t>(opcode_ - begin_)});
  }
  void require(bool ok, const char* message) const {
    if (!ok) [[unlikely]]
      fail(message);
  }

  size_t remaining() const { return static_cast<size_t>(end_ - p_); }
  ByteSpan take(uint64_t n) {
    if (n > remaining()) [[unlikely]]
      cut_off(n);
    const ByteSpan data(p_, static_cast<size_t>(n));
    p_ += n;
    return data;
  }
  [[noreturn]] [[gnu::noinline]] void cut_off(uint64_t n) const {
    throw Error(ErrorCode::kCorruptData, "pickle ends too early",
                {.offset = static_cast<uint64_t>(opcode_ - begin_),
                 .wanted = std::to_string(n) + " bytes",
                 .found = std::to_string(remaining())});
  }
  template <class T>
  T little() {
    T v;
    std::memcpy(&v, take(sizeof(T)).data(), sizeof(T));
    return v;
  }
  uint64_t signed_length() {
    const auto n = little<int32_t>();
    require(n >= 0, "negative length");
    return static_cast<uint64_t>(n);
  }
  std::string_view line() {
    const size_t window = std::min(remaining(), kMaxGlobalLine);
    const void* newline = window == 0 ? nullptr : std::memchr(p_, '\n', window);
    require(newline != nullptr, "name without end");
    const std::string_view text = as_text(take(static_cast<uint64_t>(static_cast<const std::byte*>(newline) - p_)));
    ++p_;
    require(is_utf8(text), "name is no UTF-8");
    return text;
  }

  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void need(size_t n) const { require(stack_.size() >= floor() + n, "stack underflow"); }
  Value& top() {
    need(1);
    return stack_.back();
  }
  Value pop() {
    need(1);
    const Value v = stack_.back();
    stack_.pop_back();
    return v;
  }
  void push(const Value& v) { stack_.push_back(v); }
  size_t pop_mark() {
    require(!marks_.empty(), "no MARK");
    const size_t mark = marks_.back();
    marks_.pop_back();
    return mark;
  }

  void put(uint64_t index) {
    need(1);
    // Every entry costs at least one byte of stream, so an honest index is smaller than the position.
    if (index > static_cast<uint64_t>(p_ - begin_))
      fail("memo index " + std::to_string(index) + " is out of proportion");
    if (index >= memo_.size()) memo_.resize(index + 1, unset());
    if (memo_[index].is_same(unset())) ++memo_count_;
    memo_[index] = stack_.back();
  }
  void get(uint64_t index) {
    if (index >= memo_.size() || memo_[index].is_same(unset()))
      fail("memo entry " + std::to_string(index) + " is not there");
    push(memo_[index]);
  }
  static Value unset() { return Access::make(Kind::kNone, nullptr, 1); }

  void text(Kind kind, uint64_t length) {
    const ByteSpan data = take(length);
    if (kind == Kind::kStr) require(is_utf8(as_text(data)), "str is no UTF-8");
    push(Access::text(*arena_, kind, data));
  }
  void integer(uint64_t length) {  // two's complement, little-endian
    ByteSpan digits = take(length);
    while (digits.size() > 1) {  // drop bytes that only repeat the sign
      const auto last = std::to_integer<uint8_t>(digits.back());
      const bool negative = (std::to_integer<uint8_t>(digits[digits.size() - 2]) & 0x80) != 0;
      if (last != (negative ? 0xFF : 0x00)) break;
      digits = digits.first(digits.size() - 1);
    }
    if (digits.size() > 8) return push(Access::text(*arena_, Kind::kBigInt, digits));
    const bool negative = !digits.empty() && (std::to_integer<uint8_t>(digits.back()) & 0x80) != 0;
    int64_t v = negative ? -1 : 0;
    std::memcpy(&v, digits.data(), digits.size());
    push(Access::integer(v));
  }
  void tuple(size_t from) {
    const Value v = Access::sequence(*arena_, Kind::kTuple, stack_.data() + from, stack_.size() - from);
    stack_.resize(from);
    push(v);
  }
  void call(Object::Made made) {
    Object object;
    object.made = made;
    Object::Extras extras;
    if (made == Object::Made::kNewObjEx) {
      extras.kwargs = pop();
      require(extras.kwargs.kind() == Kind::kDict, "keyword arguments are no dict");
      object.extras = &extras;
    }
    object.args = pop();
    object.callable = pop();
    require(object.args.kind() == Kind::kTuple, "arguments are no tuple");
    require(object.callable.kind() == Kind::kGlobal || object.callable.kind() == Kind::kObject,
            "call of what is no class or function");
    if (object.callable.kind() == Kind::kGlobal && runs_code(object.callable.as_global()))
      fail("calls " + describe(object.callable) + ", which would run code in Python", ErrorCode::kUnsupported);
    push(Access::object(*arena_, object));
  }
  void append(size_t from) {  // stack_[from..] into the list below
    require(from > floor(), "stack underflow");
    const Value& target = stack_[from - 1];
    const Value* list = &target;
    if (target.kind() == Kind::kObject) {
      auto& extras = Access::extras(*arena_, Access::node<Object>(target));
      if (extras.list_items.is_none()) extras.list_items = Access::sequence(*arena_, Kind::kList, nullptr, 0);
      list = &extras.list_items;
    } else {
      require(target.kind() == Kind::kList, "append to what is no list");
    }
    Access::append(*arena_, Access::node<ListNode>(*list), stack_.data() + from, stack_.size() - from);
    stack_.resize(from);
  }
  void set_items(size_t from) {
    require(from > floor(), "stack underflow");
    require((stack_.size() - from) % 2 == 0, "key without value");
    const Value& target = stack_[from - 1];
    const Value* dict = &target;
    if (target.kind() == Kind::kObject) {
      auto& extras = Access::extras(*arena_, Access::node<Object>(target));
      if (extras.dict_items.is_none()) extras.dict_items = Access::dict(*arena_, nullptr, 0);
      dict = &extras.dict_items;
    } else {
      require(target.kind() == Kind::kDict, "set item of what is no dict");
    }
    static_assert(sizeof(Entry) == 2 * sizeof(Value));  // the stack holds key, value, key, value, ...
    entries_.clear();
    for (size_t i = from; i < stack_.size(); i += 2) entries_.push_back({stack_[i], stack_[i + 1]});
    Access::append(*arena_, Access::node<DictNode>(*dict), entries_.data(), entries_.size());
    stack_.resize(from);
  }

  // Carries out one opcode; false after STOP.
  bool step() {
    opcode_ = p_;
    const auto op = static_cast<Op>(little<uint8_t>());
    switch (op) {
      case Op::kProto:
        if (const auto version = little<uint8_t>(); version > 5) {
          fail("protocol " + std::to_string(version), ErrorCode::kUnsupported);
        }
        break;
      case Op::kFrame: {
        const auto length = little<uint64_t>();
        require(length <= remaining(), "frame is longer than the stream");
        break;
      }
      case Op::kStop: {
        const Value root = pop();
        require(stack_.empty() && marks_.empty(), "values left on the stack");
        Access::set_root(tree_, root);
        return false;
      }
      case Op::kMark:
        marks_.push_back(stack_.size());
        break;
      case Op::kPop:
        if (!marks_.empty() && marks_.back() == stack_.size()) {
          marks_.pop_back();
        } else {
          pop();
        }
        break;
      case Op::kPopMark:
        stack_.resize(pop_mark());
        break;
      case Op::kDup:
        push(Value(top()));
        break;

      case Op::kMemoize:
        put(memo_count_);
        break;
      case Op::kBinPut:
        put(little<uint8_t>());
        break;
      case Op::kLongBinPut:
        put(little<uint32_t>());
        break;
      case Op::kBinGet:
        get(little<uint8_t>());
        break;
      case Op::kLongBinGet:
        get(little<uint32_t>());
        break;

      case Op::kNone:
        push({});
        break;
      case Op::kNewTrue:
        push(Access::boolean(true));
        break;
      case Op::kNewFalse:
        push(Access::boolean(false));
        break;
      case Op::kBinInt1:
        push(Access::integer(little<uint8_t>()));
        break;
      case Op::kBinInt2:
        push(Access::integer(little<uint16_t>()));
        break;
      case Op::kBinInt:
        push(Access::integer(little<int32_t>()));
        break;
      case Op::kLong1:
        integer(little<uint8_t>());
        break;
      case Op::kLong4:
        integer(signed_length());
        break;
      case Op::kBinFloat:
        push(Access::real(std::bit_cast<double>(__builtin_bswap64(little<uint64_t>()))));
        break;

      case Op::kShortBinUnicode:
        text(Kind::kStr, little<uint8_t>());
        break;
      case Op::kBinUnicode:
        text(Kind::kStr, little<uint32_t>());
        break;
      case Op::kBinUnicode8:
        text(Kind::kStr, little<uint64_t>());
        break;
      case Op::kShortBinBytes:
      case Op::kShortBinString:
        text(Kind::kBytes, little<uint8_t>());
        break;
      case Op::kBinBytes:
        text(Kind::kBytes, little<uint32_t>());
        break;
      case Op::kBinBytes8:
        text(Kind::kBytes, little<uint64_t>());
        break;
      case Op::kBinString:
        text(Kind::kBytes, signed_length());
        break;
      case Op::kByteArray8:
        text(Kind::kByteArray, little<uint64_t>());
        break;

      case Op::kEmptyTuple:
        push(Access::sequence(*arena_, Kind::kTuple, nullptr, 0));
        break;
      case Op::kTuple1:
      case Op::kTuple2:
      case Op::kTuple3: {
        const size_t n = static_cast<size_t>(op) - static_cast<size_t>(Op::kTuple1) + 1;
        need(n);
        tuple(stack_.size() - n);
        break;
      }
      case Op::kTuple:
        tuple(pop_mark());
        break;
      case Op::kEmptyList:
        push(Access::sequence(*arena_, Kind::kList, nullptr, 0));
        break;
      case Op::kAppend:
        need(2);
        append(stack_.size() - 1);
        break;
      case Op::kAppends:
        append(pop_mark());
        break;
      case Op::kEmptyDict:
        push(Access::dict(*arena_, nullptr, 0));
        break;
      case Op::kSetItem:
        need(3);
        set_items(stack_.size() - 2);
        break;
      case Op::kSetItems:
        set_items(pop_mark());
        break;
      case Op::kEmptySet:
        push(Access::sequence(*arena_, Kind::kSet, nullptr, 0));
        break;
      case Op::kAddItems: {
        const size_t from = pop_mark();
        require(from > floor() && stack_[from - 1].kind() == Kind::kSet, "add to what is no set");
        Access::append(*arena_, Access::node<ListNode>(stack_[from - 1]), stack_.data() + from, stack_.size() - from);
        stack_.resize(from);
        break;
      }
      case Op::kFrozenSet: {
        const size_t from = pop_mark();
        const Value v = Access::sequence(*arena_, Kind::kFrozenSet, stack_.data() + from, stack_.size() - from);
        stack_.resize(from);
        push(v);
        break;
      }

      case Op::kGlobal: {
        const std::string_view module = line();
        push(Access::global(*arena_, module, line()));
        break;
      }
      case Op::kStackGlobal: {
        const Value name = pop();
        const Value module = pop();
        require(name.kind() == Kind::kStr && module.kind() == Kind::kStr, "name of a global is no str");
        push(Access::global_of(*arena_, module, name));
        break;
      }
      case Op::kReduce:
        call(Object::Made::kReduce);
        break;
      case Op::kNewObj:
        call(Object::Made::kNewObj);
        break;
      case Op::kNewObjEx:
        call(Object::Made::kNewObjEx);
        break;
      case Op::kBuild: {
        const Value state = pop();
        require(top().kind() == Kind::kObject, "BUILD of what is no object");
        auto& object = Access::node<Object>(top());
        require(!object.has_state, "second BUILD of one object");
        object.has_state = true;
        object.state = state;
        break;
      }
      case Op::kBinPersId:
        push(Access::persistent(*arena_, pop()));
        break;
      default:
        refuse(op);
    }
    return true;
  }

  [[noreturn]] void refuse(Op op) const {
    const std::string_view name = refused_name(op);
    if (!name.empty()) fail("opcode " + std::string(name) + " is not accepted", ErrorCode::kUnsupported);
    fail("unknown opcode " + std::to_string(static_cast<unsigned>(op)));
  }

  Tree tree_;
  Access::Arena* arena_ = nullptr;
  const std::byte* begin_;
  const std::byte* p_;
  const std::byte* end_;
  const std::byte* opcode_ = nullptr;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;
  std::vector<Value> memo_;
  size_t memo_count_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace

Tree parse(ByteSpan stream) { return Machine(stream).run(); }

// --- check_tree ------------------------------------------------------------------------------------------------------

namespace {

struct Children {
  std::span<const Value> items;
  std::span<const Entry> entries;
  const Object* object = nullptr;

  explicit Children(const Value& v) {
    switch (v.kind()) {
      case Kind::kList:
      case Kind::kTuple:
      case Kind::kSet:
      case Kind::kFrozenSet:
        items = v.items();
        break;
      case Kind::kDict:
        entries = v.entries();
        break;
      case Kind::kObject:
        object = &v.as_object();
        break;
      case Kind::kPersistentId:
        items = {&v.persistent_id(), 1};
        break;
      default:
        break;
    }
  }
  size_t size() const { return object != nullptr ? 6 : items.size() + 2 * entries.size(); }
  // Bytes of a text, however spelled.
  static size_t text_size(const Value& v) {
    if (v.kind() == Kind::kStr) return v.as_str().size();
    const bool is_bytes = v.kind() == Kind::kBytes || v.kind() == Kind::kByteArray || v.kind() == Kind::kBigInt;
    return is_bytes ? v.as_bytes().size() : 0;
  }
  Value operator[](size_t i) const {
    if (object != nullptr) {
      switch (i) {
        case 0:
          return object->callable;
        case 1:
          return object->args;
        case 2:
          return object->state;
        default:
          break;
      }
      if (object->extras == nullptr) return {};
      return i == 3 ? object->extras->kwargs : i == 4 ? object->extras->list_items : object->extras->dict_items;
    }
    if (!entries.empty()) return i % 2 == 0 ? entries[i / 2].key : entries[i / 2].value;
    return items[i];
  }
};

}  // namespace

void check_tree(const Value& root, const Limits& limits) {
  struct Frame {
    Value value;
    Children children;
    size_t next = 0;
    size_t depth = 1;  // of the part below, this value included
    uint64_t expanded = 1;
  };
  constexpr size_t kTextBytesOfOneValue = 64;
  struct Seen {
    bool done = false;
    size_t depth = 0;
    uint64_t expanded = 0;
  };
  std::unordered_map<const void*, Seen> seen;
  std::deque<Frame> path;  // a vector would hold two copies of a deep path while it grows
  const auto fail = [](const char* what) {
    throw Error(ErrorCode::kUnsupported, std::string("pickle: value is ") + what);
  };
  const auto absorb = [&](size_t depth, uint64_t expanded) {
    if (path.empty()) return;
    Frame& parent = path.back();
    parent.depth = std::max(parent.depth, depth + 1);
    parent.expanded += expanded;
    if (parent.depth > limits.max_depth) fail("nested too deep");
    if (parent.expanded > limits.max_expanded) fail("too large when shared parts are copied");
  };
  const auto enter = [&](const Value& v) {
    const Children children(v);
    if (children.size() == 0) return absorb(1, 1 + Children::text_size(v) / kTextBytesOfOneValue);
    const auto [it, is_new] = seen.try_emplace(Access::identity(v));
    if (!is_new) {
      if (!it->second.done) fail("a cycle");
      return absorb(it->second.depth, it->second.expanded);
    }
    if (path.size() >= limits.max_depth) fail("nested too deep");
    path.push_back({.value = v, .children = children});
  };
  enter(root);
  while (!path.empty()) {
    Frame& frame = path.back();
    if (frame.next < frame.children.size()) {
      enter(frame.children[frame.next++]);
      continue;
    }
    const Frame done = frame;
    seen[Access::identity(done.value)] = {.done = true, .depth = done.depth, .expanded = done.expanded};
    path.pop_back();
    absorb(done.depth, done.expanded);
  }
}

// --- copy ------------------------------------------------------------------------------------------------------------

namespace {

class Copier {
 public:
  Copier(Tree& tree, const std::function<Value(const Value&)>& persistent_id)
      : tree_(tree), persistent_id_(persistent_id) {}

  Value copy(const Value& v) {
    switch (v.kind()) {
      case Kind::kNone:
      case Kind::kBool:
      case Kind::kInt:
      case Kind::kFloat:
        return v;
      case Kind::kGlobal:
        return tree_.global(v.as_global().module, v.as_global().name);
      default:
        break;
    }
    if (const auto it = copies_.find(Access::identity(v)); it != copies_.end() && it->second.kind() == v.kind()) {
      return it->second;
    }
    const Value made = make(v);
    copies_[Access::identity(v)] = made;
    return made;
  }

 private:
  Value make(const Value& v) {
    Access::Arena& arena = Access::arena(tree_);
    switch (v.kind()) {
      case Kind::kStr:
        return Access::text(arena, Kind::kStr, as_bytes(v.as_str()));
      case Kind::kBytes:
      case Kind::kByteArray:
      case Kind::kBigInt:
        return Access::text(arena, v.kind(), v.as_bytes());
      case Kind::kDict: {
        const std::vector<Entry> entries = copy_all(v.entries());
        return Access::dict(arena, entries.data(), entries.size());
      }
      case Kind::kPersistentId:
        return tree_.persistent(persistent_id_ ? persistent_id_(v.persistent_id()) : copy(v.persistent_id()));
      case Kind::kObject:
        return copy_object(v.as_object());
      default: {
        std::vector<Value> items;
        items.reserve(v.items().size());
        for (const Value& item : v.items()) items.push_back(copy(item));
        return Access::sequence(arena, v.kind(), items.data(), items.size());
      }
    }
  }
  std::vector<Entry> copy_all(std::span<const Entry> entries) {
    std::vector<Entry> result;
    result.reserve(entries.size());
    for (const auto& [key, value] : entries) {
      const Value copied_key = copy(key);
      result.push_back({copied_key, copy(value)});
    }
    return result;
  }
  Value copy_object(const Object& object) {
    Object parts = object;
    Object::Extras extras;
    parts.callable = copy(object.callable);
    parts.args = copy(object.args);
    parts.state = copy(object.state);
    if (object.extras != nullptr) {
      extras.kwargs = copy(object.extras->kwargs);
      extras.list_items = copy(object.extras->list_items);
      extras.dict_items = copy(object.extras->dict_items);
      parts.extras = &extras;
    }
    return tree_.object(parts);
  }

  Tree& tree_;
  const std::function<Value(const Value&)>& persistent_id_;
  std::unordered_map<const void*, Value> copies_;
};

}  // namespace

Value Tree::copy(const Value& value, const std::function<Value(const Value& id)>& persistent_id) {
  return Copier(*this, persistent_id).copy(value);
}

// --- write -----------------------------------------------------------------------------------------------------------

namespace {

// What CPython 3 does for protocol 2, including when it memoizes: after every container, string and call, never for
// scalars and ().
class Writer {
 public:
  Bytes run(const Value& root) {
    op(Op::kProto);
    out_.u8(2);
    save(root);
    op(Op::kStop);
    return out_.take();
  }

 private:
  void op(Op v) { out_.u8(static_cast<uint8_t>(v)); }

  // True if the value was written before and is now referred to.
  bool recall(const void* identity) {
    const auto it = memo_.find(identity);
    if (it == memo_.end()) return false;
    index(it->second, Op::kBinGet, Op::kLongBinGet);
    return true;
  }
  void memoize(const void* identity) {
    const auto n = static_cast<uint32_t>(next_++);
    if (identity != nullptr) memo_.emplace(identity, n);
    index(n, Op::kBinPut, Op::kLongBinPut);
  }
  void index(uint32_t n, Op small, Op large) {
    if (n < 256) {
      op(small);
      out_.u8(static_cast<uint8_t>(n));
    } else {
      op(large);
      out_.u32(n);
    }
  }

  void save_int(int64_t v) {
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
      size_t n = 8;  // shortest two's complement
      while (n > 1 && (v >> (8 * n - 9)) == (v < 0 ? -1 : 0)) --n;
      save_digits(std::as_bytes(std::span(&v, 1)).first(n));
    }
  }
  void save_digits(ByteSpan digits) {
    if (digits.size() < 256) {
      op(Op::kLong1);
      out_.u8(static_cast<uint8_t>(digits.size()));
    } else {
      op(Op::kLong4);
      out_.u32(static_cast<uint32_t>(digits.size()));
    }
    out_.bytes(digits);
  }
  void save_str(std::string_view text, const void* identity) {
    op(Op::kBinUnicode);
    out_.u32(static_cast<uint32_t>(text.size()));
    out_.text(text);
    memoize(identity);
  }
  void save_global(std::string_view module, std::string_view name, const void* identity) {
    if (module.find('\n') != module.npos || name.find('\n') != name.npos)
      throw Error(ErrorCode::kUnsupported, "pickle: the name of a global holds a line break");
    op(Op::kGlobal);
    out_.text(module);
    out_.u8('\n');
    out_.text(name);
    out_.u8('\n');
    memoize(identity);
  }
  // Builtins and constants that the writer itself brings in; the address of each text is its identity.
  void save_builtin(const char* module, const char* name) {
    if (!recall(name)) save_global(module, name, name);
  }
  void save_bytes(ByteSpan data, const void* identity) {
    static constexpr const char* kBytes = "bytes";
    static constexpr const char* kEncode = "encode";
    static constexpr const char* kLatin1 = "latin1";
    if (data.empty()) {
      save_builtin("__builtin__", kBytes);
      op(Op::kEmptyTuple);
    } else {
      save_builtin("_codecs", kEncode);
      save_str(latin1_to_utf8(data), nullptr);
      if (!recall(kLatin1)) save_str(kLatin1, kLatin1);
      op(Op::kTuple2);
      memoize(nullptr);
    }
    op(Op::kReduce);
    memoize(identity);
  }
  // CPython writes a lone item with the short opcode and longer contents in batches of 1000; when it walks an iterator,
  // as for what REDUCE made, a last batch of one is a lone item too.
  void save_batches(size_t count, bool iterated, Op one, Op many, const auto& save_item) {
    constexpr size_t kBatch = 1000;
    for (size_t i = 0; i < count;) {
      const size_t end = std::min(count, i + kBatch);
      const bool lone = end - i == 1 && (count == 1 || iterated);
      if (!lone) op(Op::kMark);
      for (; i < end; ++i) save_item(i);
      op(lone ? one : many);
    }
  }
  void save_items(std::span<const Value> items, bool iterated = false) {
    save_batches(items.size(), iterated, Op::kAppend, Op::kAppends, [&](size_t i) { save(items[i]); });
  }
  void save_entries(std::span<const Entry> entries, bool iterated = false) {
    save_batches(entries.size(), iterated, Op::kSetItem, Op::kSetItems, [&](size_t i) {
      save(entries[i].key);
      save(entries[i].value);
    });
  }
  void save_set(const char* name, std::span<const Value> items, const void* identity) {
    save_builtin("__builtin__", name);
    op(Op::kEmptyList);
    memoize(nullptr);
    save_items(items);
    op(Op::kTuple1);
    memoize(nullptr);
    op(Op::kReduce);
    memoize(identity);
  }
  void save_object(const Object& object, const void* identity) {
    save(object.callable);
    save(object.args);
    if (object.made == Object::Made::kNewObjEx)
      throw Error(ErrorCode::kUnsupported, "pickle: NEWOBJ_EX is not written");
    op(object.made == Object::Made::kReduce ? Op::kReduce : Op::kNewObj);
    memoize(identity);
    save_items(object.list_items(), true);
    save_entries(object.dict_items(), true);
    if (object.has_state) {
      save(object.state);
      op(Op::kBuild);
    }
  }

  void save(const Value& v) {
    static constexpr const char* kByteArray = "bytearray";
    static constexpr const char* kSet = "set";
    static constexpr const char* kFrozenSet = "frozenset";
    const void* identity = Access::identity(v);
    switch (v.kind()) {
      case Kind::kNone:
        return op(Op::kNone);
      case Kind::kBool:
        return op(v.as_bool() ? Op::kNewTrue : Op::kNewFalse);
      case Kind::kInt:
        return save_int(v.as_int());
      case Kind::kBigInt:
        return save_digits(v.as_bytes());
      case Kind::kFloat:
        op(Op::kBinFloat);
        return out_.u64(__builtin_bswap64(std::bit_cast<uint64_t>(v.as_float())));
      case Kind::kPersistentId:
        save(v.persistent_id());
        return op(Op::kBinPersId);
      case Kind::kTuple:
        if (v.items().empty()) return op(Op::kEmptyTuple);
        break;
      default:
        break;
    }
    if (recall(identity)) return;
    switch (v.kind()) {
      case Kind::kStr:
        return save_str(v.as_str(), identity);
      case Kind::kBytes:
        return save_bytes(v.as_bytes(), identity);
      case Kind::kByteArray:
        save_builtin("__builtin__", kByteArray);
        if (v.as_bytes().empty()) {
          op(Op::kEmptyTuple);
        } else {
          save_bytes(v.as_bytes(), nullptr);
          op(Op::kTuple1);
          memoize(nullptr);
        }
        op(Op::kReduce);
        return memoize(identity);
      case Kind::kList:
        op(Op::kEmptyList);
        memoize(identity);
        return save_items(v.items());
      case Kind::kTuple: {
        const auto items = v.items();
        if (items.size() > 3) op(Op::kMark);
        for (const Value& item : items) save(item);
        op(items.size() > 3 ? Op::kTuple : static_cast<Op>(static_cast<size_t>(Op::kTuple1) + items.size() - 1));
        return memoize(identity);
      }
      case Kind::kDict:
        op(Op::kEmptyDict);
        memoize(identity);
        return save_entries(v.entries());
      case Kind::kSet:
        return save_set(kSet, v.items(), identity);
      case Kind::kFrozenSet:
        return save_set(kFrozenSet, v.items(), identity);
      case Kind::kGlobal:
        return save_global(v.as_global().module, v.as_global().name, identity);
      case Kind::kObject:
        return save_object(v.as_object(), identity);
      default:
        break;
    }
  }

  ByteWriter out_;
  std::unordered_map<const void*, uint32_t> memo_;
  size_t next_ = 0;
};

}  // namespace

Bytes write(const Value& root, size_t max_depth) {
  check_tree(root, {.max_depth = max_depth, .max_expanded = std::numeric_limits<uint64_t>::max() / 2});
  return Writer().run(root);
}

namespace {

// bytes as protocol 3 and up write it, or the call that protocol 2 needs for it.
std::optional<std::string> bytes_or_encoded(const Value& value) {
  if (value.kind() == Kind::kBytes) return std::string(as_text(value.as_bytes()));
  if (value.kind() != Kind::kObject) return std::nullopt;
  const Object& object = value.as_object();
  const auto args = object.args.items();
  if (object.has_state || object.extras != nullptr) return std::nullopt;
  if (object.callable.is_global("__builtin__", "bytes") && args.empty()) return std::string();
  if (!object.callable.is_global("_codecs", "encode") || args.size() != 2) return std::nullopt;
  if (args[0].kind() != Kind::kStr || args[1].kind() != Kind::kStr || args[1].as_str() != "latin1") return std::nullopt;
  return utf8_to_latin1(args[0].as_str());
}

}  // namespace

std::optional<std::string> plain_bytes(const Value& value) {
  if (value.kind() == Kind::kByteArray) return std::string(as_text(value.as_bytes()));
  if (value.kind() == Kind::kObject) {
    const Object& object = value.as_object();
    if (object.callable.is_global("__builtin__", "bytearray") && !object.has_state && object.extras == nullptr) {
      const auto args = object.args.items();
      if (args.empty()) return std::string();
      return args.size() == 1 ? bytes_or_encoded(args[0]) : std::nullopt;
    }
  }
  return bytes_or_encoded(value);
}

}  // namespace reshard::pickle
