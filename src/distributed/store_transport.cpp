// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/store_transport.h"

#include <algorithm>

#include "distributed/store_thread.h"
#include "reshard/core/error.h"
#include "reshard/launch/environment.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;

// The store refuses values of 8 MiB and more.
constexpr size_t kPartBytes = size_t{4} << 20;
constexpr milliseconds kHeartbeatInterval{200};
// A wait for a message is ended by the transport, never by this.
constexpr std::chrono::hours kWaitLimit{24};

}  // namespace

/// A rank whose message is waited for.
struct StoreTransport::Peer {
  int rank;
  int64_t beats = -1;  // not known yet
  Clock::time_point last_sign{};
};

StoreTransport::StoreTransport(ProcessGroup& group, milliseconds silence)
    : rank_(group.rank()),
      world_size_(group.size()),
      silence_(silence),
      // Signs of life are looked for this often, so that silence is noticed well within a second of its deadline.
      look_(std::clamp(silence / 8, milliseconds(10), milliseconds(500))),
      blamed_(rank_),
      host_("torchrun's agent"),
      prefix_("op" + std::to_string(group.next_operation()) + "/"),
      threads_(group.store_threads()),
      sent_(static_cast<size_t>(world_size_)),
      received_(static_cast<size_t>(world_size_)) {
  if (const auto env = read_rank_environment(); !env || !env->agent_store) {
    host_ = "rank 0 of the default group";
    const auto host = std::find(group.ranks().begin(), group.ranks().end(), 0);
    if (host != group.ranks().end()) blamed_ = static_cast<int>(host - group.ranks().begin());
  }
  store_ = threads_->take();
  waiter_ = threads_->take();
}

StoreTransport::~StoreTransport() {
  if (lost_) return;
  threads_->give_back(std::move(store_));
  threads_->give_back(std::move(waiter_));
}

std::string StoreTransport::message_key(int from, int to, uint64_t number) const {
  return prefix_ + std::to_string(from) + "/" + std::to_string(to) + "/" + std::to_string(number);
}

std::string StoreTransport::heartbeat_key(int rank) const { return prefix_ + "alive/" + std::to_string(rank); }

void StoreTransport::lose(ErrorCode code, const std::string& how) {
  lost_ = std::make_exception_ptr(
      Error(code, "the store " + how + "; the process that hosts it is " + host_, {.rank = blamed_}));
  std::rethrow_exception(lost_);
}

template <class Result>
Result StoreTransport::finish(std::future<Result> result) {
  if (result.wait_for(silence_) != std::future_status::ready) {
    lose(ErrorCode::kTimeout, "has not answered for " + std::to_string(silence_.count()) + " ms (stopped or stuck)");
  }
  try {
    return result.get();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    lose(ErrorCode::kUnavailable, "is lost (" + text.substr(0, text.find('\n')) + ")");
  }
}

template <class Call>
auto StoreTransport::call(Call call) {
  if (lost_) std::rethrow_exception(lost_);
  return finish(store_->submit(std::move(call)));
}

void StoreTransport::send(int to, ByteSpan message) {
  // Part: one byte "more follows", then bytes.
  size_t position = 0;
  do {
    const size_t n = std::min(kPartBytes, message.size() - position);
    std::vector<uint8_t> part(n + 1);
    part[0] = position + n < message.size();
    std::transform(message.begin() + static_cast<ptrdiff_t>(position),
                   message.begin() + static_cast<ptrdiff_t>(position + n), part.begin() + 1,
                   [](std::byte b) { return static_cast<uint8_t>(b); });
    position += n;
    call([key = message_key(rank_, to, sent_[static_cast<size_t>(to)]++), part = std::move(part)](c10d::Store& store) {
      store.set(key, part);
    });
  } while (position < message.size());
}

Bytes StoreTransport::receive(int from) {
  std::vector<Peer> peers{{from}};
  return receive_first(peers);
}

void StoreTransport::gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) {
  std::vector<Peer> peers;
  for (const int rank : from) peers.push_back({rank});
  for (; !peers.empty(); peers.erase(peers.begin())) {
    Arrival arrival{.from = peers.front().rank, .message = {}, .error = nullptr};
    try {
      arrival.message = receive_first(peers);
    } catch (const Error&) {
      if (lost_) throw;
      arrival.error = std::current_exception();
    }
    arrived(std::move(arrival));
  }
}

Bytes StoreTransport::receive_first(std::vector<Peer>& peers) {
  const int from = peers.front().rank;
  Bytes message;
  for (bool more = true; more;) {
    const std::string key = message_key(from, rank_, received_[static_cast<size_t>(from)]++);
    await(key, peers);
    const std::vector<uint8_t> part = call([key](c10d::Store& store) {
      auto value = store.get(key);
      store.deleteKey(key);
      return value;
    });
    if (part.empty()) throw Error(ErrorCode::kInternal, "an empty message part", {.rank = from});
    more = part[0] != 0;
    std::transform(part.begin() + 1, part.end(), std::back_inserter(message), [](uint8_t b) { return std::byte{b}; });
  }
  return message;
}

void StoreTransport::await(const std::string& key, std::vector<Peer>& peers) {
  if (call([key](c10d::Store& store) { return store.check({key}); })) return;
  // The wait is on the second connection, so that heartbeats go on over the first.
  auto arrival = waiter_->submit([key](c10d::Store& store) { store.wait({key}, kWaitLimit); });
  const Peer& first = peers.front();
  if (first.beats < 0) look_for_signs(peers);  // silence counts from here
  while (arrival.wait_until(std::min(Clock::now() + look_, first.last_sign + silence_)) != std::future_status::ready) {
    look_for_signs(peers);
    if (Clock::now() - first.last_sign < silence_) continue;
    call([key](c10d::Store& store) { store.set(key, std::vector<uint8_t>{0}); });  // ends the wait
    finish(std::move(arrival));
    call([key](c10d::Store& store) { store.deleteKey(key); });
    throw Error(ErrorCode::kTimeout,
                "rank " + std::to_string(first.rank) + " was silent for " + std::to_string(silence_.count()) +
                    " ms (stopped, stuck, dead, or not taking part)",
                {.rank = first.rank});
  }
  finish(std::move(arrival));
}

void StoreTransport::look_for_signs(std::vector<Peer>& peers) {
  std::vector<std::string> keys;
  for (const Peer& peer : peers) keys.push_back(heartbeat_key(peer.rank));
  const std::vector<int64_t> beats = call([own = heartbeat_key(rank_), keys = std::move(keys)](c10d::Store& store) {
    store.add(own, 1);
    std::vector<int64_t> counts;
    for (const std::string& key : keys) counts.push_back(store.add(key, 0));
    return counts;
  });
  for (size_t i = 0; i < peers.size(); ++i) {
    if (beats[i] != peers[i].beats) peers[i] = {peers[i].rank, beats[i], Clock::now()};
  }
}

void StoreTransport::heartbeat() noexcept {
  const std::lock_guard lock(heartbeat_mutex_);
  const auto now = Clock::now();
  if (now - last_heartbeat_ < kHeartbeatInterval) return;
  last_heartbeat_ = now;
  try {
    // Not waited for: a lost store shows at the next send or receive, where it can be reported.
    if (store_->is_idle()) store_->submit([key = heartbeat_key(rank_)](c10d::Store& store) { store.add(key, 1); });
  } catch (...) {
  }
}

}  // namespace reshard
