// SPDX-License-Identifier: BSD-3-Clause
// The scanner and the tree read the same catalogues, from usual streams and from damaged ones.
#include "format/metadata_scan.h"

#include <gtest/gtest.h>

#include <string>

#include "reshard/format/dcp_metadata.h"
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
      for (const unsigned flip : {0x01u, 0x04u, 0x20u, 0x80u, 0xFFu}) {
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

}  // namespace
}  // namespace reshard
