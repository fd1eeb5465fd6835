// SPDX-License-Identifier: BSD-3-Clause
#include "protocol/save_plan_cache.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>

namespace reshard {

SavePlanCache::SavePlanCache() = default;
SavePlanCache::~SavePlanCache() = default;
SavePlanCache::SavePlanCache(SavePlanCache&&) noexcept = default;
SavePlanCache& SavePlanCache::operator=(SavePlanCache&&) noexcept = default;
void SavePlanCache::clear() { kept_.reset(); }

std::vector<std::vector<SharedSet>> find_shared_sets(const std::vector<SavePlan>& plans) {
  // A set of ranks is told by their number and a hash of them. Should two sets ever be taken for one, contents seem to
  // differ, and the save plans in full.
  struct Holders {
    uint64_t count = 0;
    uint64_t hash = 0;
  };
  OrderedMap<MetadataIndex, Holders, MetadataIndexHash> holders;
  for (uint64_t rank = 0; rank < plans.size(); ++rank) {
    for (const WriteItem& item : plans[rank].items) {
      if (!item.content) continue;
      Holders& of_item = holders[item.index];
      ++of_item.count;
      of_item.hash = (of_item.hash ^ (rank + 1)) * 0xFF51AFD7ED558CCDull;
      of_item.hash ^= of_item.hash >> 32;
    }
  }
  std::map<std::pair<uint64_t, uint64_t>, uint32_t> ids;
  std::vector<std::vector<SharedSet>> shared(plans.size());
  for (size_t rank = 0; rank < plans.size(); ++rank) {
    auto& sets = shared[rank];
    std::unordered_map<uint32_t, size_t> positions;  // in sets
    for (size_t i = 0; i < plans[rank].items.size(); ++i) {
      const WriteItem& item = plans[rank].items[i];
      if (!item.content) continue;
      const Holders& of_item = *holders.find(item.index);
      if (of_item.count == 1) continue;
      const uint32_t id =
          ids.try_emplace({of_item.count, of_item.hash}, static_cast<uint32_t>(ids.size())).first->second;
      const auto [at, is_new] = positions.try_emplace(id, sets.size());
      if (is_new) sets.push_back({id, {}});
      sets[at->second].items.push_back(i);
    }
  }
  return shared;
}

ShortDigest structure_of(ByteSpan without_contents, const SavePlan& local_plan) {
  Bytes has_content;
  has_content.reserve(local_plan.items.size());
  for (const WriteItem& item : local_plan.items)
    has_content.push_back(static_cast<std::byte>(item.content.has_value()));
  return shorten(Sha256().update(without_contents).update(has_content).finish());
}

ShortDigest contents_of(const SharedSet& set, const SavePlan& local_plan) {
  // The order of the items can differ between ranks.
  std::vector<std::pair<std::string, const WriteItem*>> items;
  items.reserve(set.items.size());
  for (const size_t i : set.items) items.emplace_back(to_string(local_plan.items[i].index), &local_plan.items[i]);
  std::sort(items.begin(), items.end());
  ByteWriter out;
  for (const auto& [name, item] : items) {
    out.string(name);
    out.u8(item->content.has_value());
    if (item->content) out.bytes(*item->content);
  }
  return shorten(Sha256::of(out.buffer()));
}

ShortDigest PlanOffer::plan_digest(const std::string& planned_in, const ShortDigest& structure) {
  ByteWriter out;
  out.string(planned_in);
  out.bytes(structure);
  return shorten(Sha256::of(out.buffer()));
}

PlanOffer PlanOffer::of(const SavePlanCache::Kept& kept, const SavePlan& local_plan) {
  PlanOffer offer{plan_digest(kept.planned_in, kept.structure), {}};
  for (const SharedSet& set : kept.shared) offer.contents.push_back(contents_of(set, local_plan));
  return offer;
}

void PlanOffer::encode(ByteWriter& out) const {
  out.bytes(plan);
  for (const ShortDigest& digest : contents) out.bytes(digest);
}

PlanOffer PlanOffer::decode(ByteReader& in) {
  PlanOffer offer;
  std::ranges::copy(in.bytes(offer.plan.size()), offer.plan.begin());
  while (!in.at_end()) std::ranges::copy(in.bytes(sizeof(ShortDigest)), offer.contents.emplace_back().begin());
  return offer;
}

bool is_as_kept(const SavePlanCache::Kept& kept, const std::vector<PlanOffer>& offers) {
  if (kept.ranks.size() != offers.size()) return false;
  std::unordered_map<uint32_t, ShortDigest> contents;
  for (size_t rank = 0; rank < offers.size(); ++rank) {
    const SavePlanCache::Kept::Rank& known = kept.ranks[rank];
    const PlanOffer& offer = offers[rank];
    if (offer.plan != PlanOffer::plan_digest(kept.planned_in, known.structure)) return false;
    if (offer.contents.size() != known.sets.size()) return false;
    for (size_t s = 0; s < known.sets.size(); ++s) {
      if (contents.try_emplace(known.sets[s], offer.contents[s]).first->second != offer.contents[s]) return false;
    }
  }
  return true;
}

void encode_shared_sets(const std::vector<SharedSet>& sets, ByteWriter& out) {
  out.varint(sets.size());
  for (const SharedSet& set : sets) {
    out.varint(set.items.size());
    size_t next = 0;
    for (const size_t item : set.items) {
      out.varint(item - next);
      next = item + 1;
    }
  }
}

std::vector<SharedSet> decode_shared_sets(ByteReader& in, size_t items) {
  std::vector<SharedSet> sets(in.count());
  for (SharedSet& set : sets) {
    set.items.resize(in.count());
    uint64_t next = 0;
    for (size_t& item : set.items) {
      const uint64_t skipped = in.varint();
      if (next >= items || skipped >= items - next) {
        throw Error(ErrorCode::kCorruptData, "an item that is shared with other ranks is not in the plan");
      }
      item = next + skipped;
      next = item + 1;
    }
  }
  return sets;
}

std::vector<SharedString> files_of(const std::vector<StorageInfo>& places) {
  OrderedMap<SharedString, char> files;
  for (const StorageInfo& place : places) files[place.relative_path];
  std::vector<SharedString> names;
  for (const auto& [name, nothing] : files) names.push_back(name);
  return names;
}

void rename_files(std::vector<StorageInfo>& places, const std::vector<SharedString>& names) {
  OrderedMap<SharedString, SharedString> renamed;
  for (StorageInfo& place : places) {
    const size_t known = renamed.size();
    SharedString& name = renamed[place.relative_path];
    if (renamed.size() != known) {
      if (known == names.size()) throw Error(ErrorCode::kCorruptData, "a plan has more files than were named");
      name = names[known];
    }
    place.relative_path = name;
  }
  if (renamed.size() != names.size()) throw Error(ErrorCode::kCorruptData, "a plan has fewer files than were named");
}

}  // namespace reshard
