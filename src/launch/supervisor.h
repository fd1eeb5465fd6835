// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The process between a launcher and its ranks. It is a fork of the launcher that never executes anything else, so that
// no second program has to be found; what it does is therefore limited to what is allowed after a fork of a threaded
// process: system calls on memory that was made ready before.
//
// It holds one end of a SOCK_SEQPACKET pair. From the launcher: an int, a signal for every living rank (sent after
// SIGCONT). To the launcher: one RankEvent for each rank. End of file (the launcher is done or dead): kill and reap
// everything, and go.

#include <sys/types.h>

#include <cstdint>

namespace reshard {

struct RankEvent {
  int rank;
  int status;       // as waitpid gives it
  int start_error;  // errno, or 0
  int64_t at_ns;    // CLOCK_MONOTONIC
};

/// What to start, as plain pointers into the launcher's memory. All descriptors are above 2.
struct SupervisedRank {
  char* const* envp;
  int stdout_fd;
  int stderr_fd;
  int report_fd;
  int listen_fd;  // -1 on all but rank 0
  pid_t pid;      // the supervisor's own note
};

struct SupervisorPlan {
  const char* program;
  char* const* argv;
  SupervisedRank* ranks;
  int rank_count;
  int null_fd;
  int socket_fd;
};

/// Runs in the forked child; never returns.
[[noreturn]] void supervise(const SupervisorPlan& plan);

}  // namespace reshard
