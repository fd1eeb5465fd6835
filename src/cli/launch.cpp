// SPDX-License-Identifier: BSD-3-Clause
#include <chrono>
#include <cmath>
#include <cstdio>

#include "cli/commands.h"
#include "reshard/launch/launcher.h"

namespace reshard::cli {

int launch_command(const LaunchCommandOptions& options) {
  LaunchOptions launch_options;
  launch_options.argv = options.command;
  launch_options.ranks = options.ranks;
  launch_options.deadline = std::chrono::milliseconds(std::llround(std::ceil(options.deadline_seconds * 1000)));
  const LaunchResult result = launch(launch_options);
  if (result.success()) return 0;
  std::fflush(stdout);
  if (result.deadline_passed) std::fprintf(stderr, "reshard: the deadline has passed\n");
  // The first cause first; ranks that were only ended because of it are not causes.
  const auto print = [](const RankResult& rank) {
    std::fprintf(stderr, "reshard: rank %d %s\n", rank.rank, rank.describe().c_str());
  };
  if (result.first_failed) print(result.ranks.at(static_cast<size_t>(*result.first_failed)));
  for (const RankResult& rank : result.ranks) {
    if (rank.rank == result.first_failed || rank.reason == EndReason::kAfterFailure) continue;
    if (rank.exit_code != 0) print(rank);
  }
  return 1;
}

}  // namespace reshard::cli
