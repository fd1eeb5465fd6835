// SPDX-License-Identifier: BSD-3-Clause
// Checkpoints of four PyTorch releases, read item by item and compared with what PyTorch says they hold.

#include "support/oracle.h"

#include <gtest/gtest.h>

#include <map>

#include "reshard/format/dcp_metadata.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"

namespace reshard {
namespace {

using nlohmann::json;
using pickle::Kind;
using pickle::Value;

// Releases whose items have all the records that this library writes.
bool is_current(const std::string& release) { return release == "2.9.1" || release == "2.14.1"; }

class OracleTest : public ::testing::TestWithParam<std::string> {
 protected:
  OracleTest() : oracle_(GetParam()), metadata_(decode_metadata(oracle_.file(".metadata"))) {}

  ByteSpan item(const StorageInfo& info) {
    auto [it, is_new] = files_.try_emplace(info.relative_path);
    if (is_new) it->second = oracle_.file(info.relative_path);
    return ByteSpan(it->second).subspan(info.offset, info.length);
  }
  OracleCase oracle_;
  Metadata metadata_;
  std::map<std::string, Bytes> files_;
};

std::string test_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = "Torch" + info.param;
  std::erase_if(name, [](char c) { return c == '.' || c == '_' || c == '/'; });
  return name;
}
INSTANTIATE_TEST_SUITE_P(Checkpoints, OracleTest, ::testing::ValuesIn(OracleCase::names()), test_name);

TEST(OracleDataTest, IsComplete) {
  std::vector<std::string> all;
  for (const char* release : {"2.1.2", "2.14.1", "2.4.1", "2.9.1"}) {
    for (const char* name :
         {"dtensor2d_4", "dtypes", "fsdp_linear_2", "fsdp_linear_4", "fsdp_uneven_3", "nested", "replicated_2"}) {
      all.push_back(std::string(release) + "/" + name);
    }
  }
  EXPECT_EQ(OracleCase::names(), all);
}

Dims dims_of(const json& list) {
  Dims dims;
  for (const auto& v : list) dims.push_back(v.get<int64_t>());
  return dims;
}

TEST_P(OracleTest, CatalogueIsWhatTorchRead) {
  const json& catalogue = oracle_.expected().at("catalogue");
  size_t items = 0;
  EXPECT_EQ(metadata_.state_dict_metadata.size(), catalogue.at("tensors").size() + catalogue.at("bytes").size());
  for (const auto& [fqn, expected] : catalogue.at("tensors").items()) {
    SCOPED_TRACE(fqn);
    const auto* entry = metadata_.state_dict_metadata.find(fqn);
    ASSERT_NE(entry, nullptr);
    const auto* tensor = std::get_if<TensorStorageMetadata>(entry);
    ASSERT_NE(tensor, nullptr);
    EXPECT_EQ(to_string(tensor->properties.dtype), expected.at("dtype").get<std::string>());
    EXPECT_EQ(tensor->size, dims_of(expected.at("size")));
    EXPECT_EQ(tensor->properties.layout, "torch.strided");
    ASSERT_EQ(tensor->chunks.size(), expected.at("chunks").size());
    for (size_t i = 0; i < tensor->chunks.size(); ++i, ++items) {
      const json& chunk = expected.at("chunks")[i];
      EXPECT_EQ(tensor->chunks[i], (Box{dims_of(chunk.at("offsets")), dims_of(chunk.at("sizes"))}));
      const StorageInfo* info = metadata_.storage_data.find({fqn, tensor->chunks[i].offsets, {}});
      ASSERT_NE(info, nullptr);
      EXPECT_EQ(*info, (StorageInfo{chunk.at("file").get<std::string>(), chunk.at("offset"), chunk.at("length"), {}}));
    }
  }
  for (const auto& [fqn, expected] : catalogue.at("bytes").items()) {
    SCOPED_TRACE(fqn);
    const auto* entry = metadata_.state_dict_metadata.find(fqn);
    ASSERT_NE(entry, nullptr);
    EXPECT_TRUE(std::holds_alternative<BytesStorageMetadata>(*entry));
    const StorageInfo* info = metadata_.storage_data.find({fqn, {}, {}});
    ASSERT_NE(info, nullptr);
    EXPECT_EQ(*info,
              (StorageInfo{expected.at("file").get<std::string>(), expected.at("offset"), expected.at("length"), {}}));
    ++items;
  }
  EXPECT_EQ(metadata_.storage_data.size(), items);
}

TEST_P(OracleTest, PathsAreWhatTorchFlattened) {
  ASSERT_TRUE(metadata_.planner_data);
  const json& paths = oracle_.expected().at("paths");
  EXPECT_EQ(metadata_.planner_data->size(), paths.size());
  for (const auto& [fqn, path] : paths.items()) {
    const ObjectPath* found = metadata_.planner_data->find(fqn);
    ASSERT_NE(found, nullptr) << fqn;
    ASSERT_EQ(found->size(), path.size()) << fqn;
    for (size_t i = 0; i < path.size(); ++i) {
      if (path[i].is_string()) {
        EXPECT_EQ((*found)[i], PathElement(path[i].get<std::string>()));
      } else {
        EXPECT_EQ((*found)[i], PathElement(path[i].get<int64_t>()));
      }
    }
  }
}

TEST_P(OracleTest, StorageMetaIsThereSince24AndVersionSince29) {
  EXPECT_EQ(metadata_.storage_meta.has_value(), oracle_.release() != "2.1.2");
  if (metadata_.storage_meta) {
    EXPECT_EQ(metadata_.storage_meta->checkpoint_id, "/ckpt/" + oracle_.directory().filename().string());
    EXPECT_EQ(metadata_.storage_meta->save_id->size(), 36u);
  }
  EXPECT_EQ(metadata_.version.has_value(), is_current(oracle_.release()));
  EXPECT_EQ(metadata_.version.value_or(kMetadataVersion), kMetadataVersion);
  EXPECT_FALSE(metadata_.sidecars);
}

TEST_P(OracleTest, CatalogueSurvivesRewriting) {
  const Bytes bytes = encode_metadata(metadata_);
  EXPECT_EQ(decode_metadata(bytes), metadata_);
  EXPECT_EQ(encode_metadata(decode_metadata(bytes)), bytes);
}

TEST_P(OracleTest, TensorsAreTheExpectedBytes) {
  for (const auto& [fqn, entry] : metadata_.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) continue;
    SCOPED_TRACE(fqn);
    const int64_t width = element_size(tensor->properties.dtype);
    Bytes whole(static_cast<size_t>(volume(tensor->size) * width), std::byte{0xA5});
    for (const Box& chunk : tensor->chunks) {
      const ByteSpan bytes = item(*metadata_.storage_data.find({fqn, chunk.offsets, {}}));
      const TensorItem read = read_tensor_item(MemorySource(bytes));
      EXPECT_EQ(read.dtype, tensor->properties.dtype);
      EXPECT_EQ(read.sizes, chunk.sizes);
      EXPECT_EQ(read.storage_offset, 0);
      EXPECT_TRUE(read.crc32);
      const Box all = whole_box(chunk.sizes);
      const ByteRange range = payload_range(read, all);
      Bytes dense(static_cast<size_t>(volume(chunk.sizes) * width));
      copy_region(read, bytes.subspan(read.payload_offset + range.begin, range.end - range.begin), all, dense);
      // Element by element, so that the two reading paths have nothing in common.
      const Dims strides = contiguous_strides(tensor->size);
      const Dims chunk_strides = contiguous_strides(chunk.sizes);
      for (int64_t i = 0; i < volume(chunk.sizes); ++i) {
        int64_t at = 0;
        for (size_t d = 0; d < chunk.sizes.size(); ++d)
          at += (chunk.offsets[d] + i / chunk_strides[d] % chunk.sizes[d]) * strides[d];
        std::memcpy(whole.data() + at * width, dense.data() + i * width, static_cast<size_t>(width));
      }
    }
    const ByteSpan expected = oracle_.tensor(fqn);
    EXPECT_TRUE(std::ranges::equal(whole, expected));
  }
}

