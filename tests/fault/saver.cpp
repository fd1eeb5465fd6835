// SPDX-License-Identifier: BSD-3-Clause
// A real program that saves: fault_saver DIRECTORY NUMBER. Exit code 0, or 3 and the CheckpointError on stderr.
#include <cstdio>
#include <cstdlib>

#include "storage/generations.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    reshard::save_checkpoint(argv[1], reshard::generation(std::atoi(argv[2]), 1), {});
    return 0;
  } catch (const reshard::CheckpointError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "no CheckpointError: %s\n", error.what());
    return 4;
  }
}
