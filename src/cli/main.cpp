// SPDX-License-Identifier: BSD-3-Clause
// The command line: options in, one of the commands, an exit code out. 0: well; 1: an error or a failed check, named on
// stderr; 2: wrong usage (and trouble in `diff`, where 1 is a difference).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "cli/app.h"
#include "cli/output.h"
#include "protocol/save_process.h"
#include "reshard/core/error.h"

namespace {

using namespace reshard;

/// One line: of an error that crossed ranks, the first cause.
std::string message_of(const std::exception& error) {
  if (const auto* failed = dynamic_cast<const CheckpointError*>(&error)) {
    for (const auto& [rank, failure] : failed->failures()) {
      if (failure.code == failed->code()) return failure.message;
    }
  }
  return error.what();
}

}  // namespace

int main(int argc, char** argv) {
  // Not a command for people: how async_save starts a process that makes its saves.
  if (argc == 2 && std::string_view(argv[1]) == "save-worker") {
    try {
      serve_saves(STDIN_FILENO);
      return 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "reshard save-worker: %s\n", error.what());
      return 1;
    }
  }
  CLI::App app("Looks into sharded checkpoints, converts them, and starts multi-process programs.", "reshard");
  cli::Invocation run;
  cli::define(app, run);

  // What follows the first "--" belongs to the program.
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const auto separator = std::ranges::find(arguments, "--");
  if (separator != arguments.end() && !arguments.empty() && arguments.front() == "launch") {
    run.launch.command.assign(separator + 1, arguments.end());
    arguments.erase(separator, arguments.end());
  }
  try {
    std::ranges::reverse(arguments);  // as CLI11 wants it
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    constexpr int kUsage = 2;
    return app.exit(error) == 0 ? 0 : kUsage;
  } catch (const std::exception& error) {
    if (const int signal = cli::interrupted_by(); signal != 0) {
      std::fprintf(stderr, "reshard: interrupted, nothing was written\n");
      constexpr int kBySignal = 128;
      return kBySignal + signal;
    }
    std::fprintf(stderr, "reshard: %s\n", cli::printable(message_of(error)).c_str());
    return run.trouble_code;
  }
  if (std::fflush(stdout) != 0) {
    std::fprintf(stderr, "reshard: cannot write the output\n");
    return run.trouble_code;
  }
  return run.exit_code;
}
