// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "format/utf8.h"
#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"
#include "reshard/format/sha256.h"
#include "reshard/planner/default_planner.h"

namespace reshard {
namespace {

// What an item costs besides its payload, roughly: the archive around it.
constexpr uint64_t kItemOverheadBytes = 1024;
constexpr uint32_t kNone = ~uint32_t{0};
// Contents are compared as the SHA-256 of the CRC-32s of blocks of this size: at the speed of the CRC.
constexpr uint64_t kDigestBlockBytes = 64 << 10;

bool is_bytes(const WriteItem& item) { return item.type == WriteItemType::kByteIo; }

uint64_t cost_of(const WriteItem& item) {
  if (is_bytes(item)) return item.length + kItemOverheadBytes;
  const auto elements = static_cast<uint64_t>(volume(item.chunk.sizes));
  return elements * static_cast<uint64_t>(element_size(item.properties.dtype)) + kItemOverheadBytes;
}

std::string ranks_text(size_t a, size_t b) { return "ranks " + std::to_string(a) + " and " + std::to_string(b); }

std::string described(size_t rank, std::string_view value) {
  return "rank " + std::to_string(rank) + ": " + std::string(value);
}

[[noreturn]] void disagree(const std::string& what, const std::string& fqn, size_t rank_a, const std::string& a,
                           size_t rank_b, const std::string& b) {
  throw Error(ErrorCode::kInvalidArgument, ranks_text(rank_a, rank_b) + " " + what,
              {.key = fqn, .found = described(rank_a, a) + ", " + described(rank_b, b)});
}

class ContentSummer {
 public:
  void add(ByteSpan data) {
    for (size_t begin = 0; begin < data.size(); begin += kDigestBlockBytes) {
      const uint32_t sum = crc32(data.subspan(begin, std::min<size_t>(kDigestBlockBytes, data.size() - begin)));
      digest_.update(std::as_bytes(std::span(&sum, 1)));
    }
  }
  ContentDigest finish() {
    const Sha256Digest whole = digest_.finish();
    ContentDigest result;
    std::copy_n(whole.begin(), result.size(), result.begin());
    return result;
  }

 private:
  Sha256 digest_;
};

ContentDigest digest_of(const TensorView& view) {
  ContentSummer summer;
  if (is_contiguous(view.sizes, view.strides)) {
    summer.add({view.data, static_cast<size_t>(volume(view.sizes) * element_size(view.dtype))});
  } else {
    for_each_dense_block(view, kDigestBlockBytes, [&](const Bytes& block) { summer.add(block); });
  }
  return summer.finish();
}

void check_item(const WriteItem& item, size_t rank) {
  if (is_bytes(item)) {
    if (!item.index.offset) return;
    throw Error(ErrorCode::kInvalidArgument, "write item of a value has offsets",
                {.rank = static_cast<int>(rank), .key = item.index.fqn});
  }
  if (!is_inside(item.chunk, item.size)) {
    throw Error(ErrorCode::kInvalidArgument, "chunk lies outside its tensor",
                {.rank = static_cast<int>(rank),
                 .key = item.index.fqn,
                 .wanted = "a box inside " + to_string(item.size),
                 .found = to_string(item.chunk)});
  }
  if (item.index.offset != item.chunk.offsets) {
    throw Error(ErrorCode::kInvalidArgument, "write item is not named after its chunk",
                {.rank = static_cast<int>(rank),
                 .key = item.index.fqn,
                 .wanted = to_string(item.chunk.offsets),
                 .found = item.index.offset ? to_string(*item.index.offset) : "no offsets"});
  }
}

void check_tie(const SavePlan& plan, size_t i, size_t rank) {
  const WriteItem& item = plan.items[i];
  if (!item.tied_to) return;
  if (*item.tied_to < i) {
    const WriteItem& first = plan.items[*item.tied_to];
    if (!first.tied_to && first.type == item.type && first.chunk == item.chunk &&
        first.properties.dtype == item.properties.dtype) {
      return;
    }
  }
  throw Error(ErrorCode::kInvalidArgument, "write item is tied to something else than an equal, earlier one",
              {.rank = static_cast<int>(rank), .key = to_string(item.index), .found = std::to_string(*item.tied_to)});
}

// Items of one key, proposed by two ranks, must speak of the same thing.
void check_same_key(const WriteItem& a, size_t rank_a, const WriteItem& b, size_t rank_b) {
  const std::string& fqn = a.index.fqn;
  if (is_bytes(a) != is_bytes(b)) {
    const auto kind = [](const WriteItem& item) { return is_bytes(item) ? "a value" : "a tensor"; };
    disagree("hold different kinds of things under one key", fqn, rank_a, kind(a), rank_b, kind(b));
  }
  if (is_bytes(a)) return;
  if (!(a.size == b.size)) {
    disagree("disagree on the size of a tensor", fqn, rank_a, to_string(a.size), rank_b, to_string(b.size));
  }
  if (a.properties.dtype != b.properties.dtype) {
    disagree("disagree on the dtype of a tensor", fqn, rank_a, std::string(to_string(a.properties.dtype)), rank_b,
             std::string(to_string(b.properties.dtype)));
  }
}

// All items of all plans, grouped by what they are: each group is one item and the ranks that hold a copy of it. Flat
// arrays and one open-addressing table, because a large job has millions of items.
class ItemGroups {
 public:
  struct Copy {
    uint32_t rank;
    uint32_t item;          // in the rank's plan
    uint32_t next = kNone;  // copy of the same item, on a higher rank
  };
  struct Group {
    uint32_t key;
    uint32_t first;
    uint32_t last;
  };

