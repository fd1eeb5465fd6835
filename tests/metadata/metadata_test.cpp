// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/metadata/metadata.h"

#include <gtest/gtest.h>

#include <limits>
#include <utility>
#include <vector>

#include "support/expect_error.h"

namespace reshard {
namespace {

// A tensor in two chunks, an empty tensor and a value: everything a catalogue can hold.
Metadata small_catalogue() {
  Metadata metadata;
  metadata.state_dict_metadata.insert("model.weight",
                                      TensorStorageMetadata{{}, {4, 8}, {{{0, 0}, {2, 8}}, {{2, 0}, {2, 8}}}});
  metadata.state_dict_metadata.insert("model.empty", TensorStorageMetadata{{}, {0}, {{{0}, {0}}}});
  metadata.state_dict_metadata.insert("step", BytesStorageMetadata{});
  metadata.storage_data.insert({"model.weight", Dims{0, 0}, {}}, {"__0_0.distcp", 0, 1600, {}});
  metadata.storage_data.insert({"model.weight", Dims{2, 0}, {}}, {"__1_0.distcp", 0, 1600, {}});
  metadata.storage_data.insert({"step", {}, {}}, {"__0_0.distcp", 1600, 1261, {}});
  return metadata;
}

TensorStorageMetadata& weight(Metadata& metadata) {
  return std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("model.weight"));
}
StorageInfo& weight_storage(Metadata& metadata) {
  return *metadata.storage_data.find({"model.weight", Dims{2, 0}, {}});
}

TEST(MetadataTest, IndexComparesNameAndOffsetsButNotTheHint) {
  const MetadataIndex a{"w", Dims{4, 0}, 1};
  const MetadataIndex b{"w", Dims{4, 0}, {}};
  EXPECT_EQ(a, b);
  EXPECT_EQ(MetadataIndexHash{}(a), MetadataIndexHash{}(b));
  EXPECT_FALSE(a == (MetadataIndex{"w", Dims{0, 4}, 1}));
  EXPECT_FALSE(a == (MetadataIndex{"w", {}, 1}));
  EXPECT_EQ(to_string(a), "w [4, 0]");
  EXPECT_EQ(to_string(MetadataIndex{"step", {}, {}}), "step");
}

TEST(MetadataTest, PathsBecomeDottedNames) {
  EXPECT_EQ(path_to_fqn({std::string("optim"), std::string("state"), int64_t{0}, std::string("exp_avg")}),
            "optim.state.0.exp_avg");
  EXPECT_EQ(path_to_fqn({std::string("step")}), "step");
  EXPECT_EQ(path_to_fqn({}), "");
}

TEST(MetadataTest, WellFormedCatalogueIsAccepted) {
  Metadata metadata = small_catalogue();
  validate(metadata);
  metadata.sidecars.emplace(2);
  validate(metadata);
  validate(Metadata{});
  // A chunk without elements may have bytes all the same.
  metadata.storage_data.insert({"model.empty", Dims{0}, {}}, {"__1_0.distcp", 1600, 1513, {}});
  validate(metadata);
}

TEST(MetadataTest, HintsAreFollowedWhereTheyAreRightAndNowhereElse) {
  for (const auto& [first, second] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 1}, {1, 0}, {0, 0}, {1, 1}, {2, -1}, {std::numeric_limits<int64_t>::min(), 1}}) {
    Metadata metadata = small_catalogue();
    const auto save_with_hints = [&](const Dims& second_offsets) {
      metadata.storage_data.clear();
      metadata.storage_data.insert({"model.weight", Dims{0, 0}, first}, {"__0_0.distcp", 0, 1600, {}});
      metadata.storage_data.insert({"model.weight", second_offsets, second}, {"__1_0.distcp", 0, 1600, {}});
      metadata.storage_data.insert({"step", {}, second}, {"__0_0.distcp", 1600, 1261, {}});
    };
    save_with_hints({2, 0});
    validate(metadata);
    save_with_hints({3, 0});
    EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored for model.weight [2, 0]", validate(metadata));
    weight(metadata).chunks.pop_back();
    EXPECT_ERROR(ErrorCode::kCorruptData, "not in the catalogue: model.weight [3, 0]", validate(metadata));
    weight(metadata).chunks.push_back({{3, 0}, {1, 8}});
    weight(metadata).chunks.push_back({{3, 0}, {0, 8}});  // an item serves all chunks that begin where it does
    validate(metadata);
  }
}

