// SPDX-License-Identifier: BSD-3-Clause
// The scanner and the tree read the same catalogues, from usual streams and from damaged ones.
#include "format/metadata_scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "format/catalogue_builder.h"
#include "reshard/format/dcp_metadata.h"
#include "support/expect_error.h"
#include "support/oracle.h"

namespace reshard {
namespace {

/// What the scanner gives, which the tree must give, too. False if it leaves the stream to the tree.
bool scans_as_the_tree(ByteSpan file) {
  const auto scanned = scan_metadata(file);
  if (!scanned) return false;
  const DecodedMetadata wanted = decode_metadata_tree(file);
  EXPECT_EQ(scanned->metadata, wanted.metadata);
  EXPECT_EQ(scanned->is_ours, wanted.is_ours);
  auto it = wanted.metadata.storage_data.begin();
  for (const auto& [index, info] : scanned->metadata.storage_data) EXPECT_EQ(index.index, (it++)->first.index);
  return true;
}

Metadata example() {
  Metadata m;
  for (const std::string name : {"model.weight", "model.bias"}) {
    TensorStorageMetadata tensor{{DType::kFloat32, true, false, 0}, {8, 6}, {}};
    for (int64_t i = 0; i < 4; ++i) {
      tensor.chunks.push_back({{2 * i, 0}, {2, 6}});
      m.storage_data.insert({name, Dims{2 * i, 0}, i}, {"__" + std::to_string(i) + "_0.distcp", 70000, 1577, {}});
    }
    m.state_dict_metadata.insert(name, tensor);
  }
  m.state_dict_metadata.insert(
      "deep",
      TensorStorageMetadata{{DType::kBFloat16, false, true, 2, ""}, {1, 2, 3, 4}, {{{0, 0, 0, 0}, {1, 2, 3, 4}}}});
  m.storage_data.insert({"deep", Dims{0, 0, 0, 0}, {}}, {"__0_0.distcp", uint64_t{1} << 40, 2000, {}});
  m.state_dict_metadata.insert("step", BytesStorageMetadata{});
  m.storage_data.insert({"step", {}, {}}, {"__0_0.distcp", 0, 1261, {}});
  m.planner_data.emplace().insert("model.weight", {std::string("model"), std::string("weight")});
  m.planner_data->insert("step", {std::string("step"), int64_t{3}});
  m.storage_meta = StorageMeta{"/ckpt/a", "17393829-ce51-471d-b4d3-3223f2ae1c3a", std::nullopt, {"m"}};
  m.version = kMetadataVersion;
  m.sidecars.emplace(2)[1].fill(std::byte{0xA5});
  return m;
}

TEST(MetadataScanTest, ReadsWhatThisLibraryWrites) {
  EXPECT_TRUE(scans_as_the_tree(encode_metadata(example())));
  EXPECT_TRUE(scans_as_the_tree(encode_metadata(Metadata{})));
  EXPECT_TRUE(scans_as_the_tree(CatalogueBuilder().encode_in_protocol_4()));
}

TEST(MetadataScanTest, ReadsWhatPyTorchWrites) {
  for (const std::string& name : OracleCase::names()) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(scans_as_the_tree(OracleCase(name).file(".metadata")));
  }
}

TEST(MetadataScanTest, LeavesCompressedItemsToTheTree) {
  Metadata m = example();
  m.storage_data.find({"step", {}, {}})->transform_descriptors = {"stream.zstd/1"};
  EXPECT_FALSE(scans_as_the_tree(encode_metadata(m)));
  EXPECT_EQ(decode_metadata(encode_metadata(m)), m);
}

TEST(MetadataScanTest, DamagedStreamsAreReadAsTheTreeReadsThemOrNotAtAll) {
  std::vector<Bytes> files = {encode_metadata(example())};
  for (const std::string& name : OracleCase::names()) {
    if (name.ends_with("/nested")) files.push_back(OracleCase(name).file(".metadata"));
  }
  size_t scanned = 0;
  size_t left = 0;
  for (const Bytes& file : files) {
    for (size_t n = 0; n < file.size(); ++n) EXPECT_FALSE(scan_metadata(ByteSpan(file).first(n))) << n;
    Bytes damaged = file;
    for (size_t at = 0; at < file.size(); ++at) {
      constexpr unsigned kFlips[] = {0x01, 0x04, 0x20, 0x80, 0xFF};
      for (const unsigned flip : kFlips) {
        if (&file != &files[0] && flip != kFlips[at % 5]) continue;  // PyTorch's are much the same
        damaged[at] = file[at] ^ static_cast<std::byte>(flip);
        try {
          ++(scans_as_the_tree(damaged) ? scanned : left);
        } catch (const Error& error) {
          ADD_FAILURE() << "byte " << at << " ^ " << flip << ": the tree refuses it: " << error.what();
        }
        damaged[at] = file[at];
      }
    }
  }
  EXPECT_GT(scanned, 1000U);
  EXPECT_GT(left, 1000U);
}

Bytes joined(const std::vector<std::string>& parts) {
  ByteWriter out;
  for (const std::string& part : parts) out.text(part);
  return out.take();
}

/// The builder's catalogue with these bytes in the place of `placeholder`, an opcode that it has once.
Bytes with_opcode(CatalogueBuilder& builder, std::string_view placeholder, const std::string& opcode) {
  std::vector<std::string> parts = opcodes_of(builder.encode_in_protocol_4());
  EXPECT_EQ(std::count(parts.begin(), parts.end(), placeholder), 1);
  std::replace(parts.begin(), parts.end(), std::string(placeholder), opcode);
  return joined(parts);
}

TEST(MetadataScanTest, KeysNamedAsAttributesAreKeys) {
  CatalogueBuilder b;
  for (const char* key : {"version", "storage_meta", "planner_data", "reshard_sidecars", "reshard_step"}) {
    b.more_entries.push_back({b.tree.str(key), b.make(CatalogueBuilder::kModule, "BytesStorageMetadata", {})});
  }
  const Bytes file = b.encode_in_protocol_4();
  EXPECT_TRUE(scans_as_the_tree(file));
  EXPECT_FALSE(scan_metadata(file)->is_ours);
}

TEST(MetadataScanTest, PathsOfForeignPlannersAreLeftToTheTree) {
  CatalogueBuilder b;
  for (const auto& element : {pickle::Tree::none(), pickle::Tree::real(1), b.tree.tuple({}), b.tree.list({})}) {
    b.planner_data = b.tree.dict({{b.tree.str("w"), b.tree.tuple({b.tree.str("w"), element})}});
    EXPECT_FALSE(scans_as_the_tree(b.encode_in_protocol_4()));
  }
  b.planner_data = b.tree.dict({{b.tree.str("w"), b.tree.tuple({b.tree.str("w"), b.tree.str("odd")})}});
  EXPECT_TRUE(scans_as_the_tree(b.encode_in_protocol_4()));
  EXPECT_FALSE(scans_as_the_tree(with_opcode(b, std::string("X\x03\0\0\0odd", 8), "C\x03odd"))) << "bytes are no text";
}

TEST(MetadataScanTest, AttributesOfOthersArePassedOver) {
  CatalogueBuilder b;
  const auto one = pickle::Tree::integer(1);
  const auto notes = b.tree.dict({{b.tree.str("a"), one}});
  b.more_attributes = {{b.tree.str("none"), pickle::Tree::none()},
                       {b.tree.str("notes"), notes},
                       {b.tree.str("list"), b.tree.list({b.tree.str("a"), b.tree.str("b")})},
                       {b.tree.str("tuple"), b.tree.tuple({b.tree.dict({{b.tree.str("a"), one}}), one, one, one})},
                       {b.tree.str("pairs"), b.tree.tuple({b.tree.dict({{one, one}, {b.tree.str("b"), one}})})}};
  EXPECT_TRUE(scans_as_the_tree(b.encode_in_protocol_4()));
}

TEST(MetadataScanTest, ProtocolsUpTo5AreRead) {
  for (const char protocol : {'\2', '\4', '\5'}) {
    std::vector<std::string> parts = opcodes_of(CatalogueBuilder().encode_in_protocol_4());
    parts[0][1] = protocol;
    EXPECT_TRUE(scans_as_the_tree(joined(parts)));
  }
}

// A stream can repeat a size for two bytes, so only short ones may be shared.
TEST(MetadataScanTest, TensorsOfMoreThanEightDimensionsAreLeftToTheTree) {
  for (const size_t rank : {0, 3, 4, 8}) {
    CatalogueBuilder b;
    b.size = b.dims(std::vector<int64_t>(rank, 1));
    EXPECT_TRUE(scans_as_the_tree(b.encode_in_protocol_4())) << rank;
  }
  CatalogueBuilder b;
  b.size = b.dims(std::vector<int64_t>(9, 1));
  EXPECT_FALSE(scan_metadata(b.encode_in_protocol_4()));
}

TEST(MetadataScanTest, LongIntegersOfOneToEightBytesAreRead) {
  CatalogueBuilder b;
  replace(b.first_index, "index", pickle::Tree::integer(int64_t{1} << 40));
  const std::string placeholder("\x8a\x06\0\0\0\0\0\x01", 8);
  for (const char last : {'\x01', '\x7f', '\x80', '\xff'}) {
    for (size_t n = 1; n <= 8; ++n) {
      const std::string digits = std::string(n - 1, '\x22') + last;
      EXPECT_TRUE(
          scans_as_the_tree(with_opcode(b, placeholder, "\x8a" + std::string(1, static_cast<char>(n)) + digits)));
    }
  }
  for (const size_t n : {0, 9, 16, 255}) {
    const std::string digits(n, '\x01');
    EXPECT_FALSE(scan_metadata(with_opcode(b, placeholder, "\x8a" + std::string(1, static_cast<char>(n)) + digits)));
  }
}

TEST(MetadataScanTest, DigestsOfSidecarsAreBytesOf32Each) {
  CatalogueBuilder b;
  b.more_attributes = {{b.tree.str("reshard_sidecars"), pickle::Tree::integer(12345)}};
  const auto with = [&](char op, size_t n) {
    return with_opcode(
        b, "M90",
        op + std::string(1, static_cast<char>(n)) + std::string(op == 'C' ? 0 : 3, '\0') + std::string(n, 'd'));
  };
  for (const char op : {'C', 'B'}) {
    for (const size_t n : {0, 32, 64}) EXPECT_TRUE(scans_as_the_tree(with(op, n))) << op << n;
    for (const size_t n : {1, 31, 33, 65}) EXPECT_FALSE(scan_metadata(with(op, n))) << op << n;
  }
  EXPECT_FALSE(scan_metadata(with('X', 32))) << "text";
}

TEST(MetadataScanTest, WhatIsThereTwiceIsNotAdded) {
  const auto with = [](const char* name, auto&& make) {
    CatalogueBuilder b;
    b.more_attributes = {{b.tree.str(name), make(b)}};
    return b.encode_in_protocol_4();
  };
  const Bytes emptied = with("storage_data", [](CatalogueBuilder& b) { return b.tree.dict({}); });
  EXPECT_FALSE(scan_metadata(emptied));
  EXPECT_EQ(decode_metadata_tree(emptied).metadata.storage_data.size(), 0U);
  // An attribute that nobody asks for, which is a catalogue itself.
  const Bytes nested = with("parent", [](CatalogueBuilder& b) {
    const auto key = b.make(CatalogueBuilder::kModule, "BytesStorageMetadata", {});
    return b.make(CatalogueBuilder::kModule, "Metadata",
                  b.tree.dict({{b.tree.str("state_dict_metadata"), b.tree.dict({{b.tree.str("other"), key}})},
                               {b.tree.str("storage_data"), b.tree.dict({})}}));
  });
  EXPECT_FALSE(scan_metadata(nested));
  EXPECT_EQ(decode_metadata_tree(nested).metadata, CatalogueBuilder().decode());
}

TEST(MetadataScanTest, TheStreamIsOneCatalogueAndNothingElse) {
  const std::vector<std::string> parts = opcodes_of(CatalogueBuilder().encode_in_protocol_4());
  for (const char* more : {"N", "(", "(("}) {
    std::vector<std::string> changed = parts;
    changed.insert(changed.begin() + 1, more);
    EXPECT_FALSE(scan_metadata(joined(changed))) << more;
    EXPECT_ERROR(ErrorCode::kCorruptData, "values left on the stack", decode_metadata_tree(joined(changed)));
  }
  EXPECT_FALSE(scan_metadata(as_bytes("K\x01.")));
}

TEST(MetadataScanTest, NamesOfGlobalsAreText) {
  const std::vector<std::string> parts = opcodes_of(CatalogueBuilder().encode_in_protocol_4());
  size_t globals = 0;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (parts[i] != "\x93") continue;
    ++globals;
    for (const size_t back : {1, 2}) {
      std::vector<std::string> changed = parts;
      ASSERT_EQ(changed[i - back][0], 'X');
      changed[i - back][0] = 'B';  // the same as bytes
      EXPECT_FALSE(scan_metadata(joined(changed))) << parts[i - back];
    }
  }
  EXPECT_GT(globals, 5U);
}

