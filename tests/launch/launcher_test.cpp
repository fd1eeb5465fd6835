// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/launcher.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "launch/child_process.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// `script` run by a shell in each rank; lines are kept, not printed.
LaunchOptions shell(const std::string& script, int ranks) {
  LaunchOptions options = {.argv = {"sh", "-c", script}, .ranks = ranks, .deadline = std::chrono::seconds(30)};
  options.on_line = [](const OutputLine&) {};
  return options;
}

/// Opens the FIFO for as long as the shell and its children live.
std::string alive(const AliveFifo& fifo) { return "exec 9>" + fifo.path() + "; echo $$ >&9; "; }

TEST(LauncherTest, GivesEachRankTheContract) {
  LaunchOptions options = shell(
      "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS $EXTRA"
      " ${RESHARD_MASTER_LISTEN_FD:+listens} ${HOME:+home}; test $MASTER_PORT -gt 0",
      3);
  options.environment = {{"EXTRA", "extra"}, {"HOME", std::nullopt}};
  const LaunchResult result = launch(options);
  EXPECT_TRUE(result.success());
  EXPECT_EQ(result.ranks[0].output, "0 3 0 3 127.0.0.1 1 extra listens\n");
  EXPECT_EQ(result.ranks[1].output, "1 3 1 3 127.0.0.1 1 extra\n");
  EXPECT_EQ(result.ranks[2].output, "2 3 2 3 127.0.0.1 1 extra\n");
}

TEST(LauncherTest, OnlyItsOwnDescriptorsReachARank) {
  const int leak = open("/dev/null", O_RDONLY);  // without close-on-exec
  const LaunchResult result =
      launch(shell("ls /proc/self/fd | wc -l; test ! -e /proc/self/fd/" + std::to_string(leak), 2));
  close(leak);
  // 0, 1, 2, the report, on rank 0 the listening socket, and ls's own folder.
  EXPECT_EQ(result.ranks[0].output, "6\n");
  EXPECT_EQ(result.ranks[1].output, "5\n");
}

TEST(LauncherTest, PassesOnLinesOfBothStreams) {
  std::vector<std::string> lines;
  LaunchOptions options = shell("echo out; echo err >&2; printf 'no end'", 1);
  options.on_line = [&](const OutputLine& line) {
    lines.push_back((line.stream == OutputStream::kStdout ? "1:" : "2:") + std::string(line.text));
  };
  launch(options);
  std::sort(lines.begin(), lines.end());
  EXPECT_THAT(lines, ElementsAre("1:no end", "1:out", "2:err"));
}

TEST(LauncherTest, PrintsLinesWithTheirRankByDefault) {
  LaunchOptions options = shell("echo out of $RANK; echo err of $RANK >&2", 2);
  options.on_line = nullptr;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  launch(options);
  const std::string out = ::testing::internal::GetCapturedStdout();
  EXPECT_THAT(out, HasSubstr("[rank 0] out of 0\n"));
  EXPECT_THAT(out, HasSubstr("[rank 1] out of 1\n"));
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("[rank 1] err of 1\n"));
}

TEST(LauncherTest, KeepsTheEndOfMuchOutput) {
  LaunchOptions options = shell("seq 1 200000", 2);
  options.capture_limit = 1000;
  const LaunchResult result = launch(options);
  EXPECT_LE(result.ranks[1].output.size(), 2100u);
  EXPECT_TRUE(result.ranks[1].output.ends_with("\n200000\n"));
}

TEST(LauncherTest, BringsBackTheReportAlsoOfAKilledRank) {
  const LaunchResult result =
      launch(shell("printf 'report of %s' $RANK >/proc/self/fd/$RESHARD_REPORT_FD; kill -9 $$", 2));
  EXPECT_EQ(result.ranks[0].report, "report of 0");
  EXPECT_EQ(result.ranks[1].report, "report of 1");
}

