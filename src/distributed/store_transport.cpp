// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/store_transport.h"

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>

#include "reshard/core/error.h"

namespace reshard {
namespace {

// The store refuses values of 8 MiB and more.
constexpr size_t kPartBytes = size_t{4} << 20;
constexpr auto kHeartbeatInterval = std::chrono::milliseconds(200);

std::string message_key(int from, int to, uint64_t number) {
  return "m/" + std::to_string(from) + "/" + std::to_string(to) + "/" + std::to_string(number);
}
std::string heartbeat_key(int rank) { return "alive/" + std::to_string(rank); }

}  // namespace

template <class Call>
auto StoreTransport::guarded(const char* what, Call&& call) const {
  try {
    return call();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    throw Error(ErrorCode::kUnavailable,
                std::string("cannot ") + what +
                    " the store; the process that hosts it (rank 0, or torchrun's agent) is lost: " +
                    text.substr(0, text.find('\n')),
                {.rank = rank_});
  }
}

StoreTransport::StoreTransport(ProcessGroup& group, std::chrono::milliseconds silence)
    : rank_(group.rank()),
      world_size_(group.size()),
      silence_(silence),
      sent_(static_cast<size_t>(world_size_)),
      received_(static_cast<size_t>(world_size_)) {
  store_ = guarded("open a connection to", [&] {
    return c10::make_intrusive<c10d::PrefixStore>("op" + std::to_string(group.next_operation()),
                                                  group.store()->clone());
  });
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
    const std::string key = message_key(rank_, to, sent_[static_cast<size_t>(to)]++);
    guarded("write to", [&] { store_->set(key, part); });
  } while (position < message.size());
}

Bytes StoreTransport::receive(int from) {
  Bytes message;
  for (bool more = true; more;) {
    const Bytes part = receive_part(from, message_key(from, rank_, received_[static_cast<size_t>(from)]));
    ++received_[static_cast<size_t>(from)];
    if (part.empty()) throw Error(ErrorCode::kInternal, "an empty message part", {.rank = from});
    more = part[0] != std::byte{0};
    message.insert(message.end(), part.begin() + 1, part.end());
  }
  return message;
}

Bytes StoreTransport::receive_part(int from, const std::string& key) {
  using Clock = std::chrono::steady_clock;
  using std::chrono::milliseconds;
  // A wait that ends without the key makes c10d print a warning, so waits are as long as the deadline allows; a lost connection ends them at once.
  const auto slice = std::clamp(silence_ / 4, milliseconds(20), milliseconds(60000));
  bool there = guarded("read", [&] { return store_->check({key}); });
  int64_t beats = there ? 0 : guarded("read", [&] { return store_->add(heartbeat_key(from), 0); });
  auto last_sign = Clock::now();
  while (true) {
    if (!there) try {
        const auto left = std::chrono::ceil<milliseconds>(last_sign + silence_ - Clock::now());
        store_->wait({key}, std::clamp(left, milliseconds(1), slice));
        there = true;
      } catch (const c10::DistStoreError&) {
        // Not there yet; a lost connection is another type.
      } catch (const std::exception&) {
        guarded("read", [&] { throw; });
      }
    if (there) {
      const std::vector<uint8_t> value = guarded("read", [&] { return store_->get(key); });
      guarded("write to", [&] { store_->deleteKey(key); });
      Bytes part(value.size());
      std::transform(value.begin(), value.end(), part.begin(), [](uint8_t b) { return std::byte{b}; });
      return part;
    }
    heartbeat();
    const int64_t now_beats = guarded("read", [&] { return store_->add(heartbeat_key(from), 0); });
    if (now_beats != beats) {
      beats = now_beats;
      last_sign = Clock::now();
    } else if (Clock::now() - last_sign >= silence_) {
      throw Error(ErrorCode::kTimeout,
                  "rank " + std::to_string(from) + " was silent for " + std::to_string(silence_.count()) +
                      " ms (stopped, stuck, dead, or not taking part)",
                  {.rank = from});
    }
  }
}

void StoreTransport::heartbeat() noexcept {
  const std::lock_guard lock(heartbeat_mutex_);
  const auto now = std::chrono::steady_clock::now();
  if (now - last_heartbeat_ < kHeartbeatInterval) return;
  last_heartbeat_ = now;
  try {
    store_->add(heartbeat_key(rank_), 1);
  } catch (...) {
    // A lost store shows at the next send or receive, where it can be reported.
  }
}

}  // namespace reshard
