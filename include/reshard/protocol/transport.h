// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Transport: how the ranks of one save or load talk. Byte messages between pairs, in order, with a deadline on silence. What carries the bytes
// (a c10d store, threads of one process, a simulator) is not known to the protocol.

#include <chrono>

#include "reshard/core/bytes.h"

namespace reshard {

class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;
  /// Hands the message over and returns; messages of a pair arrive in order. Throws kUnavailable when the medium is lost.
  virtual void send(int to, ByteSpan message) = 0;
  /// The next message of that rank. A rank at work shows it by heartbeat(); when neither a message nor a heartbeat of it came for the
  /// deadline, throws kTimeout naming the rank. Throws kUnavailable when the rank or the medium is known to be lost. Waiting counts as
  /// a sign of life of this rank.
  virtual Bytes receive(int from) = 0;
  /// Tells the other ranks that this one makes progress. Cheap to call often (it limits its own rate); any thread.
  virtual void heartbeat() noexcept = 0;
};

}  // namespace reshard
