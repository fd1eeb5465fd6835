// SPDX-License-Identifier: BSD-3-Clause
// Ranks that throw, exit, are killed or stopped, in each step of a save and a load: real processes, the store, the file
// system. (tests/protocol has every step and rank of this with simulated transports.)
//
// A case is one set of processes with a table of rounds. In a round one or two groups each save a checkpoint, then save
// or load again with a failure at one test point. Every other rank must get one CheckpointError that names the rank and
// the step, in time, and the directory must hold what committed() says. Dead ranks are missing in later rounds.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/core/hooks.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using ::testing::HasSubstr;

constexpr milliseconds kSilence{2000};
constexpr milliseconds kGrace{1000};

enum class Fault { kThrow, kExit, kKill, kStop };

struct Scenario {
  std::vector<int> members;  // global ranks; the first coordinates
  Fault fault;
  int victim;         // global rank
  const char* point;  // where it happens
  /// The rank that comes to the point and fails the victim, which waits for it meanwhile; or -1: the victim itself.
  int by = -1;

  int actor() const { return by < 0 ? victim : by; }
  bool is_load() const { return std::string_view(point).starts_with("load."); }
  bool is_member(int rank) const { return std::find(members.begin(), members.end(), rank) != members.end(); }
  /// In the group.
  int position(int rank) const {
    return static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin());
  }
  bool of_coordinator() const { return victim == members.front(); }
  /// The process of rank 0, which hosts the store, is gone or does not answer.
  bool loses_store() const { return victim == 0 && fault != Fault::kThrow; }
  bool kills() const { return fault == Fault::kExit || fault == Fault::kKill; }
  std::string text() const {
    static constexpr const char* kNames[] = {"throws", "exits", "is killed", "is stopped"};
    return "global rank " + std::to_string(victim) + ", with a group of " + std::to_string(members.size()) + ", " +
           kNames[static_cast<int>(fault)] + (by < 0 ? " at " : ", waiting, when the coordinator is at ") + point;
  }
};
/// Run side by side; their members differ.
using Round = std::vector<Scenario>;

constexpr std::string_view kPlanPoints[] = {"save.planned", "save.planned_globally", "save.placed", "load.planned"};

/// Where the survivors are when they hear of it.
std::string step_of(const Scenario& s) {
  const std::string_view point = s.point;
  if (point == "load.before_metadata") return "metadata";
  if (point == "load.metadata_read") return s.by < 0 ? "metadata" : "plan";
  if (point == "save.placed" && s.by >= 0) return "write";
  if (std::find(std::begin(kPlanPoints), std::end(kPlanPoints), point) != std::end(kPlanPoints)) return "plan";
  if (s.is_load()) return "read";
  const bool committing = point == "save.before_commit" || point == "save.after_commit";
  return committing && s.fault == Fault::kThrow ? "commit" : "write";
}

/// All votes are in, and nobody needs the victim for the commit.
bool goes_on_without(const Scenario& s) { return s.by >= 0 && std::string_view(s.point) == "save.before_commit"; }

std::map<int, RankEnd> ends_of(const std::vector<Round>& rounds) {
  std::map<int, RankEnd> ends;
  for (const Round& round : rounds) {
    for (const Scenario& s : round) {
      if (s.fault == Fault::kExit) ends[s.victim] = exits(3);
      if (s.fault == Fault::kKill) ends[s.victim] = killed_by(SIGKILL);
    }
  }
  return ends;
}

/// What all ranks of the case see.
struct SharedPage {
  std::atomic<int64_t> failed_at[2];  // by scenario of the round; nanoseconds of Clock
  std::atomic<int> combinations;
  std::atomic<int64_t> longest_wait;
};

struct Outcome {
  std::optional<CheckpointError> error;
  std::string other_error;
  milliseconds waited{};  // since the failure
};