std::string digits_of(ByteSpan little_endian) {  // of a two's complement number
  std::string text = "0";
  const bool negative = (std::to_integer<int>(little_endian.back()) & 0x80) != 0;
  for (size_t i = little_endian.size(); i-- > 0;) {
    int carry = std::to_integer<int>(negative ? ~little_endian[i] : little_endian[i]);
    for (size_t d = text.size(); d-- > 0;) {
      carry += 256 * (text[d] - '0');
      text[d] = static_cast<char>('0' + carry % 10);
      carry /= 10;
    }
    for (; carry > 0; carry /= 10) text.insert(text.begin(), static_cast<char>('0' + carry % 10));
  }
  if (!negative) return text;
  for (size_t d = text.size(); d-- > 0;) {  // -x = ~x + 1
    if (text[d] != '9') {
      ++text[d];
      break;
    }
    text[d] = '0';
  }
  return "-" + text;
}

std::string to_hex_text(ByteSpan bytes) {
  std::string text;
  char pair[3];
  for (const std::byte b : bytes) {
    std::snprintf(pair, sizeof pair, "%02x", std::to_integer<unsigned>(b));
    text += pair;
  }
  return text;
}

// The tagged form of expected.json, made from a value.
json tagged(const ValueArchive& archive, const Value& value, ByteSpan bytes) {
  const auto items = [&](std::span<const Value> values) {
    json list = json::array();
    for (const Value& v : values) list.push_back(tagged(archive, v, bytes));
    return list;
  };
  if (const auto tensor = archive.as_tensor(value)) {
    const Box all = whole_box(tensor->sizes);
    const ByteRange range = payload_range(*tensor, all);
    Bytes dense(static_cast<size_t>(volume(tensor->sizes) * element_size(tensor->dtype)));
    copy_region(*tensor, bytes.subspan(tensor->payload_offset + range.begin, range.end - range.begin), all, dense);
    json shape = json::array();
    for (const int64_t v : tensor->sizes) shape.push_back(v);
    return {{"type", "tensor"}, {"dtype", to_string(tensor->dtype)}, {"shape", shape}, {"hex", to_hex_text(dense)}};
  }
  if (const auto data = pickle::plain_bytes(value)) return {{"type", "bytes"}, {"hex", to_hex_text(as_bytes(*data))}};
  switch (value.kind()) {
    case Kind::kNone:
      return {{"type", "none"}};
    case Kind::kBool:
      return {{"type", "bool"}, {"value", value.as_bool()}};
    case Kind::kInt:
      return {{"type", "int"}, {"value", std::to_string(value.as_int())}};
    case Kind::kBigInt:
      return {{"type", "int"}, {"value", digits_of(value.as_bytes())}};
    case Kind::kFloat:
      return {{"type", "float"}, {"bits", std::bit_cast<uint64_t>(value.as_float())}};
    case Kind::kStr:
      return {{"type", "str"}, {"value", std::string(value.as_str())}};
    case Kind::kList:
      return {{"type", "list"}, {"items", items(value.items())}};
    case Kind::kTuple:
      return {{"type", "tuple"}, {"items", items(value.items())}};
    case Kind::kDict: {
      json list = json::array();
      for (const auto& [k, v] : value.entries()) list.push_back({tagged(archive, k, bytes), tagged(archive, v, bytes)});
      return {{"type", "dict"}, {"items", list}};
    }
    default:
      return {{"type", "unexpected " + std::string(to_string(value.kind()))}};
  }
}

