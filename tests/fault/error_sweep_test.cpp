// SPDX-License-Identifier: BSD-3-Clause
// Every kind of failure of every system call of a save and of a load, on each rank, until a run completes without one.
// After each: one outcome on all ranks, which names rank and file and tells the truth about the commit; the old or the
// new checkpoint whole; nothing left that is in the way.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <functional>
#include <mutex>
#include <set>

#include "fault/jobs.h"
#include "fault/system_calls.h"
#include "support/fault_file_system.h"

namespace reshard {
namespace {

using testing::AnyOf;
using testing::HasSubstr;

struct Mode {
  const char* name;
  int error;                         // errno, or 0 where the call moves fewer bytes
  std::optional<SystemCall> call{};  // unset: every call
  bool after_effect = false;         // done, and reported as failed
  bool forever = false;              // and every later one of the rank
  ssize_t at_most = -1;
  bool harmless = false;  // must not be noticed
};

constexpr Mode kModes[] = {
    {.name = "EIO", .error = EIO},
    {.name = "ENOSPC", .error = ENOSPC},
    {.name = "EDQUOT", .error = EDQUOT},
    {.name = "EACCES", .error = EACCES},
    {.name = "EMFILE", .error = EMFILE},
    {.name = "EINTR at open", .error = EINTR, .call = SystemCall::kOpen, .harmless = true},
    {.name = "EINTR at read", .error = EINTR, .call = SystemCall::kRead, .harmless = true},
    {.name = "EINTR at write", .error = EINTR, .call = SystemCall::kWrite, .harmless = true},
    {.name = "EINTR at fsync", .error = EINTR, .call = SystemCall::kSync, .harmless = true},
    {.name = "EINTR at close", .error = EINTR, .call = SystemCall::kClose, .after_effect = true, .harmless = true},
    {.name = "EINTR at opendir", .error = EINTR, .call = SystemCall::kOpendir, .harmless = true},
    {.name = "short read", .error = 0, .call = SystemCall::kRead, .at_most = 7, .harmless = true},
    {.name = "short write", .error = 0, .call = SystemCall::kWrite, .at_most = 7, .harmless = true},
    {.name = "read of nothing", .error = 0, .call = SystemCall::kRead, .at_most = 0},
    {.name = "write of nothing", .error = 0, .call = SystemCall::kWrite, .at_most = 0},
    {.name = "failing fsync", .error = EIO, .call = SystemCall::kSync, .after_effect = true},
    {.name = "failing close", .error = EIO, .call = SystemCall::kClose, .after_effect = true},
    {.name = "failing rename", .error = EIO, .call = SystemCall::kRename},
    {.name = "rename done and reported as failed", .error = EIO, .call = SystemCall::kRename, .after_effect = true},
    {.name = "anything done and reported as failed", .error = EIO, .after_effect = true},
    {.name = "a disk that died", .error = EIO, .forever = true},
    {.name = "a disk that is full", .error = ENOSPC, .call = SystemCall::kWrite, .forever = true},
};

/// Fails the nth call of one rank that the mode is meant for. What waits for the disk is answered without one.
class OneFault final : public SystemCallHook {
 public:
  OneFault(const Mode& mode, int rank, int nth) : mode_(mode), rank_(rank), nth_(nth) {}
  SystemCallAction before(const SystemCallEvent& event) override {
    const bool waits = event.call == SystemCall::kSync || event.call == SystemCall::kWriteBack;
    SystemCallAction action{.skip = waits};
    if (event.rank != rank_ || (mode_.call && event.call != *mode_.call)) return action;
    const int number = ++seen_;
    if (number < nth_ || (number > nth_ && !mode_.forever)) return action;
    if (number == nth_) {
      hit_ = true;
      const std::lock_guard lock(mutex_);
      what_ = to_string(event);
    }
    // A close that fails closes all the same, and closedir() of what opendir() opened is not seen.
    const bool after = mode_.after_effect || event.call == SystemCall::kClose;
    return {
        .error = mode_.error, .after_effect = after && event.call != SystemCall::kOpendir, .at_most = mode_.at_most};
  }
  bool hit() const { return hit_; }
  std::string what() const {
    const std::lock_guard lock(mutex_);
    return what_;
  }

