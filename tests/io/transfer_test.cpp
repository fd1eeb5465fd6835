// SPDX-License-Identifier: BSD-3-Clause
#include "io/transfer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "reshard/core/bytes.h"

namespace reshard {
namespace {

// A file in memory whose calls move as few bytes as `next_count` says, or fail.
class FakeFile {
 public:
  std::function<ssize_t(size_t wanted)> next_count = [](size_t wanted) { return static_cast<ssize_t>(wanted); };
  std::vector<std::byte> bytes;
  int calls = 0;
  int most_parts = 0;

  ssize_t write(const iovec* window, int count, off_t offset) {
    ++calls;
    most_parts = std::max(most_parts, count);
    size_t wanted = 0;
    for (int i = 0; i < count; ++i) wanted += window[i].iov_len;
    const ssize_t moved = next_count(wanted);
    size_t left = moved > 0 ? static_cast<size_t>(moved) : 0;
    size_t at = static_cast<size_t>(offset);
    for (int i = 0; i < count && left > 0; ++i) {
      const size_t n = std::min(left, window[i].iov_len);
      if (bytes.size() < at + n) bytes.resize(at + n);
      std::memcpy(bytes.data() + at, window[i].iov_base, n);
      at += n;
      left -= n;
    }
    return moved;
  }
};

struct Parts {
  Bytes all;
  std::vector<ByteSpan> spans;
};

Parts random_parts(std::mt19937_64& random, size_t count, size_t longest) {
  std::vector<size_t> lengths(count);
  Parts parts;
  for (size_t& length : lengths) {
    length = std::uniform_int_distribution<size_t>(0, longest)(random);
    for (size_t i = 0; i < length; ++i) parts.all.push_back(static_cast<std::byte>(random()));
  }
  size_t at = 0;
  for (size_t length : lengths) {
    parts.spans.push_back(ByteSpan(parts.all).subspan(at, length));
    at += length;
  }
  return parts;
}

TransferResult transfer_to(FakeFile& file, const Parts& parts, uint64_t offset) {
  return transfer_fully(std::span<const ByteSpan>(parts.spans), offset,
                        [&](const iovec* window, int count, off_t at) { return file.write(window, count, at); });
}

TEST(TransferTest, ShortTransfersAndInterruptionsLoseNothing) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 500; ++round) {
    const Parts parts = random_parts(random, random() % 20, 9);
    FakeFile file;
    bool interrupted = false;
    file.next_count = [&](size_t wanted) -> ssize_t {
      interrupted = !interrupted && random() % 3 == 0;
      errno = EINTR;
      return interrupted ? -1 : std::uniform_int_distribution<ssize_t>(1, static_cast<ssize_t>(wanted))(random);
    };
    const TransferResult result = transfer_to(file, parts, 5);
    ASSERT_EQ(result.error, 0);
    ASSERT_EQ(result.bytes, parts.all.size());
    file.bytes.resize(5 + parts.all.size());
    ASSERT_TRUE(std::equal(parts.all.begin(), parts.all.end(), file.bytes.begin() + 5));
  }
}

TEST(TransferTest, MorePartsThanTheSystemTakesGoInSeveralCalls) {
  std::mt19937_64 random(2);
  const Parts parts = random_parts(random, 5000, 3);
  FakeFile file;
  EXPECT_EQ(transfer_to(file, parts, 0).bytes, parts.all.size());
  EXPECT_EQ(file.bytes, parts.all);
  EXPECT_LE(file.most_parts, IOV_MAX);
  EXPECT_LE(file.calls, 5);
}

TEST(TransferTest, NothingToMoveMakesNoCall) {
  FakeFile file;
  const Parts empty{{}, {ByteSpan(), ByteSpan()}};
  EXPECT_EQ(transfer_to(file, empty, 0).bytes, 0U);
  EXPECT_EQ(file.calls, 0);
}

TEST(TransferTest, ErrorEndsItWithTheBytesMovedSoFar) {
  std::mt19937_64 random(3);
  const Parts parts = random_parts(random, 10, 9);
  FakeFile file;
  file.next_count = [&](size_t) -> ssize_t {
    errno = ENOSPC;
    return file.calls <= 2 ? 3 : -1;
  };
  const TransferResult result = transfer_to(file, parts, 0);
  EXPECT_EQ(result.error, ENOSPC);
  EXPECT_EQ(result.bytes, 6U);
}

TEST(TransferTest, ZeroBytesMovedIsTheEnd) {
  std::mt19937_64 random(4);
  const Parts parts = random_parts(random, 10, 9);
  FakeFile file;
  file.next_count = [&](size_t) -> ssize_t { return file.calls <= 1 ? 2 : 0; };
  const TransferResult result = transfer_to(file, parts, 0);
  EXPECT_EQ(result.error, 0);
  EXPECT_EQ(result.bytes, 2U);
}

}  // namespace
}  // namespace reshard