// Floats in the expectation become their bits.
void bits_for_floats(json& value) {
  if (value.is_object() && value.value("type", "") == "float") {
    const std::string hex = value.at("hex");
    value = {{"type", "float"}, {"bits", std::bit_cast<uint64_t>(std::strtod(hex.c_str(), nullptr))}};
  } else if (value.is_structured()) {
    for (auto& part : value) bits_for_floats(part);
  }
}

TEST_P(OracleTest, ValuesAreTheExpectedOnes) {
  json expected = oracle_.expected().at("values");
  bits_for_floats(expected);
  size_t values = 0;
  for (const auto& [fqn, entry] : metadata_.state_dict_metadata) {
    if (!std::holds_alternative<BytesStorageMetadata>(entry)) continue;
    const ByteSpan bytes = item(*metadata_.storage_data.find({fqn, {}, {}}));
    const ValueArchive archive = decode_value_archive(MemorySource(bytes));
    EXPECT_EQ(tagged(archive, archive.root(), bytes), expected.at(fqn)) << fqn;
    ++values;
  }
  EXPECT_EQ(values, expected.size());
}

TEST_P(OracleTest, EveryRecordHasItsChecksum) {
  for (const auto& [index, info] : metadata_.storage_data) {
    const ArchiveSummary summary = verify_archive(MemorySource(item(info)));
    EXPECT_EQ(summary.without_crc, 0u) << to_string(index);
    EXPECT_GE(summary.records, is_current(oracle_.release()) ? 6u : 4u) << to_string(index);
  }
}

class CurrentReleaseOracleTest : public OracleTest {};
INSTANTIATE_TEST_SUITE_P(Checkpoints, CurrentReleaseOracleTest, ::testing::ValuesIn([] {
                           auto names = OracleCase::names();
                           std::erase_if(names, [](const std::string& name) {
                             return !is_current(name.substr(0, name.find('/')));
                           });
                           return names;
                         }()),
                         test_name);

TEST_P(CurrentReleaseOracleTest, ItemsAreRewrittenByteForByte) {
  size_t dense = 0;
  for (const auto& [index, info] : metadata_.storage_data) {
    SCOPED_TRACE(to_string(index));
    const ByteSpan bytes = item(info);
    // As a value: the stream and the storages of any item.
    const ValueArchive archive = decode_value_archive(MemorySource(bytes));
    std::vector<ByteSpan> storages;
    for (int i = 0;; ++i) {
      const auto range = archive.storage(std::to_string(i));
      if (!range) break;
      storages.push_back(bytes.subspan(range->offset, range->size));
    }
    EXPECT_TRUE(std::ranges::equal(encode_value_archive(archive.root(), storages), bytes));
    if (!index.offset) continue;
    // As a tensor, written around its payload.
    const TensorItem item = read_tensor_item(MemorySource(bytes));
    if (item.conj || item.neg || item.strides != contiguous_strides(item.sizes)) continue;
    ++dense;
    const TensorArchive writer(item.dtype, item.sizes, {.alignment = 64, .requires_grad = item.requires_grad});
    ASSERT_EQ(writer.length(), bytes.size());
    ASSERT_EQ(writer.payload_offset(), item.payload_offset);
    ASSERT_EQ(writer.payload_size(), item.payload_size);
    EXPECT_TRUE(std::ranges::equal(writer.head(), bytes.first(item.payload_offset)));
    EXPECT_TRUE(std::ranges::equal(writer.tail(*item.crc32), bytes.subspan(item.payload_offset + item.payload_size)));
  }
  EXPECT_GT(dense, 0u);
}

}  // namespace
}  // namespace reshard