 private:
  const Mode& mode_;
  const int rank_;
  const int nth_;
  std::atomic<int> seen_ = 0;
  std::atomic<bool> hit_ = false;
  mutable std::mutex mutex_;
  std::string what_;
};

void expect_names_rank_and_file(const RankOutcome& outcome, int rank, const std::string& directory) {
  if (outcome.ok || !outcome.error) return;
  const std::string text = outcome.text();
  EXPECT_THAT(text, HasSubstr("rank " + std::to_string(rank) + ":"));
  EXPECT_EQ(outcome.error->failures().size(), 1U) << text;
  EXPECT_THAT(text, AnyOf(HasSubstr(directory), HasSubstr(".distcp")));
}

class ErrorSweepTest : public testing::TestWithParam<size_t> {
 protected:
  size_t world_size() const { return GetParam(); }
  QuietLog quiet_;
  TemporaryDirectory place_;
  const std::string directory_ = place_ / "checkpoint";
};
INSTANTIATE_TEST_SUITE_P(Ranks, ErrorSweepTest, testing::Values(1, 4),
                         [](const auto& c) { return "World" + std::to_string(c.param); });

class SaveErrorSweepTest : public ErrorSweepTest {
 protected:
  using Save = std::function<std::vector<RankOutcome>(const std::string& directory, int number, size_t world_size)>;
  void sweep(const char* what, int before, const Save& save) {
    const Prepared prepared(before, world_size());
    int states = 0;
    std::set<Committed> seen;
    for (const Mode& mode : kModes) {
      int tried = 0;
      for (size_t rank = 0; rank < world_size(); ++rank) {
        for (int nth = 1;; ++nth) {
          prepared.copy_to(directory_);
          const auto names = names_in(directory_);
          OneFault fault(mode, static_cast<int>(rank), nth);
          std::vector<RankOutcome> outcomes;
          {
            const HookedSystemCalls hooked(fault);
            outcomes = save(directory_, 2, world_size());
          }
          SCOPED_TRACE(std::string(mode.name) + " on rank " + std::to_string(rank) + ", call " + std::to_string(nth) +
                       ": " + fault.what() + "\n" + outcomes[0].text());
          expect_one_outcome(outcomes);
          if (!fault.hit()) {
            EXPECT_TRUE(outcomes[0].ok);
            break;
          }
          ++tried;
          if (mode.harmless) {
            EXPECT_TRUE(outcomes[0].ok);
          }
          expect_names_rank_and_file(outcomes[0], static_cast<int>(rank), place_.path());
          expect_generation(generation_in(directory_), before, 2, outcomes[0]);
          if (outcomes[0].error) seen.insert(outcomes[0].error->committed());
          // The one fault is over: what the save had made, it could remove. An open that reported a failure and was made
          // leaves a file that nobody knows of.
          if (outcomes[0].error && outcomes[0].error->committed() == Committed::kNo && !mode.forever &&
              !mode.after_effect) {
            EXPECT_EQ(names_in(directory_), names);
          }
          expect_next_save_works(directory_, world_size());
          if (HasFailure()) return;
        }
      }
      // A fresh save reads nothing.
      EXPECT_TRUE(tried > 0 || (before == 0 && mode.call == SystemCall::kRead)) << mode.name;
      states += tried;
    }
    EXPECT_TRUE(seen.contains(Committed::kNo) && seen.contains(Committed::kUnknown));
    std::printf("%s over %s, %zu ranks: %zu modes, %d modes x calls tried, 0 violations\n", what,
                before == 0 ? "nothing" : "an older checkpoint", world_size(), std::size(kModes), states);
  }
};
INSTANTIATE_TEST_SUITE_P(Ranks, SaveErrorSweepTest, testing::Values(1, 4),
                         [](const auto& c) { return "World" + std::to_string(c.param); });

constexpr auto kBlocking = [](const std::string& directory, int number, size_t world_size) {
  return try_save(directory, number, world_size);
};

TEST_P(SaveErrorSweepTest, FreshSave) { sweep("save", 0, kBlocking); }
TEST_P(SaveErrorSweepTest, SaveOverAnOlderCheckpoint) { sweep("save", 1, kBlocking); }
TEST_P(SaveErrorSweepTest, CompressedSaveOverAnOlderCheckpoint) {
  sweep("compressed save", 1, [](const std::string& directory, int number, size_t world_size) {
    return try_save(directory, number, world_size, local_file_system(),
                    {.extensions = {std::make_shared<ZStandard>()}});
  });
}
TEST_P(SaveErrorSweepTest, FreshAsyncSave) { sweep("async save", 0, try_async_save); }
TEST_P(SaveErrorSweepTest, AsyncSaveOverAnOlderCheckpoint) { sweep("async save", 1, try_async_save); }

// Only files of more than 64 MiB are sent to the device piece by piece, so the sweep does not come to that call.
TEST(LargeFileErrorTest, AWriteBackThatFailsEndsTheSaveAndOneThatCannotBeIsPassedOver) {
  const QuietLog quiet;
  MemorySaveState large;
  large.add_value("large", std::string((64 << 20) + 1, 'x'));
  for (const int error : {EIO, EINTR, EINVAL, ENOSYS}) {
    const TemporaryDirectory place;
    const std::string directory = place / "checkpoint";
    const Mode mode{.name = "write back", .error = error, .call = SystemCall::kWriteBack};
    OneFault fault(mode, 0, 1);
    std::vector<RankOutcome> outcomes;
    {
      const HookedSystemCalls hooked(fault);
      outcomes = run_job(1, [&](size_t, Transport& transport) {
        DefaultSavePlanner planner;
        FileSystemWriter writer(directory);
        run_save(transport, large, planner, writer);
      });
    }
    SCOPED_TRACE(std::to_string(error) + ": " + outcomes[0].text());
    EXPECT_TRUE(fault.hit());
    if (error == EIO) {
      EXPECT_THAT(outcomes[0].text(), HasSubstr("write back"));
      expect_names_rank_and_file(outcomes[0], 0, place.path());
      EXPECT_THAT(names_in(directory), testing::IsEmpty());
    } else {
      EXPECT_TRUE(outcomes[0].ok);
    }
  }
}

TEST_P(ErrorSweepTest, Load) {
  const Prepared prepared(1, world_size());
  prepared.copy_to(directory_);
  const auto names = names_in(directory_);
  int states = 0;
  for (const Mode& mode : kModes) {
    for (size_t rank = 0; rank < world_size(); ++rank) {
      for (int nth = 1;; ++nth) {
        OneFault fault(mode, static_cast<int>(rank), nth);
        std::vector<MemoryLoadState> loaded;
        for (size_t r = 0; r < world_size(); ++r) loaded.push_back(generation_destination());
        std::vector<RankOutcome> outcomes;
        {
          const HookedSystemCalls hooked(fault);
          outcomes = try_load(directory_, loaded);
        }
        SCOPED_TRACE(std::string(mode.name) + " on rank " + std::to_string(rank) + ", call " + std::to_string(nth) +
                     ": " + fault.what() + "\n" + outcomes[0].text());
        expect_one_outcome(outcomes);
        if (outcomes[0].ok) {
          for (MemoryLoadState& state : loaded) EXPECT_EQ(number_of(state), 1);
        }
        if (!fault.hit()) {
          EXPECT_TRUE(outcomes[0].ok);
          break;
        }
        ++states;
        if (mode.harmless) {
          EXPECT_TRUE(outcomes[0].ok);
        }
        expect_names_rank_and_file(outcomes[0], static_cast<int>(rank), place_.path());
        EXPECT_EQ(names_in(directory_), names);
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_EQ(generation_in(directory_), 1);
  std::printf("load, %zu ranks: %zu modes, %d modes x calls tried, 0 violations\n", world_size(), std::size(kModes),
              states);
}

// Memory that ends at one call to the seam: the file is named, too.
TEST_P(ErrorSweepTest, OutOfMemoryInEachCallToTheFileSystem) {
  const Prepared prepared(1, world_size());
  int states = 0;
  for (uint64_t nth = 1;; ++nth) {
    prepared.copy_to(directory_);
    FaultFileSystem files;
    files.inject({.nth = nth, .out_of_memory = true});
    const auto outcomes = try_save(directory_, 2, world_size(), files, {.sync_files = false});
    const auto trace = files.trace();
    SCOPED_TRACE((nth <= trace.size() ? to_string(trace[nth - 1]) : "") + "\n" + outcomes[0].text());
    expect_one_outcome(outcomes);
    if (nth > trace.size()) break;
    ++states;
    if (!outcomes[0].ok) {
      EXPECT_THAT(outcomes[0].text(), HasSubstr("out of memory"));
    }
    expect_generation(generation_in(directory_), 1, 2, outcomes[0]);
    expect_next_save_works(directory_, world_size());
    if (HasFailure()) return;
  }
  std::printf("out of memory in the file system, %zu ranks: %d calls tried, 0 violations\n", world_size(), states);
}

// Where the memory for a message is missing, the rank is a silent one to the others until the deadline.
constexpr std::chrono::milliseconds kShortSilence{300};

// One allocation fails; alone also a few in a row, so that the handler of the first finds no memory either.
TEST_P(ErrorSweepTest, OutOfMemoryAtEachAllocationOfASave) {
  const Prepared prepared(1, world_size());
  int states = 0;
  for (const uint64_t count : {1, 4}) {
    if (world_size() > 1 && count > 1) continue;  // a rank that cannot even report is a silent one to the others
    for (size_t rank = 0; rank < std::min<size_t>(world_size(), 2); ++rank) {
      // With 4 ranks every third one: the code is the same.
      for (uint64_t first = 1;; first += world_size() == 1 && count == 1 ? 1 : 3) {
        prepared.copy_to(directory_);
        std::vector<RankOutcome> outcomes;
        uint64_t seen = 0;
        {
          const std::vector<MemorySaveState> saved = generation(2, world_size());
          outcomes = run_job(
              world_size(),
              [&](size_t r, Transport& transport) {
                DefaultSavePlanner planner;
                FileSystemWriter writer(directory_, {.sync_files = false});
                std::optional<FailingAllocations> failing;
                if (r == rank) failing.emplace(static_cast<int>(rank), first, count);
                struct Note {
                  std::optional<FailingAllocations>& failing;
                  uint64_t& seen;
                  ~Note() {
                    if (failing) seen = failing->seen();
                  }
                } const note{failing, seen};
                run_save(transport, saved[r], planner, writer);
              },
              kShortSilence);
        }
        SCOPED_TRACE("rank " + std::to_string(rank) + ", allocation " + std::to_string(first) + " and " +
                     std::to_string(count - 1) + " more\n" + outcomes[0].text());
        for (const RankOutcome& outcome : outcomes) {
          EXPECT_TRUE(outcome.other_error.empty() || (count > 1 && outcome.other_error == "std::bad_alloc"))
              << outcome.other_error;
          expect_generation(generation_in(directory_), 1, 2, outcome);
        }
        if (seen < first) break;
        ++states;
        expect_next_save_works(directory_, world_size());
        if (HasFailure()) return;
      }
    }
  }
  std::printf("out of memory in a save, %zu ranks: %d allocations tried, 0 violations\n", world_size(), states);
}

TEST_P(ErrorSweepTest, OutOfMemoryAtEachAllocationOfALoad) {
  Prepared(1, world_size()).copy_to(directory_);
  int states = 0;
  for (uint64_t first = 1;; first += world_size() == 1 ? 1 : 3) {
    std::vector<MemoryLoadState> loaded;
    for (size_t r = 0; r < world_size(); ++r) loaded.push_back(generation_destination());
    const int rank = static_cast<int>(world_size()) - 1;
    const FailingAllocations failing(rank, first, 1);
    const auto outcomes = run_job(
        world_size(),
        [&](size_t r, Transport& transport) {
          DefaultLoadPlanner planner;
          FileSystemReader reader(directory_);
          run_load(transport, loaded[r], planner, reader);
        },
        kShortSilence);
    const uint64_t seen = failing.seen();
    SCOPED_TRACE("allocation " + std::to_string(first) + "\n" + outcomes[0].text());
    for (size_t r = 0; r < world_size(); ++r) {
      // What is made before the load begins counts, too.
      EXPECT_TRUE(outcomes[r].other_error.empty() || outcomes[r].other_error == "std::bad_alloc");
      if (outcomes[r].ok) {
        EXPECT_EQ(number_of(loaded[r]), 1);
      }
    }
    if (seen < first) {
      EXPECT_TRUE(outcomes[0].ok);
      break;
    }
    ++states;
    if (HasFailure()) return;
  }
  EXPECT_EQ(generation_in(directory_), 1);
  std::printf("out of memory in a load, %zu ranks: %d allocations tried, 0 violations\n", world_size(), states);
}

}  // namespace
}  // namespace reshard
