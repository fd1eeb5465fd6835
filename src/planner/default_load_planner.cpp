// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "reshard/planner/default_planner.h"

namespace reshard {
namespace {

constexpr size_t kNamesInMessage = 5;

// Whether two boxes inside one tensor have an element in common.
bool overlap(const Box& a, const Box& b) {
  const int64_t* a_offsets = a.offsets.data();
  const int64_t* b_offsets = b.offsets.data();
  for (size_t i = 0; i < a.offsets.size(); ++i) {
    if (std::max(a_offsets[i], b_offsets[i]) >= std::min(a_offsets[i] + a.sizes[i], b_offsets[i] + b.sizes[i])) {
      return false;
    }
  }
  return true;
}

// Finds the stored chunks that overlap a box. Few questions are answered by looking at every chunk; from kScansPaid
// questions on, sorting the chunks along one dimension is cheaper.
class ChunkIndex {
 public:
  ChunkIndex(const std::vector<Box>& chunks, size_t questions) : chunks_(chunks) {
    constexpr size_t kScansPaid = 8;
    if (questions < kScansPaid || chunks.size() < kScansPaid || chunks[0].offsets.empty()) return;
    // The dimension with the most distinct starts tells chunks apart best.
    size_t most = 0;
    std::vector<int64_t> starts(chunks.size());
    for (size_t dim = 0; dim < chunks[0].offsets.size(); ++dim) {
      for (size_t i = 0; i < chunks.size(); ++i) starts[i] = chunks[i].offsets[dim];
      std::sort(starts.begin(), starts.end());
      const auto distinct = static_cast<size_t>(std::unique(starts.begin(), starts.end()) - starts.begin());
      if (distinct > most) {
        most = distinct;
        dim_ = dim;
      }
    }
    sorted_.resize(chunks.size());
    for (size_t i = 0; i < chunks.size(); ++i) sorted_[i] = {start(i), 0, i};
    std::ranges::sort(sorted_, {}, &Entry::start);
    int64_t reach = 0;
    for (Entry& entry : sorted_) {
      reach = std::max(reach, entry.start + chunks[entry.chunk].sizes[dim_]);
      entry.reach = reach;
    }
  }

  /// In ascending order.
  std::vector<size_t> overlapping(const Box& box) const {
    std::vector<size_t> found;
    if (sorted_.empty()) {
      for (size_t i = 0; i < chunks_.size(); ++i) {
        if (overlap(chunks_[i], box)) found.push_back(i);
      }
      return found;
    }
    const int64_t begin = box.offsets[dim_];
    const int64_t end = begin + box.sizes[dim_];
    auto it = std::ranges::lower_bound(sorted_, end, {}, &Entry::start);
    while (it != sorted_.begin() && (--it)->reach > begin) {
      if (overlap(chunks_[it->chunk], box)) found.push_back(it->chunk);
    }
    std::sort(found.begin(), found.end());
    return found;
  }

 private:
  struct Entry {
    int64_t start;
    int64_t reach;  // largest end of this entry and all before it
    size_t chunk;
  };
  int64_t start(size_t chunk) const { return chunks_[chunk].offsets[dim_]; }