  explicit ItemGroups(const std::vector<SavePlan>& plans) : plans_(plans) {
    size_t n = 0;
    for (const SavePlan& plan : plans) n += plan.items.size();
    if (n >= kNone) throw Error(ErrorCode::kUnsupported, "more than 2^32 - 2 write items in one save");
    copies_.reserve(n);
    table_.assign(std::bit_ceil(2 * n + 1), kNone);
    first_copy_.reserve(plans.size());
    for (uint32_t rank = 0; rank < plans.size(); ++rank) {
      first_copy_.push_back(copies_.size());
      add(rank);
    }
  }

  const std::vector<Copy>& copies() const { return copies_; }
  const std::vector<Group>& groups() const { return groups_; }
  const WriteItem& item(const Copy& copy) const { return plans_[copy.rank].items[copy.item]; }
  size_t copy_of(uint32_t rank, size_t item) const { return first_copy_[rank] + item; }

 private:
  struct Key {
    uint32_t rank;
    const WriteItem* item;  // the first of the key
  };

  uint32_t key_of(const WriteItem& item, uint32_t rank) {
    const auto known = static_cast<uint32_t>(keys_.size());
    uint32_t& id = key_ids_[item.index.fqn];
    if (key_ids_.size() != known) {
      id = known;
      keys_.push_back({rank, &item});
    }
    check_same_key(*keys_[id].item, keys_[id].rank, item, rank);
    return id;
  }

  // The slots of a plan's items are far from each other: all are asked for before the first is used.
  void add(uint32_t rank) {
    const SavePlan& plan = plans_[rank];
    looked_up_.clear();
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const WriteItem& added = plan.items[i];
      check_item(added, rank);
      check_tie(plan, i, rank);
      const uint32_t key = key_of(added, rank);
      const size_t slot =
          (DimsHash{}(added.chunk.offsets) ^ (key * 0x9E3779B97F4A7C15ull)) * 0xFF51AFD7ED558CCDull >> 20;
      looked_up_.push_back({key, slot});
      __builtin_prefetch(&table_[slot & (table_.size() - 1)], 1);
    }
    for (uint32_t i = 0; i < plan.items.size(); ++i) add(rank, i, looked_up_[i].key, looked_up_[i].slot);
  }

  void add(uint32_t rank, uint32_t item_index, uint32_t key, size_t slot) {
    const WriteItem& added = plans_[rank].items[item_index];
    const auto copy = static_cast<uint32_t>(copies_.size());
    copies_.push_back({rank, item_index});
    const size_t mask = table_.size() - 1;
    for (;; ++slot) {
      uint32_t& id = table_[slot & mask];
      if (id == kNone) {
        id = static_cast<uint32_t>(groups_.size());
        groups_.push_back({key, copy, copy});
        return;
      }
      Group& group = groups_[id];
      const Copy& last = copies_[group.last];
      if (group.key != key || !(item(last).chunk.offsets == added.chunk.offsets)) continue;
      if (last.rank == rank) {
        throw Error(ErrorCode::kInvalidArgument, "an item is twice in the plan of one rank",
                    {.rank = static_cast<int>(rank), .key = to_string(added.index)});
      }
      if (!(item(last).chunk == added.chunk)) {
        disagree("hold overlapping chunks of a tensor", added.index.fqn, last.rank, to_string(item(last).chunk), rank,
                 to_string(added.chunk));
      }
      if (item(last).content != added.content) {
        throw Error(
            ErrorCode::kInvalidArgument,
            ranks_text(last.rank, rank) + " hold different contents under one key, and only one can be saved",
            {.key = to_string(added.index),
             .wanted = "equal contents, or a name for each rank (rank_local), or a sharded tensor, whose replicas "
                       "are trusted"});
      }
      copies_[group.last].next = copy;
      group.last = copy;
      return;
    }
  }

