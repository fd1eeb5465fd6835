// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// StoreTransport: the protocol's messages over a group's c10d store. Control data needs no device and no collective,
// works while a collective is stuck or a peer is dead, and never disturbs the order of collectives on the group.

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "reshard/distributed/process_group.h"
#include "reshard/protocol/transport.h"

namespace reshard {

/// One save or load over `group`. All members make it in the same order of operations. Messages longer than the store
/// takes are cut. The store's server lives in rank 0 of the default group (or in torchrun's agent); when it is gone,
/// every call throws kUnavailable saying so.
class StoreTransport final : public Transport {
 public:
  /// `silence`: the deadline of receive(). Opens a connection of its own to the store, so that it never waits behind
  /// another user.
  StoreTransport(ProcessGroup& group, std::chrono::milliseconds silence);

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  void send(int to, ByteSpan message) override;
  Bytes receive(int from) override;
  void heartbeat() noexcept override;

 private:
  template <class Call>
  auto guarded(const char* what, Call&& call) const;
  Bytes receive_part(int from, const std::string& key);

  int rank_;
  int world_size_;
  std::chrono::milliseconds silence_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::vector<uint64_t> sent_;
  std::vector<uint64_t> received_;
  std::mutex heartbeat_mutex_;
  std::chrono::steady_clock::time_point last_heartbeat_{};
};

}  // namespace reshard