  const std::vector<Box>& chunks_;
  size_t dim_ = 0;
  std::vector<Entry> sorted_;
};

// The regions of the items, in the destination chunk's coordinates, must tile it.
void check_covered(const std::string& fqn, const Box& dest_chunk, std::span<const ReadItem> items) {
  if (items.size() == 1 && items[0].lengths == dest_chunk.sizes) return;
  std::vector<Box> regions;
  regions.reserve(items.size());
  for (const ReadItem& item : items) regions.push_back({item.dest_offsets, item.lengths});
  const auto error = check_exact_tiling(dest_chunk.sizes, regions);
  if (!error) return;
  Dims at = error->at;
  for (size_t i = 0; i < at.size(); ++i) at[i] += dest_chunk.offsets[i];
  throw Error(
      ErrorCode::kCorruptData,
      error->kind == TilingError::Kind::kHole
          ? "the wanted part of a tensor is not covered by the stored chunks: nothing is stored at " + to_string(at)
          : "stored chunks of a tensor overlap at " + to_string(at),
      {.key = fqn, .wanted = to_string(dest_chunk)});
}

void append_read_items(const std::string& fqn, const std::string& stored_fqn, const TensorStorageMetadata& stored,
                       const ChunkIndex& index, const Box& dest_chunk, int64_t dest_index, std::vector<ReadItem>& out) {
  if (volume(dest_chunk.sizes) == 0) return;
  const size_t rank = stored.size.size();
  const size_t first = out.size();
  for (const size_t s : index.overlapping(dest_chunk)) {
    const Box& chunk = stored.chunks[s];
    ReadItem item;
    item.dest_index = {fqn, dest_chunk.offsets, dest_index};
    item.storage_index = {stored_fqn, chunk.offsets, static_cast<int64_t>(s)};
    item.dest_offsets = Dims(rank, 0);
    item.storage_offsets = Dims(rank, 0);
    item.lengths = Dims(rank, 0);
    for (size_t i = 0; i < rank; ++i) {
      const int64_t begin = std::max(chunk.offsets[i], dest_chunk.offsets[i]);
      item.dest_offsets[i] = begin - dest_chunk.offsets[i];
      item.storage_offsets[i] = begin - chunk.offsets[i];
      item.lengths[i] =
          std::min(chunk.offsets[i] + chunk.sizes[i], dest_chunk.offsets[i] + dest_chunk.sizes[i]) - begin;
    }
    out.push_back(std::move(item));
  }
  check_covered(fqn, dest_chunk, std::span(out).subspan(first));
}

void check_stored_boxes(const std::string& fqn, const TensorStorageMetadata& stored) {
  for (const Box& chunk : stored.chunks) {
    if (is_inside(chunk, stored.size)) continue;
    throw Error(ErrorCode::kCorruptData, "a stored chunk lies outside its tensor",
                {.key = fqn, .wanted = "a box inside " + to_string(stored.size), .found = to_string(chunk)});
  }
}

// Of an item, in the coordinates of the whole tensor.
Box region_of(const ReadItem& item, const Dims& chunk_offsets) {
  Box region{item.dest_offsets, item.lengths};
  for (size_t i = 0; i < chunk_offsets.size(); ++i) region.offsets[i] += chunk_offsets[i];
  return region;
}

std::string first_names(const std::vector<std::string>& names, size_t from) {
  std::string text;
  for (size_t i = from; i < names.size() && i < from + kNamesInMessage; ++i) {
    text += (i == from ? "" : ", ") + names[i];
  }
  if (names.size() > from + kNamesInMessage) text += ", ...";
  return text;
}

}  // namespace

LoadState& DefaultLoadPlanner::state() const {
  if (state_ == nullptr) throw Error(ErrorCode::kFailedPrecondition, "set_up_planner was not called");
  return *state_;
}

void DefaultLoadPlanner::set_up_planner(LoadState& state, const Metadata& metadata, bool /*is_coordinator*/) {
  state_ = &state;
  metadata_ = &metadata;
  rule_ = FlattenRule::kCurrent;
  places_.clear();
  report_ = {};

  std::unordered_set<std::string> wanted;
  for (const StateEntry& entry : state.entries(FlattenRule::kCurrent)) wanted.insert(stored_name(entry.fqn));
  const auto is_unwanted = [&](const std::string& fqn) {
    return metadata.state_dict_metadata.contains(fqn) && !wanted.contains(fqn);
  };
  const auto& stored = metadata.state_dict_metadata;
  if (std::all_of(stored.begin(), stored.end(), [&](const auto& item) { return wanted.contains(item.first); })) return;
  // The older rule may find what the newer one does not.
  for (const StateEntry& entry : state.entries(FlattenRule::kBefore24)) {
    if (!is_unwanted(stored_name(entry.fqn))) continue;
    rule_ = FlattenRule::kBefore24;
    return;
  }
}

LoadPlan DefaultLoadPlanner::create_local_plan() {
  const std::vector<StateEntry>& entries = state().entries(rule_);
  LoadPlan plan;
  plan.items.reserve(entries.size());
  places_.clear();
  places_.reserve(entries.size());
  report_ = {};

  std::unordered_set<std::string_view> names;
  std::unordered_set<std::string> wanted;  // as they are stored; two names may want one thing
  for (size_t e = 0; e < entries.size(); ++e) {
    const StateEntry& entry = entries[e];
    if (!names.insert(entry.fqn).second) {
      throw Error(ErrorCode::kInvalidArgument, "two values of the state dict have the same flattened name",
                  {.key = entry.fqn});
    }
    const std::string stored_fqn = stored_name(entry.fqn);
    wanted.insert(stored_fqn);
    const StorageMetadata* stored = metadata_->state_dict_metadata.find(stored_fqn);
    if (stored == nullptr) {
      report_.missing.push_back(entry.fqn);
      continue;
    }
    const auto* stored_tensor = std::get_if<TensorStorageMetadata>(stored);
    const bool wants_tensor = std::holds_alternative<TensorEntry>(entry.value);
    if (wants_tensor != (stored_tensor != nullptr)) {
      throw Error(ErrorCode::kInvalidArgument, "the checkpoint holds another kind of thing under this key",
                  {.key = entry.fqn,
                   .wanted = wants_tensor ? "a tensor" : "a value that is not a tensor",
                   .found = wants_tensor ? "a value that is not a tensor" : "a tensor"});
    }
    if (wants_tensor) {
      plan_tensor(e, stored_fqn, *stored_tensor, plan);
    } else {
      ReadItem item;
      item.is_bytes = true;
      item.dest_index.fqn = entry.fqn;
      item.storage_index.fqn = stored_fqn;
      places_.try_emplace(item.dest_index, Place{e, 0, {}, DType::kUInt8});
      plan.items.push_back(std::move(item));
    }
  }
  if (!report_.missing.empty() && !options_.allow_partial_load) {
    std::string text = "Missing key in checkpoint state_dict: " + report_.missing[0] + ".";
    if (report_.missing.size() > 1) {
      text +=
          " So are " + std::to_string(report_.missing.size() - 1) + " more: " + first_names(report_.missing, 1) + ".";
    }
    throw Error(ErrorCode::kNotFound, text, {.key = report_.missing[0]});
  }
  for (const auto& [fqn, item] : metadata_->state_dict_metadata) {
    if (!wanted.contains(fqn)) report_.unexpected.push_back(fqn);
  }
  return plan;
}

void DefaultLoadPlanner::plan_tensor(size_t entry_index, const std::string& stored_fqn,
                                     const TensorStorageMetadata& stored, LoadPlan& plan) {
  const StateEntry& entry = state().entries(rule_)[entry_index];
  const auto& tensor = std::get<TensorEntry>(entry.value);
  const std::string& fqn = entry.fqn;
  if (stored.size != tensor.size) {
    const std::string from = to_string(stored.size);
    const std::string to = to_string(tensor.size);
    if (!options_.allow_shape_mismatch) {
      throw Error(ErrorCode::kInvalidArgument,
                  "Size mismatch between saved " + from + " and current: " + to + " for " + fqn, {.key = fqn});
    }
    report_.shape.push_back(fqn + ": " + from + " -> " + to);
    return;
  }
  if (stored.properties.dtype != tensor.properties.dtype) {
    const std::string from(to_string(stored.properties.dtype));
    const std::string to(to_string(tensor.properties.dtype));
    if (!options_.allow_cast) {
      throw Error(
          ErrorCode::kInvalidArgument,
          "dtype mismatch between saved " + from + " and current: " + to + " for " + fqn + " (allow_cast converts)",
          {.key = fqn});
    }
    report_.cast.push_back(fqn + ": " + from + " -> " + to);
  }
  check_stored_boxes(stored_fqn, stored);
  const ChunkIndex index(stored.chunks, tensor.chunks.size());
  for (size_t c = 0; c < tensor.chunks.size(); ++c) {
    const Box& chunk = tensor.chunks[c];
    if (!is_inside(chunk, tensor.size)) {
      throw Error(ErrorCode::kInvalidArgument, "chunk lies outside its tensor",
                  {.key = fqn, .wanted = "a box inside " + to_string(tensor.size), .found = to_string(chunk)});
    }
    if (volume(chunk.sizes) == 0) continue;
    if (!places_.try_emplace({fqn, chunk.offsets, {}}, Place{entry_index, c, chunk.offsets, stored.properties.dtype})
             .second) {
      throw Error(ErrorCode::kInvalidArgument, "two chunks of a tensor start at the same offsets",
                  {.key = fqn, .found = to_string(chunk)});
    }
    append_read_items(fqn, stored_fqn, stored, index, chunk, static_cast<int64_t>(c), plan.items);
  }
}

const DefaultLoadPlanner::Place& DefaultLoadPlanner::place(const MetadataIndex& index) const {
  const auto it = places_.find(index);
  if (it == places_.end()) {
    throw Error(ErrorCode::kInternal, "asked for an item that this rank did not plan", {.key = to_string(index)});
  }
  return it->second;
}

MutableTensorView DefaultLoadPlanner::resolve_tensor(const ReadItem& item) {
  const Place& where = place(item.dest_index);
  return state().tensor(rule_, where.entry, where.chunk, region_of(item, where.offsets), where.dtype);
}

void DefaultLoadPlanner::commit_tensor(const ReadItem& item, const MutableTensorView& view) {
  const Place& where = place(item.dest_index);
  const Box region = region_of(item, where.offsets);
  if (options_.transform) options_.transform(item.dest_index.fqn.str(), region, view);
  state().commit_tensor(rule_, where.entry, where.chunk, region, view);
}

void DefaultLoadPlanner::load_bytes(const ReadItem& item, ByteSpan archive) {
  state().load_bytes(rule_, place(item.dest_index).entry, archive);
}

std::vector<ReadItem> create_read_items_for_chunk(const std::string& fqn, const TensorStorageMetadata& stored,
                                                  const Box& dest_chunk) {
  check_stored_boxes(fqn, stored);
  if (!is_inside(dest_chunk, stored.size)) {
    throw Error(ErrorCode::kInvalidArgument, "chunk lies outside its tensor",
                {.key = fqn, .wanted = "a box inside " + to_string(stored.size), .found = to_string(dest_chunk)});
  }
  std::vector<ReadItem> items;
  append_read_items(fqn, fqn, stored, ChunkIndex(stored.chunks, 1), dest_chunk, 0, items);
  return items;
}

}  // namespace reshard