class RankFailureTestFixture : public TorchDistributedTest {
 protected:
  void run(const std::vector<Round>& rounds) {
    const auto world = process_group();
    map_page();
    at::Tensor pid = at::full({1}, static_cast<int64_t>(getpid()), at::kLong);
    pids_ = at::empty({world_size()}, at::kLong);
    world->all_gather_into(pids_, pid);
    std::vector<int> alive = world->ranks();
    for (size_t r = 0; r < rounds.size(); ++r) {
      for (size_t i = 0; i < rounds[r].size(); ++i) {
        const Scenario& s = rounds[r][i];
        const auto group = group_of(s.members);
        if (group->is_member()) play(s, i, group, "round" + std::to_string(r) + "-" + std::to_string(i));
      }
      bool store_is_gone = false;
      for (const Scenario& s : rounds[r]) {
        if (!s.kills()) continue;
        std::erase(alive, s.victim);
        store_is_gone = store_is_gone || s.loses_store();
      }
      if (store_is_gone) break;  // the last round
      group_of(alive)->barrier();
    }
    if (rank() == alive.front()) {
      int all = 0;
      for (const Round& round : rounds) all += static_cast<int>(round.size());
      const int done = page_->combinations;
      std::printf("%d combinations, %d hangs, longest wait %.2f s (deadline %.2f s)\n", all, all - done,
                  static_cast<double>(page_->longest_wait.load()) / 1e3, static_cast<double>(kSilence.count()) / 1e3);
    }
  }

  void tear_down_rank() override {
    set_test_point_handler({});
    TorchDistributedTest::tear_down_rank();
  }

  static StateDict state_of(const Scenario& s, int position, float value) {
    const auto rows = static_cast<int64_t>(s.members.size());
    return {{"sharded", ShardedTensor({rows, 3}, at::kFloat, {{{{position, 0}, {1, 3}}, at::full({1, 3}, value)}})},
            {"replica", at::full({5}, value)}};
  }

 private:
  std::shared_ptr<ProcessGroup> group_of(const std::vector<int>& ranks) {
    auto& group = groups_[ranks];
    if (!group) group = new_group(ranks);
    return group;
  }

