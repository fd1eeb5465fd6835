// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// PyTorch, the peer of some tests. The target defines RESHARD_PYTHON, and RESHARD_PYTHON_SCRIPTS, its folder of scripts.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace reshard {

inline bool has_python() { return std::filesystem::exists(RESHARD_PYTHON); }

struct PythonResult {
  int exit_code = -1;
  std::string output;
};

/// Runs a script, named with its arguments as for the shell; the ranks that it starts are its own. Its crash (a signal, in it or in a rank of its)
/// shows where, is printed, and the script runs again, three times in all: no code of ours is in those processes, and PyTorch's ranks do crash in
/// their own collectives, if rarely. What they refuse, or find wrong, counts the first time.
inline PythonResult run_python(const std::string& arguments) {
  const std::string command =
      "env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u LOCAL_WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT -u "
      "RESHARD_MASTER_LISTEN_FD PYTHONFAULTHANDLER=1 '" RESHARD_PYTHON "' '" RESHARD_PYTHON_SCRIPTS "'/" +
      arguments + " 2>&1";
  for (int runs = 1;; ++runs) {
    FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) throw std::runtime_error("popen");
    PythonResult result;
    for (char buffer[4096]; const size_t n = fread(buffer, 1, sizeof buffer, pipe);) result.output.append(buffer, n);
    const int status = pclose(pipe);
    if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
    // The shell gives a signal as 128 and its number; torch.multiprocessing puts it in words.
    const bool crashed =
        result.exit_code > 128 || result.output.find("terminated with signal SIG") != std::string::npos;
    if (!crashed || runs == 3) return result;
    std::fprintf(stderr, "run %d of %s crashed:\n%s\n", runs, arguments.c_str(), result.output.c_str());
  }
}

inline void expect_python_succeeds(const std::string& arguments) {
  const PythonResult result = run_python(arguments);
  ASSERT_EQ(result.exit_code, 0) << arguments << "\n" << result.output;
}

}  // namespace reshard