TEST(MetadataScanTest, NothingIsAddedAcrossAMark) {
  // An attribute that nobody asks for: ([], ((chunk,),)). Its chunk stands above two marks and is not of the list; so it is still there when the
  // next one comes, and the scanner holds one at a time.
  CatalogueBuilder b;
  const auto chunk = [&] {
    return b.make(CatalogueBuilder::kModule, "ChunkStorageMetadata", b.tree.dict(b.first_chunk));
  };
  b.more_attributes = {{b.tree.str("extra"), chunk()}, {b.tree.str("more"), chunk()}};
  std::vector<std::string> parts = opcodes_of(b.encode_in_protocol_4());
  const auto is_key = [](const std::string& part) { return part[0] == 'X' && part.ends_with("extra"); };
  const auto key = std::ranges::find_if(parts, is_key);
  ASSERT_NE(key, parts.end());
  const auto begin = parts.insert(key + (key[1] == "\x94" ? 2 : 1), {"]", "(", "("});
  const auto end = std::find(begin, parts.end(), "b");
  ASSERT_NE(end, parts.end());
  parts.insert(end + 1, {"t", "t", "\x86"});
  EXPECT_FALSE(scan_metadata(joined(parts)));
  EXPECT_EQ(decode_metadata_tree(joined(parts)).metadata, CatalogueBuilder().decode());
}

