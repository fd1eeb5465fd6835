// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What a load plan wants, item by item of the storage, in the order in which files are read.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "reshard/planner/planner.h"

namespace reshard {

/// One item of the checkpoint, and what the plan wants of it. Borrows plan and catalogue.
struct Stored {
  const MetadataIndex* index = nullptr;
  const StorageInfo* place = nullptr;
  const TensorStorageMetadata* tensor = nullptr;  // null for a value
  const Box* chunk = nullptr;                     // of the tensor
  std::span<const ReadItem* const> wants;         // in the plan's order
  uint64_t wanted_bytes = 0;                      // of elements, by all wants
  uint64_t element_bytes = 0;                     // of the whole chunk
};

/// The items that a plan needs, by file and offset.
class StoredItems {
 public:
  /// Commits what has no elements, which nothing is read for. Throws kCorruptData for what the catalogue lacks;
  /// what `check_transforms` throws of an item with a stream transform gets the item's place.
  StoredItems(const LoadPlan& plan, const Metadata& metadata, LoadPlanner& planner,
              const std::function<void(const std::vector<std::string>&)>& check_transforms);
  StoredItems(const StoredItems&) = delete;
  StoredItems& operator=(const StoredItems&) = delete;

  uint64_t bytes_wanted() const { return bytes_wanted_; }    // of elements
  uint64_t bytes_planned() const { return bytes_planned_; }  // and of values
  /// Neighbours in one file, for one thread: all of a file if one thread reads.
  std::vector<std::span<const Stored>> batches(int thread_count) const;

 private:
  std::vector<const ReadItem*> wants_;
  std::vector<Stored> items_;
  uint64_t bytes_wanted_ = 0;
  uint64_t bytes_planned_ = 0;
};

/// Calls fn(relative_path, items) for each batch, by up to `thread_count` threads at once. When one throws, the others
/// end their batches, and the first error leaves.
void for_each_batch(const StoredItems& items, int thread_count,
                    const std::function<void(const std::string&, std::span<const Stored>)>& fn);

/// The planner's memory for a want; kInternal if it is not as planned.
MutableTensorView resolve_destination(LoadPlanner& planner, const ReadItem& want, DType dtype);

}  // namespace reshard
