// SPDX-License-Identifier: BSD-3-Clause
// Reads that check what they touch, on a file in memory that can be made to lie; and which sums and chunks are looked up.
#include "storage/checked_file.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "reshard/format/sidecar.h"
#include "storage/chunks.h"
#include "support/expect_error.h"
#include "support/memory_file_system.h"

namespace reshard {
namespace {

/// Calls are counted; the chosen one gives a wrong first byte.
class LyingFile final : public RandomAccessFile {
 public:
  explicit LyingFile(Bytes bytes) : bytes_(std::move(bytes)) {}
  uint64_t size() const override { return bytes_.size(); }
  uint64_t preferred_read_bytes() const override { return preferred; }
  void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const override {
    const uint64_t begin = offset;
    for (const MutableByteSpan part : parts) {
      if (offset > bytes_.size() || part.size() > bytes_.size() - offset) {
        throw Error(ErrorCode::kCorruptData, std::string(what) + ": the file ends too early");
      }
      std::copy_n(bytes_.begin() + static_cast<ptrdiff_t>(offset), part.size(), part.begin());
      offset += part.size();
    }
    if (++reads == lie_at) parts[0][0] ^= std::byte{1};
    ranges.push_back({begin, offset});
  }

  Bytes& bytes() { return bytes_; }
  mutable int reads = 0;
  mutable std::vector<std::pair<uint64_t, uint64_t>> ranges;
  int lie_at = 0;
  uint64_t preferred = 128 << 10;

 private:
  Bytes bytes_;
};

class CheckedFileTest : public ::testing::Test {
 protected:
  CheckedFileTest() {
    Bytes bytes(10'000);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
    file = std::make_unique<LyingFile>(bytes);
    BlockSummer summer;  // blocks [0, 100), [100, 4196), [4196, 8292), [8292, 9000), [9000, 10000)
    summer.add(ByteSpan(bytes).first(100));
    summer.cut();
    summer.add(ByteSpan(bytes).subspan(100, 8900));
    summer.cut();
    summer.add(ByteSpan(bytes).subspan(9000));
    sums = summer.finish("f");
  }
  /// What a read of a range asks of the file.
  std::vector<std::pair<uint64_t, uint64_t>> asked(uint64_t begin, uint64_t end) {
    file->ranges.clear();
    Bytes out(end - begin);
    const MutableByteSpan part(out);
    const CheckedFile::Read read = CheckedFile(*file, &sums).read(begin, {&part, 1}, "x");
    EXPECT_TRUE(std::ranges::equal(out, ByteSpan(file->bytes()).subspan(begin, end - begin)));
    uint64_t total = 0;
    for (const auto& [from, to] : file->ranges) total += to - from;
    EXPECT_EQ(read.bytes, total);
    EXPECT_EQ(read.calls, file->ranges.size());
    return file->ranges;
  }

  std::unique_ptr<LyingFile> file;
  SidecarFile sums;
};

using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;

TEST_F(CheckedFileTest, ReadsWholeBlocksInOneCall) {
  EXPECT_EQ(asked(0, 100), (Ranges{{0, 100}}));
  EXPECT_EQ(asked(5, 6), (Ranges{{0, 100}}));
  EXPECT_EQ(asked(99, 101), (Ranges{{0, 4196}}));
  EXPECT_EQ(asked(4196, 8292), (Ranges{{4196, 8292}}));
  EXPECT_EQ(asked(4200, 8293), (Ranges{{4196, 9000}}));
  EXPECT_EQ(asked(9999, 10'000), (Ranges{{9000, 10'000}}));
  EXPECT_EQ(asked(0, 10'000), (Ranges{{0, 10'000}}));
  EXPECT_EQ(asked(700, 700), Ranges{});
}

