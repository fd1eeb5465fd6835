// SPDX-License-Identifier: BSD-3-Clause
// What each error of each rank in each step becomes: one error on every rank, an old checkpoint that is still there, and
// ranks that can go on together.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "protocol/simulation.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

[[noreturn]] void fail(int rank, std::string_view stage) {
  throw std::invalid_argument("rank " + std::to_string(rank) + " fails in " + std::string(stage));
}

/// Fails where rank and stage match one of `where`.
RankHook failing(std::vector<std::pair<int, std::string>> where) {
  return [where = std::move(where)](int rank, std::string_view stage) {
    for (const auto& [bad_rank, bad_stage] : where) {
      if (rank == bad_rank && stage == bad_stage) fail(rank, stage);
    }
  };
}

struct SaveFault {
  const char* stage;
  bool coordinator_only;
  const char* step;  // as the error names it
};
constexpr SaveFault kSaveFaults[] = {
    {"set_up_planner", false, "plan"},       {"create_local_plan", false, "plan"},
    {"save.planned", false, "plan"},         {"create_global_plan", true, "plan"},
    {"save.planned_globally", true, "plan"}, {"begin_save", true, "plan"},
    {"prepare_global_plan", true, "plan"},   {"save.placed", true, "plan"},
    {"finish_plan", false, "write"},         {"save.before_write", false, "write"},
    {"write_data", false, "write"},          {"resolve_tensor", false, "write"},
    {"save.written", false, "write"},        {"save.before_vote", false, "write"},
    {"save.before_commit", true, "commit"},  {"finish", true, "commit"},
};

// test_checkpoint.py: test_save_error_handling
TEST(ProtocolFaultTest, FailedSaveIsOneErrorOnEveryRankAndTheOldCheckpointStays) {
  const TestPointsToHooks hooks;
  for (const int world_size : {2, 4}) {
    Simulation job(world_size);
    expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size, "old"); }));
    for (const SaveFault& fault : kSaveFaults) {
      for (int bad = 0; bad < (fault.coordinator_only ? 1 : world_size); ++bad) {
        // The fourth of four ranks has nothing to write.
        if (bad == 3 && std::string_view(fault.stage) == "resolve_tensor") continue;
        SCOPED_TRACE(std::string(fault.stage) + " on rank " + std::to_string(bad) + " of " +
                     std::to_string(world_size));
        const auto files = job.store.files();
        const auto outcomes =
            job.save([&](int rank) { return usual_state(rank, world_size, "new"); }, failing({{bad, fault.stage}}));
        expect_one_error(outcomes, {bad}, fault.step, Committed::kNo);
        EXPECT_THAT(outcomes[0].error->what(), HasSubstr("rank " + std::to_string(bad) + " fails in " + fault.stage));
        for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.abandoned, 1);
        EXPECT_EQ(job.store.files(), files) << "what was written is removed";
        EXPECT_EQ(content_of(job.store), "old");
      }
    }
    // The same ranks over the same transport.
    expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size, "new"); }));
    EXPECT_EQ(content_of(job.store), "new");
  }
}

TEST(ProtocolFaultTest, SeveralFailingRanksAreAllNamed) {
  Simulation job(4);
  const auto outcomes = job.save([](int rank) { return usual_state(rank, 4); },
                                 failing({{2, "write_data"}, {3, "write_data"}, {0, "write_data"}}));
  expect_one_error(outcomes, {0, 2, 3}, "write", Committed::kNo);
  for (const int rank : {0, 2, 3}) {
    EXPECT_THAT(outcomes[1].error->failures().at(rank).message,
                HasSubstr("rank " + std::to_string(rank) + " fails in write_data"));
  }
}

TEST(ProtocolFaultTest, ErrorOfAThousandRanksIsCutToAModerateSize) {
  Simulation job(300);
  const auto outcomes =
      job.save([](int) { return MemorySaveState(); },
               [](int rank, std::string_view stage) {
                 if (stage != "write_data") return;
                 throw std::runtime_error("rank " + std::to_string(rank) + " " + std::string(100000, '!'));
               });
  ASSERT_NE(outcomes[7].error, nullptr);
  EXPECT_EQ(outcomes[7].error->failures().size(), 300u);
  EXPECT_LE(std::string(outcomes[7].error->what()).size(), 1u << 20);
  EXPECT_STREQ(outcomes[7].error->what(), outcomes[0].error->what());
  EXPECT_THAT(outcomes[7].error->failures().at(200).message, HasSubstr("rank 200 !"));
}

