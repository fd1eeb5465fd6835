// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/store_transport.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>

#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

Bytes pattern(size_t n, int seed) {
  Bytes bytes(n);
  for (size_t i = 0; i < n; ++i) bytes[i] = static_cast<std::byte>(i * 31 + static_cast<size_t>(seed));
  return bytes;
}

RESHARD_DISTRIBUTED_TEST(StoreTransportTest, MessagesArriveWholeAndInOrder, .ranks = 3) {
  StoreTransport transport(*process_group(), milliseconds(20000));
  const std::vector<size_t> sizes = {0, 1, 1000, (size_t{4} << 20) - 1, size_t{4} << 20, (size_t{9} << 20) + 3};
  const int next = (rank() + 1) % 3;
  const int previous = (rank() + 2) % 3;
  for (size_t n : sizes) transport.send(next, pattern(n, rank()));
  for (size_t n : sizes) EXPECT_TRUE(transport.receive(previous) == pattern(n, previous)) << n;
  // A later operation on the group does not see what an earlier one left behind.
  transport.send(next, pattern(5, 1));
  StoreTransport second(*process_group(), milliseconds(20000));
  second.send(next, pattern(6, rank()));
  EXPECT_TRUE(second.receive(previous) == pattern(6, previous));
}

RESHARD_DISTRIBUTED_TEST(StoreTransportTest, TheDeadlineIsOnSilenceNotOnTime, .ranks = 2) {
  const auto world = process_group();
  StoreTransport transport(*world, milliseconds(1000));
  world->barrier();
  if (rank() == 0) {
    // Rank 1 works for three deadlines and shows it.
    EXPECT_EQ(transport.receive(1).size(), 1u);
    // Then it says nothing more.
    const auto start = Clock::now();
    EXPECT_ERROR(ErrorCode::kTimeout, "rank 1 was silent", transport.receive(1));
    const auto waited = Clock::now() - start;
    EXPECT_GE(waited, milliseconds(1000));
    EXPECT_LT(waited, milliseconds(2500));
  } else {
    const auto end = Clock::now() + milliseconds(3000);
    std::mutex mutex;
    std::condition_variable never;
    std::unique_lock lock(mutex);
    while (Clock::now() < end) {  // work that takes its time
      transport.heartbeat();
      never.wait_for(lock, milliseconds(50));
    }
    transport.send(0, pattern(1, 0));
  }
  world->barrier();
}

// A node that goes takes all its ranks along.
RESHARD_DISTRIBUTED_TEST(StoreTransportTest, ManySilentRanksCostOneDeadline, .ranks = 4) {
  const auto world = process_group();
  StoreTransport transport(*world, milliseconds(1500));
  world->barrier();
  if (rank() == 0) {
    const auto start = Clock::now();
    std::vector<int> from = {1, 2, 3};
    std::vector<int> silent;
    transport.gather(from, [&](Transport::Arrival arrival) {
      EXPECT_EQ(arrival.error == nullptr, arrival.from == 2);
      if (arrival.error) silent.push_back(arrival.from);
    });
    EXPECT_EQ(silent, (std::vector<int>{1, 3}));
    EXPECT_LT(Clock::now() - start, milliseconds(2500));
  } else if (rank() == 2) {
    transport.send(0, pattern(1, 0));
  }
  world->barrier();
}

/// Stops rank 0, which hosts the store, while rank 1 runs `body`.
template <class Body>
void with_stopped_host(const std::filesystem::path& dir, int rank, Body&& body) {
  const std::string fifo = dir / "pid of rank 0";
  mkfifo(fifo.c_str(), 0600);  // whoever comes first
  const int fd = open(fifo.c_str(), rank == 0 ? O_WRONLY : O_RDONLY);
  pid_t pid = getpid();
  if (rank == 0) {
    ASSERT_EQ(write(fd, &pid, sizeof(pid)), static_cast<ssize_t>(sizeof(pid)));
    raise(SIGSTOP);
  } else {
    ASSERT_EQ(read(fd, &pid, sizeof(pid)), static_cast<ssize_t>(sizeof(pid)));
    std::string state;  // "T" once it is stopped: what follows must not be faster
    while (state != "T") std::ifstream("/proc/" + std::to_string(pid) + "/stat") >> state >> state >> state;
    body();
    kill(pid, SIGCONT);
  }
  close(fd);
}

RESHARD_DISTRIBUTED_TEST(StoreTransportTest, AStoppedHostOfTheStoreIsSilenceToo, .ranks = 2) {
  const auto world = process_group();
  StoreTransport transport(*world, milliseconds(1000));
  StoreTransport working(*world, milliseconds(1000));
  working.heartbeat();
  world->barrier();
  with_stopped_host(temp_dir(), rank(), [&] {
    const auto start = Clock::now();
    EXPECT_ERROR(ErrorCode::kTimeout, "hosts it is rank 0 of the default group", transport.receive(0));
    EXPECT_LT(Clock::now() - start, milliseconds(2000));
    EXPECT_ERROR(ErrorCode::kTimeout, "hosts it is rank 0 of the default group", transport.receive(0));
    EXPECT_LT(Clock::now() - start, milliseconds(2000)) << "what is known to be lost is not waited for again";
    // Work goes on: a heartbeat waits for nobody.
    for (int i = 0; i < 1000; ++i) working.heartbeat();
    EXPECT_LT(Clock::now() - start, milliseconds(2500));
  });
  // Once it goes on, so do all.
  StoreTransport next(*world, milliseconds(20000));
  next.send(1 - rank(), pattern(10, rank()));
  EXPECT_TRUE(next.receive(1 - rank()) == pattern(10, 1 - rank()));
}

RESHARD_DISTRIBUTED_TEST(StoreTransportTest, ALostStoreIsReportedByTheSurvivors, .ranks = 2,
                         .expected = {{0, killed_by(SIGKILL)}}) {
  const auto world = process_group();
  StoreTransport transport(*world, milliseconds(20000));
  transport.send(1 - rank(), pattern(1, 0));  // both are connected
  transport.receive(1 - rank());
  world->barrier();
  // Not while rank 1 is still in the barrier: opening a FIFO waits for its other end.
  const std::string ready = temp_dir() / "ready";
  mkfifo(ready.c_str(), 0600);  // whoever comes first
  close(open(ready.c_str(), rank() == 0 ? O_RDONLY : O_WRONLY));
  if (rank() == 0) raise(SIGKILL);
  const auto start = Clock::now();
  EXPECT_ERROR(ErrorCode::kUnavailable, "the process that hosts it", transport.receive(0));
  EXPECT_LT(Clock::now() - start, milliseconds(10000));
}

}  // namespace
}  // namespace reshard