  void map_page() {
    const std::string path = temp_dir() / "page";
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(ftruncate(fd, sizeof(SharedPage)), 0);
    void* memory = mmap(nullptr, sizeof(SharedPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ASSERT_NE(memory, MAP_FAILED);
    page_ = static_cast<SharedPage*>(memory);
    close(fd);
  }

  pid_t pid_of(int global_rank) { return static_cast<pid_t>(pids_[global_rank].item<int64_t>()); }

  void fail(const Scenario& s, size_t slot) {
    page_->failed_at[slot] = Clock::now().time_since_epoch().count();
    if (s.by >= 0) {
      kill(pid_of(s.victim), s.fault == Fault::kStop ? SIGSTOP : SIGKILL);
      return;
    }
    switch (s.fault) {
      case Fault::kThrow:
        throw std::runtime_error("thrown by " + s.text());
      case Fault::kExit:
        std::exit(3);
      case Fault::kKill:
        raise(SIGKILL);
        break;
      case Fault::kStop:
        raise(SIGSTOP);
        break;
    }
  }

  Outcome attempt(const Scenario& s, size_t slot, const std::shared_ptr<ProcessGroup>& group, const std::string& dir,
                  StateDict& state) {
    std::atomic<bool> failed{false};  // points may be passed by several threads
    if (rank() == s.actor()) {
      set_test_point_handler([&](std::string_view name) {
        if (name == s.point && !failed.exchange(true)) fail(s, slot);
      });
    }
    Outcome outcome;
    try {
      if (s.is_load()) {
        load(state, FileSystemReader(dir), {.process_group = group, .silence_timeout = kSilence});
      } else {
        save(state, FileSystemWriter(dir), {.process_group = group, .silence_timeout = kSilence});
      }
    } catch (const CheckpointError& error) {
      outcome.error = error;
    } catch (const std::exception& error) {
      outcome.other_error = error.what();
    }
    set_test_point_handler({});
    outcome.waited = std::chrono::duration_cast<milliseconds>(Clock::now().time_since_epoch() -
                                                              Clock::duration(page_->failed_at[slot].load()));
    return outcome;
  }

  /// What one process finds in the directory.
  std::string content(const Scenario& s, const std::string& dir) {
    StateDict target = state_of(s, 0, 0);
    const auto rows = static_cast<int64_t>(s.members.size());
    const at::Tensor whole = at::zeros({rows, 3});
    target["sharded"] = ShardedTensor({rows, 3}, at::kFloat, {{{{0, 0}, {rows, 3}}, whole}});
    const at::Tensor replica = target.at("replica").as<at::Tensor>();
    try {
      load(target, FileSystemReader(dir),
           {.process_group = std::make_shared<ProcessGroup>("alone", 0, std::vector<int>{rank()}, nullptr,
                                                            ProcessGroup::BackendMap{}, kSilence)});
    } catch (const std::exception& error) {
      return error.what();
    }
    for (const float value : {1.0F, 2.0F}) {
      if (whole.equal(at::full({rows, 3}, value)) && replica.equal(at::full({5}, value))) {
        return value == 1 ? "old" : "new";
      }
    }
    return "a mixture";
  }

  void play(const Scenario& s, size_t slot, const std::shared_ptr<ProcessGroup>& group, const std::string& name) {
    SCOPED_TRACE(s.text());
    const std::string dir = temp_dir() / name;
    const int position = group->rank();
    save(state_of(s, position, 1), FileSystemWriter(dir), {.process_group = group});

    // The survivors meet over it, since the store may be out of reach.
    const std::string fifo = dir + ".back";
    mkfifo(fifo.c_str(), 0600);
    const int back = open(fifo.c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(back, 0);
    group->barrier();

    StateDict state = state_of(s, position, 2);
    const Outcome outcome = attempt(s, slot, group, dir, state);
    const bool is_survivor = rank() != s.victim;
    std::vector<int> survivors = s.members;
    std::erase(survivors, s.victim);
    EXPECT_EQ(outcome.other_error, "");
    if (is_survivor || s.fault == Fault::kThrow) check(s, outcome);
    if (is_survivor) {
      const std::string found = content(s, dir);
      check_truth(s, outcome, found);
      EXPECT_EQ(write(back, ".", 1), 1);
      if (rank() == survivors.front()) {
        if (are_back(back, survivors.size())) ++page_->combinations;
        if (s.fault == Fault::kStop) kill(pid_of(s.victim), SIGCONT);
      }
    } else if (s.fault == Fault::kStop) {
      check_late(s, outcome, dir);
    }
    close(back);
  }

  void check(const Scenario& s, const Outcome& outcome) {
    const bool is_coordinator = rank() == s.members.front();
    if (goes_on_without(s) && !s.loses_store()) {
      EXPECT_FALSE(outcome.error.has_value()) << outcome.error->what();
      return;
    }
    // It may have handed its answers to the store just before that went.
    if (goes_on_without(s) && is_coordinator && !outcome.error) return;
    ASSERT_TRUE(outcome.error.has_value());
    const CheckpointError& error = *outcome.error;
    const milliseconds allowed = s.fault == Fault::kThrow ? kSilence : kSilence + kGrace;
    EXPECT_LT(outcome.waited, allowed);
    int64_t longest = page_->longest_wait;
    while (longest < outcome.waited.count() &&
           !page_->longest_wait.compare_exchange_weak(longest, outcome.waited.count())) {
    }
    // Without a store a rank may wait for ever for the answer that ends the step before.
    const std::string step = step_of(s);
    EXPECT_TRUE(error.step() == step || (s.loses_store() && error.step() == "plan" && step != "metadata"))
        << error.what() << "\nwanted step " << step;
    // A store whose host is no member: each says that it cannot go on, and whose loss it is.
    const int named = s.is_member(s.victim) ? s.position(s.victim) : s.position(rank());
    ASSERT_EQ(error.failures().size(), 1u) << error.what();
    ASSERT_EQ(error.failures().begin()->first, named) << error.what();
    const RankFailure& failure = error.failures().begin()->second;
    if (s.fault == Fault::kThrow) {
      EXPECT_THAT(failure.message, HasSubstr("thrown by " + s.text()));
    } else if (s.loses_store()) {
      EXPECT_THAT(failure.message, HasSubstr("hosts it is rank 0 of the default group"));
      EXPECT_EQ(failure.code, s.fault == Fault::kStop ? ErrorCode::kTimeout : ErrorCode::kUnavailable);
    } else {
      EXPECT_THAT(failure.message, HasSubstr("rank " + std::to_string(named) + " was silent"));
      EXPECT_EQ(failure.code, ErrorCode::kTimeout);
    }
    if (!s.is_load() && (is_coordinator || (!s.of_coordinator() && !s.loses_store()) || s.fault == Fault::kThrow)) {
      const bool committed = std::string_view(s.point) == "save.after_commit" || goes_on_without(s);
      EXPECT_EQ(error.committed(), committed ? Committed::kYes : Committed::kNo) << error.what();
    }
  }

  void check_truth(const Scenario& s, const Outcome& outcome, const std::string& found) {
    if (s.is_load()) {
      EXPECT_EQ(found, "old");
      return;
    }
    const bool committed = std::string_view(s.point) == "save.after_commit" || goes_on_without(s);
    // A coordinator that throws needs no care: nobody is ahead of it. Others may see the commit only when it has come.
    EXPECT_EQ(found, committed ? "new" : "old");
    if (!outcome.error) return;
    EXPECT_TRUE(outcome.error->committed() != Committed::kNo || found == "old");
    EXPECT_TRUE(outcome.error->committed() != Committed::kYes || found == "new");
  }

  /// A stopped rank that goes on when the others have given up.
  void check_late(const Scenario& s, const Outcome& outcome, const std::string& dir) {
    const std::string found = content(s, dir);
    if (s.is_load()) {
      EXPECT_EQ(found, "old");
      EXPECT_TRUE(s.of_coordinator() || outcome.error.has_value());
      return;
    }
    const bool saved = !outcome.error || outcome.error->committed() == Committed::kYes;
    EXPECT_EQ(found, saved ? "new" : "old") << (outcome.error ? outcome.error->what() : "no error");
    if (goes_on_without(s)) {
      EXPECT_EQ(found, "new");
    } else if (!s.of_coordinator() || step_of(s) == "plan") {
      EXPECT_TRUE(outcome.error.has_value());
    }
  }

  /// Whether every survivor wrote its byte.
  static bool are_back(int fd, size_t count) {
    const auto until = Clock::now() + std::chrono::seconds(20);
    while (count > 0) {
      pollfd waiting = {fd, POLLIN, 0};
      const auto left = std::chrono::ceil<milliseconds>(until - Clock::now()).count();
      char bytes[16];
      const bool there = left > 0 && poll(&waiting, 1, static_cast<int>(left)) == 1;
      const ssize_t n = there ? read(fd, bytes, std::min(count, sizeof(bytes))) : 0;
      if (n <= 0) {
        ADD_FAILURE() << count << " survivors did not come back";
        return false;
      }
      count -= static_cast<size_t>(n);
    }
    return true;
  }

  SharedPage* page_ = nullptr;
  at::Tensor pids_;
  std::map<std::vector<int>, std::shared_ptr<ProcessGroup>> groups_;
};

// --- nobody dies -----------------------------------------------------------------------------------------------------

// Rank 0, which hosts the store, is in none of these groups.
std::vector<Round> everywhere(Fault fault) {
  std::vector<Round> rounds;
  for (const char* point : {"save.planned", "save.placed", "save.before_data_sync", "save.before_vote",
                            "save.before_commit", "save.after_commit", "load.metadata_read", "load.before_read"}) {
    rounds.push_back({{{1, 2, 3, 4}, fault, 1, point}, {{5, 6}, fault, 5, point}});
  }
  for (const char* point : {"save.planned", "save.before_data_sync", "save.before_vote", "load.before_metadata",
                            "load.planned", "load.before_read"}) {
    rounds.push_back({{{1, 2, 3, 4}, fault, 3, point}, {{5, 6}, fault, 6, point}});
  }
  return rounds;
}

std::vector<Round> throws() { return everywhere(Fault::kThrow); }

std::vector<Round> stops() {
  std::vector<Round> rounds = everywhere(Fault::kStop);
  for (const char* point : {"save.placed", "save.before_commit"}) {
    rounds.push_back({{{1, 2, 3, 4}, Fault::kStop, 3, point, 1}, {{5, 6}, Fault::kStop, 6, point, 5}});
  }
  return rounds;
}

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AThrowingRankIsOneErrorOnAll, .ranks = 7) {
  run(throws());
}

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AStoppedRankIsNamedInTimeAndMayGoOn, .ranks = 7,
                           .deadline = std::chrono::seconds(150)) {
  run(stops());
}

// The store stops with its host.
std::vector<Round> host_stops() {
  constexpr Fault kStop = Fault::kStop;
  return {{{{0, 1, 2, 3}, kStop, 0, "save.placed"}},
          {{{0, 1, 2, 3}, kStop, 0, "save.before_commit"}},
          {{{0, 1, 2, 3}, kStop, 0, "load.before_read"}},
          {{{1, 0, 2, 3}, kStop, 0, "save.before_data_sync"}},
          {{{0, 1}, kStop, 0, "save.planned"}},
          {{{0, 1}, kStop, 0, "save.after_commit"}},
          {{{1, 2, 3}, kStop, 0, "save.before_data_sync", 1}}};
}

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AStoppedHostOfTheStoreIsNamedInTime, .ranks = 4) {
  run(host_stops());
}

