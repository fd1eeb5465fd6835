// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The commands of `reshard`. Each returns the exit code (0 well, 1 not) and throws Error for what stops it; main()
// prints that in one line. Results go to stdout, problems and progress to stderr.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/io/file_system.h"

namespace reshard::cli {

/// Where a checkpoint that is only read lies: an object store for "s3://...", the local files for all else.
FileSystem& file_system_at(const std::string& path);

struct InspectOptions {
  std::string path;
  bool json = false;
  bool chunks = false;  // every chunk with its place
  std::string map;      // a file to draw where everything lies; empty: none
  bool force = false;   // replace that file
};
int inspect(const InspectOptions& options);

struct VerifyOptions {
  std::string path;
  bool quiet = false;  // problems only
};
int verify(const VerifyOptions& options);

struct DigestOptions {
  std::string path;
  bool json = false;
};
int digest(const DigestOptions& options);

struct DiffOptions {
  std::string a;
  std::string b;
  double atol = 0;  // elements may differ by atol + rtol * |element of b|
  double rtol = 0;
  bool json = false;
  bool quiet = false;  // exit code only
  uint64_t block_bytes = 64 << 20;
};
/// 0: the same, 1: different.
int diff(const DiffOptions& options);

struct ConvertCommandOptions {
  std::string source;
  std::string destination;
  std::string to;  // a CheckpointKind
  int ranks = 1;   // of a checkpoint in a directory
  bool force = false;
  bool no_verify = false;  // of a source without sums of blocks
  uint64_t block_bytes = 64 << 20;
};
int convert(const ConvertCommandOptions& options);

struct ExtractOptions {
  std::string source;
  std::string key;
  std::string output;  // empty: none, "-": stdout
  bool raw = false;    // elements without a header; of a value its archive
  bool force = false;
  uint64_t block_bytes = 64 << 20;
};
int extract(const ExtractOptions& options);

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
