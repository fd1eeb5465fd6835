// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The system calls of the library, seen and bent from within the program: a program that links system_calls.cpp has its
// own open(), pwritev(), fsync(), ..., which ask a hook first and then make the real call. So a fault is a fault of the
// system, below everything that the library has, and a trace is of what really was asked of the system.
//
// The same for memory: operator new can be made to fail.

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace reshard {

enum class SystemCall : uint8_t {
  kOpen,  // open, openat
  kStat,  // fstat, lstat
  kRead,
  kWrite,
  kWriteBack,  // sync_file_range
  kSync,
  kClose,
  kRename,
  kUnlink,
  kMkdir,
  kRmdir,
  kOpendir,
  kReaddir,
  kLock,
  kTruncate,
};
std::string_view to_string(SystemCall call);

struct SystemCallEvent {
  SystemCall call = SystemCall::kOpen;
  int rank = 0;      // that the calling thread plays; 0 where it plays none
  std::string path;  // where the call has one
  std::string to{};  // of a rename
  int fd = -1;       // where the call has one; after an open: the new one
  int flags = 0;     // of open
  off_t offset = 0;  // of reads, writes and writes back
  const iovec* parts = nullptr;
  int count = 0;
};
/// "write 3", "rename a -> b".
std::string to_string(const SystemCallEvent& event);

/// What becomes of a call.
struct SystemCallAction {
  int error = 0;              // not 0: it fails with this errno
  bool after_effect = false;  // and is made all the same
  ssize_t at_most = -1;       // not -1: a read or write moves at most so many bytes
  bool skip = false;          // it reports success (0) and is not made
};

/// Called on the thread that makes the call, which may be any; must not throw. Calls made by a hook are not seen.
class SystemCallHook {
 public:
  virtual ~SystemCallHook() = default;
  virtual SystemCallAction before(const SystemCallEvent& event) = 0;
  /// `event.fd` is the new descriptor after an open; `result` as the caller gets it, `error` its errno.
  virtual void after(const SystemCallEvent& /*event*/, long /*result*/, int /*error*/) {}
};

/// While it lives, the hook sees every call of the process. One at a time.
class HookedSystemCalls {
 public:
  explicit HookedSystemCalls(SystemCallHook& hook);
  ~HookedSystemCalls();
  HookedSystemCalls(const HookedSystemCalls&) = delete;
};

/// While it lives, allocation number `first` (from 1) of the rank and the `count - 1` after it throw std::bad_alloc.
class FailingAllocations {
 public:
  FailingAllocations(int rank, uint64_t first, uint64_t count);
  ~FailingAllocations();
  FailingAllocations(const FailingAllocations&) = delete;
  /// Allocations of the rank so far.
  uint64_t seen() const;
};

}  // namespace reshard
