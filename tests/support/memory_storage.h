// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Storage in memory: a store shared by all ranks, and a writer and reader that can fail at every stage. Items are raw:
// tensors as dense row-major elements, values as given.

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reshard/storage/storage.h"

namespace reshard {

/// Called at the start of each stage of a writer or reader, on that rank; what it throws is the stage's error.
using StageHook = std::function<void(std::string_view stage)>;

/// What a directory is to the real storage. Thread-safe.
class MemoryStore {
 public:
  std::optional<Metadata> committed() const {
    const std::lock_guard lock(mutex_);
    return committed_;
  }
  void set_committed(std::optional<Metadata> metadata) {
    const std::lock_guard lock(mutex_);
    committed_ = std::move(metadata);
  }
  std::vector<std::string> files() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> names;
    for (const auto& [name, content] : files_) names.push_back(name);
    return names;
  }

 private:
  friend class MemoryWriter;
  friend class MemoryReader;
  mutable std::mutex mutex_;
  std::map<std::string, Bytes> files_;
  std::optional<Metadata> committed_;
  int saves_begun_ = 0;
};

/// Stages: begin_save, prepare_global_plan, write_data, finish, finish.unknown (after the point of no return),
/// finish.durable (when the commit is known).
class MemoryWriter final : public StorageWriter {
 public:
  explicit MemoryWriter(MemoryStore& store, StageHook hook = {}) : store_(store), hook_(std::move(hook)) {}

  std::string checkpoint_id() const override { return "memory"; }

  void begin_save(const std::string& /*save_id*/) override {
    at("begin_save");
    const std::lock_guard lock(store_.mutex_);
    number_ = store_.saves_begun_++;
  }

  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    at("prepare_global_plan");
    for (size_t rank = 0; rank < plans.size(); ++rank) {
      uint64_t offset = 0;
      for (const WriteItem& item : plans[rank].items) {
        const uint64_t length = length_of(item);
        plans[rank].storage.push_back(
            {"__" + std::to_string(rank) + "_" + std::to_string(number_) + ".mem", offset, length, {}});
        offset += length;
      }
    }
    return plans;
  }

  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override {
    at("write_data");
    std::vector<WriteResult> results;
    std::map<std::string, Bytes> files;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const WriteItem& item = plan.items[i];
      const StorageInfo& storage = plan.storage[i];
      Bytes& file = files[storage.relative_path];
      file.resize(std::max<size_t>(file.size(), storage.offset + storage.length));
      std::byte* to = file.data() + storage.offset;
      if (item.type == WriteItemType::kByteIo) {
        std::ranges::copy(planner.resolve_bytes(item), to);
      } else {
        const TensorView view = planner.resolve_tensor(item);
        const auto element = static_cast<size_t>(element_size(view.dtype));
        size_t done = 0;
        for_each_element(view.sizes, view.strides, [&](int64_t position) {
          std::memcpy(to + done, view.data + static_cast<size_t>(position) * element, element);
          done += element;
        });
      }
      results.push_back({item.index, storage});
      if (context.progress) context.progress({"write", i + 1, plan.items.size()});
    }
    const std::lock_guard lock(store_.mutex_);
    for (auto& [name, content] : files) {
      store_.files_[name] = std::move(content);
      written_.push_back(name);
    }
    return results;
  }

  void finish(const Metadata& metadata, const StorageContext& /*context*/, Committed& committed) override {
    committed = Committed::kNo;
    at("finish");
    std::optional<Metadata> before = store_.committed();
    store_.set_committed(metadata);
    committed = Committed::kUnknown;
    at("finish.unknown");
    committed = Committed::kYes;
    at("finish.durable");
    if (!before) return;
    const std::lock_guard lock(store_.mutex_);
    for (const auto& [index, info] : before->storage_data) store_.files_.erase(info.relative_path);
  }

  void abandon() noexcept override {
    ++abandoned_;
    const std::lock_guard lock(store_.mutex_);
    for (const std::string& name : written_) store_.files_.erase(name);
    written_.clear();
  }

  int abandoned() const { return abandoned_; }

  /// Calls fn with the position, in elements, of each element of a strided view, in row-major order.
  template <class Fn>
  static void for_each_element(const Dims& sizes, const Dims& strides, Fn&& fn) {
    const int64_t n = volume(sizes);
    for (int64_t flat = 0; flat < n; ++flat) {
      int64_t rest = flat;
      int64_t position = 0;
      for (size_t i = sizes.size(); i-- > 0;) {
        position += rest % sizes[i] * strides[i];
        rest /= sizes[i];
      }
      fn(position);
    }
  }

 private:
  static uint64_t length_of(const WriteItem& item) {
    if (item.type == WriteItemType::kByteIo) return item.length;
    return static_cast<uint64_t>(volume(item.chunk.sizes) * element_size(item.properties.dtype));
  }
  void at(std::string_view stage) const {
    if (hook_) hook_(stage);
  }

  MemoryStore& store_;
  StageHook hook_;
  int number_ = 0;
  int abandoned_ = 0;
  std::vector<std::string> written_;
};

