// SPDX-License-Identifier: BSD-3-Clause
// A save over an older checkpoint, broken at every place where it can break: each call to the file system in turn
// fails, or does its work and reports a failure; each test point in turn throws. Whatever happens, a reader finds the
// old checkpoint or the new one, whole, and the error says which.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "storage/checkpoint_runs.h"
#include "storage/generations.h"
#include "support/fault_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::AnyOf;
using testing::HasSubstr;

struct Outcome {
  bool failed = false;
  Committed committed = Committed::kYes;
  std::string text;
};

Outcome try_save(const std::string& directory, int number, size_t world_size, FileSystem& files) {
  try {
    save_checkpoint(directory, generation(number, world_size), {}, files);
    return {};
  } catch (const CheckpointError& error) {
    return {true, error.committed(), error.what()};
  }
}

/// What must hold after a save of generation 2 over generation 1 that may have failed.
void check_outcome(const std::string& directory, const Outcome& outcome, const std::string& trace) {
  SCOPED_TRACE(trace + (outcome.failed ? "\n" + outcome.text : "\nno error"));
  const int found = loaded_generation(directory);
  if (!outcome.failed) {
    EXPECT_EQ(found, 2);
  } else {
    EXPECT_THAT(outcome.text, HasSubstr(directory)) << "the error does not name the file";
    EXPECT_THAT(outcome.text, HasSubstr("rank "));
    switch (outcome.committed) {
      case Committed::kNo:
        EXPECT_EQ(found, 1);
        break;
      case Committed::kYes:
        EXPECT_EQ(found, 2);
        break;
      case Committed::kUnknown:
        EXPECT_THAT(found, AnyOf(1, 2));
        break;
    }
  }
  // Nothing that is left stands in the way of the next save.
  const Outcome next = try_save(directory, 3, 1, local_file_system());
  EXPECT_FALSE(next.failed) << next.text;
  EXPECT_EQ(loaded_generation(directory), 3);
}

class CommitTest : public testing::TestWithParam<size_t> {
 protected:
  void SetUp() override {
    set_log_sink([](LogLevel, std::string_view) {});
  }
  void TearDown() override { set_log_sink(nullptr); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, CommitTest, testing::Values(1, 3),
                         [](const auto& c) { return "World" + std::to_string(c.param); });

TEST_P(CommitTest, OldOrNewWhicheverCallFails) {
  std::set<Committed> seen;
  for (const bool after_effect : {false, true}) {
    bool reached = true;
    int states = 0;
    for (uint64_t nth = 1; reached; ++nth) {
      TemporaryDirectory directory;
      save_checkpoint(directory.path(), generation(1, GetParam()));
      FaultFileSystem files;
      files.inject({.nth = nth, .error = EIO, .after_effect = after_effect});
      const Outcome outcome = try_save(directory.path(), 2, GetParam(), files);
      const auto trace = files.trace();
      reached = nth <= trace.size();
      if (outcome.failed) seen.insert(outcome.committed);
      if (reached) {
        ++states;
        check_outcome(directory.path(), outcome, (after_effect ? "after " : "at ") + to_string(trace[nth - 1]));
      }
      if (HasFailure()) return;
    }
    EXPECT_GT(states, 15);
  }
  EXPECT_TRUE(seen.contains(Committed::kNo));
  EXPECT_TRUE(seen.contains(Committed::kUnknown));
}

// As on a disk that died: nothing works from one call on, so nothing can be cleaned up either.
TEST_P(CommitTest, OldOrNewWhenNothingWorksFromOneCallOn) {
  bool reached = true;
  for (uint64_t nth = 1; reached; ++nth) {
    TemporaryDirectory directory;
    save_checkpoint(directory.path(), generation(1, GetParam()));
    FaultFileSystem files;
    files.inject({.nth = nth, .error = EIO, .forever = true, .torn_bytes = 7});
    const Outcome outcome = try_save(directory.path(), 2, GetParam(), files);
    const auto trace = files.trace();
    reached = nth <= trace.size();
    if (reached) check_outcome(directory.path(), outcome, "from " + to_string(trace[nth - 1]) + " on");
    if (HasFailure()) return;
  }
}

TEST_P(CommitTest, OldOrNewWhicheverTestPointThrows) {
  std::set<std::string> points;
  bool reached = true;
  for (int nth = 1; reached; ++nth) {
    TemporaryDirectory directory;
    save_checkpoint(directory.path(), generation(1, GetParam()));
    std::atomic<int> passed = 0;
    std::string hit;
    set_test_point_handler([&](std::string_view name) {
      if (++passed != nth) return;
      hit = name;
      throw Error(ErrorCode::kIo, "stopped by the test", {.file = directory.path()});
    });
    const Outcome outcome = try_save(directory.path(), 2, GetParam(), local_file_system());
    set_test_point_handler(nullptr);
    reached = !hit.empty();
    if (reached) {
      points.insert(hit);
      check_outcome(directory.path(), outcome, "at test point " + hit);
    }
    if (HasFailure()) return;
  }
  for (const char* name : {"save.before_data_sync", "save.before_sidecar", "save.before_directory_sync",
                           "commit.before_write", "commit.before_rename", "commit.after_rename", "commit.after_sync",
                           "save.before_cleanup", "save.during_cleanup"}) {
    EXPECT_TRUE(points.contains(name)) << name;
  }
}

// A reader that holds the old catalogue while a new one commits reads old values or gets an error, never new values.
TEST_P(CommitTest, AReaderOfTheReplacedCheckpointNeverSeesTheNewOne) {
  TemporaryDirectory directory;
  save_checkpoint(directory.path(), generation(1, GetParam()));
  FileSystemReader reader(directory.path());
  const Metadata metadata = reader.read_metadata();
  save_checkpoint(directory.path(), generation(2, GetParam()));
  MemoryLoadState state({replica_entry("weight", {6, 4})});
  DefaultLoadPlanner planner;
  planner.set_up_planner(state, metadata, true);
  reader.set_up_storage_reader(metadata);
  try {
    reader.read_data(planner.create_local_plan(), planner, {});
    ADD_FAILURE() << "the files of the old checkpoint should be gone";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kNotFound);
    EXPECT_EQ(error.context().key, "weight");
  }
}

}  // namespace
}  // namespace reshard
