// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/sidecar.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "reshard/format/crc32.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

constexpr auto kCorrupt = ErrorCode::kCorruptData;

Sidecar example() {
  Sidecar sidecar;
  sidecar.save_id = "17393829-ce51-471d-b4d3-3223f2ae1c3a";
  sidecar.rank = 3;
  sidecar.world_size = 4;
  sidecar.files = {{"__3_0.distcp", 10000, {704, 704 + 4096}, {1, 0xDEADBEEF, 3, 4}},
                   {"sub/__3_1.distcp", 4097, {}, {5, 6}},
                   {"__3_2.distcp", 0, {}, {}}};
  return sidecar;
}
// The body with a digest that fits it: what a forger would write.
Bytes sealed(Bytes body) {
  const Sha256Digest digest = Sha256::of(body);
  body.insert(body.end(), digest.begin(), digest.end());
  return body;
}
ByteWriter begin_body(uint64_t rank = 0, uint64_t world_size = 1) {
  ByteWriter out;
  out.text("RESHARD\x02");
  out.string("1.2.3");
  out.string("id");
  out.varint(rank);
  out.varint(world_size);
  return out;
}

TEST(SidecarTest, SurvivesARoundTrip) {
  Sidecar sidecar = example();
  const Bytes bytes = encode_sidecar(sidecar);
  const Sidecar back = decode_sidecar(bytes);
  EXPECT_FALSE(back.library_version.empty());
  sidecar.library_version = back.library_version;
  EXPECT_EQ(back, sidecar);
  EXPECT_EQ(encode_sidecar(back), bytes);
}

TEST(SidecarTest, NoChangedByteAndNoTruncationPasses) {
  const Bytes good = encode_sidecar(example());
  for (size_t i = 0; i < good.size(); ++i) {
    EXPECT_ERROR(kCorrupt, "sidecar", decode_sidecar(ByteSpan(good).first(i)));
    for (const int change : {1, 0x80}) {
      Bytes bad = good;
      bad[i] ^= static_cast<std::byte>(change);
      EXPECT_THROW(decode_sidecar(bad), Error) << i;
    }
  }
  Bytes longer = good;
  longer.push_back({});
  EXPECT_ERROR(kCorrupt, "checksum differs", decode_sidecar(longer));
}

TEST(SidecarTest, AnotherLayoutIsNamed) {
  Bytes bytes = encode_sidecar(example());
  bytes[7] = std::byte{1};
  EXPECT_ERROR(ErrorCode::kUnsupported, "wanted 2, found 1", decode_sidecar(bytes));
}

TEST(SidecarTest, ContentsAreCheckedBehindARightDigest) {
  const auto refuse = [](const char* text, ByteWriter& body) {
    EXPECT_ERROR(kCorrupt, text, decode_sidecar(sealed(body.take())));
  };
  ByteWriter out;
  out.text("RESHARD\x02");
  refuse("ends too early", out);
  out = begin_body(1, 1);
  refuse("not below the world size", out);
  out = begin_body(0, 0);
  refuse("not below the world size", out);
  out = begin_body(0, uint64_t{1} << 31);
  refuse("not below the world size", out);
  out = begin_body(0, (uint64_t{1} << 31) - 1);
  out.varint(0);
  EXPECT_EQ(decode_sidecar(sealed(out.take())).world_size, (int64_t{1} << 31) - 1);
  out = begin_body();
  out.varint(uint64_t{1} << 60);  // files
  refuse("ends too early", out);
  out = begin_body();
  out.varint(1);
  out.string("../escape");
  out.varint(5);
  out.varint(0);
  refuse("..", out);

  const auto one_file = [](uint64_t size, const std::vector<uint64_t>& distances, size_t sums) {
    ByteWriter body = begin_body();
    body.varint(1);
    body.string("file");
    body.varint(size);
    body.varint(distances.size());
    for (const uint64_t distance : distances) body.varint(distance);
    for (size_t i = 0; i < sums; ++i) body.u32(0);
    return body;
  };
  out = one_file(100, {40, 59}, 3);
  EXPECT_EQ(decode_sidecar(sealed(out.take())).files.at(0).cuts, (std::vector<uint64_t>{40, 99}));
  out = one_file(100, {0}, 2);
  refuse("part is empty", out);
  out = one_file(100, {40, 60}, 3);
  refuse("leaves its file", out);
  out = one_file(100, {40, ~uint64_t{0}}, 3);
  refuse("leaves its file", out);
  out = one_file(8193, {}, 2);
  refuse("fewer sums than blocks", out);
  out = one_file(~uint64_t{0}, {1}, 2);
  refuse("fewer sums than blocks", out);
  out = one_file(8192, {}, 3);
  refuse("bytes left over", out);
}