/// Stages: read_metadata, set_up_storage_reader, read_data.
class MemoryReader final : public StorageReader {
 public:
  explicit MemoryReader(const MemoryStore& store, StageHook hook = {}) : store_(store), hook_(std::move(hook)) {}

  Metadata read_metadata() override {
    at("read_metadata");
    auto metadata = store_.committed();
    if (!metadata) throw Error(ErrorCode::kNotFound, "nothing was saved");
    return *std::move(metadata);
  }
  void set_up_storage_reader(const Metadata& metadata) override {
    at("set_up_storage_reader");
    metadata_ = &metadata;
  }
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) override {
    at("read_data");
    size_t done = 0;
    for (const ReadItem& item : plan.items) {
      const StorageInfo* info = metadata_->storage_data.find(item.storage_index);
      if (info == nullptr) throw Error(ErrorCode::kCorruptData, "no such item", {.key = to_string(item.storage_index)});
      const Bytes content = read(*info);
      if (item.is_bytes) {
        planner.load_bytes(item, content);
      } else {
        const MutableTensorView view = planner.resolve_tensor(item);
        const auto element = static_cast<size_t>(element_size(view.dtype));
        const Dims stored = contiguous_strides(stored_chunk(item.storage_index).sizes);
        size_t first = 0;
        for (size_t i = 0; i < stored.size(); ++i) first += static_cast<size_t>(item.storage_offsets[i] * stored[i]);
        std::vector<int64_t> from;
        MemoryWriter::for_each_element(item.lengths, stored, [&](int64_t position) { from.push_back(position); });
        size_t next = 0;
        MemoryWriter::for_each_element(view.sizes, view.strides, [&](int64_t position) {
          std::memcpy(view.data + static_cast<size_t>(position) * element,
                      content.data() + (first + static_cast<size_t>(from.at(next++))) * element, element);
        });
        planner.commit_tensor(item, view);
      }
      if (context.progress) context.progress({"read", ++done, plan.items.size()});
    }
  }

 private:
  Bytes read(const StorageInfo& info) const {
    const std::lock_guard lock(store_.mutex_);
    const auto it = store_.files_.find(info.relative_path);
    if (it == store_.files_.end()) throw Error(ErrorCode::kNotFound, "no such file", {.file = info.relative_path});
    if (info.offset + info.length > it->second.size()) {
      throw Error(ErrorCode::kCorruptData, "file too short", {.file = info.relative_path});
    }
    const auto begin = it->second.begin() + static_cast<ptrdiff_t>(info.offset);
    return Bytes(begin, begin + static_cast<ptrdiff_t>(info.length));
  }
  const Box& stored_chunk(const MetadataIndex& index) const {
    const auto& tensor = std::get<TensorStorageMetadata>(*metadata_->state_dict_metadata.find(index.fqn));
    for (const Box& chunk : tensor.chunks) {
      if (chunk.offsets == *index.offset) return chunk;
    }
    throw Error(ErrorCode::kCorruptData, "no such chunk", {.key = to_string(index)});
  }
  void at(std::string_view stage) const {
    if (hook_) hook_(stage);
  }

  const MemoryStore& store_;
  StageHook hook_;
  const Metadata* metadata_ = nullptr;
};

}  // namespace reshard
