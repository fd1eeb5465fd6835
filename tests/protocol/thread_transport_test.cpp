// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/thread_transport.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <map>
#include <numeric>
#include <thread>

#include "support/expect_error.h"
#include "support/rank_threads.h"

namespace reshard {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLong{60000};
constexpr milliseconds kShort{100};
// Long enough for a rank to show life in between on a busy machine.
constexpr milliseconds kHonest{1000};

std::string text(const Bytes& message) { return std::string(as_text(message)); }

TEST(ThreadTransportTest, MessagesOfAPairArriveInOrder) {
  ThreadHub hub(2, kLong);
  const auto zero = hub.transport(0);
  const auto one = hub.transport(1);
  EXPECT_EQ(one->rank(), 1);
  EXPECT_EQ(one->world_size(), 2);
  for (const char* message : {"a", "", "c"}) one->send(0, as_bytes(message));
  for (const char* message : {"a", "", "c"}) EXPECT_EQ(text(zero->receive(1)), message);
}

TEST(ThreadTransportTest, PairsDoNotMix) {
  ThreadHub hub(3, kLong);
  hub.transport(2)->send(0, as_bytes("from 2"));
  hub.transport(1)->send(0, as_bytes("from 1"));
  const auto zero = hub.transport(0);
  EXPECT_EQ(text(zero->receive(1)), "from 1");
  EXPECT_EQ(text(zero->receive(2)), "from 2");
}

TEST(ThreadTransportTest, SilentRankIsNamedAfterTheDeadline) {
  ThreadHub hub(2, kShort);
  const auto start = Clock::now();
  EXPECT_ERROR(ErrorCode::kTimeout, "rank 1 was silent for 100 ms", hub.transport(0)->receive(1));
  EXPECT_GE(Clock::now() - start, kShort);
}

TEST(ThreadTransportTest, MessageThatComesAfterItWasGivenUpIsDropped) {
  ThreadHub hub(2, kShort);
  const auto zero = hub.transport(0);
  const auto one = hub.transport(1);
  EXPECT_ERROR(ErrorCode::kTimeout, "rank 1", zero->receive(1));
  one->send(0, as_bytes("too late"));
  one->send(0, as_bytes("next"));
  EXPECT_EQ(text(zero->receive(1)), "next");
}

TEST(ThreadTransportTest, WorkingRankIsNotSilent) {
  ThreadHub hub(2, kHonest);
  const auto errors = run_ranks(2, [&](int rank) {
    const auto transport = hub.transport(rank);
    if (rank == 0) {
      EXPECT_EQ(text(transport->receive(1)), "done");
      return;
    }
    for (const auto end = Clock::now() + 2 * kHonest; Clock::now() < end; std::this_thread::yield()) {
      transport->heartbeat();
    }
    transport->send(0, as_bytes("done"));
  });
  for (const auto& error : errors) EXPECT_EQ(error, nullptr);
}

TEST(ThreadTransportTest, WaitingRankIsNotSilent) {
  // Rank 0 waits for 1, which waits for 2, which works.
  ThreadHub hub(3, kHonest);
  const auto errors = run_ranks(3, [&](int rank) {
    const auto transport = hub.transport(rank);
    if (rank < 2) {
      EXPECT_EQ(text(transport->receive(rank + 1)), "done");
    } else {
      for (const auto end = Clock::now() + 2 * kHonest; Clock::now() < end; std::this_thread::yield()) {
        transport->heartbeat();
      }
    }
    if (rank > 0) transport->send(rank - 1, as_bytes("done"));
  });
  for (const auto& error : errors) EXPECT_EQ(error, nullptr);
}

TEST(ThreadTransportTest, LostRankIsKnownAtOnceAfterItsLastMessages) {
  ThreadHub hub(2, kLong);
  const auto zero = hub.transport(0);
  const auto one = hub.transport(1);
  one->send(0, as_bytes("last words"));
  hub.lose(1);
  EXPECT_EQ(text(zero->receive(1)), "last words");
  EXPECT_ERROR(ErrorCode::kUnavailable, "rank 1 is lost", zero->receive(1));
  EXPECT_NO_THROW(zero->send(1, as_bytes("anyone there?")));
  EXPECT_ERROR(ErrorCode::kUnavailable, "this rank is lost", one->send(0, {}));
  EXPECT_ERROR(ErrorCode::kUnavailable, "this rank is lost", one->receive(0));
}

TEST(ThreadTransportTest, LossWakesThoseWhoWait) {
  ThreadHub hub(2, kLong);
  std::latch started(1);
  std::thread waiter([&] {
    const auto zero = hub.transport(0);
    started.count_down();
    EXPECT_ERROR(ErrorCode::kUnavailable, "rank 1 is lost", zero->receive(1));
  });
  started.wait();
  hub.lose(1);
  waiter.join();
}

TEST(ThreadTransportTest, GatherTakesWhatComesAndReportsTheRest) {
  ThreadHub hub(4, kShort);
  hub.transport(1)->send(0, as_bytes("here"));
  hub.lose(2);
  std::map<int, Transport::Arrival> arrivals;
  const std::vector<int> others{1, 2, 3};
  hub.transport(0)->gather(others, [&](Transport::Arrival arrival) {
    const int from = arrival.from;
    EXPECT_TRUE(arrivals.emplace(from, std::move(arrival)).second);
  });
  ASSERT_EQ(arrivals.size(), 3u);
  EXPECT_EQ(text(arrivals[1].message), "here");
  EXPECT_EQ(arrivals[1].error, nullptr);
  EXPECT_ERROR(ErrorCode::kUnavailable, "rank 2 is lost", std::rethrow_exception(arrivals[2].error));
  EXPECT_ERROR(ErrorCode::kTimeout, "rank 3 was silent", std::rethrow_exception(arrivals[3].error));
}

TEST(ThreadTransportTest, ManySilentRanksCostOneDeadline) {
  constexpr milliseconds kSilence{500};
  ThreadHub hub(101, kSilence);
  std::vector<int> others(100);
  std::iota(others.begin(), others.end(), 1);
  int silent = 0;
  const auto start = Clock::now();
  hub.transport(0)->gather(others, [&](const Transport::Arrival& arrival) { silent += arrival.error != nullptr; });
  EXPECT_EQ(silent, 100);
  EXPECT_LT(Clock::now() - start, 20 * kSilence) << "one after the other would take 100 deadlines";
}

/// Has no gather() of its own.
class PlainTransport final : public Transport {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 4; }
  void send(int /*to*/, ByteSpan /*message*/) override {}
  Bytes receive(int from) override {
    if (from == 2) throw Error(ErrorCode::kUnavailable, "gone");
    return Bytes(static_cast<size_t>(from));
  }
  void heartbeat() noexcept override {}
};

