// SPDX-License-Identifier: BSD-3-Clause
#include "fault/system_calls.h"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "support/rank_threads.h"

namespace reshard {
namespace {

std::atomic<SystemCallHook*> the_hook = nullptr;
thread_local bool inside = false;  // a hook, whose own calls and allocations are not seen

int this_rank() { return std::max(current_rank(), 0); }

std::atomic<bool> failing_allocations = false;
std::atomic<int> failing_rank = 0;
std::atomic<uint64_t> allocations = 0;
std::atomic<uint64_t> first_failing = 0;
std::atomic<uint64_t> failing_count = 0;

class Inside {
 public:
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};

template <class Function>
Function* real(const char* name) {
  void* found = ::dlsym(RTLD_NEXT, name);
  if (found == nullptr) std::abort();
  return reinterpret_cast<Function*>(found);
}

/// `work(at_most)` makes the real call.
template <class Result, class Work>
Result intercepted(SystemCallEvent (*describe)(const void*), const void* arguments, Result failure, Work work) {
  SystemCallHook* hook = the_hook.load(std::memory_order_acquire);
  if (hook == nullptr || inside) return work(-1);
  const Inside guard;
  const int errno_before = errno;
  SystemCallEvent event = describe(arguments);
  event.rank = this_rank();
  const SystemCallAction action = hook->before(event);
  Result result = failure;
  int error = action.error;
  if (action.skip) {
    result = Result{};
    error = errno_before;
  } else if (action.error == 0 || action.after_effect) {
    errno = errno_before;
    result = work(action.at_most);
    error = errno;
    if (action.error != 0) {
      result = failure;
      error = action.error;
    }
  }
  if constexpr (std::is_integral_v<Result>) {
    if (event.call == SystemCall::kOpen) event.fd = static_cast<int>(result);
    hook->after(event, static_cast<long>(result), error);
  } else {
    hook->after(event, result != failure ? 0 : -1, error);
  }
  errno = error;
  return result;
}

template <class Result, class Describe, class Work>
Result see(const Describe& describe, Result failure, const Work& work) {
  return intercepted<Result>([](const void* d) { return (*static_cast<const Describe*>(d))(); }, &describe, failure,
                             work);
}

ssize_t transfer(ssize_t (*call)(int, const iovec*, int, off_t), int fd, const iovec* parts, int count, off_t offset,
                 ssize_t at_most) {
  if (at_most < 0) return call(fd, parts, count, offset);
  std::vector<iovec> cut;
  for (int i = 0; i < count && at_most > 0; ++i) {
    cut.push_back({parts[i].iov_base, std::min(parts[i].iov_len, static_cast<size_t>(at_most))});
    at_most -= static_cast<ssize_t>(cut.back().iov_len);
  }
  return cut.empty() ? 0 : call(fd, cut.data(), static_cast<int>(cut.size()), offset);
}

}  // namespace

std::string_view to_string(SystemCall call) {
  constexpr std::array<std::string_view, 15> kNames = {"open",  "stat",    "read",    "write",  "sync_file_range",
                                                       "fsync", "close",   "rename",  "unlink", "mkdir",
                                                       "rmdir", "opendir", "readdir", "flock",  "ftruncate"};
  return kNames.at(static_cast<size_t>(call));
}

std::string to_string(const SystemCallEvent& event) {
  std::string text(to_string(event.call));
  if (!event.path.empty()) text += " " + event.path;
  if (!event.to.empty()) text += " -> " + event.to;
  if (event.call == SystemCall::kWrite || event.call == SystemCall::kRead)
    text += " at " + std::to_string(event.offset);
  return text;
}

HookedSystemCalls::HookedSystemCalls(SystemCallHook& hook) { the_hook = &hook; }
HookedSystemCalls::~HookedSystemCalls() { the_hook = nullptr; }

FailingAllocations::FailingAllocations(int rank, uint64_t first, uint64_t count) {
  failing_rank = rank;
  allocations = 0;
  first_failing = first;
  failing_count = count;
  failing_allocations = true;
}
FailingAllocations::~FailingAllocations() { failing_allocations = false; }
uint64_t FailingAllocations::seen() const { return allocations; }

}  // namespace reshard

// --- in place of the system's -------------------------------------------------------------------------------------------

using reshard::SystemCall;
using reshard::SystemCallEvent;

namespace {
std::string text_of(const char* path) { return path != nullptr ? path : ""; }
}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  static auto* const next = reshard::real<int(const char*, int, ...)>("open");
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kOpen, .path = text_of(path), .flags = flags}; },
                      -1, [&](ssize_t) { return next(path, flags, mode); });
}

int openat(int directory, const char* path, int flags, ...) {
  static auto* const next = reshard::real<int(int, const char*, int, ...)>("openat");
  mode_t mode = 0;
  if ((flags & O_CREAT) != 0) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kOpen, .path = text_of(path), .flags = flags}; },
                      -1, [&](ssize_t) { return next(directory, path, flags, mode); });
}

int __open_2(const char* path, int flags) { return open(path, flags); }
int __openat_2(int directory, const char* path, int flags) { return openat(directory, path, flags); }

