// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Simulated ranks: threads with small stacks, so that thousands fit.

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <vector>

namespace reshard {

/// The rank that this thread plays, or -1.
inline int& current_rank() {
  thread_local int rank = -1;
  return rank;
}

/// Runs body(rank) for every rank, each in a thread of its own, and waits for all. result[rank] is what left the body.
inline std::vector<std::exception_ptr> run_ranks(int world_size, const std::function<void(int)>& body) {
  struct Start {
    const std::function<void(int)>* body;
    int rank;
    std::exception_ptr error;
  };
  std::vector<Start> starts(static_cast<size_t>(world_size));
  std::vector<pthread_t> threads;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 512 << 10);
  for (int rank = 0; rank < world_size; ++rank) {
    Start& start = starts[static_cast<size_t>(rank)];
    start = {&body, rank, nullptr};
    pthread_t thread{};
    const int error = pthread_create(
        &thread, &attributes,
        [](void* argument) -> void* {
          auto* mine = static_cast<Start*>(argument);
          current_rank() = mine->rank;
          try {
            (*mine->body)(mine->rank);
          } catch (...) {
            mine->error = std::current_exception();
          }
          return nullptr;
        },
        &start);
    // The threads that run already wait for one another: there is no way back.
    if (error != 0) {
      std::fprintf(stderr, "cannot start thread %d of %d: %s\n", rank, world_size, std::strerror(error));
      std::abort();
    }
    threads.push_back(thread);
  }
  pthread_attr_destroy(&attributes);
  std::vector<std::exception_ptr> errors;
  for (const pthread_t thread : threads) pthread_join(thread, nullptr);
  for (Start& start : starts) errors.push_back(start.error);
  return errors;
}

}  // namespace reshard