TEST(MetadataTest, CatalogueOfAPartialSaveIsAccepted) {
  Metadata metadata = small_catalogue();
  weight(metadata).size = {10, 8};
  validate(metadata);
}

TEST(MetadataTest, ImpossibleTensorSizesAreRefused) {
  Metadata metadata = small_catalogue();
  weight(metadata).size = Dims(65, 1);
  EXPECT_ERROR(ErrorCode::kCorruptData, "too many dimensions; key model.weight; wanted at most 64, found 65",
               validate(metadata));
  metadata = small_catalogue();
  weight(metadata).size = {-1, 8};
  EXPECT_ERROR(ErrorCode::kCorruptData, "negative size in [-1, 8]; key model.weight", validate(metadata));
  metadata = small_catalogue();
  weight(metadata).size = {int64_t{1} << 40, int64_t{1} << 40};
  EXPECT_ERROR(ErrorCode::kCorruptData, "overflows; key model.weight", validate(metadata));
  metadata = small_catalogue();
  weight(metadata).size = {int64_t{1} << 31, int64_t{1} << 31};  // fits in elements, not in bytes
  EXPECT_ERROR(ErrorCode::kCorruptData, "number of bytes", validate(metadata));
}

TEST(MetadataTest, ChunksOutsideTheirTensorAreRefused) {
  for (const Box& chunk : {Box{{3, 0}, {2, 8}}, Box{{-1, 0}, {2, 8}}, Box{{2, 0}, {-2, 8}}, Box{{2}, {2}},
                           Box{{2, 0}, {std::numeric_limits<int64_t>::max(), 8}}}) {
    Metadata metadata = small_catalogue();
    weight(metadata).chunks[1] = chunk;
    EXPECT_ERROR(ErrorCode::kCorruptData, "chunk 1 lies outside its tensor; key model.weight", validate(metadata));
  }
}

TEST(MetadataTest, ItemsWithoutBytesAreRefused) {
  Metadata metadata = small_catalogue();
  weight(metadata).chunks.push_back({{3, 0}, {1, 8}});
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored for model.weight [3, 0]", validate(metadata));
  metadata = small_catalogue();
  metadata.state_dict_metadata.insert("epoch", BytesStorageMetadata{});
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored for epoch; key epoch", validate(metadata));
}

TEST(MetadataTest, BytesWithoutAnItemAreRefused) {
  for (const MetadataIndex& index : {MetadataIndex{"other", {}, {}}, MetadataIndex{"model.weight", Dims{1, 0}, {}},
                                     MetadataIndex{"model.weight", {}, {}}, MetadataIndex{"step", Dims{}, {}}}) {
    Metadata metadata = small_catalogue();
    metadata.storage_data.insert(index, {"__0_0.distcp", 0, 1, {}});
    EXPECT_ERROR(ErrorCode::kCorruptData, "not in the catalogue: " + to_string(index), validate(metadata));
  }
}

TEST(MetadataTest, ByteRangesThatOverflowAreRefused) {
  Metadata metadata = small_catalogue();
  weight_storage(metadata).offset = ~uint64_t{0};
  EXPECT_ERROR(ErrorCode::kCorruptData, "byte range of model.weight [2, 0] overflows", validate(metadata));
  weight_storage(metadata) = {"f", uint64_t{1} << 62, uint64_t{1} << 62, {}};
  EXPECT_ERROR(ErrorCode::kCorruptData, "overflows", validate(metadata));
  weight_storage(metadata).length -= 1;
  validate(metadata);
}

TEST(MetadataTest, PathsThatStayBelowTheDirectoryAreAccepted) {
  for (const char* path : {"__0_0.distcp", "a/b/c", "..a", "a..", ".hidden", "a/...", "with space", "\xC3\xA9"}) {
    validate_relative_path(path, "key");
  }
}

TEST(MetadataTest, PathsThatMayLeaveTheDirectoryAreRefused) {
  using namespace std::string_literals;
  for (const std::string& path : {""s, "/etc/passwd"s, "/"s, ".."s, "../x"s, "a/../b"s, "a/.."s, "a//b"s, "a/"s, "."s,
                                  "./a"s, "a/./b"s, "a\\b"s, "a\0b"s}) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "key model.weight", validate_relative_path(path, "model.weight"));
    Metadata metadata = small_catalogue();
    weight_storage(metadata).relative_path = path;
    EXPECT_ERROR(ErrorCode::kCorruptData, "key model.weight", validate(metadata));
  }
}

}  // namespace
}  // namespace reshard
