// SPDX-License-Identifier: BSD-3-Clause
// A distributed case of somebody else's: two processes that find each other's greeting in the folder they share.

#include <poll.h>

#include <filesystem>
#include <fstream>

#include "reshard/testing/distributed_test.h"

RESHARD_DISTRIBUTED_TEST(Greeting, ReachesTheOtherRank, .ranks = 2) {
  const auto greeting = [&](int rank) { return temp_dir() / ("greeting-" + std::to_string(rank)); };
  std::ofstream(greeting(rank())) << "from rank " << rank();
  // The fixture's deadline ends this loop where the other rank never comes.
  while (!std::filesystem::exists(greeting(1 - rank()))) poll(nullptr, 0, 1);
  EXPECT_EQ(world_size(), 2);
}
