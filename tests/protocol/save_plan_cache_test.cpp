// SPDX-License-Identifier: BSD-3-Clause
// Saves again and again with a SavePlanCache a rank: what is sent, what is written, and what makes a save plan in full.
#include "protocol/save_plan_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "reshard/storage/filesystem.h"
#include "simulation.h"
#include "support/counting_transport.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

/// One job that saves into one directory.
class Job {
 public:
  explicit Job(int ranks)
      : world_size(ranks), caches(static_cast<size_t>(ranks)), hub_(ranks, std::chrono::seconds(60)) {
    for (int rank = 0; rank < ranks; ++rank) transports_.push_back(hub_.transport(rank));
    for (SavePlanCache& cache : caches) given.push_back(&cache);
  }

  /// The error's text; empty if all ranks saved.
  std::string save(const std::function<MemorySaveState(int)>& state_of, FileSystemWriterOptions options = {}) {
    std::vector<std::string> errors(transports_.size());
    counts.clear();
    for (auto& transport : transports_) counts.emplace_back(*transport);
    run_ranks(world_size, [&](int rank) {
      const auto r = static_cast<size_t>(rank);
      const MemorySaveState state = state_of(rank);
      DefaultSavePlanner planner;
      FileSystemWriter writer(directory.path(), options);
      try {
        run_save(counts[r], state, planner, writer, {}, given[r]);
      } catch (const CheckpointError& error) {
        errors[r] = error.what();
      }
    });
    for (const std::string& error : errors) EXPECT_EQ(error, errors[0]);
    return errors[0];
  }
  /// What is in the directory has the pattern, and this value of "b".
  void expect_saved(std::string_view content) {
    MemoryLoadState state(usual_destinations(1)[0]);
    DefaultLoadPlanner planner;
    FileSystemReader reader(directory.path());
    run_load(*solo_transport(), state, planner, reader);
    EXPECT_EQ(state.first_difference(), "");
    EXPECT_EQ(state.value(2), content);
  }
  std::vector<uint64_t> hits() const {
    std::vector<uint64_t> all;
    for (const SavePlanCache& cache : caches) all.push_back(cache.hits());
    return all;
  }
  void expect_hits(uint64_t n) { EXPECT_EQ(hits(), std::vector<uint64_t>(caches.size(), n)); }
  /// Each rank but the coordinator took part in so many rounds.
  void expect_rounds(size_t n) {
    for (int rank = 1; rank < world_size; ++rank) {
      EXPECT_EQ(counts[static_cast<size_t>(rank)].sent.size(), n) << "rank " << rank;
      EXPECT_EQ(counts[static_cast<size_t>(rank)].received.size(), n) << "rank " << rank;
    }
  }

  const int world_size;
  TemporaryDirectory directory;
  std::vector<SavePlanCache> caches;
  std::vector<SavePlanCache*> given;  // a rank
  std::vector<CountingTransport> counts;

 private:
  ThreadHub hub_;
  std::vector<std::unique_ptr<Transport>> transports_;
};

auto usual(int world_size, std::string content) {
  return [=](int rank) { return usual_state(rank, world_size, content); };
}

TEST(SavePlanCacheTest, SavesOfUnchangedStructureArePlannedInOneRoundOfSmallMessages) {
  Job job(3);
  const std::vector<std::string> contents = {"first", "secon", "third", "forth"};
  for (size_t n = 0; n < contents.size(); ++n) {
    SCOPED_TRACE("save " + std::to_string(n));
    ASSERT_EQ(job.save(usual(3, contents[n])), "");
    job.expect_saved(contents[n]);
    job.expect_hits(n);
    job.expect_rounds(2);  // plan, vote
    for (int rank = 1; rank < 3; ++rank) {
      const auto& count = job.counts[static_cast<size_t>(rank)];
      if (n == 0) {
        EXPECT_GT(count.sent[0], 64U);
        EXPECT_GT(count.received[0], 64U);
      } else {
        EXPECT_EQ(count.sent[0], 37U);  // one shared set: that of all ranks
        EXPECT_LE(count.received[0], 64U);
      }
    }
  }
}

TEST(SavePlanCacheTest, TheSmallMessagesDoNotGrowWithTheNumberOfTensors) {
  Job job(2);
  const auto state_of = [](int rank) {
    MemorySaveState state;
    for (int t = 0; t < 300; ++t) {
      state.add(tensor_entry("shard." + std::to_string(t), {4}, {{{2 * rank}, {2}}}));
      state.add(replica_entry("plain." + std::to_string(t), {3}));
    }
    return state;
  };
  ASSERT_EQ(job.save(state_of), "");
  ASSERT_EQ(job.save(state_of), "");
  job.expect_hits(1);
  EXPECT_EQ(job.counts[1].sent[0], 37U);
  EXPECT_LE(job.counts[1].received[0], 64U);
}