// test_checkpoint.py: test_save_error_handling_no_dist
TEST(ProtocolFaultTest, FailedSaveOfAProcessAlone) {
  const TestPointsToHooks hooks;
  for (const SaveFault& fault : kSaveFaults) {
    SCOPED_TRACE(fault.stage);
    Simulation job(1);
    expect_one_error(job.save([](int rank) { return usual_state(rank, 1); }, failing({{0, fault.stage}})), {0},
                     fault.step, Committed::kNo);
    EXPECT_EQ(content_of(job.store), "nothing");
  }
}

TEST(ProtocolFaultTest, CodesOfErrorsCrossRanks) {
  Simulation job(2);
  const auto code_of = [&](const std::function<void()>& thrower) {
    const auto outcomes = job.save([](int rank) { return usual_state(rank, 2); },
                                   [&](int rank, std::string_view stage) {
                                     if (rank == 1 && stage == "write_data") thrower();
                                   });
    expect_one_error(outcomes, {1}, "write", Committed::kNo);
    return outcomes[0].error->failures().at(1).code;
  };
  EXPECT_EQ(code_of([] { throw Error(ErrorCode::kIo, "disk full"); }), ErrorCode::kIo);
  EXPECT_EQ(code_of([] { throw Error(ErrorCode::kAlreadyExists, "there"); }), ErrorCode::kAlreadyExists);
  EXPECT_EQ(code_of([] { throw std::bad_alloc(); }), ErrorCode::kUnavailable);
  EXPECT_EQ(code_of([] { throw 17; }), ErrorCode::kInternal) << "not a std::exception";
}

TEST(ProtocolFaultTest, CommitThatFailsHalfWayIsUnknownAndNothingIsAbandoned) {
  Simulation job(3);
  expect_all_ok(job.save([](int rank) { return usual_state(rank, 3, "old"); }));
  const auto outcomes =
      job.save([](int rank) { return usual_state(rank, 3, "new"); }, failing({{0, "finish.unknown"}}));
  expect_one_error(outcomes, {0}, "commit", Committed::kUnknown);
  for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.abandoned, 0);
  EXPECT_EQ(content_of(job.store), "new");
}

TEST(ProtocolFaultTest, FailureAfterTheCommitSaysThatItIsCommitted) {
  const TestPointsToHooks hooks;
  for (const char* stage : {"finish.durable", "save.after_commit"}) {
    Simulation job(3);
    const auto outcomes = job.save([](int rank) { return usual_state(rank, 3, "new"); }, failing({{0, stage}}));
    expect_one_error(outcomes, {0}, "commit", Committed::kYes);
    for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.abandoned, 0);
    EXPECT_EQ(content_of(job.store), "new");
  }
}

TEST(ProtocolFaultTest, PlansThatDoNotMakeWholeTensorsFailOnEveryRank) {
  Simulation job(4);
  const auto outcomes = job.save([](int rank) {
    MemorySaveState state;
    if (rank != 2) state.add(tensor_entry("w", {8}, {{{2 * rank}, {2}}}));
    return state;
  });
  expect_one_error(outcomes, {0}, "plan", Committed::kNo);
  EXPECT_EQ(outcomes[3].error->code(), ErrorCode::kInvalidArgument);
  EXPECT_THAT(outcomes[3].error->what(), HasSubstr("no rank supplies the part of a tensor at [4]"));
}

struct LoadFault {
  const char* stage;
  bool coordinator_only;
  const char* step;
};
constexpr LoadFault kLoadFaults[] = {
    {"load.before_metadata", false, "metadata"},
    {"read_metadata", true, "metadata"},
    {"load.metadata_read", true, "metadata"},
    {"set_up_storage_reader", false, "plan"},
    {"set_up_planner", false, "plan"},
    {"create_local_plan", false, "plan"},
    {"load.planned", false, "plan"},
    {"load.before_read", false, "read"},
    {"read_data", false, "read"},
    {"commit_tensor", false, "read"},
    {"load.read", false, "read"},
};