  const std::vector<SavePlan>& plans_;
  std::vector<Copy> copies_;        // in walking order: rank by rank, item by item
  std::vector<size_t> first_copy_;  // of each rank
  std::vector<Group> groups_;
  std::vector<uint32_t> table_;  // of groups
  struct LookedUp {
    uint32_t key;
    size_t slot;  // where its search begins
  };
  std::vector<LookedUp> looked_up_;  // the items of the plan that is being added
  std::vector<Key> keys_;
  OrderedMap<SharedString, uint32_t> key_ids_;
};

// For each key whose items the ranks of several nodes hold, all of them each: the one of these nodes with the least to write. The largest keys
// choose first.
std::unordered_map<uint32_t, uint32_t> choose_nodes(const ItemGroups& groups, const std::vector<uint64_t>& load,
                                                    size_t ranks_per_node) {
  const auto& copies = groups.copies();
  struct Key {
    uint64_t cost = 0;
    std::vector<uint32_t> firsts;
  };
  std::map<uint32_t, Key> keys;
  for (const auto& group : groups.groups()) {
    Key& key = keys[group.key];
    if (copies[group.first].next != kNone)
      key.cost += cost_of(groups.item(copies[group.first]));  // `load` has the others
    key.firsts.push_back(group.first);
  }
  std::vector<std::pair<uint32_t, const Key*>> by_cost;
  for (const auto& [id, key] : keys) {
    if (key.cost > 0) by_cost.emplace_back(id, &key);
  }
  std::ranges::stable_sort(by_cost, std::greater(), [](const auto& entry) { return entry.second->cost; });
  std::vector<uint64_t> node_load((load.size() + ranks_per_node - 1) / ranks_per_node);
  for (size_t rank = 0; rank < load.size(); ++rank) node_load[rank / ranks_per_node] += load[rank];
  std::unordered_map<uint32_t, uint32_t> chosen;
  for (const auto& [id, key] : by_cost) {
    std::map<uint32_t, size_t> items_of_node;
    for (const uint32_t first : key->firsts) {
      std::optional<uint32_t> last;  // copies come in the order of their ranks
      for (uint32_t copy = first; copy != kNone; copy = copies[copy].next) {
        const auto node = static_cast<uint32_t>(copies[copy].rank / ranks_per_node);
        if (last != node) ++items_of_node[node];
        last = node;
      }
    }
    std::optional<uint32_t> best;
    for (const auto& [node, items] : items_of_node) {
      if (items == key->firsts.size() && (!best || node_load[node] < node_load[*best])) best = node;
    }
    if (!best) continue;
    chosen[id] = *best;
    node_load[*best] += key->cost;
  }
  return chosen;
}

// Which copies stay.
std::vector<bool> choose_copies(const ItemGroups& groups, size_t world_size, DedupPolicy policy,
                                size_t ranks_per_node) {
  const auto& copies = groups.copies();
  std::vector<bool> kept(copies.size());
  std::vector<uint64_t> load(world_size);
  struct Replicated {
    uint64_t cost;
    uint32_t first;
    uint32_t key;
  };
  std::vector<Replicated> replicated;
  for (const auto& group : groups.groups()) {
    const auto& first = copies[group.first];
    const bool alone = first.next == kNone;
    const bool tied = groups.item(first).tied_to.has_value();
    if (alone || policy == DedupPolicy::kLowestRank) kept[group.first] = true;
    if (alone && !tied) load[first.rank] += cost_of(groups.item(first));
    if (!alone && !tied && policy != DedupPolicy::kLowestRank) {
      replicated.push_back({cost_of(groups.item(first)), group.first, group.key});
    }
  }
  std::unordered_map<uint32_t, uint32_t> nodes;
  if (policy == DedupPolicy::kSameNode) nodes = choose_nodes(groups, load, ranks_per_node);
  std::stable_sort(replicated.begin(), replicated.end(), [](auto& a, auto& b) { return a.cost > b.cost; });
  for (const auto& [cost, first, key] : replicated) {
    uint32_t best = kNone;
    const auto node = nodes.find(key);
    for (uint32_t copy = first; copy != kNone; copy = copies[copy].next) {
      if (node != nodes.end() && copies[copy].rank / ranks_per_node != node->second) continue;
      if (best == kNone || load[copies[copy].rank] < load[copies[best].rank]) best = copy;
    }
    kept[best] = true;
    load[copies[best].rank] += cost;
  }
  // A tied item stays with what it is tied to, where it costs nothing.
  for (const auto& group : groups.groups()) {
    if (kept[group.first] || !groups.item(copies[group.first]).tied_to) continue;
    uint32_t best = kNone;
    for (uint32_t copy = group.first; copy != kNone && best == kNone; copy = copies[copy].next) {
      const auto tied_to = groups.item(copies[copy]).tied_to;
      if (tied_to && kept[groups.copy_of(copies[copy].rank, *tied_to)]) best = copy;
    }
    kept[best == kNone ? group.first : best] = true;
  }
  return kept;
}

Metadata build_metadata(std::vector<SavePlan>& plans) {
  struct Key {
    const WriteItem* first;
    size_t items = 0;
  };
  OrderedMap<SharedString, Key> keys;
  for (const SavePlan& plan : plans) {
    for (const WriteItem& item : plan.items) {
      Key& key = keys[item.index.fqn];
      if (key.items++ == 0) key.first = &item;
    }
  }
  Metadata metadata;
  metadata.version = kMetadataVersion;
  auto& entries = metadata.state_dict_metadata;
  entries.reserve(keys.size());
  for (const auto& [fqn, key] : keys) {
    if (is_bytes(*key.first)) {
      entries.insert(fqn, BytesStorageMetadata{});
    } else {
      TensorStorageMetadata tensor{key.first->properties, key.first->size, {}};
      tensor.chunks.reserve(key.items);
      entries.insert(fqn, std::move(tensor));
    }
  }
  auto& paths = metadata.planner_data.emplace();
  const SharedPaths* merged = nullptr;
  for (SavePlan& plan : plans) {
    for (WriteItem& item : plan.items) {
      auto& entry = entries.begin()[static_cast<ptrdiff_t>(*keys.position(item.index.fqn))].second;
      if (auto* tensor = std::get_if<TensorStorageMetadata>(&entry)) {
        item.index.index = static_cast<int64_t>(tensor->chunks.size());
        tensor->chunks.push_back(item.chunk);
      }
    }
    if (merged != nullptr && merged->is_same(plan.planner_data)) continue;
    merged = &plan.planner_data;
    for (const auto& [fqn, path] : *plan.planner_data) {
      if (!paths.contains(fqn)) paths.insert(fqn, path);
    }
  }
  return metadata;
}

// For messages, so a plain search will do.
std::string rank_of(const std::vector<SavePlan>& plans, const std::string& fqn, const Box& chunk) {
  for (size_t rank = 0; rank < plans.size(); ++rank) {
    for (const WriteItem& item : plans[rank].items) {
      if (item.chunk == chunk && item.index.fqn == fqn) return "rank " + std::to_string(rank);
    }
  }
  return "no rank";
}

}  // namespace

