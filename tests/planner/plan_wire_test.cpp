// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/planner/plan_wire.h"

#include <gtest/gtest.h>

#include <limits>

#include "support/expect_error.h"
#include "support/memory_state.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

std::string random_name(Random& random) {
  static const char* const kParts[] = {"layers", "0", "17", "weight", "", "\xC3\xA9t\xC3\xA9", "a b", "exp_avg"};
  std::string name;
  for (int64_t n = random_between(random, 1, 4); n > 0; --n) {
    name += kParts[random_between(random, 0, 7)];
    if (n > 1) name += random_between(random, 0, 5) == 0 ? "/" : ".";
  }
  return name;
}

ObjectPath random_path(Random& random, const std::string& fqn) {
  if (random_between(random, 0, 2) != 0) return path_of(fqn);
  ObjectPath path;
  for (int64_t n = random_between(random, 0, 3); n > 0; --n) {
    if (random_between(random, 0, 1) == 0) {
      path.emplace_back(random_between(random, -1, 5));
    } else {
      path.emplace_back(random_name(random));
    }
  }
  return path;
}

TensorProperties random_properties(Random& random) {
  TensorProperties p{.dtype = static_cast<DType>(random_between(random, 0, static_cast<int64_t>(DType::kBComplex32)))};
  p.requires_grad = random_between(random, 0, 1) == 0;
  p.pin_memory = random_between(random, 0, 3) == 0;
  if (random_between(random, 0, 4) == 0) p.memory_format = random_between(random, 0, 2);
  if (random_between(random, 0, 4) == 0) p.layout = "torch.sparse_coo";
  return p;
}

StorageInfo random_storage(Random& random) {
  StorageInfo info{"__" + std::to_string(random_between(random, 0, 2)) + "_0.distcp",
                   static_cast<uint64_t>(random_between(random, 0, kMax)),
                   static_cast<uint64_t>(random_between(random, 0, 100000)),
                   {}};
  if (random_between(random, 0, 5) == 0) info.transform_descriptors = {"stream.zstd/1", ""};
  return info;
}

SavePlan random_plan(Random& random) {
  SavePlan plan;
  for (int64_t keys = random_between(random, 0, 5); keys > 0; --keys) {
    const std::string fqn = random_name(random);
    plan.planner_data.edit().insert(fqn, random_path(random, fqn));
    if (random_between(random, 0, 3) == 0) {
      WriteItem item;
      item.index.fqn = fqn;
      item.type = WriteItemType::kByteIo;
      item.length = static_cast<uint64_t>(random_between(random, 0, kMax));
      if (random_between(random, 0, 1) == 0) item.content.emplace().fill(std::byte{7});
      plan.items.push_back(item);
      continue;
    }
    const Dims shape = random_shape(random, 300);
    const TensorProperties properties = random_properties(random);
    for (int64_t chunks = random_between(random, 0, 4); chunks > 0; --chunks) {
      WriteItem item;
      item.type = random_between(random, 0, 1) == 0 ? WriteItemType::kTensor : WriteItemType::kShard;
      item.chunk = random_box(random, shape);
      item.size = shape;
      item.properties = random_between(random, 0, 9) == 0 ? random_properties(random) : properties;
      item.index = {fqn, item.chunk.offsets, {}};
      if (random_between(random, 0, 1) == 0) item.index.index = random_between(random, 0, 1000);
      if (random_between(random, 0, 1) == 0) item.content.emplace().fill(std::byte{9});
      plan.items.push_back(item);
    }
  }
  for (size_t i = 1; i < plan.items.size(); ++i) {
    if (random_between(random, 0, 4) == 0) {
      plan.items[i].tied_to = static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(i) - 1));
    }
  }
  if (random_between(random, 0, 1) == 0) {
    for (size_t i = 0; i < plan.items.size(); ++i) plan.storage.push_back(random_storage(random));
  }
  return plan;
}