TEST(SavePlanCacheTest, EachSetOfRanksThatSharesItemsAddsADigest) {
  Job job(4);
  const auto state_of = [](int rank) {
    MemorySaveState state(usual_entries(rank, 4));
    state.add_value("b", "content");
    state.add(replica_entry("pair" + std::to_string(rank / 2), {7}));  // ranks 0, 1 and ranks 2, 3
    state.add(replica_entry("own" + std::to_string(rank), {2}));       // shared with nobody
    return state;
  };
  ASSERT_EQ(job.save(state_of), "");
  ASSERT_EQ(job.save(state_of), "");
  job.expect_hits(1);
  for (size_t rank = 1; rank < 4; ++rank) EXPECT_EQ(job.counts[rank].sent[0], 53U);
}

TEST(SavePlanCacheTest, ContentsThatDifferAreFoundInARepeatedSave) {
  for (const int other : {0, 1, 2}) {
    Job job(3);
    ASSERT_EQ(job.save(usual(3, "first")), "");
    const std::string error =
        job.save([=](int rank) { return usual_state(rank, 3, rank == other ? "other" : "again"); });
    EXPECT_NE(error.find("hold different contents under one key"), std::string::npos) << error;
    EXPECT_NE(error.find("key b"), std::string::npos) << error;
    job.expect_saved("first");
    ASSERT_EQ(job.save(usual(3, "third")), "") << "a failed save empties the caches, no more";
    job.expect_saved("third");
    job.expect_hits(0);
    ASSERT_EQ(job.save(usual(3, "fourt")), "");
    job.expect_hits(1);
  }
}

TEST(SavePlanCacheTest, AnotherStructureOnOneRankOrAllPlansInFullInTheSameSave) {
  for (const int changed : {0, 1, 2, -1}) {
    SCOPED_TRACE("rank " + std::to_string(changed));
    Job job(3);
    const auto longer = [=](int rank) {
      MemorySaveState state = usual_state(rank, 3, "again");
      if (changed == rank || changed == -1) state.add(replica_entry("more", {5}));
      return state;
    };
    ASSERT_EQ(job.save(usual(3, "first")), "");
    ASSERT_EQ(job.save(longer), "");
    job.expect_hits(0);
    job.expect_rounds(changed == -1 ? 2 : 3);
    job.expect_saved("again");
    ASSERT_EQ(job.save(longer), "");
    job.expect_hits(1);
    job.expect_rounds(2);
    ASSERT_EQ(job.save(usual(3, "back!")), "");
    job.expect_saved("back!");
  }
}

TEST(SavePlanCacheTest, AValueOfAnotherLengthPlansInFull) {
  Job job(2);
  ASSERT_EQ(job.save(usual(2, "short")), "");
  ASSERT_EQ(job.save(usual(2, "longer than before")), "");
  job.expect_hits(0);
  job.expect_rounds(2);
  job.expect_saved("longer than before");
}

TEST(SavePlanCacheTest, ARankThatStartedAnewOrHasNoCachePlansInFull) {
  for (const int rank : {0, 1, 2}) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    Job job(3);
    ASSERT_EQ(job.save(usual(3, "first")), "");
    job.caches[static_cast<size_t>(rank)] = SavePlanCache();
    ASSERT_EQ(job.save(usual(3, "secon")), "");
    job.expect_hits(0);
    job.expect_rounds(rank == 0 ? 3 : 3);
    job.expect_saved("secon");
    ASSERT_EQ(job.save(usual(3, "third")), "");
    job.expect_hits(1);
    job.given[static_cast<size_t>(rank)] = nullptr;
    for (const char* content : {"forth", "fifth"}) {
      ASSERT_EQ(job.save(usual(3, content)), "");
      job.expect_hits(1);
      job.expect_saved(content);
    }
    job.expect_rounds(2);  // nobody keeps what not all keep, so nobody offers it
  }
}

TEST(SavePlanCacheTest, CachesOfDifferentSavesAreNotMixed) {
  Job job(2);
  Job other(2);
  ASSERT_EQ(job.save(usual(2, "first")), "");
  ASSERT_EQ(other.save(usual(2, "first")), "");
  std::swap(job.caches[1], other.caches[1]);  // equal plans, planned by another save
  ASSERT_EQ(job.save(usual(2, "secon")), "");
  EXPECT_EQ(job.caches[0].hits(), 0U);
  EXPECT_EQ(job.caches[1].hits(), 0U);
  job.expect_rounds(3);
  job.expect_saved("secon");
}