int fstat(int fd, struct stat* status) noexcept {
  static auto* const next = reshard::real<int(int, struct stat*)>("fstat");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kStat, .path = {}, .fd = fd}; }, -1,
                      [&](ssize_t) { return next(fd, status); });
}

int lstat(const char* path, struct stat* status) noexcept {
  static auto* const next = reshard::real<int(const char*, struct stat*)>("lstat");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kStat, .path = text_of(path)}; }, -1,
                      [&](ssize_t) { return next(path, status); });
}

ssize_t preadv(int fd, const iovec* parts, int count, off_t offset) {
  static auto* const next = reshard::real<ssize_t(int, const iovec*, int, off_t)>("preadv");
  return reshard::see(
      [&] {
        return SystemCallEvent{
            .call = SystemCall::kRead, .path = {}, .fd = fd, .offset = offset, .parts = parts, .count = count};
      },
      ssize_t{-1}, [&](ssize_t at_most) { return reshard::transfer(next, fd, parts, count, offset, at_most); });
}

ssize_t pwritev(int fd, const iovec* parts, int count, off_t offset) {
  static auto* const next = reshard::real<ssize_t(int, const iovec*, int, off_t)>("pwritev");
  return reshard::see(
      [&] {
        return SystemCallEvent{
            .call = SystemCall::kWrite, .path = {}, .fd = fd, .offset = offset, .parts = parts, .count = count};
      },
      ssize_t{-1}, [&](ssize_t at_most) { return reshard::transfer(next, fd, parts, count, offset, at_most); });
}

int sync_file_range(int fd, off_t offset, off_t length, unsigned flags) {
  static auto* const next = reshard::real<int(int, off_t, off_t, unsigned)>("sync_file_range");
  return reshard::see(
      [&] { return SystemCallEvent{.call = SystemCall::kWriteBack, .path = {}, .fd = fd, .offset = offset}; }, -1,
      [&](ssize_t) { return next(fd, offset, length, flags); });
}

int fsync(int fd) {
  static auto* const next = reshard::real<int(int)>("fsync");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kSync, .path = {}, .fd = fd}; }, -1,
                      [&](ssize_t) { return next(fd); });
}

int close(int fd) {
  static auto* const next = reshard::real<int(int)>("close");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kClose, .path = {}, .fd = fd}; }, -1,
                      [&](ssize_t) { return next(fd); });
}

int rename(const char* from, const char* to) noexcept {
  static auto* const next = reshard::real<int(const char*, const char*)>("rename");
  return reshard::see(
      [&] { return SystemCallEvent{.call = SystemCall::kRename, .path = text_of(from), .to = text_of(to)}; }, -1,
      [&](ssize_t) { return next(from, to); });
}

int unlink(const char* path) noexcept {
  static auto* const next = reshard::real<int(const char*)>("unlink");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kUnlink, .path = text_of(path)}; }, -1,
                      [&](ssize_t) { return next(path); });
}

int mkdir(const char* path, mode_t mode) noexcept {
  static auto* const next = reshard::real<int(const char*, mode_t)>("mkdir");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kMkdir, .path = text_of(path)}; }, -1,
                      [&](ssize_t) { return next(path, mode); });
}

int rmdir(const char* path) noexcept {
  static auto* const next = reshard::real<int(const char*)>("rmdir");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kRmdir, .path = text_of(path)}; }, -1,
                      [&](ssize_t) { return next(path); });
}

DIR* opendir(const char* path) {
  static auto* const next = reshard::real<DIR*(const char*)>("opendir");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kOpendir, .path = text_of(path)}; },
                      static_cast<DIR*>(nullptr), [&](ssize_t) { return next(path); });
}

dirent* readdir(DIR* stream) {
  static auto* const next = reshard::real<dirent*(DIR*)>("readdir");
  return reshard::see([] { return SystemCallEvent{.call = SystemCall::kReaddir, .path = {}}; },
                      static_cast<dirent*>(nullptr), [&](ssize_t) { return next(stream); });
}

int flock(int fd, int operation) noexcept {
  static auto* const next = reshard::real<int(int, int)>("flock");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kLock, .path = {}, .fd = fd}; }, -1,
                      [&](ssize_t) { return next(fd, operation); });
}

int ftruncate(int fd, off_t length) noexcept {
  static auto* const next = reshard::real<int(int, off_t)>("ftruncate");
  return reshard::see([&] { return SystemCallEvent{.call = SystemCall::kTruncate, .path = {}, .fd = fd}; }, -1,
                      [&](ssize_t) { return next(fd, length); });
}

}  // extern "C"

void* operator new(size_t size, const std::nothrow_t&) noexcept {
  if (reshard::failing_allocations.load(std::memory_order_relaxed) && !reshard::inside &&
      reshard::current_rank() == reshard::failing_rank) {
    const uint64_t number = ++reshard::allocations;
    if (number - reshard::first_failing < reshard::failing_count) return nullptr;
  }
  return std::malloc(size != 0 ? size : 1);
}
void* operator new(size_t size) {
  if (void* memory = operator new(size, std::nothrow)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
