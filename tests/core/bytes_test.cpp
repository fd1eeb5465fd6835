// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/bytes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "support/expect_error.h"

namespace reshard {
namespace {

TEST(BytesTest, WhatIsWrittenIsReadBack) {
  ByteWriter writer;
  writer.u8(0xAB);
  writer.u16(0x1234);
  writer.u32(0xDEADBEEF);
  writer.u64(0x0123456789ABCDEF);
  writer.i64(-5);
  writer.string("key");
  writer.blob(as_bytes(""));
  writer.text("raw");
  const Bytes bytes = writer.take();
  EXPECT_EQ(as_text(ByteSpan(bytes).subspan(1, 2)), "\x34\x12") << "little endian";

  ByteReader reader(bytes);
  EXPECT_EQ(reader.u8(), 0xAB);
  EXPECT_EQ(reader.u16(), 0x1234);
  EXPECT_EQ(reader.u32(), 0xDEADBEEF);
  EXPECT_EQ(reader.u64(), 0x0123456789ABCDEFU);
  EXPECT_EQ(reader.i64(), -5);
  EXPECT_EQ(reader.string(), "key");
  EXPECT_EQ(reader.blob().size(), 0U);
  EXPECT_EQ(as_text(reader.bytes(3)), "raw");
  EXPECT_TRUE(reader.at_end());
}

TEST(BytesTest, EveryLengthOfVarintComesBack) {
  for (int bits = 0; bits <= 64; ++bits) {
    for (uint64_t v : {bits == 64 ? std::numeric_limits<uint64_t>::max() : (uint64_t{1} << bits) - 1,
                       bits == 64 ? uint64_t{0} : uint64_t{1} << bits}) {
      ByteWriter writer;
      writer.varint(v);
      const Bytes bytes = writer.take();
      ByteReader reader(bytes);
      EXPECT_EQ(reader.varint(), v);
      EXPECT_TRUE(reader.at_end());
    }
  }
}

TEST(BytesTest, PiecesOfEveryLengthComeInOrder) {
  Bytes all(1500);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::byte>(i * 7 + i / 256);
  for (size_t piece = 1; piece <= 600; ++piece) {
    ByteWriter writer;
    for (size_t at = 0; at < all.size(); at += piece) {
      writer.bytes(ByteSpan(all).subspan(at, std::min(piece, all.size() - at)));
      ASSERT_EQ(writer.size(), std::min(at + piece, all.size()));
      if (at % 3 == 0) {
        ASSERT_EQ(writer.buffer().size(), writer.size());
      }
    }
    ASSERT_EQ(writer.take(), all) << piece;
    EXPECT_EQ(writer.size(), 0U);
  }
  for (size_t before = 240; before < 260; ++before) {  // a number does not fit in the room that is left
    ByteWriter writer;
    writer.bytes(ByteSpan(all).first(before));
    writer.varint(~uint64_t{0});
    writer.u64(5);
    const Bytes bytes = writer.take();
    ByteReader reader(bytes);
    reader.bytes(before);
    EXPECT_EQ(reader.varint(), ~uint64_t{0});
    EXPECT_EQ(reader.u64(), 5U);
  }
}

TEST(BytesTest, VarintBeyond64BitsIsRefused) {
  Bytes bytes(9, std::byte{0xFF});
  bytes.push_back(std::byte{0x02});  // would be bit 64
  EXPECT_ERROR(ErrorCode::kCorruptData, "longer than 64 bits", ByteReader(bytes).varint());
  bytes.back() = std::byte{0x80};
  bytes.push_back(std::byte{0x00});
  EXPECT_ERROR(ErrorCode::kCorruptData, "longer than 64 bits", ByteReader(bytes).varint());
}

TEST(BytesTest, ReadingPastTheEndNamesTheDataAndWhatWasWanted) {
  const Bytes bytes(3);
  EXPECT_ERROR(ErrorCode::kCorruptData, "plan ends too early; offset 0; wanted 4 bytes, found 3 bytes",
               ByteReader(bytes, "plan").u32());
  ByteReader reader(bytes, "plan");
  reader.u16();
  EXPECT_ERROR(ErrorCode::kCorruptData, "offset 2", reader.u64());
  EXPECT_EQ(reader.remaining(), 1U) << "a failed read takes nothing";
}

TEST(BytesTest, CountsThatCannotFitAreRefusedBeforeAnythingIsAllocated) {
  ByteWriter writer;
  writer.varint(uint64_t{1} << 60);
  writer.text("0123456789");
  EXPECT_ERROR(ErrorCode::kCorruptData, "items", ByteReader(writer.buffer()).count());
  EXPECT_ERROR(ErrorCode::kCorruptData, "items", ByteReader(writer.buffer()).string());

  ByteWriter small;
  small.varint(3);
  small.text("0123456789");
  EXPECT_EQ(ByteReader(small.buffer()).count(3), 3U);
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted 3 items", ByteReader(small.buffer()).count(4));
}

}  // namespace
}  // namespace reshard