// test_checkpoint.py: test_load_error_handling, test_load_error_handling_no_dist
TEST(ProtocolFaultTest, FailedLoadIsOneErrorOnEveryRank) {
  const TestPointsToHooks hooks;
  for (const int world_size : {1, 2, 4}) {
    Simulation job(world_size);
    expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size); }));
    for (const LoadFault& fault : kLoadFaults) {
      for (int bad = 0; bad < (fault.coordinator_only ? 1 : world_size); ++bad) {
        SCOPED_TRACE(std::string(fault.stage) + " on rank " + std::to_string(bad) + " of " +
                     std::to_string(world_size));
        auto states = usual_destinations(world_size);
        expect_one_error(job.load(states, failing({{bad, fault.stage}})), {bad}, fault.step, Committed::kNo);
        if (std::string_view(fault.step) == "read") continue;
        for (MemoryLoadState& state : states) {
          EXPECT_EQ(state.memory().buffer(1), Bytes(20, std::byte{0xCD})) << "touched before all could plan";
          EXPECT_EQ(state.value(2), "");
        }
      }
    }
    auto states = usual_destinations(world_size);
    expect_all_ok(job.load(states));
    for (MemoryLoadState& state : states) EXPECT_EQ(state.first_difference(), "");
  }
}

TEST(ProtocolFaultTest, RankThatMissesAKeyStopsTheLoadBeforeAnythingIsTouched) {
  Simulation job(3);
  expect_all_ok(job.save([](int rank) { return usual_state(rank, 3); }));
  auto states = usual_destinations(3);
  states[1] = MemoryLoadState({replica_entry("r", {5}), replica_entry("extra", {2})});
  const auto outcomes = job.load(states);
  expect_one_error(outcomes, {1}, "plan", Committed::kNo);
  EXPECT_EQ(outcomes[0].error->code(), ErrorCode::kNotFound);
  EXPECT_THAT(outcomes[0].error->what(), HasSubstr("Missing key in checkpoint state_dict: extra."));
  for (MemoryLoadState& state : states) EXPECT_NE(state.first_difference(), "");
}

TEST(ProtocolFaultTest, LoadOfNothingIsNotFoundOnEveryRank) {
  Simulation job(3);
  auto states = usual_destinations(3);
  const auto outcomes = job.load(states);
  expect_one_error(outcomes, {0}, "metadata", Committed::kNo);
  EXPECT_EQ(outcomes[2].error->code(), ErrorCode::kNotFound);
}

TEST(ProtocolFaultTest, RanksThatCallDifferentOperationsAreToldAtOnce) {
  for (const int odd_one : {0, 1, 3}) {  // the only one that loads
    Simulation job(4);
    expect_all_ok(job.save([](int rank) { return usual_state(rank, 4, "old"); }));
    auto destinations = usual_destinations(4);
    std::vector<Outcome> outcomes(4);
    const auto start = Simulation::Clock::now();
    run_ranks(4, [&](int rank) {
      MemorySaveState state = usual_state(rank, 4, "new");
      auto& outcome = outcomes[static_cast<size_t>(rank)];
      if (rank == odd_one) {
        job.load_rank(rank, destinations[static_cast<size_t>(rank)], {}, outcome);
      } else {
        job.save_rank(rank, state, {}, outcome);
      }
    });
    EXPECT_LT(Simulation::Clock::now() - start, std::chrono::seconds(30)) << "the deadline is a minute";
    expect_one_error(outcomes, odd_one == 0 ? std::set<int>{1, 2, 3} : std::set<int>{odd_one},
                     odd_one == 0 ? "metadata" : "plan", Committed::kNo);
    EXPECT_THAT(outcomes[2].error->what(), HasSubstr(odd_one == 0 ? "rank 1 called save while rank 0 called load"
                                                                  : "called load while rank 0 called save"));
    EXPECT_EQ(outcomes[0].error->code(), ErrorCode::kFailedPrecondition);
    EXPECT_EQ(content_of(job.store), "old");
    expect_all_ok(job.save([](int rank) { return usual_state(rank, 4, "new"); }));
    EXPECT_EQ(content_of(job.store), "new");
  }
}

/// Changes what a writer says that it wrote.
class LyingWriter final : public StorageWriter {
 public:
  LyingWriter(MemoryStore& store, bool places_are_final, std::function<void(std::vector<WriteResult>&)> lie)
      : writer_(store), places_are_final_(places_are_final), lie_(std::move(lie)) {}
  bool places_are_final() const override { return places_are_final_; }
  std::string checkpoint_id() const override { return writer_.checkpoint_id(); }
  void begin_save(const std::string& save_id) override { writer_.begin_save(save_id); }
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    return writer_.prepare_global_plan(std::move(plans));
  }
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override {
    auto results = writer_.write_data(plan, planner, context);
    lie_(results);
    return results;
  }
  void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override {
    writer_.finish(metadata, context, committed);
  }
  void abandon() noexcept override { writer_.abandon(); }

 private:
  MemoryWriter writer_;
  const bool places_are_final_;
  std::function<void(std::vector<WriteResult>&)> lie_;
};

