// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// State dicts made of plain buffers, for tests of planners, protocol and storage. Every tensor holds a pattern: each
// byte is a function of the key and of its place in the whole tensor, so that a part that landed anywhere else is seen.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "reshard/planner/state.h"

namespace reshard {

/// The byte at `position` of the row-major tensor `fqn`.
inline std::byte pattern_byte(const std::string& fqn, uint64_t position) {
  const uint64_t mixed = (std::hash<std::string>{}(fqn) ^ position) * 0x9E3779B97F4A7C15ull;
  return static_cast<std::byte>(mixed >> 56);
}

/// The elements of `chunk`, dense and row-major, of the tensor `fqn` of `size`.
inline Bytes pattern_of(const std::string& fqn, const Dims& size, const Box& chunk, int64_t element_bytes) {
  Bytes bytes(static_cast<size_t>(volume(chunk.sizes) * element_bytes));
  if (bytes.empty() || !is_inside(chunk, size)) return bytes;  // a chunk that lies outside is some test's bad input
  for_each_run(whole_box(size), chunk, [&](int64_t whole, int64_t part, int64_t length) {
    for (int64_t i = 0; i < length * element_bytes; ++i) {
      bytes[static_cast<size_t>(part * element_bytes + i)] =
          pattern_byte(fqn, static_cast<uint64_t>(whole * element_bytes + i));
    }
  });
  return bytes;
}

/// "a.b" -> ("a", "b").
inline ObjectPath path_of(const std::string& fqn) {
  ObjectPath path;
  for (size_t begin = 0; begin <= fqn.size();) {
    const size_t end = std::min(fqn.find('.', begin), fqn.size());
    path.emplace_back(fqn.substr(begin, end - begin));
    begin = end + 1;
  }
  return path;
}

inline StateEntry tensor_entry(const std::string& fqn, const Dims& size, std::vector<Box> chunks,
                               DType dtype = DType::kFloat32) {
  StateEntry entry{fqn, path_of(fqn), {}};
  auto& tensor = entry.value.emplace<TensorEntry>();
  tensor.properties.dtype = dtype;
  tensor.size = size;
  tensor.chunks = std::move(chunks);
  tensor.sharded = true;
  return entry;
}
inline StateEntry replica_entry(const std::string& fqn, const Dims& size, DType dtype = DType::kFloat32) {
  StateEntry entry = tensor_entry(fqn, size, {whole_box(size)}, dtype);
  std::get<TensorEntry>(entry.value).sharded = false;
  return entry;
}
inline StateEntry bytes_entry(const std::string& fqn, uint64_t length) {
  return {fqn, path_of(fqn), BytesEntry{length}};
}

/// What both states hold: entries, and a buffer for each chunk or value.
class MemoryEntries {
 public:
  size_t add(StateEntry entry) {
    auto& buffers = buffers_.emplace_back();
    if (const auto* tensor = std::get_if<TensorEntry>(&entry.value)) {
      for (const Box& chunk : tensor->chunks) {
        buffers.emplace_back(static_cast<size_t>(volume(chunk.sizes) * element_size(tensor->properties.dtype)),
                             std::byte{0xCD});
      }
    } else {
      buffers.emplace_back(std::get<BytesEntry>(entry.value).length);
    }
    entries_.push_back(std::move(entry));
    return entries_.size() - 1;
  }

  const std::vector<StateEntry>& entries() const { return entries_; }
  const TensorEntry& tensor(size_t entry) const { return std::get<TensorEntry>(entries_.at(entry).value); }
  Bytes& buffer(size_t entry, size_t chunk = 0) { return buffers_.at(entry).at(chunk); }
  const Bytes& buffer(size_t entry, size_t chunk = 0) const { return buffers_.at(entry).at(chunk); }
  Bytes expected(size_t entry, size_t chunk) const {
    const TensorEntry& t = tensor(entry);
    return pattern_of(entries_.at(entry).fqn, t.size, t.chunks.at(chunk), element_size(t.properties.dtype));
  }
  /// The first key whose buffers do not hold the pattern; empty if all do.
  std::string first_difference() const {
    for (size_t e = 0; e < entries_.size(); ++e) {
      if (!std::holds_alternative<TensorEntry>(entries_[e].value)) continue;
      for (size_t c = 0; c < tensor(e).chunks.size(); ++c) {
        if (buffer(e, c) != expected(e, c)) return entries_[e].fqn + " chunk " + to_string(tensor(e).chunks[c]);
      }
    }
    return {};
  }

