// SPDX-License-Identifier: BSD-3-Clause
// Power loss at every moment of saves: from a trace of the system calls, every state that the disk may be found in
// (disk_model.h) is opened. It holds the old or the new checkpoint, whole; once save has returned, the new one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <unordered_set>

#include "fault/disk_model.h"
#include "fault/jobs.h"
#include "reshard/storage/checkpoint_manager.h"

namespace reshard {
namespace {

using Generations = std::set<int>;

struct Tally {
  uint64_t states = 0;
  uint64_t distinct = 0;
  uint64_t violations = 0;
  std::string first;  // violation
  Tally& operator+=(const Tally& other) {
    states += other.states;
    distinct += other.distinct;
    violations += other.violations;
    if (first.empty()) first = other.first;
    return *this;
  }
};

/// What may be found from op number `begin` of a trace on.
struct Phase {
  size_t begin;
  Generations allowed;
};

/// Keeps the trace of saves into one directory, and what each moment allows.
class Story {
 public:
  Story(size_t world_size, int before) : world_size_(world_size) {
    Prepared(before, world_size).copy_to(directory_);
    trace_.emplace(place_.path());
    phases_.push_back({0, {before}});
  }

  DiskTrace& trace() { return *trace_; }

  RankOutcome save(int number) {
    Generations allowed = phases_.back().allowed;
    const Generations before = allowed;
    allowed.insert(number);
    phases_.push_back({trace_->ops().size(), allowed});
    RankOutcome outcome;
    {
      const HookedSystemCalls hooked(*trace_);
      outcome = try_save(directory_, number, world_size_)[0];
    }
    if (outcome.ok) {
      phases_.push_back({trace_->ops().size(), {number}});
    } else if (!trace_->died() && outcome.error && outcome.error->committed() == Committed::kNo) {
      phases_.push_back({trace_->ops().size(), before});
    }
    return outcome;
  }

  /// Opens every state at every moment from op `from` on, leaving out the ops that `without` tells: as if the library
  /// had not made these calls.
  Tally check(const std::function<bool(const DiskOp&)>& without = {}, size_t from = 0) const {
    Tally tally;
    DiskModel disk(*trace_);
    std::unordered_set<std::string> seen;
    for (size_t crash = 0; crash <= trace_->ops().size(); ++crash) {
      if (crash > 0) {
        const DiskOp& op = trace_->ops()[crash - 1];
        if (!without || !without(op)) disk.apply(op);
      }
      if (crash < from) continue;
      // At a boundary both hold: the op is done, and save has not returned or has.
      std::vector<const Generations*> allowed;
      for (size_t p = 0; p < phases_.size(); ++p) {
        if (phases_[p].begin <= crash && (p + 1 == phases_.size() || phases_[p + 1].begin >= crash)) {
          allowed.push_back(&phases_[p].allowed);
        }
      }
      const Generations& strictest = *allowed.back();
      tally.states += disk.each_state([&](const auto& files, const auto& directories) {
        std::string key;
        for (const auto& [path, bytes] : files) {
          key += path + '\0' + std::to_string(std::hash<std::string_view>{}(as_text(*bytes))) + '\0';
        }
        for (const std::string& name : directories) key += name + '\0';
        for (const int number : strictest) key += std::to_string(number) + ' ';
        if (!seen.insert(std::move(key)).second) return;
        ++tally.distinct;
        MemoryFileSystem opened(files, directories);
        std::string problem;
        const int found = examine(directory_, opened, problem);
        if (problem.empty() && !strictest.contains(found)) problem = "found generation " + std::to_string(found);
        if (problem.empty()) {
          // What is left does not stand in the way of the next save.
          const auto next = try_save(directory_, 99, 1, opened);
          if (!next[0].ok || examine(directory_, opened, problem) != 99) problem += "; then: " + next[0].text();
        }
        if (problem.empty()) return;
        if (tally.violations++ == 0) {
          tally.first = "after op " + std::to_string(crash) + ": " + problem;
          for (const auto& [path, bytes] : files) {
            tally.first += "\n  " + path + " " + std::to_string(bytes->size());
          }
        }
      });
    }
    return tally;
  }

