// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Planners decide what is written and read; they see no file and no other rank. Names follow
// torch.distributed.checkpoint.planner.
//
// Save, in call order:
//   1. all ranks      set_up_planner(state, is_coordinator)
//   2. all ranks      create_local_plan(), then, where there is more than one, add_content_digests(plan)
//   3. coordinator    create_global_plan(local plans, in rank order)
//   4. all ranks      finish_plan(this rank's part of the global plan)
//   5. all ranks      resolve_tensor / resolve_bytes for each write item, from any thread of the storage writer
// Load:
//   1. all ranks      set_up_planner(state, metadata, is_coordinator)
//   2. all ranks      create_local_plan()
//   3. all ranks      for each read item: resolve_tensor, then commit_tensor; or load_bytes
// A load is planned by each rank alone: every rank has the same catalogue.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "reshard/metadata/metadata.h"
#include "reshard/planner/state.h"

namespace reshard {

enum class WriteItemType : uint8_t {
  kTensor,  // a whole tensor; equal items on several ranks are replicas
  kShard,   // one box of a sharded tensor
  kByteIo,  // a serialized value
};

/// Stands for the elements of a tensor or the bytes of a value when ranks compare what they hold.
using ContentDigest = std::array<std::byte, 16>;

/// One thing that a rank can write.
struct WriteItem {
  MetadataIndex index;  // for tensors: fqn and the chunk's offsets
  // kTensor, kShard:
  Box chunk;
  Dims size;  // of the whole tensor
  TensorProperties properties;
  // kByteIo:
  uint64_t length = 0;  // bytes of the serialized value
  /// In a local plan, where copies of the item on other ranks must be equal: what this rank holds.
  std::optional<ContentDigest> content = {};
  WriteItemType type = WriteItemType::kTensor;  // here because a plan holds millions of items, and this costs no room
  /// Index in the same plan of an earlier item, not tied itself, with the same elements: the storage may give both one
  /// place and write it once.
  std::optional<size_t> tied_to = {};
  friend bool operator==(const WriteItem&, const WriteItem&) = default;
};

/// Flattened name -> path of the keys of a state dict. Copies share one map until one of them is edited: in most jobs all
/// ranks have the same keys.
class SharedPaths {
 public:
  using Map = OrderedMap<SharedString, ObjectPath>;
  SharedPaths() = default;
  explicit SharedPaths(Map map) : map_(std::make_shared<Map>(std::move(map))) {}
  const Map& operator*() const { return map_ ? *map_ : empty_map(); }
  const Map* operator->() const { return &**this; }
  /// For changes: a map of its own.
  Map& edit() {
    if (!map_ || map_.use_count() != 1) map_ = std::make_shared<Map>(**this);
    return *map_;
  }
  bool is_same(const SharedPaths& other) const { return map_ == other.map_; }
  friend bool operator==(const SharedPaths& a, const SharedPaths& b) { return a.is_same(b) || *a == *b; }

 private:
  static const Map& empty_map() {
    static const Map empty;
    return empty;
  }
  std::shared_ptr<Map> map_;
};

/// What one rank writes. `storage`, filled by StorageWriter::prepare_global_plan, says where each item goes (same order
/// as items).
struct SavePlan {
  std::vector<WriteItem> items;
  std::vector<StorageInfo> storage;
  /// Flattened name -> path, of every key of this rank. Goes into the catalogue; the plan that a rank gets back has
  /// none.
  SharedPaths planner_data;
  friend bool operator==(const SavePlan&, const SavePlan&) = default;
};

struct GlobalSavePlan {
  std::vector<SavePlan> plans;  // one a rank
  Metadata metadata;            // without storage_data, which the storage writer fills
};

class SavePlanner {
 public:
  virtual ~SavePlanner() = default;
  /// `state` is borrowed until the save ends.
  virtual void set_up_planner(const SaveState& state, bool is_coordinator) = 0;
  virtual SavePlan create_local_plan() = 0;
  /// Fills WriteItem::content of the items whose copies on other ranks are to be compared. None by default.
  virtual void add_content_digests(SavePlan& /*plan*/) const {}
  /// Throws kInvalidArgument naming key and ranks if the plans do not describe whole tensors.
  virtual GlobalSavePlan create_global_plan(std::vector<SavePlan> local_plans) = 0;
  virtual SavePlan finish_plan(SavePlan plan) = 0;
  /// Memory of a kTensor or kShard item of the finished plan. Thread-safe.
  virtual TensorView resolve_tensor(const WriteItem& item) const = 0;
  /// Serialized value of a kByteIo item. Thread-safe.
  virtual ByteSpan resolve_bytes(const WriteItem& item) const = 0;
};

/// One thing that a rank reads: a box of a stored chunk into a box of a destination chunk, or one serialized value.
struct ReadItem {
  bool is_bytes = false;
  MetadataIndex dest_index;     // fqn and offsets of the destination chunk
  MetadataIndex storage_index;  // fqn and offsets of the stored chunk
  Dims dest_offsets;            // of the region, relative to the destination chunk
  Dims storage_offsets;         // of the region, relative to the stored chunk
  Dims lengths;                 // sizes of the region
  friend bool operator==(const ReadItem&, const ReadItem&) = default;
};

struct LoadPlan {
  std::vector<ReadItem> items;
  friend bool operator==(const LoadPlan&, const LoadPlan&) = default;
};

/// What a load found to differ; made before any data byte is read.
struct LoadReport {
  std::vector<std::string> missing;     // wanted, not in the checkpoint (only with allow_partial_load)
  std::vector<std::string> unexpected;  // in the checkpoint, not wanted
  std::vector<std::string> cast;        // "fqn: float32 -> bfloat16" (only with allow_cast)
  std::vector<std::string> shape;       // "fqn: [4, 8] -> [6, 8]", not loaded (only with allow_shape_mismatch)
};

class LoadPlanner {
 public:
  virtual ~LoadPlanner() = default;
  /// Both are borrowed until the load ends.
  virtual void set_up_planner(LoadState& state, const Metadata& metadata, bool is_coordinator) = 0;
  /// Throws kNotFound for a missing key, kInvalidArgument for a shape or dtype that differs.
  virtual LoadPlan create_local_plan() = 0;
  virtual const LoadReport& report() const = 0;
  /// Host memory for the region of a tensor item; its dtype is the stored one. Thread-safe.
  virtual MutableTensorView resolve_tensor(const ReadItem& item) = 0;
  /// Called once, when the view holds its data. Thread-safe.
  virtual void commit_tensor(const ReadItem& item, const MutableTensorView& view) = 0;
  /// Called for a bytes item with its whole archive. One thread at a time.
  virtual void load_bytes(const ReadItem& item, ByteSpan archive) = 0;
};

}  // namespace reshard