 private:
  std::vector<StateEntry> entries_;
  std::vector<std::vector<Bytes>> buffers_;
};

/// Tensors are filled with their pattern when they are added.
class MemorySaveState final : public SaveState {
 public:
  MemorySaveState() = default;
  explicit MemorySaveState(std::vector<StateEntry> entries) {
    for (StateEntry& entry : entries) add(std::move(entry));
  }
  void add(StateEntry entry) {
    const size_t e = memory_.add(std::move(entry));
    if (!std::holds_alternative<TensorEntry>(memory_.entries()[e].value)) return;
    for (size_t c = 0; c < memory_.tensor(e).chunks.size(); ++c) memory_.buffer(e, c) = memory_.expected(e, c);
  }
  void add_value(const std::string& fqn, std::string_view content) {
    const size_t e = memory_.add(bytes_entry(fqn, content.size()));
    std::ranges::copy(as_bytes(content), memory_.buffer(e).begin());
  }
  MemoryEntries& memory() { return memory_; }

  const std::vector<StateEntry>& entries() const override { return memory_.entries(); }
  TensorView tensor(size_t entry, size_t chunk) const override {
    const TensorEntry& tensor = memory_.tensor(entry);
    const Dims& sizes = tensor.chunks.at(chunk).sizes;
    return {.data = memory_.buffer(entry, chunk).data(),
            .dtype = tensor.properties.dtype,
            .sizes = sizes,
            .strides = contiguous_strides(sizes),
            .owner = nullptr};
  }
  ByteSpan bytes(size_t entry) const override { return memory_.buffer(entry); }

 private:
  MemoryEntries memory_;
};

/// Buffers start with another content than the pattern. A dtype that differs from the stored one is cast for float32
/// and float64.
class MemoryLoadState final : public LoadState {
 public:
  MemoryLoadState() = default;
  explicit MemoryLoadState(std::vector<StateEntry> entries) {
    for (StateEntry& entry : entries) memory_[0].add(std::move(entry));
  }
  /// Without such entries both rules give the same.
  void set_entries_before_24(std::vector<StateEntry> entries) {
    has_old_ = true;
    for (StateEntry& entry : entries) memory_[1].add(std::move(entry));
  }
  MemoryEntries& memory(FlattenRule rule = FlattenRule::kCurrent) {
    return memory_[has_old_ && rule == FlattenRule::kBefore24 ? 1 : 0];
  }
  std::string first_difference() { return memory().first_difference(); }
  /// Calls of commit_tensor so far.
  size_t commits() const { return commits_; }
  std::string value(size_t entry, FlattenRule rule = FlattenRule::kCurrent) {
    return std::string(as_text(memory(rule).buffer(entry)));
  }

  const std::vector<StateEntry>& entries(FlattenRule rule) const override {
    return const_cast<MemoryLoadState*>(this)->memory(rule).entries();
  }
  MutableTensorView tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region, DType dtype) override {
    const TensorEntry& tensor = memory(rule).tensor(entry);
    MutableTensorView view{.data = nullptr, .dtype = dtype, .sizes = region.sizes, .strides = {}, .owner = nullptr};
    if (dtype == tensor.properties.dtype) {
      view.strides = contiguous_strides(tensor.chunks.at(chunk).sizes);
      view.data = memory(rule).buffer(entry, chunk).data() + position(tensor, chunk, region.offsets);
    } else {
      auto staging = std::make_shared<Bytes>(static_cast<size_t>(volume(region.sizes) * element_size(dtype)));
      view.strides = contiguous_strides(region.sizes);
      view.data = staging->data();
      view.owner = std::move(staging);
    }
    return view;
  }
  void commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                     const MutableTensorView& view) override {
    std::atomic_ref(commits_).fetch_add(1);  // reader threads
    const TensorEntry& tensor = memory(rule).tensor(entry);
    if (view.dtype == tensor.properties.dtype) return;
    if (view.dtype != DType::kFloat32 || tensor.properties.dtype != DType::kFloat64) {
      throw Error(ErrorCode::kUnsupported, "only float32 to float64 is cast here");
    }
    std::byte* to = memory(rule).buffer(entry, chunk).data();
    for_each_run(tensor.chunks.at(chunk), region, [&](int64_t chunk_offset, int64_t part_offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i) {
        float stored;
        std::memcpy(&stored, view.data + (part_offset + i) * 4, 4);
        const double wanted = stored;
        std::memcpy(to + (chunk_offset + i) * 8, &wanted, 8);
      }
    });
  }
  void load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) override {
    memory(rule).buffer(entry).assign(archive.begin(), archive.end());
  }

 private:
  static size_t position(const TensorEntry& tensor, size_t chunk, const Dims& offsets) {
    const Box& box = tensor.chunks.at(chunk);
    const Dims strides = contiguous_strides(box.sizes);
    int64_t element = 0;
    for (size_t i = 0; i < offsets.size(); ++i) element += (offsets[i] - box.offsets[i]) * strides[i];
    return static_cast<size_t>(element * element_size(tensor.properties.dtype));
  }

  std::array<MemoryEntries, 2> memory_;
  bool has_old_ = false;
  size_t commits_ = 0;
};

}  // namespace reshard
