// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Files as torch.save writes them, made by hand: tensors that are any view of any storage, in any nesting.

#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "reshard/format/pickle.h"
#include "reshard/format/torch_archive.h"

namespace reshard {

class TorchFile {
 public:
  pickle::Tree tree;

  /// A storage with these bytes; returns its number.
  size_t storage(Bytes bytes) {
    storages_.push_back(std::move(bytes));
    return storages_.size() - 1;
  }
  pickle::Value ints(const Dims& dims) {
    std::vector<pickle::Value> values;
    for (const int64_t v : dims) values.push_back(pickle::Tree::integer(v));
    return tree.tuple(values);
  }
  pickle::Value call(const char* module, const char* name, std::vector<pickle::Value> args) {
    pickle::Object object;
    object.callable = tree.global(module, name);
    object.args = tree.tuple(args);
    return tree.object(object);
  }
  /// A float32 view of a storage.
  pickle::Value view(size_t storage, int64_t offset, const Dims& sizes, const Dims& strides,
                     std::vector<pickle::Entry> flags = {}) {
    const auto elements = static_cast<int64_t>(storages_.at(storage).size() / 4);
    const pickle::Value id =
        tree.tuple({tree.str("storage"), tree.global("torch", "FloatStorage"), tree.str(std::to_string(storage)),
                    tree.str("cpu"), pickle::Tree::integer(elements)});
    std::vector<pickle::Value> args = {
        tree.persistent(id), pickle::Tree::integer(offset), ints(sizes),
        ints(strides),       pickle::Tree::boolean(false),  call("collections", "OrderedDict", {})};
    if (!flags.empty()) args.push_back(tree.dict(flags));
    return call("torch._utils", "_rebuild_tensor_v2", std::move(args));
  }
  /// A dense tensor with a storage of its own.
  pickle::Value tensor(DType dtype, const Dims& sizes, Bytes bytes) {
    return make_tensor_value(tree, dtype, sizes, storage(std::move(bytes)));
  }
  pickle::Value dict(std::vector<std::pair<std::string, pickle::Value>> items) {
    std::vector<pickle::Entry> entries;
    for (const auto& [key, value] : items) entries.push_back({tree.str(key), value});
    return tree.dict(entries);
  }
  /// As module.state_dict() is: with _metadata in its state.
  pickle::Value ordered_dict(std::vector<std::pair<std::string, pickle::Value>> items) {
    pickle::Object::Extras extras;
    extras.dict_items = dict(std::move(items));
    pickle::Object object;
    object.callable = tree.global("collections", "OrderedDict");
    object.args = tree.tuple({});
    object.extras = &extras;
    object.has_state = true;
    object.state = dict({{"_metadata", dict({{"version", pickle::Tree::integer(1)}})}});
    return tree.object(object);
  }
  Bytes bytes(const pickle::Value& root) const {
    std::vector<ByteSpan> spans(storages_.begin(), storages_.end());
    return encode_value_archive(root, spans);
  }
  void write(const std::string& path, const pickle::Value& root) const {
    const Bytes content = bytes(root);
    std::ofstream(path, std::ios::binary) << as_text(content);
  }

 private:
  std::vector<Bytes> storages_;
};

/// The bytes of float32 values first, first + 1, ...
inline Bytes counting(size_t count, float first = 0) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i);
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}
inline Bytes floats(std::vector<float> values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

}  // namespace reshard