TEST(LauncherTest, ReportsHowEachRankEnded) {
  LaunchOptions options = shell("test $RANK = 0 || exit 3; kill -SEGV $$", 2);
  const LaunchResult result = launch(options);
  EXPECT_FALSE(result.success());
  EXPECT_EQ(result.ranks[0].signal, SIGSEGV);
  EXPECT_EQ(result.ranks[0].exit_code, std::nullopt);
  EXPECT_EQ(result.ranks[0].describe(), "killed by SIGSEGV");
  EXPECT_EQ(result.ranks[1].exit_code, 3);
  EXPECT_EQ(result.ranks[1].describe(), "exited with code 3");
}

TEST(LauncherTest, AFailedRankEndsTheOthers) {
  AliveFifo fifo;
  LaunchOptions options = shell(alive(fifo) + "test $RANK = 1 && exit 4; sleep 1000", 3);
  options.failure_grace = milliseconds(100);
  const LaunchResult result = launch(options);
  EXPECT_EQ(result.first_failed, 1);
  EXPECT_FALSE(result.deadline_passed);
  EXPECT_LT(result.duration, std::chrono::seconds(10));
  for (int other : {0, 2}) {
    EXPECT_EQ(result.ranks[static_cast<size_t>(other)].reason, EndReason::kAfterFailure);
    EXPECT_EQ(result.ranks[static_cast<size_t>(other)].signal, SIGTERM);
  }
  fifo.wait_until_nobody_is_left();
}

TEST(LauncherTest, OthersMayEndByThemselvesAfterAFailure) {
  LaunchOptions options = shell("test $RANK = 1 && exit 4; sleep 0.1; exit 5", 2);
  options.failure_grace = std::chrono::seconds(20);
  const LaunchResult result = launch(options);
  EXPECT_EQ(result.first_failed, 1);
  EXPECT_EQ(result.ranks[0].reason, EndReason::kItself);
  EXPECT_EQ(result.ranks[0].exit_code, 5);
}

TEST(LauncherTest, TheCallerDecidesWhatSuccessIs) {
  LaunchOptions options = shell("test $RANK = 0 || kill -9 $$; sleep 0.3", 2);
  options.failure_grace = milliseconds(0);
  options.is_success = [](const RankResult& rank) {
    return rank.rank == 1 ? rank.signal == SIGKILL : rank.exit_code == 0;
  };
  const LaunchResult result = launch(options);
  EXPECT_TRUE(result.success());
  EXPECT_EQ(result.ranks[0].exit_code, 0);
}

TEST(LauncherTest, TheDeadlineEndsRanksWithAbort) {
  LaunchOptions options = shell("trap 'echo last words; exit 6' ABRT; while :; do sleep 0.01; done", 2);
  options.deadline = milliseconds(300);
  std::string after;
  options.on_line = [&](const OutputLine& line) {
    if (line.ending) after += line.text;
  };
  const LaunchResult result = launch(options);
  EXPECT_TRUE(result.deadline_passed);
  EXPECT_EQ(result.first_failed, std::nullopt);
  EXPECT_GE(result.duration, milliseconds(300));
  EXPECT_EQ(result.ranks[1].reason, EndReason::kDeadline);
  EXPECT_EQ(result.ranks[1].exit_code, 6);
  EXPECT_EQ(after, "last wordslast words");
}

TEST(LauncherTest, RanksThatIgnoreTheSignalAreKilled) {
  AliveFifo fifo;
  LaunchOptions options = shell(alive(fifo) + "trap '' ABRT TERM; while :; do sleep 1000; done", 2);
  options.deadline = milliseconds(200);
  options.end_grace = milliseconds(200);
  const LaunchResult result = launch(options);
  EXPECT_EQ(result.ranks[0].signal, SIGKILL);
  fifo.wait_until_nobody_is_left();
}

TEST(LauncherTest, AStoppedRankIsEndedAtTheDeadline) {
  LaunchOptions options = shell("kill -STOP $$", 1);
  options.deadline = milliseconds(300);
  const LaunchResult result = launch(options);
  EXPECT_TRUE(result.deadline_passed);
  EXPECT_TRUE(result.ranks[0].stopped);
  EXPECT_EQ(result.ranks[0].signal, SIGABRT);  // it was continued to get it
}

