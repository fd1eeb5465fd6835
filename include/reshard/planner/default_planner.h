// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The planners that save and load use unless told otherwise. Same rules as PyTorch's, with three promises added: a
// saved tensor is whole (its chunks tile it exactly, or the save fails naming the hole or overlap and the ranks), what
// is loaded is whole, and a dtype is never cast silently.

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "reshard/planner/planner.h"

namespace reshard {

struct DefaultSavePlannerOptions {
  /// Replicated items go to the lowest rank that has them instead of the one with the least to write.
  bool dedup_save_to_lowest_rank = false;
  /// Not 0: DedupPolicy::kSameNode with nodes of this many ranks, numbered one after the other as torchrun does
  /// (LOCAL_WORLD_SIZE).
  size_t dedup_ranks_per_node = 0;
  /// Compares the replicas of sharded tensors, too, which otherwise are trusted. Reads every tensor once more.
  bool verify_replicas = false;
};

/// A plain tensor or value under one key on several ranks must have one content: it is compared by digest while planning, and a
/// difference is an error that names the key and two ranks (PyTorch keeps one of them, whichever). Boxes of sharded tensors that
/// several ranks hold are declared replicas and trusted.
/// Writes every chunk with elements once. Chunks without elements are left out, but a tensor that has none at all keeps
/// one chunk, so that it exists in the checkpoint.
class DefaultSavePlanner final : public SavePlanner {
 public:
  explicit DefaultSavePlanner(DefaultSavePlannerOptions options = {}) : options_(options) {}
  void set_up_planner(const SaveState& state, bool is_coordinator) override;
  SavePlan create_local_plan() override;
  void add_content_digests(SavePlan& plan) const override;
  GlobalSavePlan create_global_plan(std::vector<SavePlan> local_plans) override;
  SavePlan finish_plan(SavePlan plan) override;
  TensorView resolve_tensor(const WriteItem& item) const override;
  ByteSpan resolve_bytes(const WriteItem& item) const override;

 private:
  struct Place {
    size_t entry;
    size_t chunk;
  };
  const SaveState& state() const;
  const Place& place(const MetadataIndex& index) const;

  DefaultSavePlannerOptions options_;
  const SaveState* state_ = nullptr;
  OrderedMap<MetadataIndex, Place, MetadataIndexHash> places_;
};

struct DefaultLoadPlannerOptions {
  /// Wanted keys that the checkpoint lacks are left as they are (and reported) instead of being an error.
  bool allow_partial_load = false;
  /// A stored dtype that differs from the wanted one is converted (and reported) instead of being an error. PyTorch
  /// casts silently.
  bool allow_cast = false;
  /// A tensor whose stored shape differs from the wanted one is left as it is (and reported) instead of being an error.
  bool allow_shape_mismatch = false;
  /// From the fully qualified name that the destination has to the one that the checkpoint has, where they differ. Null: they are the
  /// same. Called while planning, for every name, on one thread.
  std::function<std::string(const std::string& fqn)> rename = {};
  /// Changes what was read, before it is cast and taken: `region` (in coordinates of the whole tensor) of the destination `fqn`, in the stored
  /// dtype, in place. Called once for each part that is read, from any thread.
  std::function<void(const std::string& fqn, const Box& region, const MutableTensorView& view)> transform = {};
};

/// Reads what the destination wants and no more. A checkpoint of torch before 2.4, whose flat names differ, is
/// recognised by its keys, and the destination is then flattened as those releases did.
class DefaultLoadPlanner final : public LoadPlanner {
 public:
  explicit DefaultLoadPlanner(DefaultLoadPlannerOptions options = {}) : options_(options) {}
  void set_up_planner(LoadState& state, const Metadata& metadata, bool is_coordinator) override;
  LoadPlan create_local_plan() override;
  const LoadReport& report() const override { return report_; }
  MutableTensorView resolve_tensor(const ReadItem& item) override;
  void commit_tensor(const ReadItem& item, const MutableTensorView& view) override;
  void load_bytes(const ReadItem& item, ByteSpan archive) override;

 private:
  struct Place {
    size_t entry;
    size_t chunk;
    Dims offsets;  // of the chunk
    DType dtype;   // as stored
  };
  LoadState& state() const;
  const Place& place(const MetadataIndex& index) const;
  std::string stored_name(const std::string& fqn) const { return options_.rename ? options_.rename(fqn) : fqn; }
  void plan_tensor(size_t entry_index, const std::string& stored_fqn, const TensorStorageMetadata& stored,
                   LoadPlan& plan);

  DefaultLoadPlannerOptions options_;
  LoadState* state_ = nullptr;
  const Metadata* metadata_ = nullptr;
  FlattenRule rule_ = FlattenRule::kCurrent;
  std::unordered_map<MetadataIndex, Place, MetadataIndexHash> places_;
  LoadReport report_;
};

enum class DedupPolicy : uint8_t {
  kBalanced,    // on the holder with the least to write: what only one rank holds counts first, then the largest items
  kLowestRank,  // on the lowest rank that holds it
  /// All items of a key on one node, that with the least to write of those that hold all of them; there as kBalanced. (With replicas over nodes
  /// and shards inside them, a tensor is then on one node's disk.) Keys that no node holds whole: as kBalanced.
  kSameNode,
};

/// Keeps each item that several plans hold (equal fqn and offsets) on one rank. Load is counted in bytes of the chunk
/// (PyTorch counts the whole tensor), ties go to the lowest rank, so the result is a function of the plans. Order
/// inside a plan is kept. Linear in the number of items. Throws kInvalidArgument naming key and ranks where plans
/// contradict each other: a key that is a tensor here and a value there, sizes, dtypes, boxes or contents that differ,
/// an item twice in one plan. The items that stay have no content digest. `ranks_per_node` is for kSameNode.
void dedup_save_plans(std::vector<SavePlan>& plans, DedupPolicy policy, size_t ranks_per_node = 0);

/// The read items that fill `dest_chunk` (a box of the tensor `fqn`) from the chunks in `stored`, in the order of the
/// stored chunks; parts without elements need none. Throws kCorruptData naming the key and a coordinate if the stored
/// chunks do not cover the box exactly once.
std::vector<ReadItem> create_read_items_for_chunk(const std::string& fqn, const TensorStorageMetadata& stored,
                                                  const Box& dest_chunk);

/// Throws kInvalidArgument naming the key, the ranks and a coordinate if a tensor of `metadata` is not tiled exactly by
/// its chunks. `plans` (one a rank) is where the chunks came from.
void validate_global_plan(const Metadata& metadata, const std::vector<SavePlan>& plans);

}  // namespace reshard
