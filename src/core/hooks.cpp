// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/hooks.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace reshard {
namespace {

// A replaceable process-wide callback. A call that is under way keeps the callback it began with alive, and no lock is
// held during it, so a callback may log or replace itself.
template <class... Args>
class Slot {
 public:
  using Fn = std::function<void(Args...)>;

  void set(Fn fn) {
    auto next = fn ? std::make_shared<const Fn>(std::move(fn)) : nullptr;
    const std::lock_guard lock(mutex_);
    fn_.swap(next);
    set_.store(fn_ != nullptr, std::memory_order_relaxed);
  }
  /// False if nobody listens.
  bool call(Args... args) {
    if (!set_.load(std::memory_order_relaxed)) return false;
    std::shared_ptr<const Fn> fn;
    {
      const std::lock_guard lock(mutex_);
      fn = fn_;
    }
    if (!fn) return false;
    (*fn)(args...);
    return true;
  }

 private:
  std::atomic<bool> set_ = false;
  std::mutex mutex_;
  std::shared_ptr<const Fn> fn_;
};

// Never destroyed: threads may log while the process exits.
auto& log_slot() {
  static auto& slot = *new Slot<LogLevel, std::string_view>;
  return slot;
}
auto& test_point_slot() {
  static auto& slot = *new Slot<std::string_view>;
  return slot;
}

}  // namespace

void set_log_sink(std::function<void(LogLevel, std::string_view)> sink) { log_slot().set(std::move(sink)); }

void log(LogLevel level, std::string_view message) {
  if (log_slot().call(level, message) || level != LogLevel::kWarning) return;
  std::string line = "[reshard] warning: ";
  line += message;
  line += '\n';
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void set_test_point_handler(std::function<void(std::string_view)> handler) {
  test_point_slot().set(std::move(handler));
}

void test_point(std::string_view name) { test_point_slot().call(name); }

}  // namespace reshard