TEST(LauncherTest, WhatRanksLeaveBehindIsEnded) {
  AliveFifo fifo;
  // In a session of its own, its parent gone, deaf to what can be ignored.
  const LaunchResult result =
      launch(shell(alive(fifo) + "(trap '' TERM HUP; setsid sh -c 'sleep 1000; sleep 1000' &) ; :", 2));
  EXPECT_TRUE(result.success());
  fifo.wait_until_nobody_is_left();
}

TEST(LauncherTest, AProgramThatIsNotThereIsAResult) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer makes vfork() a fork(): the child cannot tell its parent why exec failed";
#endif
  LaunchOptions options = {.argv = {"/no/such/program"}, .ranks = 2, .deadline = std::chrono::seconds(10)};
  const LaunchResult result = launch(options);
  EXPECT_EQ(result.ranks[0].describe(), "could not be started: No such file or directory");
  EXPECT_EQ(result.ranks[1].start_error, ENOENT);
  EXPECT_EQ(result.first_failed, 0);
}

TEST(LauncherTest, AKilledSupervisorTakesTheRanksAlong) {
  AliveFifo fifo;
  try {
    launch(shell(alive(fifo) + "test $RANK = 0 && kill -9 $PPID; exec sleep 1000", 3));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnavailable);
    EXPECT_THAT(error.what(), HasSubstr("supervisor"));
  }
  fifo.wait_until_nobody_is_left();
}

TEST(LauncherTest, AnExceptionFromTheCallerEndsTheRanks) {
  AliveFifo fifo;
  LaunchOptions options = shell(alive(fifo) + "echo line; exec sleep 1000", 2);
  options.on_line = [](const OutputLine&) { throw std::runtime_error("enough"); };
  EXPECT_THROW(launch(options), std::runtime_error);
  fifo.wait_until_nobody_is_left();
}

TEST(LauncherTest, ThreadsMayLaunchAtOnceAndMayEnd) {
  // Ranks outlive the thread that would have spawned them, and one launch holds nothing of another open.
  std::vector<LaunchResult> results(4);
  {
    std::vector<std::jthread> threads;
    for (LaunchResult& result : results) {
      threads.emplace_back([&result] { result = launch(shell("echo $MASTER_PORT; sleep 0.2", 2)); });
    }
  }
  for (const LaunchResult& result : results) {
    EXPECT_TRUE(result.success());
    EXPECT_EQ(result.ranks[0].output, result.ranks[1].output);
  }
  EXPECT_NE(results[0].ranks[0].output, results[1].ranks[0].output);
}

TEST(LauncherTest, LeavesChildrenAndSignalsOfTheCallerAlone) {
  ChildProcess child({"sh", "-c", "exit 3"});
  sigset_t before, after;
  sigprocmask(SIG_BLOCK, nullptr, &before);
  EXPECT_TRUE(launch(shell("exit 0", 1)).success());
  sigprocmask(SIG_BLOCK, nullptr, &after);
  for (int signal = 1; signal < 32; ++signal) EXPECT_EQ(sigismember(&before, signal), sigismember(&after, signal));
  EXPECT_EQ(child.wait().exit_code, 3);
}

TEST(LauncherTest, SignalsBlockedInTheCallerReachRanks) {
  sigset_t blocked, before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const LaunchResult result = launch(shell("grep SigBlk /proc/self/status", 1));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  EXPECT_EQ(result.ranks[0].output, "SigBlk:\t0000000000000000\n");
}

TEST(LauncherTest, RefusesWrongOptions) {
  EXPECT_THROW(launch({.argv = {}}), Error);
  EXPECT_THROW(launch({.argv = {"true"}, .ranks = 0}), Error);
  EXPECT_THROW(launch({.argv = {"true"}, .ranks = 100'000}), Error);
}

}  // namespace
}  // namespace reshard