TEST(SavePlanCacheTest, AnotherPlacementPlansInFull) {
  Job job(2);
  ASSERT_EQ(job.save(usual(2, "first")), "");
  ASSERT_EQ(job.save(usual(2, "secon"), {.storage_alignment = 4096}), "");
  job.expect_hits(0);
  job.expect_rounds(3);
  job.expect_saved("secon");
  ASSERT_EQ(job.save(usual(2, "third"), {.thread_count = 2, .storage_alignment = 4096}), "");
  job.expect_hits(0);
  job.expect_saved("third");
  ASSERT_EQ(job.save(usual(2, "forth"), {.thread_count = 2, .storage_alignment = 4096}), "");
  job.expect_hits(1);
  job.expect_saved("forth");
}

TEST(SavePlanCacheTest, OneRankAloneUsesItToo) {
  Job job(1);
  for (uint64_t n = 0; n < 3; ++n) {
    ASSERT_EQ(job.save(usual(1, "abc" + std::to_string(n))), "");
    job.expect_hits(n);
    job.expect_saved("abc" + std::to_string(n));
  }
}

TEST(SavePlanCacheTest, ARepeatedSaveWritesWhatASaveWithoutCacheWrites) {
  const auto catalogue = [](bool with_cache) {
    Job job(3);
    if (!with_cache) job.given.assign(3, nullptr);
    for (const char* content : {"first", "secon"}) EXPECT_EQ(job.save(usual(3, content)), "");
    job.expect_hits(with_cache ? 1 : 0);
    Metadata metadata = FileSystemReader(job.directory.path()).read_metadata();
    metadata.storage_meta.reset();  // ids and directory
    metadata.sidecars.reset();
    return metadata;
  };
  EXPECT_EQ(catalogue(true), catalogue(false));
}

// --- the messages ----------------------------------------------------------------------------------------------------

std::vector<std::vector<size_t>> read_shared_sets(const Bytes& bytes, size_t items) {
  ByteReader in(bytes);
  std::vector<std::vector<size_t>> sets;
  for (const SharedSet& set : decode_shared_sets(in, items)) sets.push_back(set.items);
  EXPECT_TRUE(in.at_end());
  return sets;
}
Bytes varints(std::initializer_list<uint64_t> numbers) {
  ByteWriter out;
  for (const uint64_t number : numbers) out.varint(number);
  return out.take();
}

TEST(SharedSetsTest, ComeBackAsTheyWere) {
  ByteWriter out;
  encode_shared_sets({{7, {0, 1, 5}}, {8, {}}, {9, {299}}}, out);
  EXPECT_EQ(read_shared_sets(out.take(), 300), (std::vector<std::vector<size_t>>{{0, 1, 5}, {}, {299}}));
}

TEST(SharedSetsTest, ItemsOutsideThePlanAndCountsWithoutItemsAreRefused) {
  constexpr uint64_t kMost = ~uint64_t{0};
  EXPECT_EQ(read_shared_sets(varints({1, 2, 0, 1}), 3), (std::vector<std::vector<size_t>>{{0, 2}}));
  for (const Bytes& bad : {varints({1, 1, 3}), varints({1, 2, 0, 2}), varints({1, 2, 2, 0}), varints({1, 2, 1, kMost}),
                           varints({1, 1, kMost})}) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "not in the plan", read_shared_sets(bad, 3));
  }
  EXPECT_ERROR(ErrorCode::kCorruptData, "not in the plan", read_shared_sets(varints({1, 1, 0}), 0));
  for (const Bytes& bad : {varints({kMost}), varints({2, 0}), varints({1, kMost}), varints({1, 2, 0})}) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early", read_shared_sets(bad, 3));
  }
}

