// SPDX-License-Identifier: BSD-3-Clause
// SIGKILL at every named test point, after every system call that writes, and in the middle of every write, of a save
// by ranks that are processes: of one rank, and of all ranks at once. A killed process is not a power loss
// (power_loss_test.cpp): what the system was told stays.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <set>

#include "fault/jobs.h"
#include "fault/process_ranks.h"
#include "fault/system_calls.h"
#include "reshard/storage/checkpoint_manager.h"

namespace reshard {
namespace {

using testing::HasSubstr;

enum class Victims { kOneRank, kAllRanks };

bool writes(const SystemCallEvent& event) {
  switch (event.call) {
    case SystemCall::kOpen:
      return (event.flags & O_CREAT) != 0;
    case SystemCall::kWrite:
    case SystemCall::kSync:
    case SystemCall::kRename:
    case SystemCall::kUnlink:
    case SystemCall::kMkdir:
    case SystemCall::kRmdir:
    case SystemCall::kTruncate:
    case SystemCall::kLock:
      return true;
    default:
      return false;
  }
}

/// Kills at the nth moment that this process comes to. `where`, shared with the test, tells which that was.
class KillAt final : public SystemCallHook {
 public:
  using Where = std::array<char, 256>;
  KillAt(int nth, Victims victims, Where& where) : nth_(nth), victims_(victims), where_(where) {}

  SystemCallAction before(const SystemCallEvent& event) override {
    SystemCallAction action{.skip = event.call == SystemCall::kSync};  // a killed process loses nothing of it
    if (event.call != SystemCall::kWrite) return action;
    ssize_t size = 0;
    for (int i = 0; i < event.count; ++i) size += static_cast<ssize_t>(event.parts[i].iov_len);
    // Torn: after one byte, in the middle, but for one byte.
    for (const ssize_t part : {ssize_t{1}, size / 2, size - 1}) {
      if (++seen_ != nth_ || part <= 0) continue;
      torn_ = true;
      action.at_most = part;
    }
    return action;
  }
  void after(const SystemCallEvent& event, long, int) override {
    if (torn_) kill_at("in the middle of " + to_string(event));
    if (writes(event) && ++seen_ == nth_) kill_at("after " + to_string(event));
  }
  void test_point(std::string_view name) {
    if (++seen_ == nth_) kill_at("at test point " + std::string(name));
  }

 private:
  void kill_at(const std::string& where) {
    std::strncpy(where_.data(), where.c_str(), where_.size() - 1);
    ::kill(victims_ == Victims::kAllRanks ? 0 : ::getpid(), SIGKILL);
    for (;;) ::pause();
  }

  const int nth_;
  const Victims victims_;
  Where& where_;
  int seen_ = 0;
  bool torn_ = false;
};

/// Runs `body` on forked ranks; rank `victim` comes to its nth moment and is killed. Returns where, empty if it never
/// came so far.
std::string run_killed(size_t world_size, size_t victim, int nth, Victims victims,
                       const std::function<void(int, Transport&)>& body, std::vector<ProcessOutcome>& outcomes) {
  Shared<KillAt::Where> where(1);
  outcomes = run_processes(world_size, [&](int rank, Transport& transport) {
    KillAt kill(rank == static_cast<int>(victim) ? nth : -1, victims, where[0]);
    set_test_point_handler([&](std::string_view name) { kill.test_point(name); });
    const HookedSystemCalls hooked(kill);
    body(rank, transport);
  });
  return where[0].data();
}

class KillSweepTest : public testing::TestWithParam<size_t> {
 protected:
  /// Saves generation 2 over `before`, killed at every moment of every rank. Returns the number of states.
  int sweep(int before, Victims victims, const FileSystemWriterOptions& options, bool async = false) {
    const size_t world_size = GetParam();
    const Prepared prepared(before, world_size);
    std::vector<MemorySaveState> states = generation(2, world_size);
    std::set<std::string> places;
    std::set<std::string> points;
    int tried = 0;
    for (size_t victim = 0; victim < world_size; ++victim) {
      for (int nth = 1;; ++nth) {
        prepared.copy_to(directory_);
        std::vector<ProcessOutcome> outcomes;
        const std::string where = run_killed(
            world_size, victim, nth, victims,
            [&](int rank, Transport& transport) {
              if (async) return run_async_save(transport, states[static_cast<size_t>(rank)], directory_);
              DefaultSavePlanner planner;
              FileSystemWriter writer(directory_, options);
              run_save(transport, states[static_cast<size_t>(rank)], planner, writer);
            },
            outcomes);
        SCOPED_TRACE("rank " + std::to_string(victim) + " " + where + " (moment " + std::to_string(nth) + ")");
        if (where.empty()) {
          if (outcomes[victim].ok) break;
          ADD_FAILURE() << outcomes[victim].text.data();
          return tried;
        }
        ++tried;
        points.insert(where);
        EXPECT_TRUE(outcomes[victim].killed);
        const int found = generation_in(directory_);
        EXPECT_TRUE(found == before || found == 2) << found;
        for (size_t rank = 0; rank < world_size; ++rank) {
          if (outcomes[rank].killed) continue;
          EXPECT_EQ(victims, Victims::kOneRank);
          expect_true_report(outcomes[rank], rank, victim, found, before);
        }
        expect_next_save_works(directory_, 1);
        if (HasFailure()) return tried;
      }
    }
    for (const char* name : {"save.before_data_sync", "save.before_sidecar", "save.before_directory_sync",
                             "save.before_vote", "commit.before_rename", "commit.after_rename", "commit.after_sync"}) {
      EXPECT_TRUE(points.contains(std::string("at test point ") + name)) << name;
    }
    return tried;
  }

