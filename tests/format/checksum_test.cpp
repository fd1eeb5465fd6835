// SPDX-License-Identifier: BSD-3-Clause
#include <gtest/gtest.h>

#include <string>

#include "reshard/format/crc32.h"
#include "reshard/format/sha256.h"

namespace reshard {
namespace {

TEST(Crc32Test, KnownAnswers) {
  EXPECT_EQ(crc32({}), 0u);
  EXPECT_EQ(crc32(as_bytes("123456789")), 0xCBF43926u);
  EXPECT_EQ(crc32(as_bytes("3\n")), 0x55679ED1u);
}

TEST(Crc32Test, PartsJoinInTheOrderOfTheirBytes) {
  std::string text(100003, '\0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i >> 3);
  const uint32_t whole = crc32(as_bytes(text));
  for (const size_t cut : {size_t{0}, size_t{1}, size_t{4096}, size_t{99999}, text.size()}) {
    const uint32_t a = crc32(as_bytes(text.substr(0, cut)));
    const uint32_t b = crc32(as_bytes(text.substr(cut)));
    EXPECT_EQ(crc32_combine(a, b, text.size() - cut), whole);
    EXPECT_EQ(crc32(as_bytes(text.substr(cut)), a), whole);
  }
  EXPECT_NE(crc32_combine(crc32(as_bytes("b")), crc32(as_bytes("a")), 1), crc32(as_bytes("ab")));
}

TEST(Crc32Test, ZerosPast4GiBCombine) {
  // n zero bytes, doubled 33 times from one, against the sum of 2^32 + 16 zeros that PyTorch wrote into an archive.
  uint32_t power = crc32(as_bytes(std::string(1, '\0')));
  uint32_t sixteen = 0;
  for (uint64_t n = 1; n < uint64_t{1} << 32; n *= 2) {
    if (n == 16) sixteen = power;
    power = crc32_combine(power, power, n);
  }
  EXPECT_EQ(crc32_combine(power, sixteen, 16), 0xC9EFF1BDu);
}

TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(to_hex(Sha256::of({})), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(to_hex(Sha256::of(as_bytes("abc"))), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(Sha256Test, PiecesGiveTheDigestOfTheWholeAndFinishStartsAnew) {
  Sha256 hash;
  const auto digest = hash.update(as_bytes("a")).update({}).update(as_bytes("bc")).finish();
  EXPECT_EQ(digest, Sha256::of(as_bytes("abc")));
  EXPECT_EQ(hash.finish(), Sha256::of({}));
}

}  // namespace
}  // namespace reshard
