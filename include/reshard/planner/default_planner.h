// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The planners that save and load use unless told otherwise. Same rules as PyTorch's, with three promises added: a saved tensor is whole
// (its chunks tile it exactly, or the save fails naming the hole or overlap and the ranks), what is loaded is whole, and a dtype is never cast silently.

#include <memory>
#include <unordered_map>

#include "reshard/planner/planner.h"

namespace reshard {

struct DefaultSavePlannerOptions {
  /// Replicated items go to the lowest rank that has them instead of the one with the least to write.
  bool dedup_save_to_lowest_rank = false;
};

class DefaultSavePlanner final : public SavePlanner {
 public:
  explicit DefaultSavePlanner(DefaultSavePlannerOptions options = {}) : options_(options) {}
  void set_up_planner(const SaveState& state, bool is_coordinator) override;
  SavePlan create_local_plan() override;
  GlobalSavePlan create_global_plan(std::vector<SavePlan> local_plans) override;
  SavePlan finish_plan(SavePlan plan) override;
  TensorView resolve_tensor(const WriteItem& item) const override;
  ByteSpan resolve_bytes(const WriteItem& item) const override;

 private:
  DefaultSavePlannerOptions options_;
  const SaveState* state_ = nullptr;
  std::unordered_map<MetadataIndex, std::pair<size_t, size_t>, MetadataIndexHash> places_;  // item -> (entry, chunk)
};

struct DefaultLoadPlannerOptions {
  /// Wanted keys that the checkpoint lacks are left as they are (and reported) instead of being an error.
  bool allow_partial_load = false;
  /// A stored dtype that differs from the wanted one is converted (and reported) instead of being an error. PyTorch casts silently.
  bool allow_cast = false;
};

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
  DefaultLoadPlannerOptions options_;
  LoadState* state_ = nullptr;
  const Metadata* metadata_ = nullptr;
  FlattenRule rule_ = FlattenRule::kCurrent;
  std::unordered_map<MetadataIndex, std::pair<size_t, size_t>, MetadataIndexHash> places_;
  LoadReport report_;
};

enum class DedupPolicy : uint8_t { kBalanced, kLowestRank };

/// Keeps each item that several plans hold (equal fqn and offsets) on one rank: the least loaded so far, ties to the lowest; walking rank 0's plan
/// first. Order inside a plan is kept.
void dedup_save_plans(std::vector<SavePlan>& plans, DedupPolicy policy);

/// The read items that fill `dest_chunk` (box of the tensor `fqn`) from the stored chunks of `stored`, in the order of the stored chunks.
std::vector<ReadItem> create_read_items_for_chunk(const std::string& fqn, const TensorStorageMetadata& stored, const Box& dest_chunk);

/// Throws kInvalidArgument naming the key, the ranks and the coordinates if a tensor of `metadata` is not tiled exactly by its chunks. `ranks_of` (optional) tells
/// which rank supplied a chunk.
void validate_global_plan(const Metadata& metadata, const std::vector<SavePlan>& plans);

}  // namespace reshard
