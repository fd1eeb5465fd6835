// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// ThreadTransport: ranks that are threads of one process. For programs without a process group (world size 1) and for
// simulation with up to thousands of ranks.

#include <chrono>
#include <memory>

#include "reshard/protocol/transport.h"

namespace reshard {

/// The meeting of `world_size` threads. Shared by their transports. All functions are thread-safe.
class ThreadHub {
 public:
  /// `silence`: the deadline of Transport::receive().
  ThreadHub(int world_size, std::chrono::milliseconds silence);
  ~ThreadHub();
  /// One a rank; used by one thread (heartbeat by any). The hub must outlive it.
  std::unique_ptr<Transport> transport(int rank);
  /// Marks a rank as dead for good: who waits for it gets kUnavailable, after the messages that it sent before; what it
  /// tries itself throws kUnavailable.
  void lose(int rank);

 private:
  friend class ThreadTransport;
  struct State;
  std::unique_ptr<State> state_;
};

/// A transport of one rank, for a process alone.
std::unique_ptr<Transport> solo_transport();

}  // namespace reshard
