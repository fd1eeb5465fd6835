// SPDX-License-Identifier: BSD-3-Clause
// How long a load takes with and without verification, one process, from files that are in memory:
//
//   TMPDIR=/dev/shm verified_load [--mib 1024] [--tensors 8] [--rounds 7]
//
// Both loads run by turns; their medians and the ratio are printed, and what was read for a byte that was needed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "reshard/protocol/thread_transport.h"
#include "reshard/storage/filesystem.h"
#include "support/memory_state.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

template <class Body>
double seconds(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

void run(int64_t mib, int64_t tensors, int rounds) {
  const TemporaryDirectory directory;
  const int64_t elements = mib * (1 << 20) / 4 / tensors;
  std::vector<StateEntry> entries;
  for (int64_t t = 0; t < tensors; ++t)
    entries.push_back(tensor_entry("t" + std::to_string(t), {elements}, {{{0}, {elements}}}));
  const auto transport = solo_transport();
  {
    const MemorySaveState saved(entries);
    DefaultSavePlanner planner;
    FileSystemWriter writer(directory.path());
    std::printf("save             %.3f s\n", seconds([&] { run_save(*transport, saved, planner, writer); }));
  }
  MemoryLoadState state(entries);
  ReadCounters counters;
  const auto load = [&](bool verify) {
    DefaultLoadPlanner planner;
    FileSystemReader reader(directory.path(), {.verify_checksums = verify});
    const double time = seconds([&] { run_load(*transport, state, planner, reader); });
    counters = reader.counters();
    return time;
  };
  load(true);
  if (const std::string difference = state.first_difference(); !difference.empty()) {
    std::fprintf(stderr, "wrong: %s\n", difference.c_str());
    std::exit(1);
  }
  std::vector<double> plain;
  std::vector<double> verified;
  for (int round = 0; round < rounds; ++round) {
    plain.push_back(load(false));
    verified.push_back(load(true));
  }
  const double gib = static_cast<double>(counters.bytes_needed) / (1 << 30);
  std::printf("load             %.3f s  %.2f GiB/s\n", median(plain), gib / median(plain));
  std::printf("load, verified   %.3f s  %.2f GiB/s\n", median(verified), gib / median(verified));
  std::printf("ratio            %.3f\n", median(verified) / median(plain));
  std::printf("read             %.6f bytes per byte needed, sidecars %.6f\n",
              static_cast<double>(counters.bytes_read) / static_cast<double>(counters.bytes_needed),
              static_cast<double>(counters.bytes_sidecars) / static_cast<double>(counters.bytes_needed));
}

}  // namespace
}  // namespace reshard

int main(int argc, char** argv) {
  int64_t mib = 1024;
  int64_t tensors = 8;
  int rounds = 7;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    if (name == "--mib") mib = std::atoll(argv[i + 1]);
    if (name == "--tensors") tensors = std::atoll(argv[i + 1]);
    if (name == "--rounds") rounds = std::atoi(argv[i + 1]);
  }
  reshard::run(mib, tensors, rounds);
}
