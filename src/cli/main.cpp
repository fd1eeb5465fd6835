// SPDX-License-Identifier: BSD-3-Clause
// The command line: options in, one of the commands, an exit code out. 0: well; 1: an error or a failed check, named on
// stderr; 2: wrong usage.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "reshard/core/error.h"

int main(int argc, char** argv) {
  using namespace reshard;
  CLI::App app("Looks into sharded checkpoints and starts multi-process programs.", "reshard");
  app.require_subcommand(1);
  int exit_code = 0;

  cli::InspectOptions inspect_options;
  auto* inspect = app.add_subcommand("inspect", "What a checkpoint holds; opens no data file");
  inspect->add_option("directory", inspect_options.directory, "The checkpoint")->required();
  inspect->add_flag("--json", inspect_options.json, "As JSON, with every chunk");
  inspect->add_flag("--chunks", inspect_options.chunks, "Every chunk with its place");
  inspect->callback([&] { exit_code = cli::inspect(inspect_options); });

  cli::VerifyOptions verify_options;
  auto* verify =
      app.add_subcommand("verify", "Check everything; exit code 1 and a line for each problem if it is not whole");
  verify->add_option("directory", verify_options.directory, "The checkpoint")->required();
  verify->add_flag("-q,--quiet", verify_options.quiet, "Print problems only");
  verify->callback([&] { exit_code = cli::verify(verify_options); });

  cli::DigestOptions digest_options;
  auto* digest = app.add_subcommand(
      "digest", "SHA-256 of every whole tensor's row-major little-endian bytes, however it is sharded");
  digest->add_option("directory", digest_options.directory, "The checkpoint")->required();
  digest->add_flag("--json", digest_options.json, "As JSON: {key: hex}");
  digest->callback([&] { exit_code = cli::digest(digest_options); });

  cli::LaunchCommandOptions launch_options;
  auto* launch = app.add_subcommand("launch", "Start ranks of a program on this host, with torchrun's environment");
  launch->footer("What follows -- is the program and its arguments.");
  launch->add_option("-n,--ranks", launch_options.ranks, "How many")->required()->check(CLI::PositiveNumber);
  launch->add_option("--deadline", launch_options.deadline_seconds, "End the run after so many seconds")
      ->check(CLI::NonNegativeNumber);
  launch->callback([&] {
    if (launch_options.command.empty()) throw CLI::RequiredError("-- program");
    exit_code = cli::launch_command(launch_options);
  });

  // What follows the first "--" belongs to the program.
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const auto separator = std::ranges::find(arguments, "--");
  if (separator != arguments.end() && !arguments.empty() && arguments.front() == "launch") {
    launch_options.command.assign(separator + 1, arguments.end());
    arguments.erase(separator, arguments.end());
  }
  try {
    std::ranges::reverse(arguments);  // as CLI11 wants it
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    constexpr int kUsage = 2;
    return app.exit(error) == 0 ? 0 : kUsage;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "reshard: %s\n", cli::printable(error.what()).c_str());
    return 1;
  }
  if (std::fflush(stdout) != 0) {
    std::fprintf(stderr, "reshard: cannot write the output\n");
    return 1;
  }
  return exit_code;
}