TEST(SharedSetsTest, AreTheItemsThatTheSameRanksHold) {
  std::vector<SavePlan> plans(3);
  const auto add = [&](std::initializer_list<size_t> ranks, const char* fqn, bool has_content = true) {
    for (const size_t rank : ranks) {
      WriteItem& item = plans[rank].items.emplace_back();
      item.index.fqn = fqn;
      if (has_content) item.content.emplace();
    }
  };
  add({0}, "own");
  add({0, 1, 2}, "all");
  add({1, 2}, "pair");
  add({0, 1, 2}, "no content", false);
  add({1, 2}, "pair too");
  add({0, 1, 2}, "all too");
  add({0, 2}, "others");
  const auto sets = find_shared_sets(plans);
  const auto items = [&](size_t rank) {
    std::vector<std::vector<size_t>> all;
    for (const SharedSet& set : sets[rank]) all.push_back(set.items);
    return all;
  };
  using Sets = std::vector<std::vector<size_t>>;
  EXPECT_EQ(items(0), (Sets{{1, 3}, {4}}));
  EXPECT_EQ(items(1), (Sets{{0, 4}, {1, 3}}));
  EXPECT_EQ(items(2), (Sets{{0, 4}, {1, 3}, {5}}));
  EXPECT_EQ(sets[0][0].id, sets[1][0].id);
  EXPECT_EQ(sets[0][0].id, sets[2][0].id);
  EXPECT_EQ(sets[1][1].id, sets[2][1].id);
  EXPECT_EQ(sets[0][1].id, sets[2][2].id);
  EXPECT_EQ((std::set{sets[2][0].id, sets[2][1].id, sets[2][2].id}).size(), 3U);
}

TEST(PlanOfferTest, EndsAfterAWholeDigest) {
  PlanOffer offer;
  offer.plan.fill(std::byte{1});
  offer.contents.resize(2);
  offer.contents[1].fill(std::byte{2});
  ByteWriter out;
  offer.encode(out);
  const Bytes bytes = out.take();
  EXPECT_EQ(bytes.size(), 48U);
  for (size_t n = 0; n <= bytes.size(); ++n) {
    ByteReader in(ByteSpan(bytes).first(n));
    if (n % 16 != 0 || n == 0) {
      EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early", PlanOffer::decode(in));
      continue;
    }
    const PlanOffer back = PlanOffer::decode(in);
    EXPECT_EQ(back.plan, offer.plan);
    EXPECT_EQ(back.contents,
              std::vector(offer.contents.begin(), offer.contents.begin() + static_cast<ptrdiff_t>(n / 16 - 1)));
  }
}

TEST(PlanOfferTest, AnOtherNumberOfOffersOrOfSetsIsNotAsKept) {
  SavePlanCache::Kept kept;
  kept.planned_in = "id";
  kept.ranks.resize(2);
  kept.ranks[1].structure.fill(std::byte{1});
  kept.ranks[0].sets = {0};
  kept.ranks[1].sets = {0, 1};
  const auto offer = [&](size_t rank, size_t sets) {
    return PlanOffer{PlanOffer::plan_digest("id", kept.ranks[rank].structure), std::vector<ShortDigest>(sets)};
  };
  EXPECT_TRUE(is_as_kept(kept, {offer(0, 1), offer(1, 2)}));
  for (const std::vector<PlanOffer>& other : {std::vector{offer(0, 1)},
                                              {offer(0, 1), offer(1, 2), offer(1, 2)},
                                              {offer(0, 0), offer(1, 2)},
                                              {offer(0, 2), offer(1, 2)},
                                              {offer(0, 1), offer(1, 1)},
                                              {offer(1, 1), offer(0, 2)}}) {
    EXPECT_FALSE(is_as_kept(kept, other));
  }
  std::vector<PlanOffer> offers{offer(0, 1), offer(1, 2)};
  offers[1].contents[1].fill(std::byte{9});  // of a set that rank 0 has no part in
  EXPECT_TRUE(is_as_kept(kept, offers));
  offers[1].contents[0].fill(std::byte{9});
  EXPECT_FALSE(is_as_kept(kept, offers));
}

TEST(RenameFilesTest, EachFileGetsItsNameAndNoneIsLeft) {
  const std::vector<StorageInfo> places{{"a", 0, 1, {}}, {"b", 0, 2, {}}, {"a", 1, 3, {}}};
  EXPECT_EQ(files_of(places), (std::vector<SharedString>{"a", "b"}));
  std::vector<StorageInfo> renamed = places;
  rename_files(renamed, {"b", "c"});
  EXPECT_EQ(renamed, (std::vector<StorageInfo>{{"b", 0, 1, {}}, {"c", 0, 2, {}}, {"b", 1, 3, {}}}));
  for (const std::vector<SharedString>& names : {std::vector<SharedString>{}, {"b"}}) {
    renamed = places;
    EXPECT_ERROR(ErrorCode::kCorruptData, "more files than were named", rename_files(renamed, names));
  }
  renamed = places;
  EXPECT_ERROR(ErrorCode::kCorruptData, "fewer files than were named", rename_files(renamed, {"b", "c", "d"}));
}

}  // namespace
}  // namespace reshard