TEST(MetadataScanTest, OnlyListsAreAppendedTo) {
  // What is added to the dict is where it belongs before the opcode that adds it comes.
  std::vector<std::string> parts = opcodes_of(CatalogueBuilder().encode_in_protocol_4());
  size_t changed = 0;
  for (std::string& part : parts) {
    if (part != "u") continue;
    part = "e";
    EXPECT_FALSE(scan_metadata(joined(parts))) << changed;
    part = "u";
    ++changed;
  }
  EXPECT_GT(changed, 10U);
}

TEST(MetadataScanTest, ChangedOpcodesAreReadAsTheTreeReadsThemOrNotAtAll) {
  CatalogueBuilder b;
  b.more_attributes = {
      {b.tree.str("storage_meta"),
       b.make(CatalogueBuilder::kModule, "StorageMeta",
              b.tree.dict(
                  {{b.tree.str("checkpoint_id"), b.call("pathlib", "PosixPath", {b.tree.str("/"), b.tree.str("ckpt")})},
                   {b.tree.str("modules"), b.tree.list({b.tree.str("m"), b.tree.str("n")})}}))},
      {b.tree.str("version"), b.tree.str("1.0.0")}};
  std::mt19937 random(77);
  size_t scanned = 0;
  size_t left = 0;
  for (const Bytes& file : {b.encode_in_protocol_4(), encode_metadata(example())}) {
    const std::vector<std::string> parts = opcodes_of(file);
    std::vector<std::string> pool = parts;
    for (const char op : std::string_view("(.)]}aetsuRbN\x81\x85\x86\x87\x88\x93\x94")) pool.emplace_back(1, op);
    const auto any = [&](const std::vector<std::string>& all) { return random() % all.size(); };
    for (int round = 0; round < 6000; ++round) {
      std::vector<std::string> changed = parts;
      for (auto n = 1 + random() % 2; n > 0; --n) {
        const auto at = changed.begin() + static_cast<std::ptrdiff_t>(any(changed));
        switch (random() % 4) {
          case 0:
            changed.erase(at);
            break;
          case 1:
            *at = pool[any(pool)];
            break;
          case 2:
            changed.insert(at, pool[any(pool)]);
            break;
          default:
            std::swap(*at, changed[any(changed)]);
        }
      }
      const Bytes damaged = joined(changed);
      try {
        ++(scans_as_the_tree(damaged) ? scanned : left);
      } catch (const Error& error) {
        ADD_FAILURE() << "round " << round << ": the tree refuses it: " << error.what();
      }
    }
  }
  EXPECT_GT(scanned, 500U);
  EXPECT_GT(left, 5000U);
}

}  // namespace
}  // namespace reshard
