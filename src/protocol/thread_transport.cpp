// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/thread_transport.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace reshard {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

void check_rank(int rank, int world_size) {
  if (rank >= 0 && rank < world_size) return;
  throw Error(ErrorCode::kInvalidArgument, "no such rank",
              {.wanted = "0 to " + std::to_string(world_size - 1), .found = std::to_string(rank)});
}

}  // namespace

struct ThreadHub::State {
  struct Queue {
    std::deque<Bytes> messages;
    size_t given_up = 0;  // messages that still have to come and that nobody waits for any more
  };
  struct Inbox {
    std::mutex mutex;
    std::condition_variable changed;
    std::map<int, Queue> from;
  };

  State(int world_size, milliseconds silence_limit)
      : silence(silence_limit),
        inboxes(static_cast<size_t>(world_size)),
        last_sign(static_cast<size_t>(world_size)),
        lost(static_cast<size_t>(world_size)) {}

  int size() const { return static_cast<int>(inboxes.size()); }
  Inbox& inbox(int rank) { return inboxes[static_cast<size_t>(rank)]; }
  bool is_lost(int rank) const { return lost[static_cast<size_t>(rank)].load(); }
  void show_life(int rank) { last_sign[static_cast<size_t>(rank)].store(Clock::now()); }
  Clock::time_point last_sign_of(int rank) const { return last_sign[static_cast<size_t>(rank)].load(); }

  const milliseconds silence;
  std::vector<Inbox> inboxes;
  std::vector<std::atomic<Clock::time_point>> last_sign;
  std::vector<std::atomic<bool>> lost;
};

class ThreadTransport final : public Transport {
 public:
  ThreadTransport(ThreadHub::State& hub, int rank) : hub_(hub), rank_(rank) {}

  int rank() const override { return rank_; }
  int world_size() const override { return hub_.size(); }

  void send(int to, ByteSpan message) override {
    check_rank(to, hub_.size());
    check_not_lost();
    heartbeat();
    auto& inbox = hub_.inbox(to);
    const std::lock_guard lock(inbox.mutex);
    inbox.from[rank_].messages.emplace_back(message.begin(), message.end());
    inbox.changed.notify_all();
  }

  Bytes receive(int from) override {
    Bytes message;
    std::exception_ptr error;
    gather({&from, 1}, [&](Arrival arrival) {
      message = std::move(arrival.message);
      error = arrival.error;
    });
    if (error) std::rethrow_exception(error);
    return message;
  }

  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    for (const int rank : from) check_rank(rank, hub_.size());
    const auto since = Clock::now();
    const auto slice = std::clamp(hub_.silence / 4, milliseconds(1), milliseconds(250));
    auto& inbox = hub_.inbox(rank_);
    std::vector<int> pending(from.begin(), from.end());
    std::vector<Arrival> ready;
    while (!pending.empty()) {
      check_not_lost();
      heartbeat();
      {
        std::unique_lock lock(inbox.mutex);
        const auto is_ready = [&](int rank) { return take(inbox, rank, since, ready); };
        std::erase_if(pending, is_ready);
        if (ready.empty()) inbox.changed.wait_for(lock, slice);
      }
      for (Arrival& arrival : ready) arrived(std::move(arrival));
      ready.clear();
    }
  }

  void heartbeat() noexcept override { hub_.show_life(rank_); }

 private:
  // Whether waiting for that rank is over.
  bool take(ThreadHub::State::Inbox& inbox, int rank, Clock::time_point since, std::vector<Arrival>& ready) {
    auto& queue = inbox.from[rank];
    for (; queue.given_up > 0 && !queue.messages.empty(); --queue.given_up) queue.messages.pop_front();
    const auto fail = [&](ErrorCode code, const std::string& text) {
      ready.push_back({rank, {}, std::make_exception_ptr(Error(code, "rank " + std::to_string(rank) + text))});
    };
    if (!queue.messages.empty()) {
      ready.push_back({rank, std::move(queue.messages.front()), nullptr});
      queue.messages.pop_front();
    } else if (hub_.is_lost(rank)) {
      fail(ErrorCode::kUnavailable, " is lost");
    } else if (Clock::now() - std::max(since, hub_.last_sign_of(rank)) >= hub_.silence) {
      ++queue.given_up;
      fail(ErrorCode::kTimeout, " was silent for " + std::to_string(hub_.silence.count()) + " ms");
    } else {
      return false;
    }
    return true;
  }

  void check_not_lost() const {
    if (hub_.is_lost(rank_)) throw Error(ErrorCode::kUnavailable, "this rank is lost", {.rank = rank_});
  }

  ThreadHub::State& hub_;
  const int rank_;
};

ThreadHub::ThreadHub(int world_size, milliseconds silence) {
  if (world_size < 1) {
    throw Error(ErrorCode::kInvalidArgument, "world size",
                {.wanted = "1 or more", .found = std::to_string(world_size)});
  }
  state_ = std::make_unique<State>(world_size, silence);
}

ThreadHub::~ThreadHub() = default;

std::unique_ptr<Transport> ThreadHub::transport(int rank) {
  check_rank(rank, state_->size());
  return std::make_unique<ThreadTransport>(*state_, rank);
}

void ThreadHub::lose(int rank) {
  check_rank(rank, state_->size());
  state_->lost[static_cast<size_t>(rank)].store(true);
  for (auto& inbox : state_->inboxes) {
    const std::lock_guard lock(inbox.mutex);
    inbox.changed.notify_all();
  }
}

namespace {

class SoloTransport final : public Transport {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void send(int /*to*/, ByteSpan /*message*/) override { no_peer(); }
  Bytes receive(int /*from*/) override { no_peer(); }
  void heartbeat() noexcept override {}

 private:
  [[noreturn]] static void no_peer() { throw Error(ErrorCode::kInternal, "a process alone has no peer to talk to"); }
};

}  // namespace

std::unique_ptr<Transport> solo_transport() { return std::make_unique<SoloTransport>(); }

}  // namespace reshard
