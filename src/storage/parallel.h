// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Work of one rank by several threads.

#include <atomic>
#include <cstddef>
#include <functional>
#include <string_view>

namespace reshard {

/// Throws kInvalidArgument for less than one thread; `who` has the option.
void require_thread_count(int thread_count, std::string_view who);

/// Runs body(0) ... body(count - 1) on up to `threads` threads, the caller's among them. When one throws, `failed` is
/// set, no further one starts, and the first exception leaves once all threads have ended.
void run_parallel(size_t count, size_t threads, std::atomic<bool>& failed, const std::function<void(size_t)>& body);

}  // namespace reshard