TEST_F(CheckedFileTest, SumsWhatACallHasReadBeforeTheNext) {
  file->preferred = 4000;
  EXPECT_EQ(asked(0, 10'000), (Ranges{{0, 4000}, {4000, 8000}, {8000, 10'000}}));
  EXPECT_EQ(asked(150, 4300), (Ranges{{100, 4100}, {4100, 8100}, {8100, 8292}}));
  EXPECT_EQ(asked(100, 4100), (Ranges{{100, 4100}, {4100, 4196}}));
  EXPECT_EQ(asked(9000, 10'000), (Ranges{{9000, 10'000}}));
  file->bytes()[50] ^= std::byte{1};
  EXPECT_ERROR(ErrorCode::kCorruptData, "do not match their checksum", asked(0, 10'000));
  EXPECT_EQ(file->ranges, (Ranges{{0, 4000}, {0, 100}}));  // nothing is read after the changed block is found
}

// Large reads go to their places past the caches, 128 KiB at a time: parts of every alignment, short and long.
TEST_F(CheckedFileTest, LargeReadsReachEveryPart) {
  Bytes bytes(5 << 20);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
  LyingFile large(bytes);
  BlockSummer summer;
  summer.add(bytes);
  const SidecarFile large_sums = summer.finish("f");
  constexpr std::byte kUntouched{0xA5};
  for (const SidecarFile* checked_by : {static_cast<const SidecarFile*>(nullptr), &large_sums}) {
    Bytes out(bytes.size() + 4096, kUntouched);
    std::vector<MutableByteSpan> parts;
    std::vector<std::pair<size_t, size_t>> gaps;
    size_t wanted = 0;
    size_t at = 1;
    const auto add = [&](size_t size) {
      parts.push_back(MutableByteSpan(out).subspan(at, size));
      gaps.emplace_back(at + size, 3);
      at += size + 3;
      wanted += size;
    };
    for (const size_t size : {1, 63, 64, 2047, 2048, 2111, 5000, (128 << 10) - 1, (128 << 10) + 77}) add(size);
    add(bytes.size() - 100 - wanted);
    large.ranges.clear();
    const CheckedFile::Read read = CheckedFile(large, checked_by).read(50, parts, "x");
    EXPECT_EQ(read.bytes, checked_by != nullptr ? bytes.size() : bytes.size() - 100);
    EXPECT_EQ(read.calls, 40u);
    EXPECT_EQ(large.ranges.size(), 40u);
    size_t from = 50;
    for (const MutableByteSpan& part : parts) {
      EXPECT_TRUE(std::ranges::equal(part, ByteSpan(bytes).subspan(from, part.size()))) << "at " << from;
      from += part.size();
    }
    EXPECT_EQ(out[0], kUntouched);
    for (const auto& [begin, size] : gaps) {
      for (size_t i = 0; i < size; ++i) EXPECT_EQ(out[begin + i], kUntouched) << begin;
    }
  }
  EXPECT_ERROR(ErrorCode::kCorruptData, "thing: the file ends too early", [&] {
    Bytes out(5 << 20);
    const MutableByteSpan part(out);
    CheckedFile(large, nullptr).read(1, {&part, 1}, "thing");
  }());
}

TEST_F(CheckedFileTest, EndsOfBlocksAreKnownWhereThereAreSums) {
  const CheckedFile checked(*file, &sums), plain(*file, nullptr);
  EXPECT_TRUE(checked.is_checked());
  EXPECT_FALSE(plain.is_checked());
  EXPECT_EQ(checked.block_end(0), 0u);
  EXPECT_EQ(checked.block_end(1), 100u);
  EXPECT_EQ(checked.block_end(100), 100u);
  EXPECT_EQ(checked.block_end(101), 4196u);
  EXPECT_EQ(checked.block_end(8293), 9000u);
  EXPECT_EQ(plain.block_end(101), 101u);
}

TEST_F(CheckedFileTest, WithoutSumsNothingMoreIsReadAndNothingChecked) {
  const CheckedFile plain(*file, nullptr);
  file->bytes()[7] ^= std::byte{1};
  Bytes out(3);
  const MutableByteSpan part(out);
  EXPECT_EQ(plain.read(5, {&part, 1}, "x").bytes, 3u);
  EXPECT_EQ(file->ranges, (Ranges{{5, 8}}));
}

TEST_F(CheckedFileTest, PastTheEndItIsTheFilesError) {
  const CheckedFile checked(*file, &sums);
  Bytes out(2);
  const MutableByteSpan part(out);
  EXPECT_ERROR(ErrorCode::kCorruptData, "thing: the file ends too early", checked.read(9999, {&part, 1}, "thing"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "thing: the file ends too early", checked.read(10'001, {&part, 1}, "thing"));
}

TEST_F(CheckedFileTest, NamesTheBlockThatChanged) {
  for (const auto& [changed, block] :
       {std::pair{0, 0}, {99, 0}, {100, 100}, {4195, 100}, {4196, 4196}, {8999, 8292}, {9500, 9000}}) {
    file->bytes()[static_cast<size_t>(changed)] ^= std::byte{0x10};
    try {
      asked(0, 10'000);
      ADD_FAILURE() << "byte " << changed;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kCorruptData);
      EXPECT_EQ(error.context().offset, static_cast<uint64_t>(block)) << error.what();
      EXPECT_NE(error.context().wanted, error.context().found);
    }
    file->bytes()[static_cast<size_t>(changed)] ^= std::byte{0x10};
  }
}

// A bit that flips in memory or on the wire, not on the disk: the data is not handed out all the same.
TEST_F(CheckedFileTest, SaysSoWhenTheSecondReadIsRight) {
  file->lie_at = 1;
  Bytes out(200);
  const MutableByteSpan part(out);
  EXPECT_ERROR(ErrorCode::kCorruptData, "did not match their checksum, but do when read again: thing",
               CheckedFile(*file, &sums).read(4200, {&part, 1}, "thing"));
}

TEST_F(CheckedFileTest, AnotherSizeThanTheSumsSpeakOfIsAnError) {
  for (const uint64_t size : {9'999, 10'001}) {
    sums.size = size;
    EXPECT_ERROR(ErrorCode::kCorruptData,
                 "not the one of its sidecar; offset " + std::to_string(std::min<uint64_t>(size, 10'000)),
                 CheckedFile(*file, &sums));
  }
}

// --- sidecars
// ----------------------------------------------------------------------------------------------------------

class SidecarsTest : public ::testing::Test {
 protected:
  SidecarsTest() {
    metadata.storage_meta.emplace();
    metadata.storage_meta->save_id = "id";
    metadata.sidecars.emplace();
  }
  /// Puts a sidecar and its digest in place.
  void add(const Sidecar& sidecar) {
    const Bytes bytes = encode_sidecar(sidecar);
    const auto out = files.create("/c/" + sidecar_name("id", static_cast<int64_t>(metadata.sidecars->size())),
                                  CreateMode::kExclusive);
    out->write(0, bytes);
    metadata.sidecars->push_back(sidecar_digest(bytes));
  }
  static SidecarFile empty_file(const std::string& name) { return BlockSummer().finish(name); }
  Sidecars sidecars() { return Sidecars(directory, files, metadata); }

  const std::string directory = "/c";
  MemoryFileSystem files{{}, {"/c"}};
  Metadata metadata;
};

TEST_F(SidecarsTest, EachDataFileHasTheOneOfItsRank) {
  add({{}, "id", 0, 2, {empty_file("__0_0.distcp"), empty_file("__0_1.distcp")}});
  add({{}, "id", 1, 2, {empty_file("__1_0.distcp")}});
  Sidecars all = sidecars();
  EXPECT_EQ(all.of_file("__0_1.distcp")->relative_path, "__0_1.distcp");
  const uint64_t first = all.bytes_read();
  EXPECT_GT(first, 0u);
  EXPECT_EQ(all.of_file("__0_0.distcp")->relative_path, "__0_0.distcp");
  EXPECT_EQ(all.bytes_read(), first) << "read once";
  EXPECT_EQ(all.of_file("__1_0.distcp")->relative_path, "__1_0.distcp");
  EXPECT_GT(all.bytes_read(), first);
  for (const char* name : {"__1_1.distcp", "__2_0.distcp", "weights.bin"}) {
    EXPECT_ERROR(ErrorCode::kCorruptData, std::string("no sidecar speaks of this file; file ") + name,
                 all.of_file(name));
  }
}

TEST_F(SidecarsTest, WithoutSidecarsThereAreNoSums) {
  metadata.sidecars.reset();
  EXPECT_EQ(sidecars().of_file("__0_0.distcp"), nullptr);
  EXPECT_EQ(sidecar_rank(metadata, "__0_0.distcp"), std::nullopt);
}

TEST_F(SidecarsTest, ACatalogueWithoutTheNameOfItsSaveHasNoUseForThem) {
  add({{}, "id", 0, 1, {empty_file("__0_0.distcp")}});
  metadata.storage_meta->save_id.reset();
  EXPECT_ERROR(ErrorCode::kCorruptData, "does not name its save; file .metadata", sidecars().of_rank(0));
  metadata.storage_meta.reset();
  EXPECT_ERROR(ErrorCode::kCorruptData, "does not name its save; file .metadata", sidecars().of_rank(0));
}

TEST_F(SidecarsTest, RankAndNumberOfRanksCount) {
  add({{}, "id", 1, 2, {}});
  add({{}, "id", 1, 3, {}});
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted save id, rank 0 of 2, found save id, rank 1 of 2",
               sidecars().of_rank(0));
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted save id, rank 1 of 2, found save id, rank 1 of 3",
               sidecars().of_rank(1));
}

TEST_F(SidecarsTest, OneThatListsAFileTwiceIsRefused) {
  add({{}, "id", 0, 1, {empty_file("__0_0.distcp"), empty_file("__0_0.distcp")}});
  EXPECT_ERROR(ErrorCode::kCorruptData, "twice", sidecars().of_rank(0));
}

// --- chunks
// ----------------------------------------------------------------------------------------------------------

TEST(FindChunkTest, ByItsHintElseByItsOffsets) {
  TensorStorageMetadata tensor;
  tensor.size = {4, 2};
  tensor.chunks = {{{0, 0}, {1, 2}}, {{1, 0}, {2, 2}}, {{3, 0}, {1, 2}}};
  const auto found = [&](const Dims& offset, std::optional<int64_t> hint) {
    const Box* chunk = find_chunk(tensor, {"t", offset, hint});
    return chunk == nullptr ? -1 : chunk - tensor.chunks.data();
  };
  EXPECT_EQ(found({1, 0}, 1), 1);
  EXPECT_EQ(found({1, 0}, std::nullopt), 1);
  for (const int64_t wrong : {0, 2, 3, -1}) EXPECT_EQ(found({1, 0}, wrong), 1) << wrong;
  EXPECT_EQ(found({2, 0}, 1), -1);
  EXPECT_EQ(found({2, 0}, std::nullopt), -1);
}

}  // namespace
}  // namespace reshard