using Results = std::vector<WriteResult>;
void expect_lies_fail(bool places_are_final, const std::vector<std::function<void(Results&)>>& lies) {
  for (size_t l = 0; l < lies.size(); ++l) {
    for (const int liar : {0, 1}) {
      SCOPED_TRACE("lie " + std::to_string(l) + " on rank " + std::to_string(liar));
      Simulation job(3);
      std::vector<Outcome> outcomes(3);
      run_ranks(3, [&](int rank) {
        MemorySaveState state(
            {tensor_entry("a", {6}, {{{2 * rank}, {2}}}), tensor_entry("b", {6}, {{{2 * rank}, {2}}})});
        DefaultSavePlanner planner;
        LyingWriter writer(job.store, places_are_final, [&](Results& results) {
          if (rank == liar) lies[l](results);
        });
        try {
          run_save(*job.transports[static_cast<size_t>(rank)], state, planner, writer);
        } catch (const CheckpointError& error) {
          outcomes[static_cast<size_t>(rank)].error = std::make_shared<const CheckpointError>(error);
        }
      });
      expect_one_error(outcomes, {liar}, "write", Committed::kNo);
      EXPECT_THAT(outcomes[2].error->what(), HasSubstr("receipts do not match the plan"));
      EXPECT_EQ(content_of(job.store), "nothing");
    }
  }
}

TEST(ProtocolFaultTest, NothingIsCommittedWithoutAllReceipts) {
  const std::vector<std::function<void(Results&)>> lies{
      [](Results& results) { results.pop_back(); },
      [](Results& results) { results.push_back(results.back()); },
      [](Results& results) { results.clear(); },
      [](Results& results) { ++results[0].storage.offset; },
      [](Results& results) { --results[0].storage.length; },
      [](Results& results) { results[0].storage.relative_path = results[0].storage.relative_path + "x"; },
      [](Results& results) { results[0].index.fqn = results[0].index.fqn + "x"; },
      [](Results& results) { results[0].index.offset = Dims{5}; },
      [](Results& results) { std::swap(results[0], results[1]); },
  };
  expect_lies_fail(true, lies);
}

// The places are the rank's to say then; all else is not.
TEST(ProtocolFaultTest, NothingIsCommittedWithoutAllReceiptsWhosePlacesAreNotFinal) {
  expect_lies_fail(
      false, {
                 [](Results& results) { results.pop_back(); },
                 [](Results& results) { results.push_back(results.back()); },
                 [](Results& results) { results.clear(); },
                 [](Results& results) { results[0].storage.relative_path = results[0].storage.relative_path + "x"; },
                 [](Results& results) { results[0].storage.transform_descriptors = {"stream.zstd/1"}; },
                 [](Results& results) { results[0].index.fqn = results[0].index.fqn + "x"; },
                 [](Results& results) { std::swap(results[0].index, results[1].index); },
             });
}

TEST(ProtocolFaultTest, PlannerThatLosesPlansIsRefused) {
  class LosingPlanner final : public SavePlanner {
   public:
    void set_up_planner(const SaveState& state, bool is_coordinator) override {
      planner_.set_up_planner(state, is_coordinator);
    }
    SavePlan create_local_plan() override { return planner_.create_local_plan(); }
    GlobalSavePlan create_global_plan(std::vector<SavePlan> plans) override {
      GlobalSavePlan global = planner_.create_global_plan(std::move(plans));
      global.plans.pop_back();
      return global;
    }
    SavePlan finish_plan(SavePlan plan) override { return planner_.finish_plan(std::move(plan)); }
    TensorView resolve_tensor(const WriteItem& item) const override { return planner_.resolve_tensor(item); }
    ByteSpan resolve_bytes(const WriteItem& item) const override { return planner_.resolve_bytes(item); }

   private:
    DefaultSavePlanner planner_;
  };
  MemoryStore store;
  MemorySaveState state = usual_state(0, 1);
  LosingPlanner planner;
  MemoryWriter writer(store);
  try {
    run_save(*solo_transport(), state, planner, writer);
    ADD_FAILURE() << "saved";
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("planner or storage writer lost plans"));
  }
}

