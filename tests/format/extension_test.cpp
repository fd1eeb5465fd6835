// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/extension.h"

#include <gtest/gtest.h>

#include <random>

#include "support/expect_error.h"
#include "support/streams.h"

namespace reshard {
namespace {

Bytes compressible(size_t size) {
  std::mt19937 random(7);
  Bytes bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() % 4);
  return bytes;
}

TEST(ZStandardTest, GivesBackWhatWentInInPiecesOfAnySize) {
  const Bytes data = compressible(700'000);  // several blocks
  for (const int level : {-5, 1, 3, 19}) {
    const ZStandard zstd(level);
    for (const size_t piece : {size_t{1} << 20, size_t{4096}, size_t{77}}) {
      const Bytes stored = transformed(zstd, data, piece);
      EXPECT_LT(stored.size(), data.size() / 2);
      EXPECT_EQ(restored(zstd, stored, piece), data) << level << " " << piece;
    }
  }
  EXPECT_EQ(restored(ZStandard(), transformed(ZStandard(), {}, 1), 1), Bytes());
}

TEST(ZStandardTest, WritesOneFrameWithoutSizeAndChecksumAsPyTorchDoes) {
  const Bytes stored = transformed(ZStandard(), compressible(1000), 100);
  EXPECT_EQ(as_text(ByteSpan(stored).first(5)), std::string_view("\x28\xb5\x2f\xfd\x00", 5));
}

TEST(ZStandardTest, ReadsFramesOneAfterTheOther) {
  Bytes stored = transformed(ZStandard(), as_bytes("one, "), 100);
  for (const char* more : {"", "two"}) {
    const Bytes frame = transformed(ZStandard(), as_bytes(more), 100);
    stored.insert(stored.end(), frame.begin(), frame.end());
  }
  EXPECT_EQ(as_text(restored(ZStandard(), stored, 100)), "one, two");
}

TEST(ZStandardTest, RefusesEveryTruncation) {
  const Bytes stored = transformed(ZStandard(), compressible(300), 300);
  for (size_t size = 1; size < stored.size(); ++size) {
    ASSERT_TRUE(throws_error(ErrorCode::kCorruptData, "the zstd frame is cut off", [&] {
      restored(ZStandard(), ByteSpan(stored).first(size), 300);
    })) << size;
  }
}

TEST(ZStandardTest, SaysWhereAForeignStreamBegins) {
  EXPECT_ERROR(ErrorCode::kCorruptData, "no zstd frame, or a damaged one; found Unknown frame descriptor after 0 bytes",
               restored(ZStandard(), as_bytes("PK\3\4 a zip archive"), 100));
  Bytes stored = transformed(ZStandard(), compressible(300), 300);
  const size_t frame = stored.size();
  stored.resize(frame + 100, std::byte{0x55});
  EXPECT_ERROR(ErrorCode::kCorruptData, "Unknown frame descriptor after " + std::to_string(frame) + " bytes",
               restored(ZStandard(), stored, 300));
}

// Of a window of 1 GiB, with which a few bytes would take as much memory.
TEST(ZStandardTest, RefusesLargeWindows) {
  EXPECT_ERROR(ErrorCode::kCorruptData, "too much memory",
               restored(ZStandard(), as_bytes(std::string_view("\x28\xb5\x2f\xfd\x00\xa0\x01\x00\x00", 9)), 100));
}

TEST(ZStandardTest, RefusesLevelsThatThereAreNot) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "level of ZStandard; wanted", ZStandard(23));
}

TEST(ExtensionRegistryTest, FindsExtensionsByNameAndVersion) {
  ExtensionRegistry registry;
  const auto descriptors_of = [&](const std::vector<std::string>& descriptors) {
    std::vector<std::string> found;
    for (const auto& extension : registry.from_descriptor_list(descriptors)) {
      found.push_back(extension->get_descriptor());
    }
    return found;
  };
  using List = std::vector<std::string>;
  EXPECT_EQ(descriptors_of({}), List());
  EXPECT_EQ(descriptors_of({"stream.zstd/1", "stream.zstd/1.7"}), (List{"stream.zstd/1", "stream.zstd/1"}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "wanted stream.zstd/1, found stream.zstd/2", descriptors_of({"stream.zstd/2"}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "unknown version of a stream transform", descriptors_of({"stream.zstd"}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "that is not registered; wanted stream.zstd, found stream.rot13/1",
               descriptors_of({"stream.zstd/1", "stream.rot13/1"}));
  EXPECT_ERROR(ErrorCode::kUnsupported, "not registered", descriptors_of({""}));
  registry.register_extension("stream.rot13", Rot13::from_descriptor);
  EXPECT_EQ(descriptors_of({"stream.zstd/1", "stream.rot13/1"}), (List{"stream.zstd/1", "stream.rot13/1"}));
  registry.register_extension("stream.zstd", [](std::string_view) { return nullptr; });
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "makes nothing", descriptors_of({"stream.zstd/1"}));
}

}  // namespace
}  // namespace reshard
