// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Transport: how the ranks of one save or load talk. Byte messages between pairs, in order, with a deadline on silence.
// What carries the bytes (a c10d store, threads of one process, a simulator) is not known to the protocol.
//
// The protocol talks in a star: every rank sends to rank 0 and waits for its answer. A rank that is alive sends and
// receives the same number of messages whether a step succeeds or fails, so a transport can carry one operation after
// the other, also after errors.

#include <exception>
#include <functional>
#include <span>

#include "reshard/core/bytes.h"

namespace reshard {

class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  /// Hands the message over and returns; messages of a pair arrive in order. A peer that is gone is no error here.
  /// Throws kUnavailable or kTimeout when the medium is lost; the error's context holds the rank whose loss that is.
  virtual void send(int to, ByteSpan message) = 0;

  /// The next message of that rank. A rank at work shows it by heartbeat(); when neither a message nor a heartbeat of
  /// it came for the deadline, throws kTimeout naming the rank, and the message that was waited for is dropped should
  /// it still come. Throws kUnavailable when the rank is known to be lost, or as send() does. Waiting counts as a
  /// sign of life of this rank.
  virtual Bytes receive(int from) = 0;

  /// What came of waiting for one rank.
  struct Arrival {
    int from = 0;
    Bytes message;
    std::exception_ptr error;  // set: what receive() would have thrown
  };
  /// receive() from each of `from`. Calls `arrived` once for each, on this thread, in any order. A transport that can
  /// watches them all at once, so that many silent ranks cost one deadline; the default waits for one after the other.
  /// Throws itself only when the medium is lost, as send() does.
  virtual void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived);

  /// Tells the other ranks that this one makes progress. Cheap to call often (it limits its own rate); any thread.
  virtual void heartbeat() noexcept = 0;
};

}  // namespace reshard