// --- ranks that die --------------------------------------------------------------------------------------------------

std::vector<Round> kills() {
  constexpr Fault kKill = Fault::kKill;
  return {{{{1, 2, 3, 4}, kKill, 1, "save.placed"}, {{5, 6, 7, 8}, kKill, 6, "save.before_data_sync"}},
          {{{2, 3, 4, 5}, kKill, 3, "save.planned"}, {{7, 8}, kKill, 7, "save.before_vote"}},
          {{{2, 4, 5, 8}, kKill, 2, "save.after_commit"}},
          {{{4, 5}, kKill, 5, "save.before_commit", 4}},
          {{{4, 8}, kKill, 8, "load.before_read"}},
          {{{0, 4}, kKill, 0, "save.before_data_sync"}}};
}

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AKilledRankIsNamedInTime, .ranks = 9,
                           .expected = ends_of(kills())) {
  run(kills());
}

std::vector<Round> departures() {
  constexpr Fault kExit = Fault::kExit;
  return {{{{1, 2, 3, 4}, kExit, 4, "save.before_vote"}, {{5, 6, 7, 8}, kExit, 5, "load.metadata_read"}},
          {{{1, 2, 3, 6}, kExit, 1, "save.before_commit"}, {{7, 8}, kExit, 8, "save.planned"}},
          {{{2, 3, 6, 7}, kExit, 6, "load.before_read"}},
          {{{2, 3}, kExit, 2, "save.before_data_sync"}},
          {{{3, 7}, kExit, 3, "load.read"}},
          {{{7, 0}, kExit, 0, "save.before_vote"}}};
}

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, ARankThatExitsIsNamedInTime, .ranks = 9,
                           .expected = ends_of(departures())) {
  run(departures());
}

