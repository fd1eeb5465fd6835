// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/protocol.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

#include "protocol/simulation.h"
#include "support/counting_transport.h"
#include "support/expect_error.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;

// test_checkpoint.py: test_dummy_writer_works, test_dummy_reader_works
TEST(ProtocolTest, FourRanksSaveAndLoad) {
  Simulation job(4);
  expect_all_ok(job.save([](int rank) { return usual_state(rank, 4); }));
  auto states = usual_destinations(4);
  expect_all_ok(job.load(states));
  for (MemoryLoadState& state : states) {
    EXPECT_EQ(state.first_difference(), "");
    EXPECT_EQ(state.value(2), "first");
  }
}

TEST(ProtocolTest, ProcessAloneSavesAndLoads) {
  MemoryStore store;
  const auto transport = solo_transport();
  MemorySaveState state = usual_state(0, 1, "alone");
  DefaultSavePlanner planner;
  MemoryWriter writer(store);
  const SaveResult result = run_save(*transport, state, planner, writer);
  EXPECT_EQ(result.items, 3u);
  EXPECT_EQ(result.bytes_written, 6u * 4 * 4 + 5 * 4 + 5);
  EXPECT_EQ(content_of(store), "alone");
}

// e2e/test_e2e_save_and_load.py: test_no_dist
TEST(ProtocolTest, EmptyStateIsALegalCheckpoint) {
  Simulation job(2);
  expect_all_ok(job.save([](int) { return MemorySaveState(); }));
  std::vector<MemoryLoadState> states(2);
  expect_all_ok(job.load(states));
  EXPECT_TRUE(job.store.committed()->state_dict_metadata.empty());
}

TEST(ProtocolTest, ResultIsEqualOnEveryRankAndTheCatalogueSaysWhoWrote) {
  Simulation job(4);
  const auto outcomes = job.save([](int rank) { return usual_state(rank, 4); });
  expect_all_ok(outcomes);
  for (const Outcome& outcome : outcomes) {
    EXPECT_EQ(outcome.saved->save_id, outcomes[0].saved->save_id);
    EXPECT_EQ(outcome.saved->items, 3u + 2u) << "6 rows over 4 ranks: 2, 2, 2, 0; and two replicas";
    EXPECT_EQ(outcome.saved->bytes_written, 6u * 4 * 4 + 5 * 4 + 5);
    EXPECT_EQ(outcome.abandoned, 0);
  }
  EXPECT_THAT(outcomes[0].saved->save_id,
              MatchesRegex("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"));
  const Metadata metadata = *job.store.committed();
  EXPECT_EQ(metadata.storage_meta->checkpoint_id, "memory");
  EXPECT_EQ(metadata.storage_meta->save_id, outcomes[0].saved->save_id);
  EXPECT_EQ(metadata.version, "1.0.0");
  EXPECT_FALSE(metadata.sidecars.has_value()) << "this storage writes none";
  EXPECT_EQ(metadata.storage_data.size(), 5u);
  EXPECT_NO_THROW(validate(metadata));
  ASSERT_TRUE(metadata.planner_data.has_value());
  EXPECT_EQ(metadata.planner_data->size(), 3u);
}

TEST(ProtocolTest, EverySaveHasAnIdOfItsOwn) {
  Simulation job(2);
  const auto first = job.save([](int rank) { return usual_state(rank, 2); });
  const auto second = job.save([](int rank) { return usual_state(rank, 2); });
  EXPECT_NE(first[0].saved->save_id, second[0].saved->save_id);
}

TEST(ProtocolTest, SavingAgainReplacesTheCheckpoint) {
  Simulation job(3);
  for (const char* content : {"first", "second", "third"}) {
    expect_all_ok(job.save([&](int rank) { return usual_state(rank, 3, content); }));
    EXPECT_EQ(content_of(job.store), content);
  }
  EXPECT_EQ(job.store.files().size(), 3u) << "files of the older saves are gone";
}

/// Random tensors cut at random over n ranks, some chunks replicated.
struct RandomLayout {
  std::vector<std::vector<StateEntry>> ranks;

  RandomLayout(Random& random, size_t world_size, const std::vector<std::pair<std::string, Dims>>& tensors)
      : ranks(world_size) {
    for (const auto& [key, shape] : tensors) {
      std::vector<std::vector<Box>> parts(world_size);
      const auto any_rank = [&] {
        return static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(world_size) - 1));
      };
      for (const Box& box : random_tiling(random, shape)) {
        const size_t owner = any_rank();
        parts[owner].push_back(box);
        const size_t other = any_rank();
        if (other != owner && random_between(random, 0, 3) == 0) parts[other].push_back(box);
      }
      for (size_t rank = 0; rank < world_size; ++rank) {
        ranks[rank].push_back(tensor_entry(key, shape, parts[rank], key == "k0" ? DType::kComplex128 : DType::kInt16));
      }
    }
  }
};

TEST(ProtocolTest, AnyLayoutOnAnyNumberOfRanksLoadsIntoAnyOther) {
  Random random(21);
  for (int round = 0; round < 60; ++round) {
    std::vector<std::pair<std::string, Dims>> tensors;
    for (int t = 0; t < 4; ++t) tensors.emplace_back("k" + std::to_string(t), random_shape(random));
    const auto from = static_cast<size_t>(random_between(random, 1, 5));
    const auto to = static_cast<size_t>(random_between(random, 1, 5));
    const RandomLayout saved(random, from, tensors);
    const RandomLayout wanted(random, to, tensors);
    Simulation writers(static_cast<int>(from));
    expect_all_ok(writers.save([&](int rank) { return MemorySaveState(saved.ranks[static_cast<size_t>(rank)]); }));

    Simulation readers(static_cast<int>(to));
    std::vector<MemoryLoadState> states;
    for (const auto& entries : wanted.ranks) states.emplace_back(entries);
    std::vector<Outcome> outcomes(to);
    run_ranks(static_cast<int>(to), [&](int rank) {
      DefaultLoadPlanner planner;
      MemoryReader reader(writers.store);
      const auto r = static_cast<size_t>(rank);
      outcomes[r].loaded = run_load(*readers.transports[r], states[r], planner, reader);
    });
    expect_all_ok(outcomes);
    for (MemoryLoadState& state : states) EXPECT_EQ(state.first_difference(), "");
  }
}

