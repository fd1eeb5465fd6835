// SPDX-License-Identifier: BSD-3-Clause
#include "launch/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace reshard {
namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

void close_all_but(const int* sorted_keep, int count) {
  unsigned low = 3;
  for (int i = 0; i < count; ++i) {
    const unsigned fd = static_cast<unsigned>(sorted_keep[i]);
    if (fd > low) close_range(low, fd - 1, 0);
    low = fd + 1;
  }
  close_range(low, ~0U, 0);
}

// Between vfork and exec the child runs in our memory while we wait: it touches nothing but `error`.
[[gnu::noinline]] int start(const SupervisorPlan& plan, SupervisedRank& rank, pid_t supervisor) {
  volatile int error = 0;
  const pid_t pid = vfork();
  if (pid == 0) {
    setpgid(0, 0);  // a rank that signals its group must not reach the others
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != supervisor) _exit(127);
    dup2(plan.null_fd, STDIN_FILENO);
    dup2(rank.stdout_fd, STDOUT_FILENO);
    dup2(rank.stderr_fd, STDERR_FILENO);
    fcntl(rank.report_fd, F_SETFD, 0);  // everything else we hold closes on exec
    if (rank.listen_fd >= 0) fcntl(rank.listen_fd, F_SETFD, 0);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    execvpe(plan.program, plan.argv, rank.envp);
    error = errno;
    _exit(127);
  }
  rank.pid = pid;
  return pid < 0 ? errno : error;
}

// SIGKILL for every direct child, found by its parent's number in /proc: ranks, and what ranks left behind and we
// adopted.
void kill_children() {
  const int proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (proc < 0) return;
  const pid_t self = getpid();
  alignas(8) static char entries[1 << 14];
  for (;;) {
    const long size = syscall(SYS_getdents64, proc, entries, sizeof(entries));
    if (size <= 0) break;
    for (long at = 0; at < size;) {
      struct Entry {  // linux_dirent64
        uint64_t inode;
        int64_t offset;
        uint16_t length;
        uint8_t type;
        char name[1];
      };
      const char* raw = entries + at;
      uint16_t length;
      std::memcpy(&length, raw + offsetof(Entry, length), sizeof(length));
      at += length;
      const char* name = raw + offsetof(Entry, name);
      if (name[0] < '1' || name[0] > '9') continue;
      char path[32];
      char* end = stpncpy(path, name, 20);
      std::memcpy(end, "/stat", 6);
      const int fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
      if (fd < 0) continue;
      char stat[256];  // "pid (name, at most 64 bytes) state ppid ..."
      const ssize_t n = read(fd, stat, sizeof(stat) - 1);
      close(fd);
      if (n <= 0) continue;
      stat[n] = '\0';
      const char* close_paren = std::strrchr(stat, ')');
      if (close_paren == nullptr || std::strlen(close_paren) < 5) continue;
      if (std::strtol(close_paren + 4, nullptr, 10) == self) {
        kill(static_cast<pid_t>(std::strtol(name, nullptr, 10)), SIGKILL);
      }
    }
  }
  close(proc);
}

class Supervisor {
 public:
  explicit Supervisor(const SupervisorPlan& plan) : plan_(plan) {}

