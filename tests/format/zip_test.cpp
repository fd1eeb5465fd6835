// SPDX-License-Identifier: BSD-3-Clause
#include "format/zip.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "format/zip_builder.h"
#include "support/expect_error.h"

namespace reshard::zip {
namespace {

constexpr auto kCorrupt = ErrorCode::kCorruptData;
constexpr auto kUnsupported = ErrorCode::kUnsupported;

using Edit = std::function<void(std::vector<ZipRecord>& records)>;

Bytes edited(const Edit& edit, const std::function<void(Bytes&)>& edit_end = nullptr) {
  std::vector<ZipRecord> records = {
      {"top/one", bytes_of("first content")}, {"top/two", bytes_of("second")}, {"top/three", {}}};
  if (edit) edit(records);
  return build_zip(records, edit_end);
}
// Opens the archive and reads all of it.
std::string contents(const Bytes& archive) {
  const MemorySource source(archive);
  Reader reader(source);
  std::string all;
  for (const Entry& entry : reader.entries())
    all += entry.name + "=" + std::string(as_text(reader.content(entry, 1000))) + ";";
  return all;
}

TEST(ZipReaderTest, ReadsAPlainArchive) {
  EXPECT_EQ(contents(edited(nullptr)), "one=first content;two=second;three=;");
  const Bytes archive = edited(nullptr);
  const MemorySource source(archive);
  Reader reader(source);
  EXPECT_EQ(reader.find("four"), nullptr);
  EXPECT_EQ(reader.find(""), nullptr);
  EXPECT_ERROR(kCorrupt, "no record four", reader.get("four"));
  EXPECT_TRUE(Reader::is_known(reader.get("two"), "second"));
  EXPECT_FALSE(Reader::is_known(reader.get("two"), "sekond"));
}

TEST(ZipReaderTest, CommentsAndALittleJunkBehindTheEndArePassedOver) {
  const std::vector<ZipRecord> records = {{"top/one", bytes_of("x")}};
  for (const size_t length : {1u, 1000u, 5000u, 65535u})
    EXPECT_EQ(contents(build_zip(records, nullptr, std::string(length, 'c'))), "one=x;");
  Bytes junk = build_zip(records);
  junk.insert(junk.end(), 7, std::byte{'j'});
  EXPECT_EQ(contents(junk), "one=x;");
  junk.insert(junk.end(), 70000, std::byte{'j'});
  EXPECT_ERROR(kCorrupt, "no end record", contents(junk));
}

TEST(ZipReaderTest, ExtraBlocksMayDifferBetweenTheHeaders) {
  EXPECT_EQ(contents(edited([](auto& records) {
              records[0].local_extra = bytes_of({"FB\5\0ZZZZZ", 9});
              records[1].directory_extra = bytes_of({"xy\0\0", 4});
            })),
            "one=first content;two=second;three=;");
}

TEST(ZipReaderTest, RecordsOutsideTheTopFolderHaveNoName) {
  EXPECT_EQ(contents(edited([](auto& records) { records[1].name = "other/two"; })),
            "one=first content;=second;three=;");
  EXPECT_ERROR(kCorrupt, "no top folder", contents(edited([](auto& records) { records[0].name = "one"; })));
}

struct BadZip {
  const char* name;
  ErrorCode code;
  const char* text;
  Edit edit;
  std::function<void(Bytes&)> edit_end = nullptr;
};
void PrintTo(const BadZip& bad, std::ostream* out) { *out << bad.text; }
class ZipRefusalTest : public ::testing::TestWithParam<BadZip> {};
TEST_P(ZipRefusalTest, IsNamed) {
  EXPECT_ERROR(GetParam().code, GetParam().text, contents(edited(GetParam().edit, GetParam().edit_end)));
}

template <class T>
std::function<void(Bytes&)> set(size_t at, T value) {
  return [=](Bytes& bytes) { poke<T>(bytes, at, value); };
}
Edit directory(size_t record, std::function<void(Bytes&)> edit) {
  return [=](auto& records) { records[record].edit_directory = edit; };
}
Edit local(size_t record, std::function<void(Bytes&)> edit) {
  return [=](auto& records) { records[record].edit_local = edit; };
}

INSTANTIATE_TEST_SUITE_P(Archives, ZipRefusalTest,
                         ::testing::
                             Values(
                                 BadZip{"SeveralDisks", kCorrupt, "several disks", nullptr, set<uint16_t>(4, 1)},
                                 BadZip{"DirectoryPastTheEnd", kCorrupt, "directory is out of place", nullptr,
                                        set<uint32_t>(16, 0x7FFFFFFF)},
                                 BadZip{"DirectoryTooLong", kCorrupt, "directory is out of place", nullptr,
                                        set<uint32_t>(12, 0x7FFFFFFF)},
                                 BadZip{"DirectoryLongerByOne", kCorrupt, "directory is out of place", nullptr,
                                        [](Bytes& end) {
                                          uint32_t size = 0;
                                          std::memcpy(&size, end.data() + 12, sizeof size);
                                          poke<uint32_t>(end, 12, size + 1);
                                        }},
                                 BadZip{"TooManyEntries", kCorrupt, "more records than", nullptr,
                                        [](Bytes& end) { poke<uint16_t>(end, 8, 999), poke<uint16_t>(end, 10, 999); }},
                                 BadZip{"OneEntryTooMany", kCorrupt, "directory ends too early",
                                        [](auto& records) { records[0].name.append(60, 'e'); },
                                        [](Bytes& end) { poke<uint16_t>(end, 8, 4), poke<uint16_t>(end, 10, 4); }},
                                 BadZip{"Zip64WithoutItsRecord", kCorrupt, "directory is out of place", nullptr,
                                        set<uint32_t>(16, 0xFFFFFFFF)},
                                 BadZip{"NoDirectorySignature", kCorrupt, "directory entry is not there",
                                        directory(1, set<uint32_t>(0, 0))},
                                 BadZip{"NamePastTheDirectory", kCorrupt, "cut off",
                                        directory(2, set<uint16_t>(28, 0xFFFF))},
                                 BadZip{"Encrypted", kUnsupported, "top/two is encrypted",
                                        directory(1, set<uint16_t>(8, 1))},
                                 BadZip{"Deflated", kUnsupported, "top/two is compressed",
                                        directory(1, set<uint16_t>(10, 8))},
                                 BadZip{"TwoSizes", kCorrupt, "top/one has two sizes",
                                        directory(0, set<uint32_t>(20, 5))},
                                 BadZip{"HeaderPastTheDirectory", kCorrupt, "top/one is out of place",
                                        directory(0, set<uint32_t>(42, 0x7FFFFFFF))},
                                 BadZip{
                                     "SizePastTheDirectory", kCorrupt, "top/two is out of place",
                                     directory(
                                         1, [](Bytes& e) { poke<uint32_t>(e, 20, 5000), poke<uint32_t>(e, 24, 5000); })},
                                 BadZip{
                                     "Overlap", kCorrupt, "top/one overlaps",
                                     directory(0,
                                               [](Bytes& e) { poke<uint32_t>(e, 20, 14), poke<uint32_t>(e, 24, 14); })},
                                 BadZip{"SameHeaderTwice", kCorrupt, "overlaps", directory(1, set<uint32_t>(42, 0))},
                                 BadZip{"SameNameTwice", kCorrupt, "two records are named top/one",
                                        [](auto& records) { records[1].name = "top/one"; }},
                                 BadZip{"SameNameInAnotherCase", kCorrupt,
                                        "two records are named", [](auto& records) { records[1].name = "top/ONE"; }},
                                 BadZip{"NoLocalHeader", kCorrupt, "top/one has no local header",
                                        local(0, set<uint32_t>(0, 0))},
                                 BadZip{"OtherLocalName", kCorrupt, "another name",
                                        [](auto& records) { records[0].local_name = "top/0ne"; }},
                                 BadZip{"LongerLocalName", kCorrupt, "another name",
                                        [](auto& records) { records[0].local_name = "top/one1"; }},
                                 BadZip{"LocallyDeflated", kCorrupt, "stored otherwise", local(0, set<uint16_t>(8, 8))},
                                 BadZip{"LocallyEncrypted", kCorrupt,
                                        "stored otherwise", local(0, set<uint16_t>(6, 1))},
                                 BadZip{"LocalExtraIntoTheNext", kCorrupt,
                                        "top/two overlaps", local(1, set<uint16_t>(28, 9))},
                                 BadZip{
                                     "ExtraBlockCutOff", kCorrupt, "extra block is cut off",
                                     [](auto& records) { records[0].directory_extra = bytes_of({"\x01\0\x08\0", 4}); }},
                                 BadZip{"Zip64BlockTooShort", kCorrupt, "zip64 block ends too early",
                                        [](auto& records) {
                                          records[0].edit_directory = set<uint32_t>(24, 0xFFFFFFFF);
                                          records[0].directory_extra = bytes_of({"\x01\0\x04\0\0\0\0\0", 8});
                                        }}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(ZipReaderTest, Zip64RecordsMustAgreeWithTheRest) {
  // One record, then the three end records as torch writes them.
  ByteWriter out;
  Record record{.name = "top/one", .header = 0, .size = 1, .crc32 = crc32(as_bytes("x"))};
  record.payload = payload_position(0, record.name.size(), record.size, 64);
  put_local_header(out, record);
  out.text("x");
  put_descriptor(out, record);
  const uint64_t directory_at = out.size();
  put_tail(out, {&record, 1}, directory_at);
  const Bytes good = out.take();
  EXPECT_EQ(contents(good), "one=x;");
  EXPECT_EQ(good.size(), directory_at + directory_entry_size(record) + kEndSize);

  const size_t end64 = good.size() - 98, locator = good.size() - 42, end = good.size() - 22;
  const auto refuse = [&](const char* text, size_t at, auto value) {
    Bytes bad = good;
    poke(bad, at, value);
    EXPECT_ERROR(kCorrupt, text, contents(bad));
  };
  refuse("out of place", locator + 8, uint64_t{1} << 40);
  refuse("out of place", locator + 8, uint64_t{locator});
  refuse("is not there", locator + 8, uint64_t{0});
  refuse("is not there", end64, uint32_t{0});
  refuse("wrong length", end64 + 4, uint64_t{43});
  refuse("wrong length", end64 + 4, uint64_t{45});
  refuse("wrong length", end64 + 4, ~uint64_t{0});
  refuse("two end records disagree", end64 + 32, uint64_t{2});
  refuse("two end records disagree", end64 + 40, uint64_t{2});
  refuse("two end records disagree", end64 + 48, uint64_t{2});
  refuse("several disks", end64 + 24, uint64_t{2});
  // Where the short record leaves the numbers to the long one, the long one counts and is checked.
  Bytes open = good;
  poke<uint16_t>(open, end + 8, 0xFFFF);
  poke<uint16_t>(open, end + 10, 0xFFFF);
  poke<uint32_t>(open, end + 12, 0xFFFFFFFF);
  poke<uint32_t>(open, end + 16, 0xFFFFFFFF);
  EXPECT_EQ(contents(open), "one=x;");
  poke<uint64_t>(open, end64 + 48, ~uint64_t{0} - 5);
  EXPECT_ERROR(kCorrupt, "directory is out of place", contents(open));
}

TEST(ZipReaderTest, DescriptorsOfEveryFormAreChecked) {
  const Bytes content = bytes_of("content");
  const auto build = [&](bool signature, bool wide, uint32_t crc) {
    // The descriptor stands between this record's content and the next record: here it is the start of the next one's slack.
    ByteWriter descriptor;
    if (signature) descriptor.u32(0x08074b50);
    descriptor.u32(crc);
    for (int i = 0; i < 2; ++i)
      wide ? descriptor.u64(content.size()) : descriptor.u32(static_cast<uint32_t>(content.size()));
    ByteWriter all;
    all.bytes(content);
    all.bytes(descriptor.buffer());
    std::vector<ZipRecord> records = {{"top/one", all.take()}};
    const uint32_t size = static_cast<uint32_t>(content.size());
    records[0].edit_directory = [=, true_crc = crc32(content)](Bytes& e) {
      poke<uint16_t>(e, 8, 8);
      poke<uint32_t>(e, 16, true_crc);
      poke<uint32_t>(e, 20, size);
      poke<uint32_t>(e, 24, size);
    };
    return build_zip(records);
  };
  for (const bool signature : {false, true}) {
    for (const bool wide : {false, true}) {
      EXPECT_EQ(verify_archive(MemorySource(build(signature, wide, crc32(content)))).records, 1u);
      EXPECT_ERROR(kCorrupt, "data descriptor that differs", verify_archive(MemorySource(build(signature, wide, 5))));
    }
  }
}

TEST(ZipReaderTest, AnArchiveMayBeEmpty) {
  ByteWriter out;
  zip::put_tail(out, {}, 0);
  const Bytes file = out.take();
  const MemorySource source(file);
  EXPECT_TRUE(zip::Reader(source).entries().empty());
  // Without the zip64 records it is the end record alone.
  const Bytes shortest = build_zip({});
  EXPECT_EQ(shortest.size(), 22u);
  EXPECT_TRUE(zip::Reader(MemorySource(shortest)).entries().empty());
  EXPECT_ERROR(kCorrupt, "too short", contents(Bytes(21)));
}

// The counts of the end record proper have 16 bits.
TEST(ZipReaderTest, MoreThan65535RecordsAreCounted) {
  constexpr size_t kRecords = 65536;
  std::vector<std::string> names;
  for (size_t i = 0; i < kRecords; ++i) names.push_back("a/" + std::to_string(i));
  std::vector<zip::Record> records;
  uint64_t end = 0;
  for (const std::string& name : names) {
    const uint64_t payload = zip::payload_position(end, name.size(), 0, 1);
    records.push_back({name, end, payload, 0, 0});
    end = zip::end_position(end, payload, 0);
  }
  ByteWriter out;
  for (const zip::Record& record : records) zip::put_local_header(out, record);
  zip::put_tail(out, records, end);
  const Bytes file = out.take();
  const MemorySource source(file);
  EXPECT_EQ(zip::Reader(source).entries().size(), kRecords);
}

/// A file of nothing but zeros in front of an end record, which says that all of it is the directory.
class AllDirectory final : public ByteSource {
 public:
  explicit AllDirectory(uint32_t size) : size_(size) {
    poke<uint32_t>(end_, 0, 0x06054b50);
    poke<uint16_t>(end_, 8, 1);
    poke<uint16_t>(end_, 10, 1);
    poke<uint32_t>(end_, 12, size);
  }
  uint64_t size() const override { return size_ + end_.size(); }
  void read(uint64_t offset, MutableByteSpan out) const override {
    std::ranges::fill(out, std::byte{0});
    for (size_t i = 0; i < end_.size(); ++i) {
      if (size_ + i >= offset && size_ + i < offset + out.size()) out[size_ + i - offset] = end_[i];
    }
  }

 private:
  uint64_t size_;
  Bytes end_ = Bytes(22);
};

TEST(ZipReaderTest, ADirectoryOfMoreThan256MebibytesIsNotRead) {
  EXPECT_ERROR(kCorrupt, "directory entry is not there", Reader(AllDirectory(256 << 20)));
  EXPECT_ERROR(kCorrupt, "directory is too large", Reader(AllDirectory((256 << 20) + 1)));
}

TEST(ZipReaderTest, WhatIsNoArchiveIsSaid) {
  EXPECT_ERROR(kCorrupt, "too short", contents({}));
  EXPECT_ERROR(kCorrupt, "no end record", contents(Bytes(100)));
  EXPECT_ERROR(kCorrupt, "no end record", contents(Bytes(100000)));
}

}  // namespace
}  // namespace reshard::zip
