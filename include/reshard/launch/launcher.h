// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Starts N ranks of a program on this host and sees them to their end.
//
// Order of events in one launch():
//   1. The store's port is bound (127.0.0.1, chosen by the kernel) and the listening socket goes to rank 0 alone.
//   2. A supervisor process is forked; it starts the ranks with the environment of launch/environment.h, and is the
//      reaper of all their descendants. stdin is /dev/null; stdout and stderr come back as lines.
//   3. The caller's thread waits, passes lines on, and decides: a rank that ended otherwise than `is_success` allows,
//      or a deadline that passed, ends the others: SIGCONT and a signal first, SIGKILL after `end_grace`.
//   4. When all ranks have ended, the supervisor ends what they left behind and goes.
//
// Nothing survives the caller: when it dies, also by SIGKILL, the supervisor sees the end of file on their socket and
// kills every rank and every descendant of a rank, also those in sessions of their own and stopped ones. When the
// supervisor itself is killed, the kernel kills the ranks.

#include <sys/types.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace reshard {

/// Names a file descriptor, open for writing in each rank: what a rank writes there comes back as RankResult::report,
/// also when it is killed right after.
inline constexpr const char* kReportFdVariable = "RESHARD_REPORT_FD";

enum class OutputStream : unsigned char { kStdout, kStderr };

/// One line that a rank wrote, without its line end.
struct OutputLine {
  int rank = 0;
  OutputStream stream = OutputStream::kStdout;
  std::string_view text;
  bool ending = false;  // written after the rank was told to end: usually the stacks of a stuck rank
};

enum class EndReason : unsigned char {
  kItself,        // nobody asked it to
  kAfterFailure,  // ended by launch() because another rank had failed
  kDeadline,      // ended by launch() because the deadline had passed
};

/// How one rank ended.
struct RankResult {
  int rank = 0;
  std::optional<int> exit_code = {};  // set when it exited
  int signal = 0;                     // the signal that killed it, or 0
  int start_error = 0;                // errno when the program could not be started, or 0
  EndReason reason = EndReason::kItself;
  std::string output = {};                           // the last `capture_limit` bytes of its lines, both streams
  std::string report = {};                           // what it wrote to kReportFdVariable
  std::chrono::steady_clock::time_point ended_at{};  // when the supervisor saw the end
  std::chrono::nanoseconds duration{};
  bool stopped = false;  // it was stopped (SIGSTOP) when it was told to end

  /// "exited with code 3", "killed by SIGSEGV", "could not be started: No such file or directory"
  std::string describe() const;
};

struct LaunchOptions {
  /// The program's arguments, its own name first.
  std::vector<std::string> argv = {};
  /// The file to execute; argv[0] by default. Without a slash it is looked up in PATH.
  std::string program = {};
  int ranks = 1;
  /// Set (or, with nullopt, unset) in every rank on top of this process's environment. Wins over the contract's own
  /// variables. OMP_NUM_THREADS is 1 unless set here or there.
  std::map<std::string, std::optional<std::string>> environment = {};
  /// Of the whole run; zero: none. Ranks alive then get SIGABRT, so that a stack-printing handler can tell where they
  /// are.
  std::chrono::milliseconds deadline{0};
  /// After the first failure the others have this long to end by themselves.
  std::chrono::milliseconds failure_grace{1000};
  /// What the others get then.
  int end_signal = SIGTERM;
  /// From that signal (or the deadline's SIGABRT) to SIGKILL.
  std::chrono::milliseconds end_grace{5000};
  std::size_t capture_limit = 1 << 20;
  /// Called on the caller's thread for every line. By default lines go to this process's own stdout and stderr as
  /// "[rank k] line". What it throws ends the ranks and leaves launch().
  std::function<void(const OutputLine&)> on_line = {};
  /// Called on the caller's thread when a rank ended by itself, with its result and report. Default: exit code 0.
  std::function<bool(const RankResult&)> is_success = {};
};

struct LaunchResult {
  std::vector<RankResult> ranks;  // by rank
  std::optional<int>
      first_failed;  // the rank that ended first without success; none if all succeeded or only the deadline passed
  bool deadline_passed = false;
  std::chrono::nanoseconds duration{};

  bool success() const { return !first_failed && !deadline_passed; }
};

/// Runs the ranks; blocks until all have ended and nothing of them is left. A rank that fails is a result, not an
/// error; throws kInvalidArgument for wrong options, kIo when the operating system refuses a socket or process,
/// kTimeout when killed processes do not go away (stuck in the kernel). May be called from several threads at once.
/// Leaves signal handlers and children of the caller alone.
LaunchResult launch(const LaunchOptions& options);

/// "SIGKILL"; "signal 40" where there is no name.
std::string signal_name(int signal);

}  // namespace reshard