 private:
  size_t world_size_;
  TemporaryDirectory place_;
  const std::string directory_ = place_ / "checkpoint";
  std::optional<DiskTrace> trace_;
  std::vector<Phase> phases_;
};

class PowerLossTest : public testing::TestWithParam<size_t> {
 protected:
  QuietLog quiet_;
};
INSTANTIATE_TEST_SUITE_P(Ranks, PowerLossTest, testing::Values(1, 4),
                         [](const auto& c) { return "World" + std::to_string(c.param); });

void print(const char* what, size_t world_size, const Tally& tally) {
  std::printf("power loss, %s, %zu ranks: %llu legal states, %llu distinct opened, checkpoints lost %llu\n", what,
              world_size, static_cast<unsigned long long>(tally.states),
              static_cast<unsigned long long>(tally.distinct), static_cast<unsigned long long>(tally.violations));
}

TEST_P(PowerLossTest, OldOrNewAtEveryMomentOfTwoSaves) {
  for (const int before : {0, 1}) {
    Story story(GetParam(), before);
    ASSERT_TRUE(story.save(2).ok);
    ASSERT_TRUE(story.save(3).ok);
    const Tally tally = story.check();
    EXPECT_EQ(tally.violations, 0U) << tally.first;
    EXPECT_GT(tally.distinct, 50U);
    print(before == 0 ? "two saves into an empty place" : "two saves over an older checkpoint", GetParam(), tally);
  }
}

// Each sync is needed: without it some state is lost. Shows, too, that the check can fail.
TEST_P(PowerLossTest, WithoutAnyOneOfItsSyncsASaveWouldLoseACheckpoint) {
  Story story(GetParam(), 0);
  ASSERT_TRUE(story.save(2).ok);
  size_t rename = 0;
  const auto& ops = story.trace().ops();
  while (ops[rename].kind != DiskOp::kRename) ++rename;
  const auto is_before_commit = [&](const DiskOp& op) { return &op < &ops[rename]; };
  const auto lost_without = [&](const std::function<bool(const DiskOp&)>& without) {
    return story.check(without).violations;
  };
  EXPECT_EQ(lost_without([](const DiskOp&) { return false; }), 0U);
  EXPECT_GT(lost_without([](const DiskOp& op) { return op.kind == DiskOp::kSyncFile && op.path.ends_with(".distcp"); }),
            0U);
  EXPECT_GT(lost_without([](const DiskOp& op) {
              return op.kind == DiskOp::kSyncFile && op.path.find("/.reshard-") != std::string::npos;
            }),
            0U);
  EXPECT_GT(lost_without([](const DiskOp& op) {
              return op.kind == DiskOp::kSyncFile && op.path.find("/.metadata") != std::string::npos;
            }),
            0U);
  EXPECT_GT(lost_without([&](const DiskOp& op) {
              return op.kind == DiskOp::kSyncDirectory && op.path.ends_with("/checkpoint") && is_before_commit(op);
            }),
            0U);
  EXPECT_GT(lost_without([&](const DiskOp& op) {
              return op.kind == DiskOp::kSyncDirectory && op.path.ends_with("/checkpoint") && !is_before_commit(op);
            }),
            0U);
  EXPECT_GT(lost_without([](const DiskOp& op) {
              return op.kind == DiskOp::kSyncDirectory && !op.path.ends_with("/checkpoint");
            }),
            0U);
}

// One fsync fails, and what it was for stays unsure for good; then another save goes on in the same directory.
TEST(PowerLossAfterFaultTest, OldOrNewAfterASyncThatFailed) {
  const QuietLog quiet;
  for (const size_t world_size : {1, 2}) {
    Tally all;
    for (int nth = 1;; ++nth) {
      Story story(world_size, 1);
      story.trace().fail_sync(nth);
      const RankOutcome outcome = story.save(2);
      if (!story.trace().sync_failed()) break;
      EXPECT_FALSE(outcome.ok);
      ASSERT_TRUE(story.save(3).ok);
      all += story.check();
      ASSERT_EQ(all.violations, 0U) << "fsync " << nth << ", " << outcome.text() << "\n" << all.first;
    }
    print("a failed fsync, then another save", world_size, all);
  }
}

// A save is killed at any call, and the job is started anew: what the first one made and did not sync is still unsure.
TEST(PowerLossAfterFaultTest, OldOrNewWhenTheSaveAfterAKilledOneIsStruck) {
  const QuietLog quiet;
  Tally all;
  for (const int before : {0, 1}) {
    for (int nth = 1;; ++nth) {
      Story story(1, before);
      story.trace().die_at(nth);
      const RankOutcome outcome = story.save(2);
      if (outcome.ok) break;
      story.trace().die_at(0);
      const size_t from = story.trace().ops().size();
      ASSERT_TRUE(story.save(3).ok);
      all += story.check({}, from);
      ASSERT_EQ(all.violations, 0U) << "killed at call " << nth << "\n" << all.first;
    }
  }
  print("a killed save, then another", 1, all);
}

// A job with a CheckpointManager: every step that is there is whole, none that was saved is missing but for the old ones.
TEST(PowerLossManagerTest, AtLeastKCommittedStepsRemainWhole) {
  const QuietLog quiet;
  constexpr size_t kKeep = 2;
  TemporaryDirectory place;
  const std::string root = place / "run";
  DiskTrace trace(place.path());
  std::vector<std::pair<size_t, int64_t>> saved;  // from this op on, this is the last step that was saved
  {
    const HookedSystemCalls hooked(trace);
    CheckpointManager manager(root, {.keep_last = kKeep});
    manager.resume();
    for (int step = 1; step <= 5; ++step) {
      ASSERT_TRUE(try_save(step_directory(root, step), step, 1)[0].ok);
      saved.emplace_back(trace.ops().size(), step);
      manager.saved(step);
    }
  }
  const auto check = [&](const std::function<bool(const DiskOp&)>& without) {
    Tally tally;
    DiskModel disk(trace);
    std::unordered_set<std::string> seen;
    size_t number_saved = 0;
    for (size_t crash = 0; crash <= trace.ops().size(); ++crash) {
      if (crash > 0 && (!without || !without(trace.ops()[crash - 1]))) disk.apply(trace.ops()[crash - 1]);
      while (number_saved < saved.size() && saved[number_saved].first <= crash) ++number_saved;
      tally.states += disk.each_state([&](const auto& files, const auto& directories) {
        std::string key = std::to_string(number_saved);
        for (const auto& [path, bytes] : files) {
          key += path + '\0' + std::to_string(std::hash<std::string_view>{}(as_text(*bytes))) + '\0';
        }
        if (!seen.insert(std::move(key)).second) return;
        ++tally.distinct;
        MemoryFileSystem opened(files, directories);
        const std::vector<int64_t> steps = committed_steps(root, opened);
        std::string problem;
        for (const int64_t step : steps) {
          if (examine(step_directory(root, step), opened, problem) != step) problem += "; step " + std::to_string(step);
        }
        if (number_saved > 0 && (steps.empty() || steps.back() < saved[number_saved - 1].second)) {
          problem += "the last step is gone";
        }
        if (steps.size() < std::min(number_saved, kKeep)) problem += "too few steps are left";
        if (problem.empty()) return;
        if (tally.violations++ == 0) tally.first = "after op " + std::to_string(crash) + ": " + problem;
      });
    }
    return tally;
  };
  const Tally tally = check({});
  EXPECT_EQ(tally.violations, 0U) << tally.first;
  print("a job with a CheckpointManager", 1, tally);

  // Without the sync between taking the catalogue away and the data, a step could come back without its data.
  size_t op = 0;
  const auto& ops = trace.ops();
  while (ops[op].kind != DiskOp::kUnlink || !ops[op].path.ends_with("/.metadata")) ++op;
  ASSERT_EQ(ops[op + 1].kind, DiskOp::kSyncDirectory);
  EXPECT_GT(check([&](const DiskOp& left_out) { return &left_out == &ops[op + 1]; }).violations, 0U);
}

}  // namespace
}  // namespace reshard
