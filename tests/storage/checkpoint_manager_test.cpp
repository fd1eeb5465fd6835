// SPDX-License-Identifier: BSD-3-Clause
// Kills and power losses of a job with a manager are in tests/fault.
#include "reshard/storage/checkpoint_manager.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "storage/generations.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class CheckpointManagerTest : public testing::Test {
 protected:
  void SetUp() override {
    set_log_sink([this](LogLevel level, std::string_view text) {
      if (level == LogLevel::kWarning) warnings_.emplace_back(text);
    });
  }
  void TearDown() override { set_log_sink(nullptr); }

  void save(int64_t step) { save_checkpoint(step_directory(root_, step), generation(static_cast<int>(step), 2)); }
  /// As a save that was killed before its commit leaves it.
  void abandon(int64_t step) {
    save(step);
    std::filesystem::remove(step_directory(root_, step) + "/.metadata");
    std::ofstream(step_directory(root_, step) + "/.metadata.tmp-0123") << "half";
  }
  bool exists(int64_t step) { return std::filesystem::exists(step_directory(root_, step)); }

  TemporaryDirectory place_;
  const std::string root_ = place_ / "run";
  std::vector<std::string> warnings_;
};

TEST_F(CheckpointManagerTest, StepsHaveDirectoriesOfTheirOwn) {
  EXPECT_EQ(step_directory("a/b", 0), "a/b/step-0");
  EXPECT_EQ(step_directory("", 12), "step-12");
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "wanted 0 or more, found -1", step_directory("a", -1));
}

TEST_F(CheckpointManagerTest, ARootIsMadeAndHasNoSteps) {
  EXPECT_THAT(committed_steps(root_), IsEmpty());
  CheckpointManager manager(root_);
  EXPECT_THAT(manager.steps(), IsEmpty());
  EXPECT_EQ(manager.latest(), std::nullopt);
  EXPECT_EQ(manager.resume(), std::nullopt);
}

TEST_F(CheckpointManagerTest, LatestIsTheLargestCommittedStep) {
  CheckpointManager manager(root_);
  for (const int64_t step : {9, 100, 20}) save(step);
  abandon(200);
  EXPECT_THAT(manager.steps(), ElementsAre(9, 20, 100));
  EXPECT_EQ(manager.latest(), 100);
  EXPECT_THAT(committed_steps(root_), ElementsAre(9, 20, 100));
}

TEST_F(CheckpointManagerTest, OnlyNamesThatStepDirectoryMakesAreSteps) {
  CheckpointManager manager(root_);
  save(7);
  for (const char* name :
       {"step-", "step-07", "step--1", "step-7x", "step-99999999999999999999", "step-+8", "Step-8"}) {
    std::filesystem::copy(step_directory(root_, 7), root_ + "/" + name);
  }
  std::ofstream(root_ + "/step-8") << "a file";
  std::filesystem::create_directories(step_directory(root_, 9) + "/.metadata");
  EXPECT_THAT(manager.steps(), ElementsAre(7));
}

TEST_F(CheckpointManagerTest, LatestThrowsRatherThanToNameAnOlderStep) {
  FaultFileSystem files;
  CheckpointManager manager(root_, {}, files);
  for (const int64_t step : {1, 2}) save(step);
  files.inject({.call = FileCall::kStatus, .nth = 2, .error = EIO});
  EXPECT_ERROR(ErrorCode::kIo, "step-2/.metadata", manager.latest());
  files.inject({.call = FileCall::kList, .error = EACCES});
  EXPECT_ERROR(ErrorCode::kIo, root_, manager.resume());
  EXPECT_EQ(manager.latest(), 2);
}

TEST_F(CheckpointManagerTest, KeepsTheLastK) {
  CheckpointManager manager(root_, {.keep_last = 2});
  for (int64_t step = 1; step <= 5; ++step) {
    save(step);
    manager.saved(step);
    EXPECT_EQ(manager.steps().size(), static_cast<size_t>(std::min<int64_t>(step, 2)));
  }
  EXPECT_THAT(manager.steps(), ElementsAre(4, 5));
  for (const int64_t step : {1, 2, 3}) EXPECT_FALSE(exists(step));
  EXPECT_EQ(loaded_generation(step_directory(root_, 4)), 4);
  EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(CheckpointManagerTest, KeepsAllByDefault) {
  CheckpointManager manager(root_);
  for (int64_t step = 1; step <= 4; ++step) save(step), manager.saved(step);
  EXPECT_THAT(manager.steps(), ElementsAre(1, 2, 3, 4));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "keep_last", CheckpointManager(place_ / "x", {.keep_last = -1}));
}