// Long enough for honest ranks on a busy machine; scenarios wait side by side.
constexpr milliseconds kSilence{3000};

// --- ranks that die ---------------------------------------------------------------------------------------------------

constexpr const char* kSavePoints[] = {"save.planned",       "save.planned_globally", "save.placed",
                                       "save.before_write",  "save.written",          "save.before_vote",
                                       "save.before_commit", "save.after_commit"};
constexpr const char* kLoadPoints[] = {"load.before_metadata", "load.metadata_read", "load.planned", "load.before_read",
                                       "load.read"};

bool is_of_coordinator(std::string_view point) {
  return point == "save.planned_globally" || point == "save.placed" || point == "save.before_commit" ||
         point == "save.after_commit" || point == "load.metadata_read";
}

/// While rank 0 is there, no other rank can have voted.
bool is_before_votes(std::string_view point) {
  return point == "save.planned" || point == "save.planned_globally" || point == "save.placed";
}
/// All other ranks have voted.
bool is_after_votes(std::string_view point) { return point == "save.before_commit" || point == "save.after_commit"; }

/// What the survivors say agrees with what is on disk.
void expect_true_to_disk(const Outcome& survivor, const MemoryStore& store) {
  const std::string content = content_of(store);
  EXPECT_TRUE(content == "old" || content == "new") << content;
  ASSERT_NE(survivor.error, nullptr);
  if (survivor.error->committed() == Committed::kNo) {
    EXPECT_EQ(content, "old");
  }
  if (survivor.error->committed() == Committed::kYes) {
    EXPECT_EQ(content, "new");
  }
}

TEST(ProtocolFaultTest, LostRankIsNamedByAllSurvivorsOfASave) {
  const TestPointsToHooks hooks;
  for (const int world_size : {2, 4}) {
    for (const char* point : kSavePoints) {
      for (int dead = 0; dead < (is_of_coordinator(point) ? 1 : world_size); ++dead) {
        SCOPED_TRACE(std::string(point) + " on rank " + std::to_string(dead) + " of " + std::to_string(world_size));
        Simulation job(world_size);
        expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size, "old"); }));
        const auto outcomes = job.save([&](int rank) { return usual_state(rank, world_size, "new"); },
                                       [&](int rank, std::string_view stage) {
                                         if (rank == dead && stage == point) {
                                           job.hub.lose(rank);
                                           throw Error(ErrorCode::kUnavailable, "killed");
                                         }
                                       });
        for (int rank = 0; rank < world_size; ++rank) {
          if (rank == dead) continue;
          SCOPED_TRACE("survivor " + std::to_string(rank));
          const Outcome& survivor = outcomes[static_cast<size_t>(rank)];
          ASSERT_NE(survivor.error, nullptr);
          EXPECT_EQ(survivor.failed_ranks(), std::set<int>{dead}) << survivor.error->what();
          EXPECT_EQ(survivor.error->code(), ErrorCode::kUnavailable);
          // Who sent a vote cannot know what became of it.
          if (dead != 0) {
            EXPECT_EQ(survivor.error->committed(), Committed::kNo);
          } else if (is_after_votes(point)) {
            EXPECT_EQ(survivor.error->committed(), Committed::kUnknown);
          }
          EXPECT_EQ(survivor.abandoned, survivor.error->committed() == Committed::kNo ? 1 : 0);
          expect_true_to_disk(survivor, job.store);
        }
      }
    }
  }
}

TEST(ProtocolFaultTest, LostRankIsNamedByAllSurvivorsOfALoad) {
  const TestPointsToHooks hooks;
  for (const int world_size : {2, 4}) {
    for (const char* point : kLoadPoints) {
      for (int dead = 0; dead < (is_of_coordinator(point) ? 1 : world_size); ++dead) {
        SCOPED_TRACE(std::string(point) + " on rank " + std::to_string(dead) + " of " + std::to_string(world_size));
        Simulation job(world_size);
        expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size); }));
        auto states = usual_destinations(world_size);
        const auto outcomes = job.load(states, [&](int rank, std::string_view stage) {
          if (rank == dead && stage == point) {
            job.hub.lose(rank);
            throw Error(ErrorCode::kUnavailable, "killed");
          }
        });
        for (int rank = 0; rank < world_size; ++rank) {
          if (rank == dead) continue;
          ASSERT_NE(outcomes[static_cast<size_t>(rank)].error, nullptr);
          EXPECT_EQ(outcomes[static_cast<size_t>(rank)].failed_ranks(), std::set<int>{dead});
        }
      }
    }
  }
}

