// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The definition of the command line, which help, completion and usage errors come from.

#include <CLI/CLI.hpp>
#include <array>
#include <string>

#include "cli/commands.h"

namespace reshard::cli {

/// What `convert --to` takes: the names of the kinds that can be written.
inline constexpr std::array<const char*, 3> kWritableKinds{"dcp", "torch", "safetensors"};

/// Where the parsed options go, and what came of the command.
struct Invocation {
  InspectOptions inspect;
  VerifyOptions verify;
  DigestOptions digest;
  DiffOptions diff;
  ConvertCommandOptions convert;
  ExtractOptions extract;
  LaunchCommandOptions launch;
  std::string shell;  // of `completion`
  int exit_code = 0;
  int trouble_code = 1;  // exit code for what stops the command
};

/// Adds commands and options to `app`; parsing runs the command. Borrows both.
void define(CLI::App& app, Invocation& invocation);

/// A script that completes commands and options in a shell: "bash", "zsh" or "fish".
std::string completion_script(const CLI::App& app, const std::string& shell);

}  // namespace reshard::cli