  static void expect_true_report(const ProcessOutcome& outcome, size_t rank, size_t victim, int found, int before) {
    SCOPED_TRACE("rank " + std::to_string(rank) + ": " + outcome.text.data());
    if (outcome.ok) {
      EXPECT_EQ(found, 2);
      return;
    }
    ASSERT_TRUE(outcome.checkpoint_error);
    EXPECT_THAT(outcome.text.data(), HasSubstr("rank " + std::to_string(victim) + " is lost"));
    if (outcome.committed != Committed::kUnknown) {
      EXPECT_EQ(found, outcome.committed == Committed::kNo ? before : 2);
    }
  }

  QuietLog quiet_;
  TemporaryDirectory place_;
  const std::string directory_ = place_ / "checkpoint";
};
INSTANTIATE_TEST_SUITE_P(Ranks, KillSweepTest, testing::Values(1, 4),
                         [](const auto& c) { return "World" + std::to_string(c.param); });

TEST_P(KillSweepTest, OldOrNewWheneverOneRankIsKilled) {
  int states = 0;
  for (const int before : {0, 1}) {
    states += sweep(before, Victims::kOneRank, {});
    states += sweep(before, Victims::kOneRank, {.single_file_per_rank = false});
    if (HasFailure()) return;
  }
  std::printf("killed: one of %zu ranks, %d states, checkpoints lost 0\n", GetParam(), states);
}

TEST_P(KillSweepTest, OldOrNewWheneverOneRankIsKilledInAnAsyncSave) {
  int states = 0;
  for (const int before : {0, 1}) {
    states += sweep(before, Victims::kOneRank, {}, /*async=*/true);
    if (HasFailure()) return;
  }
  std::printf("killed: one of %zu ranks in an async save, %d states, checkpoints lost 0\n", GetParam(), states);
}

TEST_P(KillSweepTest, OldOrNewWheneverAllRanksAreKilled) {
  if (GetParam() == 1) GTEST_SKIP() << "the same as one rank of one";
  int states = 0;
  for (const int before : {0, 1}) {
    states += sweep(before, Victims::kAllRanks, {});
    if (HasFailure()) return;
  }
  std::printf("killed: all of %zu ranks, %d states, checkpoints lost 0\n", GetParam(), states);
}

// A job with a CheckpointManager, killed at every moment of its start, its saves and its deletions, then started anew.
TEST(ManagerKillSweepTest, AtLeastKCommittedStepsRemainAndTheNextJobGoesOn) {
  const QuietLog quiet;
  constexpr int64_t kKeep = 2;
  int states = 0;
  for (int nth = 1;; ++nth) {
    TemporaryDirectory place;
    const std::string root = place / "run";
    const auto save_step = [&](int64_t step) {
      const std::vector<MemorySaveState> state = generation(static_cast<int>(step), 1);
      save_checkpoint(step_directory(root, step), state, {.sync_files = false});
    };
    {
      CheckpointManager manager(root, {.keep_last = kKeep});
      for (const int64_t step : {1, 2, 3}) save_step(step), manager.saved(step);
      // An abandoned save, to be cleaned up.
      std::filesystem::copy(step_directory(root, 3), step_directory(root, 4));
      std::filesystem::remove(step_directory(root, 4) + "/.metadata");
    }
    Shared<int64_t> saved(1);
    saved[0] = 3;
    std::vector<ProcessOutcome> outcomes;
    const std::string where = run_killed(
        1, 0, nth, Victims::kOneRank,
        [&](int, Transport&) {
          CheckpointManager manager(root, {.keep_last = kKeep});
          manager.resume();
          for (const int64_t step : {5, 6}) {
            save_step(step);
            saved[0] = step;
            manager.saved(step);
          }
        },
        outcomes);
    SCOPED_TRACE(where + "\n" + outcomes[0].text.data());
    const std::vector<int64_t> steps = committed_steps(root);
    EXPECT_GE(steps.size(), static_cast<size_t>(kKeep));
    EXPECT_GE(steps.back(), saved[0]);
    for (const int64_t step : steps) EXPECT_EQ(generation_in(step_directory(root, step)), step);
    CheckpointManager manager(root, {.keep_last = kKeep});  // takes the lock over
    EXPECT_EQ(manager.resume(), steps.back());
    EXPECT_EQ(names_in(root).size(), steps.size() + 1) << "only committed steps and the lock file";
    save_step(7);
    manager.saved(7);
    EXPECT_EQ(manager.steps(), (std::vector<int64_t>{steps.back(), 7}));
    if (HasFailure()) return;
    if (where.empty()) {
      EXPECT_TRUE(outcomes[0].ok);
      break;
    }
    ++states;
  }
  std::printf("killed: a job with a CheckpointManager, %d states, checkpoints lost 0\n", states);
}

}  // namespace
}  // namespace reshard