/// Loses its medium at one call, with the rank whose loss that is.
class LosingTransport final : public Transport {
 public:
  LosingTransport(Transport& inner, int call, std::function<void()> lost)
      : inner_(inner), call_(call), lost_(std::move(lost)) {}
  int rank() const override { return inner_.rank(); }
  int world_size() const override { return inner_.world_size(); }
  void send(int to, ByteSpan message) override {
    count();
    inner_.send(to, message);
  }
  Bytes receive(int from) override {
    count();
    return inner_.receive(from);
  }
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    count();
    inner_.gather(from, arrived);
  }
  void heartbeat() noexcept override { inner_.heartbeat(); }

 private:
  void count() {
    if (call_-- > 0) return;
    lost_();
    throw Error(ErrorCode::kUnavailable, "the store is lost", {.rank = 2});
  }

  Transport& inner_;
  int call_;
  std::function<void()> lost_;
};

TEST(ProtocolFaultTest, LostMediumIsTheLossOfTheRankThatTheTransportNames) {
  for (const int loser : {0, 1}) {
    // Rank 0: gather, two answers, gather, two answers. Rank 1: plan, answer, vote, outcome.
    for (int call = 0; call < (loser == 0 ? 6 : 4); ++call) {
      SCOPED_TRACE("call " + std::to_string(call) + " of rank " + std::to_string(loser));
      Simulation job(3, kSilence);
      std::vector<Outcome> outcomes(3);
      run_ranks(3, [&](int rank) {
        LosingTransport transport(*job.transports[static_cast<size_t>(rank)], rank == loser ? call : 1000,
                                  [&] { job.hub.lose(rank); });
        MemorySaveState state = usual_state(rank, 3, "new");
        DefaultSavePlanner planner;
        MemoryWriter writer(job.store);
        try {
          outcomes[static_cast<size_t>(rank)].saved = run_save(transport, state, planner, writer);
        } catch (const CheckpointError& error) {
          outcomes[static_cast<size_t>(rank)].error = std::make_shared<const CheckpointError>(error);
        }
      });
      const Outcome& outcome = outcomes[static_cast<size_t>(loser)];
      ASSERT_NE(outcome.error, nullptr);
      EXPECT_EQ(outcome.failed_ranks(), std::set<int>{2}) << outcome.error->what();
      EXPECT_THAT(outcome.error->what(), HasSubstr("the store is lost"));
      const bool committed = loser == 0 && call >= 4;
      EXPECT_EQ(content_of(job.store), committed || (loser == 1 && call == 3) ? "new" : "nothing");
      if (loser == 0) {
        EXPECT_EQ(outcome.error->committed(), committed ? Committed::kYes : Committed::kNo);
      } else {
        EXPECT_EQ(outcome.error->committed(), call >= 2 ? Committed::kUnknown : Committed::kNo);
      }
    }
  }
}

// --- ranks that are stopped and go on later ---------------------------------------------------------------------------

/// Stops one rank at a point until all others have come back.
class Stop {
 public:
  Stop(int rank, std::string_view point, int world_size) : rank_(rank), point_(point), others_(world_size - 1) {}
  void operator()(int rank, std::string_view point) {
    if (rank != rank_ || point != point_) return;
    std::unique_lock lock(mutex_);
    stopped_ = true;
    changed_.wait(lock, [&] { return others_ == 0; });
  }
  void came_back(int rank) {
    if (rank == rank_) return;
    const std::lock_guard lock(mutex_);
    --others_;
    changed_.notify_all();
  }
  bool stopped() const { return stopped_; }

 private:
  const int rank_;
  const std::string point_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int others_;
  bool stopped_ = false;
};