Metadata random_catalogue(Random& random) {
  Metadata metadata;
  for (int64_t keys = random_between(random, 0, 5); keys > 0; --keys) {
    const std::string fqn = random_name(random);
    if (random_between(random, 0, 3) == 0) {
      if (metadata.state_dict_metadata.insert(fqn, BytesStorageMetadata{})) {
        metadata.storage_data.insert({fqn, {}, {}}, random_storage(random));
      }
      continue;
    }
    const Dims shape = random_shape(random, 300);
    TensorStorageMetadata tensor{random_properties(random), shape, {}};
    for (int64_t chunks = random_between(random, 0, 4); chunks > 0; --chunks)
      tensor.chunks.push_back(random_box(random, shape));
    if (!metadata.state_dict_metadata.insert(fqn, tensor)) continue;
    for (size_t c = 0; c < tensor.chunks.size(); ++c) {
      MetadataIndex index{fqn, tensor.chunks[c].offsets, {}};
      // Most hints are right, some wrong, some missing.
      const auto kind = random_between(random, 0, 5);
      if (kind > 1) index.index = static_cast<int64_t>(c);
      if (kind == 1) index.index = random_between(random, 0, 1000);
      metadata.storage_data.insert(index, random_storage(random));
    }
  }
  metadata.storage_data.insert({"only.stored", Dims{1, 2}, {}}, random_storage(random));
  if (random_between(random, 0, 1) == 0) {
    auto& planner_data = metadata.planner_data.emplace();
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) planner_data.insert(fqn, random_path(random, fqn));
    planner_data.insert("only.a.path", {"only", "a", int64_t{0}});
  }
  if (random_between(random, 0, 1) == 0) {
    metadata.storage_meta = StorageMeta{"/some/where", "an-id", {}, {"m", ""}};
  }
  if (random_between(random, 0, 1) == 0) metadata.version = kMetadataVersion;
  if (random_between(random, 0, 1) == 0) {
    auto& sidecars = metadata.sidecars.emplace(static_cast<size_t>(random_between(random, 0, 100)));
    for (SidecarDigest& digest : sidecars) digest.fill(static_cast<std::byte>(random_between(random, 0, 255)));
  }
  return metadata;
}

// operator== of MetadataIndex passes over the hint.
std::vector<std::optional<int64_t>> hints_of(const SavePlan& plan) {
  std::vector<std::optional<int64_t>> hints;
  for (const WriteItem& item : plan.items) hints.push_back(item.index.index);
  return hints;
}
std::vector<std::optional<int64_t>> hints_of(const Metadata& metadata) {
  std::vector<std::optional<int64_t>> hints;
  for (const auto& [index, info] : metadata.storage_data) hints.push_back(index.index);
  return hints;
}

/// Every strict prefix is an error; every changed byte is an error or another valid value. Run under sanitizers this
/// finds reads out of bounds.
template <class Decode>
void expect_robust(const Bytes& bytes, Decode&& decode) {
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "", decode(ByteSpan(bytes).first(n)));
  }
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (const std::byte flipped : {std::byte{1} << (i % 8), std::byte{0x80}, std::byte{0xFF}}) {
      Bytes changed = bytes;
      changed[i] ^= flipped;
      try {
        decode(changed);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kCorruptData) << error.what();
      }
    }
  }
  Bytes longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_ERROR(ErrorCode::kCorruptData, "after its end", decode(longer));
}

TEST(PlanWireTest, PlansComeBackAsTheyWere) {
  Random random(5);
  for (int round = 0; round < 500; ++round) {
    const SavePlan plan = random_plan(random);
    const SavePlan decoded = decode_save_plan(encode_save_plan(plan));
    EXPECT_EQ(decoded, plan);
    EXPECT_EQ(hints_of(decoded), hints_of(plan));
  }
}

TEST(PlanWireTest, CataloguesComeBackAsTheyWere) {
  Random random(6);
  for (int round = 0; round < 500; ++round) {
    const Metadata metadata = random_catalogue(random);
    const Metadata decoded = decode_catalogue(encode_catalogue(metadata));
    EXPECT_EQ(decoded, metadata);
    EXPECT_EQ(hints_of(decoded), hints_of(metadata));
  }
}

TEST(PlanWireTest, AHintPastTheChunksComesBackAsItWas) {
  Metadata metadata;
  metadata.state_dict_metadata.insert("w", TensorStorageMetadata{{}, {8}, {{{0}, {4}}, {{4}, {4}}}});
  metadata.storage_data.insert({"w", Dims{4}, 1}, {"__0_0.distcp", 0, 16, {}});
  std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w")).chunks.pop_back();
  const Metadata decoded = decode_catalogue(encode_catalogue(metadata));
  EXPECT_EQ(decoded, metadata);
  EXPECT_EQ(hints_of(decoded), hints_of(metadata));
}

