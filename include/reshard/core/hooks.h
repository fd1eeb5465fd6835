// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Log, progress and test points: the three ways in which the library speaks to its surroundings while it works. All are
// process-wide, thread-safe, and cost one relaxed load when nobody listens.

#include <cstdint>
#include <functional>
#include <string_view>

namespace reshard {

enum class LogLevel : uint8_t { kInfo, kWarning };
/// Receives every message, on the thread that logs it and possibly on several at once; no lock is held meanwhile.
/// Default: warnings go to stderr, the rest is dropped. Null restores the default. A call under way may still reach the
/// old sink.
void set_log_sink(std::function<void(LogLevel, std::string_view)> sink);
void log(LogLevel level, std::string_view message);

/// Progress of one save or load on this rank: bytes moved so far of the bytes planned.
struct Progress {
  std::string_view step;  // "write", "read"
  uint64_t done = 0;
  uint64_t total = 0;
};
using ProgressFn = std::function<void(const Progress&)>;

/// Named places ("save.after_write", "commit.before_rename", ...) where tests observe, fail or kill. Does nothing
/// unless a test installed a handler; what the handler throws leaves the place as its error. Null removes the handler.
void test_point(std::string_view name);
void set_test_point_handler(std::function<void(std::string_view)> handler);

}  // namespace reshard