  [[noreturn]] void run() {
    isolate();
    for (int i = 0; i < plan_.rank_count; ++i) {
      SupervisedRank& rank = plan_.ranks[i];
      const int error = start(plan_, rank, getpid());
      if (error != 0) {
        if (rank.pid > 0) waitpid(rank.pid, nullptr, 0);
        rank.pid = -1;
        report({i, 0, error, now_ns()});
      }
      close(rank.stdout_fd);  // the ranks' ends are the only ones: their end is the end of file
      close(rank.stderr_fd);
      close(rank.report_fd);
      if (rank.listen_fd >= 0) close(rank.listen_fd);
    }
    for (;;) {
      pollfd fds[] = {{plan_.socket_fd, POLLIN, 0}, {signal_fd_, POLLIN, 0}};
      if (poll(fds, 2, -1) < 0 && errno != EINTR) break;
      if (fds[1].revents != 0) {
        signalfd_siginfo info;
        while (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
          if (info.ssi_signo != SIGCHLD) finish();
        }
        reap();
      }
      if (fds[0].revents != 0) {
        int signal = 0;
        const ssize_t n = recv(plan_.socket_fd, &signal, sizeof(signal), MSG_DONTWAIT);
        if (n == sizeof(signal)) {
          for (int i = 0; i < plan_.rank_count; ++i) {
            if (plan_.ranks[i].pid <= 0) continue;
            kill(plan_.ranks[i].pid, SIGCONT);  // a stopped process handles nothing but SIGKILL
            kill(plan_.ranks[i].pid, signal);
          }
        } else if (n >= 0 || (errno != EAGAIN && errno != EINTR)) {
          break;
        }
      }
    }
    finish();
  }

 private:
  // Away from the caller's session, descriptors and signals. All signals are blocked already.
  void isolate() {
    setsid();
    prctl(PR_SET_NAME, "reshard-launch");
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    for (int fd = 0; fd < 3; ++fd) dup2(plan_.null_fd, fd);
    for (int signal = 1; signal < NSIG; ++signal) {
      struct sigaction action;
      if (sigaction(signal, nullptr, &action) != 0 || (action.sa_handler == SIG_IGN && signal != SIGCHLD)) continue;
      action.sa_handler = SIG_DFL;
      action.sa_flags = 0;
      sigaction(signal, &action, nullptr);
    }
    sigset_t watched;
    sigemptyset(&watched);
    for (int signal : {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT}) sigaddset(&watched, signal);
    signal_fd_ = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd_ < 0) _exit(127);
  }

  void report(const RankEvent& event) { (void)send(plan_.socket_fd, &event, sizeof(event), MSG_NOSIGNAL); }

  // Returns false when there is no child left.
  bool reap() {
    for (;;) {
      int status = 0;
      const pid_t pid = waitpid(-1, &status, WNOHANG | WUNTRACED | WCONTINUED);
      if (pid <= 0) return pid == 0 || errno == EINTR;
      for (int i = 0; i < plan_.rank_count; ++i) {
        if (plan_.ranks[i].pid != pid) continue;
        if (WIFEXITED(status) || WIFSIGNALED(status)) plan_.ranks[i].pid = 0;
        report({i, status, 0, now_ns()});
      }
    }
  }

  // Killing a process hands its children to us, so this goes on until nothing is left.
  [[noreturn]] void finish() {
    while (reap()) {
      for (int i = 0; i < plan_.rank_count; ++i) {
        if (plan_.ranks[i].pid > 0) kill(plan_.ranks[i].pid, SIGKILL);
      }
      kill_children();
      pollfd fd = {signal_fd_, POLLIN, 0};
      poll(&fd, 1, 5);  // the next death, or a child that was handed over unseen
      signalfd_siginfo info;
      while (read(signal_fd_, &info, sizeof(info)) > 0) {
      }
    }
    _exit(0);
  }

  const SupervisorPlan& plan_;
  int signal_fd_ = -1;
};

}  // namespace

void supervise(const SupervisorPlan& plan) {
  // Descriptors of other threads, also of other launches, must not live on here. Insertion sort: nothing may be
  // allocated.
  static int keep[4 * 4096];
  int count = 0;
  const auto add = [&](int fd) {
    int at = count++;
    for (; at > 0 && keep[at - 1] > fd; --at) keep[at] = keep[at - 1];
    keep[at] = fd;
  };
  add(plan.socket_fd);
  add(plan.null_fd);
  for (int i = 0; i < plan.rank_count; ++i) {
    add(plan.ranks[i].stdout_fd);
    add(plan.ranks[i].stderr_fd);
    add(plan.ranks[i].report_fd);
    if (plan.ranks[i].listen_fd >= 0) add(plan.ranks[i].listen_fd);
  }
  close_all_but(keep, count);
  Supervisor(plan).run();
}

}  // namespace reshard