// A file may have any number there, and one rank alone reads it.
TEST(PlanWireTest, AHintThatCanBeNoPositionIsNotSent) {
  Metadata metadata;
  metadata.state_dict_metadata.insert("w", TensorStorageMetadata{{}, {12}, {{{0}, {4}}, {{4}, {4}}, {{8}, {4}}}});
  metadata.storage_data.insert({"w", Dims{0}, -1}, {"__0_0.distcp", 0, 16, {}});
  metadata.storage_data.insert({"w", Dims{4}, kMax}, {"__0_0.distcp", 16, 16, {}});
  metadata.storage_data.insert({"w", Dims{8}, kMax - 1}, {"__0_0.distcp", 32, 16, {}});
  const Metadata decoded = decode_catalogue(encode_catalogue(metadata));
  EXPECT_EQ(decoded, metadata);
  EXPECT_EQ(hints_of(decoded), (std::vector<std::optional<int64_t>>{{}, {}, kMax - 1}));
}

TEST(PlanWireTest, DamagedPlansAreErrorsAndNothingWorse) {
  Random random(7);
  for (int round = 0; round < 6; ++round) {
    expect_robust(encode_save_plan(random_plan(random)), [](ByteSpan bytes) { decode_save_plan(bytes); });
  }
}

TEST(PlanWireTest, DamagedCataloguesAreErrorsAndNothingWorse) {
  Random random(8);
  for (int round = 0; round < 6; ++round) {
    expect_robust(encode_catalogue(random_catalogue(random)), [](ByteSpan bytes) { decode_catalogue(bytes); });
  }
}

TEST(PlanWireTest, RandomBytesAreErrorsAndNothingWorse) {
  Random random(9);
  for (int round = 0; round < 20000; ++round) {
    Bytes bytes(static_cast<size_t>(random_between(random, 1, 60)));
    for (std::byte& b : bytes) b = static_cast<std::byte>(random_between(random, 0, 1) == 0 ? random() : random() & 3);
    const bool plan = random_between(random, 0, 1) == 0;
    bytes[0] = static_cast<std::byte>(plan ? 0xA1 : 0xA2);
    try {
      if (plan) {
        decode_save_plan(bytes);
      } else {
        decode_catalogue(bytes);
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kCorruptData) << error.what();
    }
  }
}

TEST(PlanWireTest, PlanAndCatalogueAreNotMixedUp) {
  EXPECT_ERROR(ErrorCode::kCorruptData, "starts with another byte", decode_save_plan(encode_catalogue({})));
  EXPECT_ERROR(ErrorCode::kCorruptData, "starts with another byte", decode_catalogue(encode_save_plan({})));
  EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early", decode_save_plan({}));
}

TEST(PlanWireTest, HugeCountsAreRefusedBeforeAnythingIsAllocated) {
  for (const uint8_t mark : {uint8_t{0xA1}, uint8_t{0xA2}}) {
    ByteWriter out;
    out.u8(mark);
    out.varint(std::numeric_limits<uint64_t>::max() / 2);
    const Bytes bytes = out.take();
    EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early",
                 mark == 0xA1 ? (decode_save_plan(bytes), 0) : (decode_catalogue(bytes), 0));
  }
}

TEST(PlanWireTest, ChunksOfAByteANumberComeBackAsTheyWere) {
  for (const size_t rank : {0, 1, 2, 3}) {
    Metadata metadata;
    const Dims size(rank, 1);
    metadata.state_dict_metadata.insert(
        "w", TensorStorageMetadata{{}, size, std::vector<Box>(rank == 0 ? 1 : 100, whole_box(size))});
    EXPECT_EQ(decode_catalogue(encode_catalogue(metadata)), metadata);
  }
}

// Each chunk takes a byte for each of its numbers at least.
TEST(PlanWireTest, MoreChunksThanTheRestCanHoldAreRefusedAtTheirCount) {
  for (const size_t rank : {1, 2, 3}) {
    const auto catalogue = [&](size_t chunks) {
      ByteWriter out;
      out.u8(0xA2);
      out.varint(1);
      out.string("w");
      out.u8(0);  // a tensor
      out.varint(rank);
      for (size_t i = 0; i < rank; ++i) out.varint(1);
      out.bytes(Bytes(2));  // float32, no flags
      out.varint(chunks);
      out.bytes(Bytes(100));
      return out.take();
    };
    const size_t most = 100 / (2 * rank);
    EXPECT_ERROR(ErrorCode::kCorruptData, std::to_string(most + 1) + " items", decode_catalogue(catalogue(most + 1)));
    EXPECT_ERROR(ErrorCode::kCorruptData, "ends too early; offset 1", decode_catalogue(catalogue(most)));
  }
}