TEST(ProtocolTest, RanksMayHoldDifferentKeysAsInPipelineParallelism) {
  Simulation job(3);
  expect_all_ok(job.save([](int rank) {
    MemorySaveState state;
    if (rank < 2) state.add(replica_entry("stage" + std::to_string(rank), {4}));
    return state;
  }));
  std::vector<MemoryLoadState> states;
  states.emplace_back(std::vector<StateEntry>{});
  states.emplace_back(std::vector<StateEntry>{replica_entry("stage0", {4}), replica_entry("stage1", {4})});
  states.emplace_back(std::vector<StateEntry>{replica_entry("stage0", {4})});
  const auto outcomes = job.load(states);
  expect_all_ok(outcomes);
  for (MemoryLoadState& state : states) EXPECT_EQ(state.first_difference(), "");
  EXPECT_THAT(outcomes[1].loaded->unexpected, IsEmpty());
  EXPECT_THAT(outcomes[2].loaded->unexpected, ElementsAre("stage1"));
}

TEST(ProtocolTest, ReportsComeBackFromALoad) {
  Simulation job(1);
  expect_all_ok(job.save([](int rank) { return usual_state(rank, 1); }));
  std::vector<MemoryLoadState> states;
  states.emplace_back(std::vector<StateEntry>{replica_entry("r", {5}, DType::kFloat64), bytes_entry("missing", 0)});
  const auto outcomes = job.load(states, {}, {.allow_partial_load = true, .allow_cast = true});
  expect_all_ok(outcomes);
  EXPECT_THAT(outcomes[0].loaded->missing, ElementsAre("missing"));
  EXPECT_THAT(outcomes[0].loaded->unexpected, ElementsAre("w", "b"));
  EXPECT_THAT(outcomes[0].loaded->cast, ElementsAre("r: float32 -> float64"));
}

TEST(ProtocolTest, ProgressIsReportedOnItsRank) {
  MemoryStore store;
  const auto transport = solo_transport();
  MemorySaveState state = usual_state(0, 1);
  DefaultSavePlanner save_planner;
  MemoryWriter writer(store);
  std::vector<std::string> seen;
  const ProgressFn progress = [&](const Progress& p) {
    seen.push_back(std::string(p.step) + " " + std::to_string(p.done) + "/" + std::to_string(p.total));
  };
  run_save(*transport, state, save_planner, writer, progress);
  MemoryLoadState destination(usual_entries(0, 1));
  DefaultLoadPlanner load_planner;
  MemoryReader reader(store);
  run_load(*transport, destination, load_planner, reader, progress);
  EXPECT_THAT(seen, ElementsAre("write 1/3", "write 2/3", "write 3/3", "read 1/2", "read 2/2"));
}

TEST(ProtocolTest, VoteIsOneSmallMessageHoweverLargeThePlan) {
  Simulation job(3);
  std::vector<std::unique_ptr<CountingTransport>> counting;
  for (const auto& transport : job.transports) counting.push_back(std::make_unique<CountingTransport>(*transport));
  const auto errors = run_ranks(3, [&](int rank) {
    MemorySaveState state;
    for (int i = 0; i < 500; ++i) {
      state.add(tensor_entry("layer" + std::to_string(i), {30}, {split_evenly(whole_box({30}), 0, 3, rank)}));
    }
    DefaultSavePlanner planner;
    MemoryWriter writer(job.store);
    run_save(*counting[static_cast<size_t>(rank)], state, planner, writer);
  });
  for (const auto& error : errors) EXPECT_EQ(error, nullptr);
  for (size_t rank = 1; rank < 3; ++rank) {
    ASSERT_EQ(counting[rank]->sent.size(), 2u) << "a plan and a vote";
    EXPECT_GT(counting[rank]->sent[0], 5000u);
    EXPECT_LE(counting[rank]->sent[1], 80u);
  }
  EXPECT_EQ(counting[0]->sent.size(), 4u) << "a plan and an outcome for each other rank";
}

TEST(ProtocolTest, ThousandRanksSaveAndLoad) {
  constexpr int kRanks = 1024;
  constexpr int64_t kRows = 1500;  // 750 ranks hold two, the others none
  Simulation job(kRanks);
  const auto entries = [&](int rank) {
    return std::vector<StateEntry>{
        tensor_entry("w", {kRows, 2}, {split_evenly(whole_box({kRows, 2}), 0, kRanks, rank)}), replica_entry("r", {7})};
  };
  const auto saved = job.save([&](int rank) { return MemorySaveState(entries(rank)); });
  expect_all_ok(saved);
  EXPECT_EQ(saved[0].saved->items, 751u);
  std::vector<MemoryLoadState> states;
  // The other way round; a few ranks want a column.
  for (int rank = 0; rank < kRanks; ++rank) {
    states.emplace_back(rank % 64 != 0
                            ? entries(kRanks - 1 - rank)
                            : std::vector<StateEntry>{tensor_entry("w", {kRows, 2}, {{{0, 1}, {kRows, 1}}})});
  }
  expect_all_ok(job.load(states));
  for (MemoryLoadState& state : states) ASSERT_EQ(state.first_difference(), "");
}

}  // namespace
}  // namespace reshard