const SaveState& DefaultSavePlanner::state() const {
  if (state_ == nullptr) throw Error(ErrorCode::kFailedPrecondition, "set_up_planner was not called");
  return *state_;
}

void DefaultSavePlanner::set_up_planner(const SaveState& state, bool /*is_coordinator*/) {
  state_ = &state;
  places_.clear();
}

SavePlan DefaultSavePlanner::create_local_plan() {
  const std::vector<StateEntry>& entries = state().entries();
  SavePlan plan;
  plan.items.reserve(entries.size());
  SharedPaths::Map paths;
  paths.reserve(entries.size());
  places_.clear();
  places_.reserve(entries.size());
  std::vector<size_t> first_items(entries.size());

  const auto add = [&](WriteItem item, Place where) {
    if (!places_.insert(item.index, where)) {
      const auto* tensor = std::get_if<TensorEntry>(&entries[where.entry].value);
      throw Error(ErrorCode::kInvalidArgument, "two chunks of a tensor start at the same offsets",
                  {.key = item.index.fqn,
                   .found = to_string(tensor->chunks[place(item.index).chunk]) + " and " + to_string(item.chunk)});
    }
    plan.items.push_back(std::move(item));
  };

  for (size_t e = 0; e < entries.size(); ++e) {
    const auto& [name, path, value] = entries[e];
    const SharedString fqn(name);
    first_items[e] = plan.items.size();
    if (!is_utf8(fqn)) throw Error(ErrorCode::kInvalidArgument, "the name of a value is no UTF-8", {.key = fqn});
    if (!paths.insert(fqn, path)) {
      throw Error(ErrorCode::kInvalidArgument, "two values of the state dict have the same flattened name",
                  {.key = fqn});
    }
    if (const auto* bytes = std::get_if<BytesEntry>(&value)) {
      WriteItem item;
      item.index.fqn = fqn;
      item.type = WriteItemType::kByteIo;
      item.length = bytes->length;
      add(std::move(item), {e, 0});
      continue;
    }
    const auto& tensor = std::get<TensorEntry>(value);
    const auto add_chunk = [&](const Box& chunk, size_t c) {
      WriteItem item;
      item.index = {fqn, chunk.offsets, {}};
      item.type = tensor.sharded ? WriteItemType::kShard : WriteItemType::kTensor;
      item.chunk = chunk;
      item.size = tensor.size;
      item.properties = tensor.properties;
      if (tensor.tied_to) item.tied_to = first_items[*tensor.tied_to] + (plan.items.size() - first_items[e]);
      add(std::move(item), {e, c});
    };
    for (const Box& chunk : tensor.chunks) {
      if (is_inside(chunk, tensor.size)) continue;
      throw Error(ErrorCode::kInvalidArgument, "chunk lies outside its tensor",
                  {.key = fqn, .wanted = "a box inside " + to_string(tensor.size), .found = to_string(chunk)});
    }
    if (!tensor.sharded && (tensor.chunks.size() != 1 || !(tensor.chunks[0] == whole_box(tensor.size)))) {
      throw Error(ErrorCode::kInvalidArgument, "a tensor that is not sharded must be held whole",
                  {.key = fqn,
                   .wanted = to_string(whole_box(tensor.size)),
                   .found = tensor.chunks.size() == 1 ? to_string(tensor.chunks[0])
                                                      : std::to_string(tensor.chunks.size()) + " chunks"});
    }
    const int64_t payload = with_error_context(
        [&] { return ErrorContext{.key = fqn}; },
        [&] {
          return checked_mul(volume(tensor.size), element_size(tensor.properties.dtype), "number of bytes of a tensor");
        });
    if (payload == 0) {
      add_chunk(whole_box(tensor.size), 0);
      continue;
    }
    for (size_t c = 0; c < tensor.chunks.size(); ++c) {
      if (volume(tensor.chunks[c].sizes) != 0) add_chunk(tensor.chunks[c], c);
    }
  }
  plan.planner_data = SharedPaths(std::move(paths));
  return plan;
}