void check_stopped_in_save(int world_size, int stopped, const char* point) {
  SCOPED_TRACE(std::string(point) + " on rank " + std::to_string(stopped) + " of " + std::to_string(world_size));
  Simulation job(world_size, kSilence);
  expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size, "old"); }));
  Stop stop(stopped, point, world_size);
  const RankHook hook = std::ref(stop);
  std::vector<Outcome> outcomes(static_cast<size_t>(world_size));
  run_ranks(world_size, [&](int rank) {
    MemorySaveState state = usual_state(rank, world_size, "new");
    job.save_rank(rank, state, hook, outcomes[static_cast<size_t>(rank)]);
    stop.came_back(rank);
  });
  EXPECT_TRUE(stop.stopped());
  for (int rank = 0; rank < world_size; ++rank) {
    if (rank == stopped) continue;
    SCOPED_TRACE("survivor " + std::to_string(rank));
    const Outcome& survivor = outcomes[static_cast<size_t>(rank)];
    EXPECT_EQ(survivor.other_error, "");
    ASSERT_NE(survivor.error, nullptr);
    EXPECT_EQ(survivor.failed_ranks(), std::set<int>{stopped}) << survivor.error->what();
    EXPECT_EQ(survivor.error->code(), ErrorCode::kTimeout);
    if (stopped != 0) {
      EXPECT_EQ(survivor.error->committed(), Committed::kNo);
    }
    if (stopped == 0) {
      EXPECT_EQ(survivor.error->committed(), is_before_votes(point) ? Committed::kNo : Committed::kUnknown);
    }
    expect_true_to_disk(survivor, job.store);
  }
  const Outcome& late = outcomes[static_cast<size_t>(stopped)];
  EXPECT_EQ(late.other_error, "");
  if (stopped != 0) {
    // It learns what the others decided, and all can go on together: nothing stale is left between them.
    ASSERT_NE(late.error, nullptr);
    EXPECT_STREQ(late.error->what(), outcomes[0].error->what());
    EXPECT_EQ(content_of(job.store), "old");
    expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size, "next"); }));
    EXPECT_EQ(content_of(job.store), "next");
  } else if (is_before_votes(point)) {
    // The others are gone: it must not commit what they gave up.
    ASSERT_NE(late.error, nullptr);
    EXPECT_EQ(content_of(job.store), "old");
  } else {
    // It holds all votes and commits; the others said that they do not know.
    EXPECT_EQ(content_of(job.store), "new");
  }
}

void check_stopped_in_load(int world_size, int stopped, const char* point) {
  SCOPED_TRACE(std::string(point) + " on rank " + std::to_string(stopped) + " of " + std::to_string(world_size));
  Simulation job(world_size, kSilence);
  expect_all_ok(job.save([&](int rank) { return usual_state(rank, world_size); }));
  Stop stop(stopped, point, world_size);
  const RankHook hook = std::ref(stop);
  auto states = usual_destinations(world_size);
  std::vector<Outcome> outcomes(static_cast<size_t>(world_size));
  run_ranks(world_size, [&](int rank) {
    job.load_rank(rank, states[static_cast<size_t>(rank)], hook, outcomes[static_cast<size_t>(rank)]);
    stop.came_back(rank);
  });
  EXPECT_TRUE(stop.stopped());
  for (int rank = 0; rank < world_size; ++rank) {
    const Outcome& outcome = outcomes[static_cast<size_t>(rank)];
    EXPECT_EQ(outcome.other_error, "");
    // A coordinator may come back to a load that all have done their part of.
    if (rank == 0 && stopped == 0) continue;
    ASSERT_NE(outcome.error, nullptr);
    EXPECT_EQ(outcome.failed_ranks(), std::set<int>{stopped}) << outcome.error->what();
  }
  if (stopped == 0) return;
  auto again = usual_destinations(world_size);
  expect_all_ok(job.load(again));
  for (MemoryLoadState& state : again) EXPECT_EQ(state.first_difference(), "");
}

TEST(ProtocolFaultTest, StoppedRankIsNamedAfterTheDeadlineAtEveryStep) {
  const TestPointsToHooks hooks;
  std::vector<std::thread> scenarios;
  for (const int world_size : {2, 4}) {
    for (const int stopped : {0, world_size - 1}) {
      for (const char* point : kSavePoints) {
        if (stopped != 0 && is_of_coordinator(point)) continue;
        scenarios.emplace_back(check_stopped_in_save, world_size, stopped, point);
      }
      for (const char* point : kLoadPoints) {
        if (stopped != 0 && is_of_coordinator(point)) continue;
        scenarios.emplace_back(check_stopped_in_load, world_size, stopped, point);
      }
    }
  }
  for (std::thread& scenario : scenarios) scenario.join();
}

