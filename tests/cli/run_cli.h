// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Running the built `reshard`, and a checkpoint to run it on.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "storage/checkpoint_runs.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"

namespace reshard {

struct CommandResult {
  int exit_code = -1;
  std::string out;
  std::string err;
};

inline std::string text_of(const std::string& path) {
  const Bytes bytes = read_test_file(path);
  return std::string(as_text(bytes));
}

/// Starts `reshard` with its output in files.
inline pid_t start_reshard(std::vector<std::string> arguments, const std::string& out, const std::string& err) {
  arguments.insert(arguments.begin(), RESHARD_CLI);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  constexpr int kFlags = O_WRONLY | O_CREAT | O_TRUNC;
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), kFlags, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), kFlags, 0600);
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw std::runtime_error("cannot start " + arguments[0]);
  return pid;
}

/// The exit code, or minus the signal that ended it.
inline int wait_for(pid_t pid) {
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/// Runs `reshard` with its output in files, so that no pipe can fill up.
inline CommandResult reshard_command(std::vector<std::string> arguments) {
  const TemporaryDirectory directory;
  const int exit_code = wait_for(start_reshard(std::move(arguments), directory / "out", directory / "err"));
  return {exit_code, text_of(directory / "out"), text_of(directory / "err")};
}

/// A checkpoint of two ranks of ours.
class CliTest : public testing::Test {
 protected:
  void SetUp() override {
    std::vector<MemorySaveState> ranks;
    for (const auto& mine : split({6, 4}, 0, 2)) {
      ranks.push_back(MemorySaveState({tensor_entry("model.weight", {6, 4}, mine), replica_entry("model.bias", {5})}));
      ranks.back().add_value("step", value_archive("seven"));
    }
    saved_ = save_checkpoint(directory_.path(), ranks);
  }
  const std::string& path() const { return directory_.path(); }
  /// A place for what a command writes.
  std::string out(const std::string& name) const { return out_ / name; }
  std::vector<std::string> names_out() const { return local_file_system().list(out_.path()); }

  TemporaryDirectory directory_;
  TemporaryDirectory out_;
  SaveResult saved_;
};

}  // namespace reshard