TEST_F(CheckpointManagerTest, TheStepJustSavedStaysAlsoIfItIsNoneOfTheLargest) {
  CheckpointManager manager(root_, {.keep_last = 1});
  for (const int64_t step : {10, 20}) save(step);
  save(15);
  manager.saved(15);
  EXPECT_THAT(manager.steps(), ElementsAre(15, 20));
}

TEST_F(CheckpointManagerTest, NothingIsDeletedForASaveThatIsNotCommitted) {
  CheckpointManager manager(root_, {.keep_last = 1});
  for (const int64_t step : {1, 2}) save(step);
  abandon(3);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "the step was not saved; file " + step_directory(root_, 3),
               manager.saved(3));
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "the step was not saved", manager.saved(4));
  EXPECT_THAT(manager.steps(), ElementsAre(1, 2));
}

TEST_F(CheckpointManagerTest, NothingIsDeletedBeforeTheNewStepIsDurable) {
  for (const uint64_t nth : {1, 2}) {
    FaultFileSystem files;
    CheckpointManager manager(root_, {.keep_last = 1}, files);
    for (const int64_t step : {1, 2}) save(step);
    files.inject({.call = FileCall::kSyncDirectory, .nth = nth, .error = EIO});
    manager.saved(2);
    EXPECT_THAT(manager.steps(), ElementsAre(1, 2));
    EXPECT_EQ(files.calls(FileCall::kRemove), 0U);
    ASSERT_EQ(warnings_.size(), nth);
  }
}

TEST_F(CheckpointManagerTest, RetentionNeverTouchesAStepThatIsNotCommitted) {
  CheckpointManager manager(root_, {.keep_last = 1});
  abandon(1);
  const auto names = local_file_system().list(step_directory(root_, 1));
  for (const int64_t step : {2, 3}) save(step), manager.saved(step);
  EXPECT_THAT(manager.steps(), ElementsAre(3));
  EXPECT_EQ(local_file_system().list(step_directory(root_, 1)), names);
}

TEST_F(CheckpointManagerTest, TheCatalogueGoesFirstAndDurably) {
  FaultFileSystem files;
  CheckpointManager manager(root_, {.keep_last = 1}, files);
  for (const int64_t step : {1, 2}) save(step);
  manager.saved(2);
  std::vector<std::string> effects;
  for (const FileCallRecord& call : files.trace()) {
    if (call.call == FileCall::kRemove || call.call == FileCall::kSyncDirectory ||
        call.call == FileCall::kRemoveDirectory) {
      effects.push_back(to_string(call));
    }
  }
  const std::string old = step_directory(root_, 1);
  ASSERT_GE(effects.size(), 6U);
  EXPECT_EQ(effects[0], "sync_directory " + step_directory(root_, 2));
  EXPECT_EQ(effects[1], "sync_directory " + root_);
  EXPECT_EQ(effects[2], "remove " + old + "/.metadata");
  EXPECT_EQ(effects[3], "sync_directory " + old);
  EXPECT_EQ(effects.back(), "rmdir " + old);
}

TEST_F(CheckpointManagerTest, ADeletionThatFailsIsAWarningAndIsTakenUpAgain) {
  FaultFileSystem files;
  CheckpointManager manager(root_, {.keep_last = 1}, files);
  for (const int64_t step : {1, 2, 3}) save(step);
  files.inject({.call = FileCall::kRemove, .nth = 2, .error = EACCES});  // a data file of step 1
  manager.saved(3);
  EXPECT_THAT(manager.steps(), ElementsAre(3));
  EXPECT_TRUE(exists(1));
  EXPECT_FALSE(exists(2)) << "the others are deleted all the same";
  ASSERT_EQ(warnings_.size(), 1U);
  EXPECT_THAT(warnings_[0], HasSubstr("step-1"));
  EXPECT_EQ(manager.resume(), 3);
  EXPECT_FALSE(exists(1));
}

