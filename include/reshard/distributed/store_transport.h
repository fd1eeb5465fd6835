// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// StoreTransport: the protocol's messages over a group's c10d store. Control data needs no device and no collective,
// works while a collective is stuck or a peer is dead, and never disturbs the order of collectives on the group.

#include <chrono>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "reshard/distributed/process_group.h"
#include "reshard/protocol/transport.h"

namespace reshard {

class StoreThread;
class StoreThreads;

/// One save or load over `group`. All members make it in the same order of operations. Messages longer than the store
/// takes are cut. The store's server lives in rank 0 of the default group (or in torchrun's agent); when it is gone
/// every call throws kUnavailable, and when it does not answer for the deadline kTimeout, saying so; the error's
/// context names the hosting rank by its number in the group, or this rank where that one is no member.
class StoreTransport final : public Transport {
 public:
  /// `silence`: the deadline of receive(), and of the store's own answers. Uses connections that nobody else uses, so
  /// that it never waits behind another user.
  StoreTransport(ProcessGroup& group, std::chrono::milliseconds silence);
  /// Waits for nothing, also when the store does not answer.
  ~StoreTransport() override;

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  void send(int to, ByteSpan message) override;
  Bytes receive(int from) override;
  /// Watches all of them at once.
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override;
  void heartbeat() noexcept override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer;

  [[noreturn]] void lose(ErrorCode code, const std::string& how);
  template <class Result>
  Result finish(std::future<Result> result);
  template <class Call>
  auto call(Call call);
  std::string message_key(int from, int to, uint64_t number) const;
  std::string heartbeat_key(int rank) const;
  Bytes receive_first(std::vector<Peer>& peers);
  void await(const std::string& key, std::vector<Peer>& peers);
  void look_for_signs(std::vector<Peer>& peers);

  int rank_;
  int world_size_;
  std::chrono::milliseconds silence_;
  std::chrono::milliseconds look_;
  int blamed_;          // the rank that a lost store is the loss of
  std::string host_;    // whoever serves the store
  std::string prefix_;  // of this operation's keys
  std::shared_ptr<StoreThreads> threads_;
  std::unique_ptr<StoreThread> store_;
  std::unique_ptr<StoreThread> waiter_;
  std::exception_ptr lost_;
  std::vector<uint64_t> sent_;
  std::vector<uint64_t> received_;
  std::mutex heartbeat_mutex_;
  Clock::time_point last_heartbeat_{};
};

}  // namespace reshard