/// A plan of one 0-d tensor under a long name, then `copies` references to it.
Bytes name_bomb(size_t copies) {
  ByteWriter out;
  out.u8(0xA1);
  out.varint(copies);
  for (size_t i = 0; i < copies; ++i) {
    out.varint(i == 0 ? 0 : 1);
    if (i == 0) {
      out.string(std::string(100000, 'x'));
      out.u8(1);  // a value
    }
    out.varint(0);  // no hint
    out.u8(0);      // no flags
    out.varint(0);  // length
  }
  out.u8(0);
  out.varint(0);
  out.varint(0);
  return out.take();
}

TEST(PlanWireTest, SmallMessageThatUnfoldsIntoGigabytesIsRefused) {
  EXPECT_EQ(decode_save_plan(name_bomb(100)).items.size(), 100u);
  EXPECT_ERROR(ErrorCode::kCorruptData, "repeats names", decode_save_plan(name_bomb(100000)));
}

TEST(PlanWireTest, PlanThatRepeatsALongNameIsPadded) {
  SavePlan plan;
  for (int64_t i = 0; i < 500; ++i) {
    WriteItem item;
    item.index = {std::string(50000, 'n'), Dims{i}, {}};
    item.type = WriteItemType::kShard;
    item.chunk = {{i}, {1}};
    item.size = {500};
    plan.items.push_back(item);
  }
  EXPECT_EQ(decode_save_plan(encode_save_plan(plan)), plan);
}

// The parts of a path, which are cut out of the name, count too.
TEST(PlanWireTest, PlanWithALongPathIsPaddedForIt) {
  SavePlan plan;
  std::string fqn = "n";
  while (fqn.size() < 50000) fqn += ".n";
  for (int64_t i = 0; i < 500; ++i) {
    WriteItem item;
    item.index = {fqn, Dims{i}, {}};
    item.type = WriteItemType::kShard;
    item.chunk = {{i}, {1}};
    item.size = {500};
    plan.items.push_back(item);
  }
  plan.planner_data.edit().insert(fqn, path_of(fqn));
  EXPECT_EQ(decode_save_plan(encode_save_plan(plan)), plan);
}

TEST(PlanWireTest, CatalogueThatRepeatsLongNamesIsPadded) {
  Metadata metadata;
  std::string fqn = "n";
  while (fqn.size() < 50000) fqn += ".n";
  const std::string path(50000, 'p');
  TensorStorageMetadata tensor{{}, {500}, {}};
  for (int64_t i = 0; i < 500; ++i) {
    tensor.chunks.push_back({{i}, {1}});
    metadata.storage_data.insert({fqn, Dims{i}, i}, {path, static_cast<uint64_t>(i), 1, {}});
  }
  metadata.state_dict_metadata.insert(fqn, tensor);
  metadata.planner_data.emplace().insert(fqn, path_of(fqn));
  EXPECT_EQ(decode_catalogue(encode_catalogue(metadata)), metadata);
}

TEST(PlanWireTest, WellFormedItemsTakeAFewBytesEach) {
  SavePlan plan;
  for (int64_t i = 0; i < 1000; ++i) {
    WriteItem item;
    item.index = {"model.layers.17.attention.wq.weight", Dims{i * 64, 0}, {}};
    item.type = WriteItemType::kShard;
    item.chunk = {{i * 64, 0}, {64, 4096}};
    item.size = {64000, 4096};
    plan.items.push_back(item);
  }
  EXPECT_LE(encode_save_plan(plan).size(), 12u * 1000 + 100);
}

TEST(PlanWireTest, ItemsThatAreNotWellFormedAreNotSent) {
  WriteItem item;
  item.index = {"w", Dims{0}, {}};
  item.chunk = {{0}, {4}};
  item.size = {4};
  const auto encode = [](const WriteItem& bad) {
    SavePlan plan;
    plan.items.push_back(bad);
    encode_save_plan(plan);
  };
  EXPECT_NO_THROW(encode(item));
  WriteItem bad = item;
  bad.index.offset = Dims{1};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "not named after its chunk", encode(bad));
  bad = item;
  bad.chunk.sizes = {4, 1};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "not named after its chunk", encode(bad));
  bad = item;
  bad.index.offset = bad.chunk.offsets = Dims{0, 0};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "not named after its chunk", encode(bad));
  bad = item;
  bad.chunk.sizes = {-4};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "size of a chunk is negative", encode(bad));
  bad = item;
  bad.index.index = -1;
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "index of a chunk is negative", encode(bad));
  bad = item;
  bad.type = WriteItemType::kByteIo;
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "value has offsets", encode(bad));
  SavePlan half;
  half.items = {item, item};
  half.storage.resize(1);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "some of its items", encode_save_plan(half));
}

}  // namespace
}  // namespace reshard