TEST(ThreadTransportTest, TransportWithoutGatherAsksOneRankAfterTheOther) {
  PlainTransport transport;
  const std::vector<int> others{1, 2, 3};
  std::string seen;
  transport.gather(others, [&](const Transport::Arrival& arrival) {
    seen +=
        std::to_string(arrival.from) + ":" + (arrival.error ? "error" : std::to_string(arrival.message.size())) + " ";
  });
  EXPECT_EQ(seen, "1:1 2:error 3:3 ");
}

TEST(ThreadTransportTest, RanksThatDoNotExistAreRefused) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "world size", ThreadHub(0, kShort));
  ThreadHub hub(2, kShort);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no such rank", hub.transport(2));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no such rank", hub.transport(0)->send(-1, {}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no such rank", hub.transport(0)->receive(2));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no such rank", hub.lose(7));
}

TEST(ThreadTransportTest, ProcessAloneHasNobodyToTalkTo) {
  const auto solo = solo_transport();
  EXPECT_EQ(solo->rank(), 0);
  EXPECT_EQ(solo->world_size(), 1);
  EXPECT_ERROR(ErrorCode::kInternal, "no peer", solo->send(0, {}));
  EXPECT_ERROR(ErrorCode::kInternal, "no peer", solo->receive(0));
}

}  // namespace
}  // namespace reshard