// The sums of a file do not depend on how its bytes came, and each names the bytes up to its block's end.
TEST(BlockSummerTest, SumsBlocksAndParts) {
  Bytes bytes(20000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 2654435761u >> 24);
  for (const size_t step : {size_t{1}, size_t{1000}, size_t{4096}, size_t{20000}}) {
    BlockSummer summer;
    const auto add = [&](size_t begin, size_t end) {
      for (size_t at = begin; at < end; at += step) {
        summer.add(ByteSpan(bytes).subspan(at, std::min(step, end - at)));
      }
    };
    add(0, 704);
    EXPECT_EQ(summer.cut(), crc32(ByteSpan(bytes).first(704)));
    add(704, 704 + 8192);
    EXPECT_EQ(summer.cut(), crc32(ByteSpan(bytes).subspan(704, 8192)));
    add(704 + 8192, bytes.size());
    const SidecarFile file = summer.finish("f");
    EXPECT_EQ(file.relative_path, "f");
    EXPECT_EQ(file.size, bytes.size());
    EXPECT_EQ(file.cuts, (std::vector<uint64_t>{704, 8896}));
    ASSERT_EQ(file.sums.size(), 1u + 2 + 3);
    const BlockMap map(file);
    uint64_t begin = 0;
    for (size_t n = 0; n < file.sums.size(); ++n) {
      const BlockMap::Block block = map.at(begin);
      EXPECT_EQ(block.begin, begin);
      EXPECT_EQ(block.sum, file.sums[n]);
      EXPECT_EQ(map.at(block.end - 1).begin, begin);
      EXPECT_EQ(crc32(ByteSpan(bytes).subspan(begin, block.end - begin), block.seed), block.sum);
      begin = block.end;
    }
    EXPECT_EQ(begin, bytes.size());
  }
}

TEST(SidecarTest, NamesAreRecognised) {
  EXPECT_EQ(sidecar_name("abc-def", 12), ".reshard-abc-def-12");
  EXPECT_TRUE(is_sidecar_name(sidecar_name("abc-def", 0)));
  EXPECT_TRUE(is_sidecar_name(sidecar_name("abc-def", 9'876'543'210)));
  for (const char* other : {".metadata", "__0_0.distcp", ".reshard-", ".reshard--1", ".reshard-abc", ".reshard-abc-",
                            ".reshard-abc-1x", "x.reshard-abc-1"}) {
    EXPECT_FALSE(is_sidecar_name(other)) << other;
  }
}

TEST(ReceiptsDigestTest, EveryFieldAndTheOrderCount) {
  using List = std::vector<std::pair<MetadataIndex, StorageInfo>>;
  const auto digest = [](const List& list) {
    ReceiptsDigest receipts;
    for (const auto& [index, info] : list) receipts.add(index, info);
    return receipts.finish();
  };
  const List base = {{{"a", Dims{1, 2}, 0}, {"f", 10, 20, {}}}, {{"b", {}, {}}, {"f", 30, 40, {}}}};
  const auto changed = [&](const std::function<void(List&)>& edit) {
    List list = base;
    edit(list);
    return digest(list);
  };
  EXPECT_EQ(digest(base), digest(base));
  EXPECT_EQ(changed([](List& l) { l[0].first.index = 5; }), digest(base));  // only a hint
  const std::vector<std::function<void(List&)>> edits = {
      [](List& l) { l[0].first.fqn = "c"; },       [](List& l) { l[0].first.offset = Dims{1, 3}; },
      [](List& l) { l[1].first.offset = Dims{}; }, [](List& l) { l[0].second.relative_path = "g"; },
      [](List& l) { l[0].second.offset = 11; },    [](List& l) { l[0].second.length = 21; },
      [](List& l) { l = {l[1], l[0]}; },           [](List& l) { l.pop_back(); }};
  for (const auto& edit : edits) EXPECT_NE(changed(edit), digest(base));
}

}  // namespace
}  // namespace reshard