void DefaultSavePlanner::add_content_digests(SavePlan& plan) const {
  for (WriteItem& item : plan.items) {
    if (item.tied_to) {
      item.content = plan.items[*item.tied_to].content;
    } else if (item.type == WriteItemType::kByteIo) {
      ContentSummer summer;
      summer.add(resolve_bytes(item));
      item.content = summer.finish();
    } else if (item.type == WriteItemType::kTensor || options_.verify_replicas) {
      item.content = digest_of(resolve_tensor(item));
    }
  }
}

GlobalSavePlan DefaultSavePlanner::create_global_plan(std::vector<SavePlan> local_plans) {
  if (options_.dedup_save_to_lowest_rank && options_.dedup_ranks_per_node > 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "DefaultSavePlannerOptions has two ways of dedup: dedup_save_to_lowest_rank and dedup_ranks_per_node");
  }
  dedup_save_plans(local_plans,
                   options_.dedup_save_to_lowest_rank  ? DedupPolicy::kLowestRank
                   : options_.dedup_ranks_per_node > 0 ? DedupPolicy::kSameNode
                                                       : DedupPolicy::kBalanced,
                   options_.dedup_ranks_per_node);
  GlobalSavePlan global;
  global.metadata = build_metadata(local_plans);
  for (const auto& [fqn, path] : *global.metadata.planner_data) {
    if (global.metadata.state_dict_metadata.find(fqn) == nullptr)
      throw Error(ErrorCode::kInvalidArgument, "no rank supplies any part of a tensor", {.key = fqn});
  }
  validate_global_plan(global.metadata, local_plans);
  global.plans = std::move(local_plans);
  return global;
}

