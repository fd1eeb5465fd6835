// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/process_group.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "reshard/distributed/store_transport.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

RESHARD_DEVICE_TEST(ProcessGroupTest, CollectivesGiveTheValuesOfAllRanks, .ranks = {2}, .one_gpu_ranks = {1, 2}) {
  const auto world = process_group();
  const int n = world->size();
  at::Tensor mine = at::full({3}, rank() + 1.0, device());
  at::Tensor all = at::empty({3 * n}, mine.options());
  world->all_gather_into(all, mine);
  for (int r = 0; r < n; ++r) EXPECT_EQ(all[3 * r].item<float>(), r + 1);

  at::Tensor input = at::arange(2 * n, mine.options()) * (rank() + 1);
  at::Tensor part = at::empty({2}, mine.options());
  const double ranks_sum = n * (n + 1) / 2.0;
  world->reduce_scatter_into(part, input, /*average=*/false);
  EXPECT_EQ(part[1].item<float>(), (2 * rank() + 1) * ranks_sum);
  world->reduce_scatter_into(part, input, /*average=*/true);
  EXPECT_EQ(part[1].item<float>(), (2 * rank() + 1) * ranks_sum / n);

  at::Tensor sum = at::full({}, rank() + 1.0, device());
  world->all_reduce_sum(sum);
  EXPECT_EQ(sum.item<double>(), ranks_sum);
  at::Tensor root = at::full({}, rank(), device());
  world->broadcast(root, n - 1);
  EXPECT_EQ(root.item<int>(), n - 1);
  world->barrier();
  EXPECT_EQ(world->traffic().collectives, 5u);
}

RESHARD_DISTRIBUTED_TEST(ProcessGroupTest, NewGroupsTalkAmongThemselves, .ranks = 4) {
  process_group();
  const auto even = new_group({0, 2});
  const auto odd = new_group({3, 1});  // group order is the order given
  const auto mine = rank() % 2 == 0 ? even : odd;
  const auto other = rank() % 2 == 0 ? odd : even;
  EXPECT_TRUE(mine->is_member());
  EXPECT_FALSE(other->is_member());
  EXPECT_EQ(mine->rank(), rank() == 0 || rank() == 3 ? 0 : 1);
  at::Tensor sum = at::full({}, rank(), at::kInt);
  mine->all_reduce_sum(sum);
  EXPECT_EQ(sum.item<int>(), rank() % 2 == 0 ? 2 : 4);
  mine->barrier();
  at::Tensor t = at::zeros({1});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "not a member", other->all_reduce_sum(t));
  for (const std::vector<int>& wrong : {std::vector<int>{}, {0, 4}, {-1}, {1, 1}}) {
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "distinct ranks", new_group(wrong));
  }
}

RESHARD_DISTRIBUTED_TEST(ProcessGroupTest, AnyRanksMakeAGroup, .ranks = 4) {
  process_group();
  for (int set = 1; set < 16; ++set) {
    std::vector<int> ranks;
    for (int r = 3; r >= 0; --r) {
      if ((set >> r) & 1) ranks.push_back(r);
    }
    const auto group = new_group(ranks);
    EXPECT_EQ(group->is_member(), ((set >> rank()) & 1) == 1);
    if (!group->is_member()) {
      EXPECT_ERROR(ErrorCode::kInvalidArgument, "not a member", group->rank());
      EXPECT_ERROR(ErrorCode::kInvalidArgument, "not a member", group->barrier());
      EXPECT_ERROR(ErrorCode::kInvalidArgument, "not a member", StoreTransport(*group, std::chrono::seconds(1)));
      continue;
    }
    EXPECT_EQ(group->ranks()[static_cast<size_t>(group->rank())], rank());
    at::Tensor sum = at::full({}, 1 << rank(), at::kInt);
    group->all_reduce_sum(sum);
    EXPECT_EQ(sum.item<int>(), set);
    group->barrier();
  }
}

// The others must learn of a killed rank at once, not at the deadline.
RESHARD_DISTRIBUTED_TEST(ProcessGroupTest, AKilledPeerIsAnErrorOfTheCollective, .ranks = 2,
                         .expected = {{1, killed_by(SIGKILL)}}) {
  const auto world = process_group();
  world->barrier();
  if (rank() == 1) raise(SIGKILL);
  at::Tensor t = at::zeros({1});
  EXPECT_ERROR(ErrorCode::kUnavailable, "all_reduce on process group \"default\"", world->all_reduce_sum(t));
}

TEST(ProcessGroupEnvironmentTest, AProcessAloneIsAGroupOfOne) {
  const auto world = init_process_group();
  EXPECT_EQ(world->size(), 1);
  at::Tensor t = at::full({2}, 3.0);
  world->all_reduce_sum(t);
  world->barrier();
  EXPECT_EQ(t[0].item<float>(), 3);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "exists already", init_process_group());
  destroy_process_group();
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "init_process_group first", default_process_group());
}

TEST(ProcessGroupEnvironmentTest, UnknownBackendsAreNamed) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "cpu:mpi", init_process_group({.backend = "cpu:mpi"}));
}

TEST(ProcessGroupEnvironmentTest, AWrongOrPartialEnvironmentIsNamed) {
  setenv("RANK", "0", 1);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "WORLD_SIZE", init_process_group());
  setenv("WORLD_SIZE", "2", 1);
  setenv("MASTER_ADDR", "127.0.0.1", 1);
  setenv("MASTER_PORT", "99999999", 1);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "99999999", init_process_group());
  setenv("MASTER_PORT", "29500", 1);
  for (const char* rank : {"zero", "2", "-1", ""}) {
    setenv("RANK", rank, 1);
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "environment variable RANK", init_process_group());
  }
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) unsetenv(name);
}

// A port in use, a rendezvous that does not answer, and one that nobody serves.
TEST(ProcessGroupEnvironmentTest, ARendezvousThatCannotBeIsAnErrorWithinItsDeadline) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(listener, 1), 0);
  socklen_t length = sizeof address;
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length);
  setenv("RANK", "0", 1);
  setenv("WORLD_SIZE", "2", 1);
  setenv("MASTER_ADDR", "127.0.0.1", 1);
  setenv("MASTER_PORT", std::to_string(ntohs(address.sin_port)).c_str(), 1);
  const ProcessGroupOptions short_wait{.timeout = std::chrono::milliseconds(500)};
  const std::string where = "(MASTER_ADDR 127.0.0.1, MASTER_PORT " + std::to_string(ntohs(address.sin_port)) + ")";
  EXPECT_ERROR(ErrorCode::kUnavailable, "cannot serve the store of the rendezvous " + where,
               init_process_group(short_wait));

  // The connection is taken and stays silent, as by a host that was stopped.
  setenv("RANK", "1", 1);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_ERROR(ErrorCode::kTimeout,
               "cannot reach the store of the rendezvous " + where + ": timed out: it does not answer",
               init_process_group(short_wait));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  close(listener);

  EXPECT_ERROR(ErrorCode::kTimeout, "cannot reach the store of the rendezvous " + where,
               init_process_group(short_wait));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) unsetenv(name);
}

}  // namespace
}  // namespace reshard
