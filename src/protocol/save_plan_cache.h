// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What a SavePlanCache holds, and the messages of a save that is planned from it.
//
//   rank          PlanOffer        "my plan is the one that you know": a digest of the plan and of the save that was planned
//                                  in full, and one of the contents of each shared set
//                 or a whole plan
//   coordinator   all offers fit   the names of the rank's files in this save; all else is as it was
//                 else             kSendPlan: every rank sends its whole plan, in the same step once more
#include <array>
#include <string>
#include <vector>

#include "reshard/format/sha256.h"
#include "reshard/planner/planner.h"
#include "reshard/protocol/protocol.h"

namespace reshard {

using ShortDigest = std::array<std::byte, 16>;

inline ShortDigest shorten(const Sha256Digest& digest) {
  ShortDigest result;
  std::copy_n(digest.begin(), result.size(), result.begin());
  return result;
}

/// First byte of a rank's message and of its answer.
enum class PlanMessage : uint8_t {
  kPlan = 0,        // a whole plan, from a rank without cache; the answer holds one
  kPlanToKeep = 1,  // the digest of its structure, then the plan
  kOffer = 2,
  kSendPlan = 3,
  kNewNames = 4,
};

/// Items of one rank's local plan whose contents are compared with those of one set of other ranks, and of each of them.
struct SharedSet {
  uint32_t id = 0;  // the same on all ranks of the set
  std::vector<size_t> items;
};

/// The shared sets of each rank, from plans with content digests.
std::vector<std::vector<SharedSet>> find_shared_sets(const std::vector<SavePlan>& plans);

/// Stands for a local plan whatever the contents: its encoding before it had content digests, and which items have one now.
ShortDigest structure_of(ByteSpan without_contents, const SavePlan& local_plan);

/// Stands for the contents of all items of a set.
ShortDigest contents_of(const SharedSet& set, const SavePlan& local_plan);

struct SavePlanCache::Kept {
  std::string planned_in;   // id of the save that was planned in full
  ShortDigest structure{};  // of this rank's local plan
  ShortDigest answer{};     // of the answer that the part came with
  SavePlan part;            // of this rank, as it was last written
  std::vector<SharedSet> shared;

  /// What the coordinator knows of each rank, itself included. Empty on other ranks.
  struct Rank {
    ShortDigest structure{};
    ShortDigest answer{};
    std::vector<uint32_t> sets;
  };
  std::vector<Rank> ranks;
  std::vector<SavePlan> plans;  // as last written
  Metadata metadata;            // without storage_data
};

struct PlanOffer {
  ShortDigest plan{};
  std::vector<ShortDigest> contents;  // of each shared set

  static ShortDigest plan_digest(const std::string& planned_in, const ShortDigest& structure);
  static PlanOffer of(const SavePlanCache::Kept& kept, const SavePlan& local_plan);
  void encode(ByteWriter& out) const;
  static PlanOffer decode(ByteReader& in);
};

/// True if the offers, one a rank, are of the plans that were kept, and contents are equal within each set.
bool is_as_kept(const SavePlanCache::Kept& kept, const std::vector<PlanOffer>& offers);

void encode_shared_sets(const std::vector<SharedSet>& sets, ByteWriter& out);
std::vector<SharedSet> decode_shared_sets(ByteReader& in, size_t items);

/// The files of a part, by first use.
std::vector<SharedString> files_of(const std::vector<StorageInfo>& places);
/// Puts `names` in the place of files_of(places); kCorruptData if there are more or fewer.
void rename_files(std::vector<StorageInfo>& places, const std::vector<SharedString>& names);

struct SavePlanCacheAccess {
  static std::unique_ptr<SavePlanCache::Kept> take(SavePlanCache* cache) {
    return cache != nullptr ? std::move(cache->kept_) : nullptr;
  }
  static void keep(SavePlanCache& cache, std::unique_ptr<SavePlanCache::Kept> kept, bool hit) {
    cache.kept_ = std::move(kept);
    cache.hits_ += hit ? 1 : 0;
  }
};

}  // namespace reshard