SavePlan DefaultSavePlanner::finish_plan(SavePlan plan) {
  for (const WriteItem& item : plan.items) place(item.index);
  return plan;
}

const DefaultSavePlanner::Place& DefaultSavePlanner::place(const MetadataIndex& index) const {
  const Place* found = places_.find(index);
  if (found == nullptr) {
    throw Error(ErrorCode::kInternal, "asked for an item that this rank did not propose", {.key = to_string(index)});
  }
  return *found;
}

TensorView DefaultSavePlanner::resolve_tensor(const WriteItem& item) const {
  const auto [entry, chunk] = place(item.index);
  if (volume(item.chunk.sizes) == 0) {
    return {.data = nullptr,
            .dtype = item.properties.dtype,
            .sizes = item.chunk.sizes,
            .strides = contiguous_strides(item.chunk.sizes),
            .owner = nullptr};
  }
  TensorView view = state().tensor(entry, chunk);
  if (!(view.sizes == item.chunk.sizes) || view.dtype != item.properties.dtype) {
    throw Error(ErrorCode::kFailedPrecondition, "a tensor changed after the save was planned",
                {.key = to_string(item.index),
                 .wanted = std::string(to_string(item.properties.dtype)) + " " + to_string(item.chunk.sizes),
                 .found = std::string(to_string(view.dtype)) + " " + to_string(view.sizes)});
  }
  return view;
}

ByteSpan DefaultSavePlanner::resolve_bytes(const WriteItem& item) const {
  const ByteSpan bytes = state().bytes(place(item.index).entry);
  if (bytes.size() != item.length) {
    throw Error(ErrorCode::kFailedPrecondition, "a value changed after the save was planned",
                {.key = item.index.fqn,
                 .wanted = std::to_string(item.length) + " bytes",
                 .found = std::to_string(bytes.size()) + " bytes"});
  }
  return bytes;
}

void dedup_save_plans(std::vector<SavePlan>& plans, DedupPolicy policy, size_t ranks_per_node) {
  if (policy == DedupPolicy::kSameNode && ranks_per_node == 0)
    throw Error(ErrorCode::kInvalidArgument, "DedupPolicy::kSameNode needs the number of ranks of a node");
  std::vector<bool> kept;
  {
    const ItemGroups groups(plans);
    kept = groups.groups().size() == groups.copies().size()
               ? std::vector<bool>(groups.copies().size(), true)
               : choose_copies(groups, plans.size(), policy, ranks_per_node);
  }
  size_t copy = 0;
  for (SavePlan& plan : plans) {
    size_t n = 0;
    std::vector<std::optional<size_t>> moved_to(plan.items.size());
    for (size_t i = 0; i < plan.items.size(); ++i, ++copy) {
      if (!kept[copy]) continue;
      if (n != i) plan.items[n] = std::move(plan.items[i]);
      WriteItem& item = plan.items[n];
      item.content.reset();
      if (item.tied_to) item.tied_to = moved_to[*item.tied_to];
      moved_to[i] = n++;
    }
    plan.items.resize(n);
  }
}

void validate_global_plan(const Metadata& metadata, const std::vector<SavePlan>& plans) {
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) continue;
    const auto error = with_error_context([&, &fqn = fqn] { return ErrorContext{.key = fqn}; },
                                          [&] { return check_exact_tiling(tensor->size, tensor->chunks); });
    if (!error) continue;
    const auto chunk = [&, &fqn = fqn](size_t i) {
      return to_string(tensor->chunks[i]) + " of " + rank_of(plans, fqn, tensor->chunks[i]);
    };
    ErrorContext context{.key = fqn};
    std::string what;
    switch (error->kind) {
      case TilingError::Kind::kOutOfBounds:
        what = "chunk lies outside its tensor";
        context.wanted = "a box inside " + to_string(tensor->size);
        context.found = chunk(error->first);
        break;
      case TilingError::Kind::kOverlap:
        what = "chunks of a tensor overlap at " + to_string(error->at);
        context.found = chunk(error->first) + " and " + chunk(error->second);
        break;
      case TilingError::Kind::kHole:
        what = "no rank supplies the part of a tensor at " + to_string(error->at);
        context.wanted = "all of " + to_string(tensor->size);
        context.found =
            std::to_string(tensor->chunks.size()) + " chunks from " + std::to_string(plans.size()) + " ranks";
        break;
    }
    throw Error(ErrorCode::kInvalidArgument, what, context);
  }
}

}  // namespace reshard
