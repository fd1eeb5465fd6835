// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Ranks that are processes, forked from the test, joined to rank 0 by socket pairs: a rank can be killed alone, and
// the others see the end of their sockets at once. Light enough for thousands of jobs.

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "reshard/core/error.h"
#include "reshard/protocol/transport.h"

namespace reshard {

/// A star of sockets: rank 0 to each other rank. A peer that ended is kUnavailable, after what it had sent.
class SocketTransport final : public Transport {
 public:
  /// `peers[r]`: the socket to rank r, or -1.
  SocketTransport(int rank, std::vector<int> peers) : rank_(rank), peers_(std::move(peers)) {}

  int rank() const override { return rank_; }
  int world_size() const override { return static_cast<int>(peers_.size()); }
  void heartbeat() noexcept override {}

  void send(int to, ByteSpan message) override {
    const uint64_t size = message.size();
    const int fd = peers_.at(static_cast<size_t>(to));
    if (put(fd, &size, sizeof(size))) put(fd, message.data(), message.size());  // a peer that is gone is no error
  }
  Bytes receive(int from) override {
    const int fd = peers_.at(static_cast<size_t>(from));
    uint64_t size = 0;
    get(fd, from, &size, sizeof(size));
    Bytes message(static_cast<size_t>(size));
    get(fd, from, message.data(), message.size());
    return message;
  }

 private:
  static constexpr int kSilenceMs = 60000;

  static bool put(int fd, const void* data, size_t size) {
    const char* from = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t n = ::send(fd, from, size, MSG_NOSIGNAL);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return false;
      from += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  static void get(int fd, int rank, void* data, size_t size) {
    char* to = static_cast<char*>(data);
    while (size > 0) {
      pollfd waiting{.fd = fd, .events = POLLIN, .revents = 0};
      if (::poll(&waiting, 1, kSilenceMs) == 0) {
        throw Error(ErrorCode::kTimeout, "rank " + std::to_string(rank) + " was silent");
      }
      const ssize_t n = ::recv(fd, to, size, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw Error(ErrorCode::kUnavailable, "rank " + std::to_string(rank) + " is lost");
      to += n;
      size -= static_cast<size_t>(n);
    }
  }

  const int rank_;
  const std::vector<int> peers_;
};

/// How one rank's process ended, told through memory that it shares with the test.
struct ProcessOutcome {
  bool ok = false;
  bool checkpoint_error = false;
  Committed committed = Committed::kUnknown;
  std::array<char, 512> text{};  // of the error
  bool killed = false;           // by SIGKILL; set by the test
  int status = 0;                // of waitpid
};

/// Memory that forked processes share with their parent.
template <class T>
class Shared {
 public:
  explicit Shared(size_t count) : count_(count) {
    void* memory = ::mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cannot share memory");
    items_ = static_cast<T*>(memory);
    for (size_t i = 0; i < count; ++i) new (items_ + i) T();
  }
  ~Shared() { ::munmap(items_, count_ * sizeof(T)); }
  Shared(const Shared&) = delete;
  T& operator[](size_t i) { return items_[i]; }

 private:
  T* items_;
  size_t count_;
};

/// Runs body(rank, transport) on forked ranks and waits for all. They are a process group of their own: kill(0, ...)
/// in one of them reaches all. The caller must have no other threads.
inline std::vector<ProcessOutcome> run_processes(size_t world_size, const std::function<void(int, Transport&)>& body) {
  Shared<ProcessOutcome> outcomes(world_size);
  std::vector<std::array<int, 2>> sockets(world_size, {-1, -1});  // [r][0]: rank 0's end, [r][1]: rank r's
  for (size_t r = 1; r < world_size; ++r) {
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets[r].data()) != 0) {
      throw std::runtime_error("cannot make a socket pair");
    }
  }
  // Nobody starts before all are in the group.
  std::array<int, 2> gate{};
  if (::pipe(gate.data()) != 0) throw std::runtime_error("cannot make a pipe");
  std::vector<pid_t> children;
  for (size_t r = 0; r < world_size; ++r) {
    const pid_t child = ::fork();
    if (child < 0) throw std::runtime_error("cannot fork");
    if (child == 0) {
      ::close(gate[1]);
      char go = 0;
      static_cast<void>(!::read(gate[0], &go, 1));
      std::vector<int> peers(world_size, -1);
      for (size_t other = 1; other < world_size; ++other) {
        if (r == 0) peers[other] = sockets[other][0];
        if (r == other) peers[0] = sockets[r][1];
        // Ends that are kept open elsewhere would hide a death.
        if (r != 0) ::close(sockets[other][0]);
        if (r != other) ::close(sockets[other][1]);
      }
      ProcessOutcome& outcome = outcomes[r];
      try {
        SocketTransport transport(static_cast<int>(r), peers);
        body(static_cast<int>(r), transport);
        outcome.ok = true;
      } catch (const CheckpointError& error) {
        outcome.checkpoint_error = true;
        outcome.committed = error.committed();
        std::strncpy(outcome.text.data(), error.what(), outcome.text.size() - 1);
      } catch (const std::exception& error) {
        std::strncpy(outcome.text.data(), error.what(), outcome.text.size() - 1);
      }
      ::_exit(0);
    }
    children.push_back(child);
    ::setpgid(child, children[0]);
  }
  for (size_t r = 1; r < world_size; ++r) {
    for (const int fd : sockets[r]) ::close(fd);
  }
  ::close(gate[0]);
  ::close(gate[1]);  // go
  std::vector<ProcessOutcome> result;
  for (size_t r = 0; r < world_size; ++r) {
    int status = 0;
    while (::waitpid(children[r], &status, 0) < 0 && errno == EINTR) {
    }
    ProcessOutcome outcome = outcomes[r];
    outcome.status = status;
    outcome.killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    result.push_back(outcome);
  }
  return result;
}

}  // namespace reshard
