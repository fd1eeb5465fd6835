// SPDX-License-Identifier: BSD-3-Clause
#include "storage/stored_items.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "storage/chunks.h"
#include "storage/parallel.h"

namespace reshard {
namespace {

constexpr uint64_t kBatchBytes = 4 << 20;  // at least, where several threads read

/// The item's position in the catalogue's storage_data.
size_t position_of(const Metadata& metadata, const MetadataIndex& index) {
  if (const auto position = metadata.storage_data.position(index)) return *position;
  throw Error(ErrorCode::kCorruptData, "the catalogue has no item " + to_string(index), {.key = index.fqn});
}

Stored stored_at(const Metadata& metadata, size_t position) {
  Stored stored;
  const auto& [key, place] = *(metadata.storage_data.begin() + static_cast<ptrdiff_t>(position));
  const MetadataIndex& index = key;
  const StorageMetadata* entry = metadata.state_dict_metadata.find(index.fqn);
  if (entry == nullptr) {
    throw Error(ErrorCode::kCorruptData, "the catalogue has no item " + to_string(index), {.key = index.fqn});
  }
  stored.index = &key;
  stored.place = &place;
  stored.tensor = std::get_if<TensorStorageMetadata>(entry);
  if (stored.tensor != nullptr) {
    stored.chunk = find_chunk(*stored.tensor, key);
    if (stored.chunk == nullptr) {
      throw Error(ErrorCode::kCorruptData, "the catalogue has no chunk " + to_string(index), {.key = index.fqn});
    }
    stored.element_bytes =
        static_cast<uint64_t>(volume(stored.chunk->sizes) * element_size(stored.tensor->properties.dtype));
  }
  return stored;
}

}  // namespace

StoredItems::StoredItems(const LoadPlan& plan, const Metadata& metadata, LoadPlanner& planner,
                         const std::function<void(const std::vector<std::string>&)>& check_transforms) {
  // What is wanted of each stored item, in the plan's order.
  std::vector<std::pair<size_t, const ReadItem*>> numbered;
  numbered.reserve(plan.items.size());
  for (const ReadItem& want : plan.items) {
    if (want.is_bytes || volume(want.lengths) != 0) {
      numbered.emplace_back(position_of(metadata, want.storage_index), &want);
      continue;
    }
    const StorageMetadata* entry = metadata.state_dict_metadata.find(want.storage_index.fqn);
    const auto* tensor = entry != nullptr ? std::get_if<TensorStorageMetadata>(entry) : nullptr;
    if (tensor != nullptr) {
      planner.commit_tensor(want, resolve_destination(planner, want, tensor->properties.dtype));
    }
  }
  std::ranges::stable_sort(numbered, {}, [](const auto& pair) { return pair.first; });
  wants_.reserve(numbered.size());
  for (const auto& [position, want] : numbered) wants_.push_back(want);

  for (size_t begin = 0, end = 0; begin < numbered.size(); begin = end) {
    while (end < numbered.size() && numbered[end].first == numbered[begin].first) ++end;
    Stored stored = stored_at(metadata, numbered[begin].first);
    if (!stored.place->transform_descriptors.empty()) {
      with_error_context(
          {.key = stored.index->fqn, .file = stored.place->relative_path, .offset = stored.place->offset},
          [&] { check_transforms(stored.place->transform_descriptors); });
    }
    stored.wants = std::span(wants_).subspan(begin, end - begin);
    if (stored.tensor == nullptr) bytes_planned_ += stored.place->length;
    for (const ReadItem* want : stored.wants) {
      if (want->is_bytes != (stored.tensor == nullptr)) {
        throw Error(ErrorCode::kInternal, "the plan and the catalogue differ on what is a tensor",
                    {.key = want->storage_index.fqn});
      }
      if (stored.tensor == nullptr) continue;
      if (!is_inside({want->storage_offsets, want->lengths}, stored.chunk->sizes)) {
        throw Error(ErrorCode::kInternal, "the plan wants a region outside its stored chunk",
                    {.key = want->storage_index.fqn,
                     .wanted = to_string(Box{want->storage_offsets, want->lengths}),
                     .found = to_string(stored.chunk->sizes)});
      }
      stored.wanted_bytes +=
          static_cast<uint64_t>(volume(want->lengths) * element_size(stored.tensor->properties.dtype));
    }
    bytes_wanted_ += stored.wanted_bytes;
    items_.push_back(stored);
  }
  bytes_planned_ += bytes_wanted_;
  std::ranges::stable_sort(items_, [](const Stored& a, const Stored& b) {
    const int order = a.place->relative_path.compare(b.place->relative_path);
    return order != 0 ? order < 0 : a.place->offset < b.place->offset;
  });
}

std::vector<std::span<const Stored>> StoredItems::batches(int thread_count) const {
  const auto bytes_of = [](const Stored& stored) {
    return stored.tensor != nullptr ? stored.wanted_bytes : stored.place->length;
  };
  const uint64_t most = thread_count == 1
                            ? std::numeric_limits<uint64_t>::max()
                            : std::max(kBatchBytes, bytes_planned_ / (4 * static_cast<uint64_t>(thread_count)));
  std::vector<std::span<const Stored>> batches;
  for (size_t begin = 0, end = 0; begin < items_.size(); begin = end) {
    const std::string& path = items_[begin].place->relative_path;
    uint64_t bytes = 0;
    for (; end < items_.size() && items_[end].place->relative_path == path && bytes < most; ++end) {
      bytes += bytes_of(items_[end]);
    }
    batches.push_back(std::span(items_).subspan(begin, end - begin));
  }
  return batches;
}

void for_each_batch(const StoredItems& items, int thread_count,
                    const std::function<void(const std::string&, std::span<const Stored>)>& fn) {
  const auto batches = items.batches(thread_count);
  std::atomic<bool> failed = false;
  run_parallel(batches.size(), static_cast<size_t>(thread_count), failed,
               [&](size_t i) { fn(batches[i].front().place->relative_path, batches[i]); });
}

MutableTensorView resolve_destination(LoadPlanner& planner, const ReadItem& want, DType dtype) {
  MutableTensorView view = planner.resolve_tensor(want);
  if (view.dtype != dtype || view.sizes != want.lengths) {
    throw Error(ErrorCode::kInternal, "destination is not as planned",
                {.wanted = std::string(to_string(dtype)) + " " + to_string(want.lengths),
                 .found = std::string(to_string(view.dtype)) + " " + to_string(view.sizes)});
  }
  return view;
}

}  // namespace reshard