// With rank 0 goes the store, so that is the last round.
std::vector<Round> coordinator_and_host_dies() { return {{{{0, 1, 2, 3}, Fault::kKill, 0, "save.after_commit"}}}; }
std::vector<Round> host_dies_after_its_vote() { return {{{{1, 0, 2, 3}, Fault::kKill, 0, "save.before_commit", 1}}}; }
std::vector<Round> host_of_others_dies() { return {{{{1, 2, 3}, Fault::kKill, 0, "save.before_data_sync", 1}}}; }

RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, ALostStoreIsTheLossOfItsHost, .ranks = 4,
                           .expected = ends_of(coordinator_and_host_dies())) {
  run(coordinator_and_host_dies());
}
RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AStoreLostAfterTheCommitLeavesTheNewCheckpoint,
                           .ranks = 4, .expected = ends_of(host_dies_after_its_vote())) {
  run(host_dies_after_its_vote());
}
RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AHostThatIsNoMemberIsNamedToo, .ranks = 4,
                           .expected = ends_of(host_of_others_dies())) {
  run(host_of_others_dies());
}

// --- honest work -----------------------------------------------------------------------------------------------------

/// Takes its time before it writes, and shows that it is at work.
class SlowWriter final : public StorageWriter {
 public:
  SlowWriter(const std::string& dir, milliseconds work) : writer_(dir), work_(work) {}
  std::string checkpoint_id() const override { return writer_.checkpoint_id(); }
  void begin_save(const std::string& save_id) override { writer_.begin_save(save_id); }
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    return writer_.prepare_global_plan(std::move(plans));
  }
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override {
    const auto end = Clock::now() + work_;
    std::mutex mutex;
    std::condition_variable never;
    std::unique_lock lock(mutex);
    while (Clock::now() < end) {
      context.progress({"write", 0, 1});
      never.wait_for(lock, milliseconds(20));
    }
    return writer_.write_data(plan, planner, context);
  }
  void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override {
    writer_.finish(metadata, context, committed);
  }
  void abandon() noexcept override { writer_.abandon(); }

 private:
  FileSystemWriter writer_;
  milliseconds work_;
};

// Also where the slow one coordinates, or hosts the store.
RESHARD_DISTRIBUTED_TEST_F(RankFailureTestFixture, RankFailureTest, AnHonestWriteMayTakeLongerThanTheDeadline,
                           .ranks = 4) {
  constexpr milliseconds kShort{1000};
  for (const int slow : {0, 3}) {
    const Scenario s{{0, 1, 2, 3}, Fault::kThrow, slow, ""};
    SlowWriter writer((temp_dir() / std::to_string(slow)).string(), rank() == slow ? 3 * kShort : milliseconds(0));
    const auto start = Clock::now();
    save(state_of(s, rank(), 1), writer, {.process_group = process_group(), .silence_timeout = kShort});
    EXPECT_GE(Clock::now() - start, 3 * kShort);
  }
}

}  // namespace
}  // namespace reshard
