// SPDX-License-Identifier: BSD-3-Clause
#include "storage/parallel.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "reshard/core/error.h"

namespace reshard {

void require_thread_count(int thread_count, std::string_view who) {
  if (thread_count >= 1) return;
  throw Error(ErrorCode::kInvalidArgument, "thread_count of a " + std::string(who),
              {.wanted = "1 or more", .found = std::to_string(thread_count)});
}

void run_parallel(size_t count, size_t threads, std::atomic<bool>& failed, const std::function<void(size_t)>& body) {
  std::atomic<size_t> next = 0;
  std::exception_ptr first;
  std::mutex mutex;
  const auto work = [&] {
    for (size_t i = next++; i < count && !failed; i = next++) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first) first = std::current_exception();
        failed = true;
      }
    }
  };
  {
    std::vector<std::jthread> helpers;
    try {
      for (size_t t = 1; t < std::min(threads, count); ++t) helpers.emplace_back(work);
    } catch (...) {
      failed = true;
      throw;
    }
    work();
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace reshard