TEST(ProtocolFaultTest, LongHonestWriteIsNotSilence) {
  static constexpr milliseconds kShortSilence{700};
  Simulation job(2, kShortSilence);
  // Rank 1 writes for three deadlines and shows progress.
  class SlowWriter final : public StorageWriter {
   public:
    SlowWriter(MemoryStore& store, bool is_slow) : writer_(store), is_slow_(is_slow) {}
    std::string checkpoint_id() const override { return writer_.checkpoint_id(); }
    void begin_save(const std::string& save_id) override { writer_.begin_save(save_id); }
    std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
      return writer_.prepare_global_plan(std::move(plans));
    }
    std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                        const StorageContext& context) override {
      const auto end = Simulation::Clock::now() + 3 * kShortSilence;
      while (is_slow_ && Simulation::Clock::now() < end) {
        context.progress({"write", 0, 1});
        std::this_thread::yield();
      }
      return writer_.write_data(plan, planner, context);
    }
    void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override {
      writer_.finish(metadata, context, committed);
    }
    void abandon() noexcept override { writer_.abandon(); }

   private:
    MemoryWriter writer_;
    bool is_slow_;
  };
  const auto errors = run_ranks(2, [&](int rank) {
    MemorySaveState state = usual_state(rank, 2, "slow");
    DefaultSavePlanner planner;
    SlowWriter writer(job.store, rank == 1);
    run_save(*job.transports[static_cast<size_t>(rank)], state, planner, writer);
  });
  for (const auto& error : errors) EXPECT_EQ(error, nullptr);
  EXPECT_EQ(content_of(job.store), "slow");
}

// --- messages that are damaged ----------------------------------------------------------------------------------------

/// Damages one message that this rank sends.
class DamagingTransport final : public Transport {
 public:
  DamagingTransport(Transport& inner, int message, std::function<void(Bytes&)> damage)
      : inner_(inner), message_(message), damage_(std::move(damage)) {}
  int rank() const override { return inner_.rank(); }
  int world_size() const override { return inner_.world_size(); }
  void send(int to, ByteSpan message) override {
    Bytes sent(message.begin(), message.end());
    if (message_-- == 0) damage_(sent);
    inner_.send(to, sent);
  }
  Bytes receive(int from) override { return inner_.receive(from); }
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    inner_.gather(from, arrived);
  }
  void heartbeat() noexcept override { inner_.heartbeat(); }

 private:
  Transport& inner_;
  int message_;
  std::function<void(Bytes&)> damage_;
};

TEST(ProtocolFaultTest, DamagedMessagesNeverHangNorCommitWhatWasNotWritten) {
  Random random(31);
  for (int round = 0; round < 300; ++round) {
    Simulation job(3, kSilence);  // who cannot read an answer leaves, and is missed
    const auto damager = static_cast<int>(random_between(random, 0, 2));
    const auto message = static_cast<int>(random_between(random, 0, damager == 0 ? 3 : 1));
    const auto seed = random();
    SCOPED_TRACE("message " + std::to_string(message) + " of rank " + std::to_string(damager) + ", seed " +
                 std::to_string(seed));
    std::vector<Outcome> outcomes(3);
    run_ranks(3, [&](int rank) {
      DamagingTransport transport(
          *job.transports[static_cast<size_t>(rank)], rank == damager ? message : -1, [&](Bytes& bytes) {
            Random own(seed);
            const auto at = static_cast<size_t>(random_between(own, 0, static_cast<int64_t>(bytes.size()) - 1));
            if (random_between(own, 0, 3) == 0) {
              bytes.resize(at);
            } else {
              bytes[at] ^= std::byte{1} << random_between(own, 0, 7);
            }
          });
      MemorySaveState state = usual_state(rank, 3, "new");
      DefaultSavePlanner planner;
      MemoryWriter writer(job.store);
      Outcome& outcome = outcomes[static_cast<size_t>(rank)];
      try {
        outcome.saved = run_save(transport, state, planner, writer);
      } catch (const CheckpointError& error) {
        outcome.error = std::make_shared<const CheckpointError>(error);
      }
    });
    // A damaged vote is never taken for a vote.
    if (damager != 0 && message == 1) {
      EXPECT_FALSE(outcomes[0].ok());
    }
    const std::string content = content_of(job.store);
    EXPECT_TRUE(outcomes[0].ok() ? content != "nothing" : content == "nothing") << content;
    for (const Outcome& outcome : outcomes) {
      EXPECT_TRUE(outcome.ok() || outcome.error);
      if (outcome.error && outcome.error->committed() == Committed::kNo) {
        EXPECT_EQ(content, "nothing");
      }
    }
  }
}

}  // namespace
}  // namespace reshard
