// SPDX-License-Identifier: BSD-3-Clause
// Cases that fail, each in its own way, run as a child by distributed_test_test.cpp, which looks at what their parent
// makes of it.
//
// A process that runs in such a case holds the FIFO named by HARNESS_ALIVE_FIFO open for writing, so that the end of
// file on it says that nothing is left, and writes a line to it when it has started.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

#include "reshard/launch/environment.h"
#include "reshard/testing/distributed_test.h"

namespace reshard {
namespace {

// To all copies of this process: it lives while its report can be read.
void announce() {
  const char* path = std::getenv("HARNESS_ALIVE_FIFO");
  if (path == nullptr) return;
  const int fd = open(path, O_WRONLY);  // stays open, also in children
  const std::string line = std::to_string(getpid()) + "\n";
  EXPECT_EQ(write(fd, line.data(), line.size()), static_cast<ssize_t>(line.size()));
}

// Ended by the parent only.
[[gnu::noinline]] void hang() {
  for (;;) pause();
}

// The others end when rank `failing` does: as with collectives, they see the end of a connection. Here it is a FIFO
// each.
class Peers : public DistributedTest {
 protected:
  void set_up_rank() override { announce(); }
};

RESHARD_DISTRIBUTED_TEST_F(Peers, Passing, KnowsItsPlace, .ranks = 3) {
  EXPECT_EQ(world_size(), 3);
  EXPECT_EQ(local_rank(), rank());
  EXPECT_EQ(std::to_string(rank()), std::getenv("RANK"));
  EXPECT_EQ(backend(), "cpu:gloo");
  EXPECT_TRUE(std::filesystem::is_directory(temp_dir()));
  std::ofstream(temp_dir() / std::to_string(rank())) << "here";
  std::printf("text of rank %d\n", rank());
  const auto env = read_rank_environment();
  ASSERT_TRUE(env.has_value());
  EXPECT_EQ(env->master_listen_fd.has_value(), rank() == 0);
  EXPECT_STREQ(std::getenv("OMP_NUM_THREADS"), "1");
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Expectation, .ranks = 3) {
  if (rank() != 1) return;
  EXPECT_EQ(1 + 1, 3) << "so says rank " << rank();
  EXPECT_TRUE(false);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, AssertionOfOneRankWhileOthersHang, .ranks = 3) {
  if (rank() != 1) hang();
  ASSERT_EQ("found", std::string("wanted"));
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Throw, .ranks = 2) {
  if (rank() == 1) throw std::runtime_error("thrown by rank 1");
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, ThrowOfWhatIsNoException, .ranks = 2) {
  if (rank() == 0) throw 42;
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, ExitZero, .ranks = 2) {
  if (rank() == 0) hang();
  std::exit(0);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, QuickExitZero, .ranks = 2) {
  if (rank() == 1) _exit(0);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, ExitNonZero, .ranks = 2) {
  if (rank() == 0) hang();
  std::exit(7);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, ExitNonZeroAfterTheBody, .ranks = 2) {
  if (rank() == 1) std::atexit([] { _exit(9); });
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Signal, .ranks = 2) {
  if (rank() == 0) hang();
  std::printf("last words\n");
  raise(SIGKILL);
}

// As with a collective: the end of rank 1 is seen by rank 0 before the parent sees it.
RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, DeathSeenByAPeer, .ranks = 2) {
  const std::string path = temp_dir() / "connection";
  mkfifo(path.c_str(), 0600);  // whoever comes first
  const int fd = open(path.c_str(), rank() == 0 ? O_RDONLY : O_WRONLY);
  ASSERT_GE(fd, 0);
  if (rank() == 1) raise(SIGKILL);
  char byte = 0;
  EXPECT_EQ(read(fd, &byte, 1), 1) << "connection closed";
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Abort, .ranks = 2) {
  if (rank() == 1) std::abort();
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Hang, .ranks = 3, .deadline = std::chrono::seconds(2)) {
  if (rank() != 1) hang();
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, HangAfterAFailure, .ranks = 2, .deadline = std::chrono::seconds(2)) {
  EXPECT_NE(rank(), 1) << "the cause";
  hang();
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, HangThatIgnoresSignals, .ranks = 1,
                           .deadline = std::chrono::milliseconds(200)) {
  signal(SIGABRT, [](int) {});
  signal(SIGTERM, SIG_IGN);
  hang();
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Failing, Stopped, .ranks = 2, .deadline = std::chrono::seconds(2)) {
  if (rank() == 1) raise(SIGSTOP);
}

// Rank 0 leaves a child in a session of its own that has a child too, and one that is stopped.
RESHARD_DISTRIBUTED_TEST_F(Peers, Leftovers, AreEnded, .ranks = 2) {
  if (rank() == 1) return;
  int started[2];
  ASSERT_EQ(pipe(started), 0);
  const auto ready = [&] {
    announce();
    if (write(started[1], "x", 1) != 1) _exit(1);
  };
  if (fork() == 0) {
    setsid();
    if (fork() == 0) {
      setsid();
      ready();
      hang();
    }
    ready();
    hang();
  }
  if (fork() == 0) {
    ready();
    raise(SIGSTOP);
  }
  char byte = 0;
  for (int i = 0; i < 3; ++i) ASSERT_EQ(read(started[0], &byte, 1), 1);
}

// Everything that can resist, for a parent that is killed: a session of its own, ignored signals, a stopped child, a stopped
// rank.
RESHARD_DISTRIBUTED_TEST_F(Peers, Resisting, Everything, .ranks = 3) {
  if (rank() == 0 && fork() == 0) {
    setsid();
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    announce();
    hang();
  }
  if (rank() == 1) {
    const pid_t child = fork();
    if (child == 0) raise(SIGSTOP);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
    ASSERT_TRUE(WIFSTOPPED(status));
    announce();
  }
  if (rank() == 2) raise(SIGSTOP);
  hang();
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Expected, DeathsAreNoFailures, .ranks = 3,
                           .expected = {{1, killed_by(SIGKILL)}, {2, exits(5)}}) {
  if (rank() == 1) raise(SIGKILL);
  if (rank() == 2) _exit(5);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Expected, DeathThatDoesNotHappen, .ranks = 2, .expected = {{1, killed_by(SIGKILL)}}) {
}

RESHARD_DISTRIBUTED_TEST_F(Peers, Skipping, InARank, .ranks = 2) {
  if (rank() == 1) GTEST_SKIP() << "not on rank 1";
}

RESHARD_DEVICE_TEST_F(Peers, OnDevices, OneBody, .ranks = {2, 4}, .one_gpu_ranks = {1, 2}) {
  const char* gpus = std::getenv("CUDA_VISIBLE_DEVICES");
  std::printf("%s on GPUs %s\n", backend().c_str(), gpus == nullptr ? "unset" : gpus);
}

RESHARD_DISTRIBUTED_TEST_F(Peers, FourOfADevice, Share, .ranks = 4, .gpus = 1) {}

TEST(OrdinaryTest, RunsInTheParent) { EXPECT_EQ(std::getenv("RANK"), nullptr); }

}  // namespace
}  // namespace reshard
