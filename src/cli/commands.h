// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The commands of `reshard`. Each returns the exit code (0 well, 1 not) and throws Error for what stops it; main()
// prints that in one line. Results go to stdout, problems to stderr.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace reshard::cli {

struct InspectOptions {
  std::string directory;
  bool json = false;
  bool chunks = false;  // every chunk with its place
};
int inspect(const InspectOptions& options);

struct VerifyOptions {
  std::string directory;
  bool quiet = false;  // problems only
};
int verify(const VerifyOptions& options);

struct DigestOptions {
  std::string directory;
  bool json = false;
};
int digest(const DigestOptions& options);

struct LaunchCommandOptions {
  int ranks = 1;
  double deadline_seconds = 0;  // 0: none
  std::vector<std::string> command;
};
int launch_command(const LaunchCommandOptions& options);

/// "1.5 MiB".
std::string readable_bytes(uint64_t bytes);
/// The text with control characters spelled out: keys are any text, and a terminal obeys some.
std::string printable(std::string_view text);

}  // namespace reshard::cli