TEST_F(CheckpointManagerTest, ResumeCleansUpAfterUnfinishedSavesAndNothingElse) {
  CheckpointManager manager(root_);
  save(1);
  abandon(2);
  abandon(3);
  std::ofstream(step_directory(root_, 3) + "/notes.txt") << "mine";
  std::filesystem::create_directories(root_ + "/step-4");
  std::filesystem::create_directories(root_ + "/logs");
  std::ofstream(root_ + "/logs/__0_0.distcp") << "mine";
  const auto names = local_file_system().list(step_directory(root_, 1));
  EXPECT_EQ(manager.resume(), 1);
  EXPECT_THAT(local_file_system().list(root_), ElementsAre(".reshard-lock", "logs", "step-1", "step-3"));
  EXPECT_THAT(local_file_system().list(step_directory(root_, 3)), ElementsAre("notes.txt"));
  EXPECT_TRUE(std::filesystem::exists(root_ + "/logs/__0_0.distcp"));
  EXPECT_EQ(local_file_system().list(step_directory(root_, 1)), names);
  EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(CheckpointManagerTest, CleanUpThatFailsIsAWarning) {
  FaultFileSystem files;
  CheckpointManager manager(root_, {}, files);
  save(1);
  abandon(2);
  files.inject({.call = FileCall::kRemove, .error = EACCES});
  EXPECT_EQ(manager.resume(), 1);
  ASSERT_EQ(warnings_.size(), 1U);
  EXPECT_THAT(warnings_[0], HasSubstr("step-2"));
}

TEST_F(CheckpointManagerTest, ASecondJobIsRefusedWithTheHoldersName) {
  std::optional<CheckpointManager> first(std::in_place, root_);
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  const std::string holder = "process " + std::to_string(::getpid()) + " on host " + host.data() + " since 20";
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, holder, CheckpointManager(root_));
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, root_, CheckpointManager(root_));
  const pid_t child = ::fork();
  if (child == 0) {
    const bool refused = static_cast<bool>(
        throws_error(ErrorCode::kFailedPrecondition, holder, [&] { CheckpointManager second(root_); }));
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_THAT(committed_steps(root_), IsEmpty()) << "readers take no lock";
  first.reset();
  CheckpointManager next(root_);
}

TEST_F(CheckpointManagerTest, TheLockOfADeadProcessIsTakenOver) {
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe(ready.data()), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    CheckpointManager holder(root_);
    static_cast<void>(!::write(ready[1], "x", 1));
    for (;;) ::pause();
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "process " + std::to_string(child), CheckpointManager(root_));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  for (const int fd : ready) ::close(fd);
  CheckpointManager next(root_);
  EXPECT_THAT(as_text(local_file_system().read_file(root_ + "/.reshard-lock", 1000)),
              HasSubstr("process " + std::to_string(::getpid())));
}

TEST_F(CheckpointManagerTest, AFailureToLockIsNamed) {
  FaultFileSystem files;
  files.inject({.call = FileCall::kLock, .error = ENOLCK});
  EXPECT_ERROR(ErrorCode::kIo, root_ + "/.reshard-lock", CheckpointManager(root_, {}, files));
}

// Two that delete the same steps, as a job and a person's script may: neither fails.
TEST_F(CheckpointManagerTest, TwoDeletersAreNoError) {
  for (int round = 0; round < 20; ++round) {
    TemporaryDirectory place;
    const std::string root = place / "run";
    for (int step = 1; step <= 4; ++step) {
      save_checkpoint(step_directory(root, step), generation(step, 1));
    }
    // A second manager past the lock, by a lock file that was removed.
    CheckpointManager first(root, {.keep_last = 1});
    std::filesystem::remove(root + "/.reshard-lock");
    CheckpointManager second(root, {.keep_last = 1});
    std::thread other([&] { second.saved(4); });
    first.saved(4);
    other.join();
    first.resume();
    EXPECT_THAT(first.steps(), ElementsAre(4));
    EXPECT_EQ(loaded_generation(step_directory(root, 4)), 4);
    EXPECT_THAT(local_file_system().list(root), ElementsAre(".reshard-lock", "step-4"));
  }
  EXPECT_THAT(warnings_, IsEmpty());
}

// Each call that a manager makes fails in turn: every step that is left is whole, and the next manager goes on.
TEST_F(CheckpointManagerTest, WhicheverCallFailsNoStepIsHalf) {
  int states = 0;
  for (const bool after_effect : {false, true}) {
    for (uint64_t nth = 1;; ++nth) {
      TemporaryDirectory place;
      const std::string root = place / "run";
      for (int step = 1; step <= 3; ++step) save_checkpoint(step_directory(root, step), generation(step, 1));
      std::filesystem::copy(step_directory(root, 3), step_directory(root, 9));
      std::filesystem::remove(step_directory(root, 9) + "/.metadata");
      FaultFileSystem files;
      files.inject({.nth = nth, .error = EIO, .after_effect = after_effect});
      try {
        CheckpointManager manager(root, {.keep_last = 1}, files);
        manager.resume();
        manager.saved(3);
      } catch (const Error& error) {
        EXPECT_THAT(error.what(), HasSubstr(root));
      }
      const auto trace = files.trace();
      if (nth > trace.size()) break;
      SCOPED_TRACE(to_string(trace[nth - 1]));
      ++states;
      const auto steps = committed_steps(root);
      ASSERT_FALSE(steps.empty());
      EXPECT_EQ(steps.back(), 3);
      for (const int64_t step : steps) EXPECT_EQ(loaded_generation(step_directory(root, step)), step);
      CheckpointManager next(root, {.keep_last = 1});
      EXPECT_EQ(next.resume(), 3);
      next.saved(3);
      EXPECT_THAT(local_file_system().list(root), ElementsAre(".reshard-lock", "step-3"));
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(states, 40);
}

}  // namespace
}  // namespace reshard
