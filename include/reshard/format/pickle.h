// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Python pickles as inert data. parse() turns a stream into a tree of values and runs nothing: a class, a function or a
// call in the stream becomes a node that names it. write() turns a tree back into the bytes that CPython's pickler
// makes.
//
//   pickle::Tree tree = pickle::parse(bytes);
//   if (tree.root().kind() == pickle::Kind::kDict) for (const auto& [key, value] : tree.root().entries()) ...
//
//   pickle::Tree tree;
//   Bytes bytes = pickle::write(tree.list({tree.integer(1), tree.str("x")}));
//
// Hostile streams: time and memory of parse() are bounded by a constant times the length of the stream, nothing
// recurses, and a tree of any depth is destroyed without recursion. But a stream can share nodes and tie them into
// cycles, so a consumer that descends without a bound must call check_tree() first.

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "reshard/core/bytes.h"

namespace reshard::pickle {

enum class Kind : uint8_t {
  kNone,
  kBool,
  kInt,     // fits int64_t
  kBigInt,  // does not
  kFloat,
  kStr,
  kBytes,  // Python 3 bytes, or a Python 2 str
  kByteArray,
  kList,
  kTuple,
  kDict,
  kSet,
  kFrozenSet,
  kGlobal,        // a class or function, by name
  kObject,        // the result of calling or instantiating something, not carried out
  kPersistentId,  // an object outside the stream (torch.save: a storage)
};

/// "None", "bool", "int", ... as in Python.
std::string_view to_string(Kind kind);

struct Entry;
struct Global;
struct Object;
class Tree;

/// One value of a tree: a handle of 16 bytes, copied freely, valid as long as the Tree it came from. Default: None.
/// Accessors throw kCorruptData naming the kind wanted and what was found, as describe() has it.
class Value {
 public:
  Value() = default;
  Kind kind() const { return kind_; }
  bool is_none() const { return kind_ == Kind::kNone; }
  bool as_bool() const;
  /// kInt only: a bool is no int here.
  int64_t as_int() const;
  double as_float() const;
  /// kStr: UTF-8 as it is in the stream, valid UTF-8 (surrogates that Python lets through are kept).
  std::string_view as_str() const;
  /// kBytes, kByteArray: the data; kBigInt: two's complement, little-endian.
  ByteSpan as_bytes() const;
  /// kList, kTuple, kSet, kFrozenSet.
  std::span<const Value> items() const;
  /// kDict, in insertion order. Duplicate keys are not merged.
  std::span<const Entry> entries() const;
  const Global& as_global() const;
  const Object& as_object() const;
  /// kPersistentId: the id.
  const Value& persistent_id() const;
  /// True for the same node: shared values of a stream stay shared.
  bool is_same(const Value& other) const {
    return kind_ == other.kind_ && size_ == other.size_ && bits_ == other.bits_;
  }
  /// True if this is the class or function `module`.`name`.
  bool is_global(std::string_view module, std::string_view name) const;

 private:
  friend struct Access;
  Kind kind_ = Kind::kNone;
  uint32_t size_ = 0;
  union {
    uint64_t bits_ = 0;
    int64_t integer_;
    double real_;
    const void* pointer_;
  };
};

struct Entry {
  Value key;
  Value value;
};

struct Global {
  std::string_view module;
  std::string_view name;
};

/// callable(*args, **kwargs), then what was put into it.
struct Object {
  enum class Made : uint8_t { kReduce, kNewObj, kNewObjEx };
  /// Parts that few objects have.
  struct Extras {
    Value kwargs;      // kDict, kNewObjEx only
    Value list_items;  // kList: what APPEND and APPENDS added, or None
    Value dict_items;  // kDict: what SETITEM and SETITEMS added, or None
  };
  Made made = Made::kReduce;
  bool has_state = false;
  Value callable;  // kGlobal wherever torch wrote the stream
  Value args;      // kTuple
  Value state;     // argument of BUILD, None without one
  const Extras* extras = nullptr;

  std::span<const Value> list_items() const;
  std::span<const Entry> dict_items() const;
};

/// What a value is, for messages: "posix.system" for a class or function and for an object that it makes, otherwise the
/// kind. Long names are cut.
std::string describe(const Value& value);

/// Owns values: those that parse() made, and those that are made here for write(). Movable; values stay valid.
class Tree {
 public:
  Tree();
  ~Tree();
  Tree(Tree&&) noexcept;
  Tree& operator=(Tree&&) noexcept;

  /// What parse() read; None in a tree made by hand.
  const Value& root() const { return root_; }

  static Value none() { return {}; }
  static Value boolean(bool v);
  static Value integer(int64_t v);
  static Value real(double v);
  /// `digits`: two's complement, little-endian, shortest form.
  Value big_integer(ByteSpan digits);
  /// Throws kInvalidArgument for what is no UTF-8.
  Value str(std::string_view utf8);
  Value bytes(ByteSpan data);
  Value byte_array(ByteSpan data);
  Value list(std::span<const Value> items);
  Value list(std::initializer_list<Value> items) { return list(std::span(items.begin(), items.size())); }
  Value tuple(std::span<const Value> items);
  Value tuple(std::initializer_list<Value> items) { return tuple(std::span(items.begin(), items.size())); }
  Value dict(std::span<const Entry> entries);
  Value dict(std::initializer_list<Entry> entries) { return dict(std::span(entries.begin(), entries.size())); }
  Value global(std::string_view module, std::string_view name);
  /// `parts.extras` is copied too.
  Value object(const Object& parts);
  Value persistent(const Value& id);
  /// A deep copy of a value of any tree. What is shared in it stays shared; the id of each persistent id becomes what
  /// `persistent_id`, if given, makes of it. Descends recursively: check_tree() first.
  Value copy(const Value& value, const std::function<Value(const Value& id)>& persistent_id = {});

 private:
  friend struct Access;
  struct Arena;
  std::unique_ptr<Arena> arena_;
  Value root_;
};

/// Reads one pickle of protocol 0 to 5 made with the opcodes that CPython emits for protocols 2 to 5 (a protocol 2
/// stream may lack its PROTO); bytes after STOP are ignored. The tree copies what it needs. Throws kCorruptData (with
/// the offset) for a broken stream, kUnsupported naming the opcode for one that is refused, or the function for a stream
/// that would run a command or code when Python loads it (os.system, builtins.eval and their like): nothing is run here
/// either way, but such a file is an attack and must not pass for a checkpoint.
Tree parse(ByteSpan stream);

/// Bounds for consumers that descend recursively or expand shared nodes.
struct Limits {
  size_t max_depth = 500;
  uint64_t max_expanded = 16 << 20;  // values, shared ones counted each time, a text once more for each 64 bytes
};
/// Throws kUnsupported if the tree below `root` has a cycle, is deeper than the limits, or would grow past them when
/// shared values are copied.
void check_tree(const Value& root, const Limits& limits = {});

/// The bytes of CPython's pickler for `root` with protocol 2, as torch.save uses it: containers and strings that are
/// the same node are written once and referred to. Throws kInvalidArgument for a tree deeper than `max_depth`.
Bytes write(const Value& root, size_t max_depth = 500);

/// The data of a Python bytes or bytearray value however its protocol spells it (protocol 2 has no bytes opcode and
/// calls a codec); nothing for other values.
std::optional<std::string> plain_bytes(const Value& value);

}  // namespace reshard::pickle
