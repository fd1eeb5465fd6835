// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "reshard/planner/default_planner.h"
#include "support/expect_error.h"
#include "support/memory_state.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

StateEntry shard_entry(int64_t rank, int64_t shard, int64_t world_size) {
  return tensor_entry("st", {shard * world_size}, {{{shard * rank}, {shard}}});
}

/// The catalogue that these ranks save.
Metadata catalogue_of(std::vector<std::vector<StateEntry>> ranks) {
  DefaultSavePlanner planner;
  std::vector<SavePlan> plans;
  for (auto& entries : ranks) {
    const MemorySaveState state(std::move(entries));
    planner.set_up_planner(state, false);
    plans.push_back(planner.create_local_plan());
  }
  return planner.create_global_plan(std::move(plans)).metadata;
}

Metadata sharded_catalogue(int64_t shard, int64_t world_size) {
  std::vector<std::vector<StateEntry>> ranks;
  for (int64_t rank = 0; rank < world_size; ++rank) ranks.push_back({shard_entry(rank, shard, world_size)});
  return catalogue_of(std::move(ranks));
}

LoadPlan plan_of(std::vector<StateEntry> entries, const Metadata& metadata, DefaultLoadPlannerOptions options = {},
                 LoadReport* report = nullptr) {
  MemoryLoadState state(std::move(entries));
  DefaultLoadPlanner planner(options);
  planner.set_up_planner(state, metadata, false);
  LoadPlan plan = planner.create_local_plan();
  if (report != nullptr) *report = planner.report();
  return plan;
}

ReadItem read_item(const std::string& fqn, Dims dest, Dims dest_offset, Dims stored, Dims stored_offset, Dims lengths) {
  return {.is_bytes = false,
          .dest_index = {fqn, std::move(dest), {}},
          .storage_index = {fqn, std::move(stored), {}},
          .dest_offsets = std::move(dest_offset),
          .storage_offsets = std::move(stored_offset),
          .lengths = std::move(lengths)};
}

// test_planner.py: test_local_load_plan
TEST(DefaultLoadPlannerTest, SameLayoutReadsEachItemWhole) {
  std::vector<std::vector<StateEntry>> ranks;
  for (int64_t rank = 0; rank < 4; ++rank) {
    ranks.push_back({replica_entry("tensor", {10}), bytes_entry("value", 9), shard_entry(rank, 8, 4)});
  }
  const LoadPlan plan =
      plan_of({replica_entry("tensor", {10}), bytes_entry("value", 9), shard_entry(1, 8, 4)}, catalogue_of(ranks));
  ASSERT_EQ(plan.items.size(), 3u);
  EXPECT_EQ(plan.items[0], read_item("tensor", {0}, {0}, {0}, {0}, {10}));
  EXPECT_TRUE(plan.items[1].is_bytes);
  EXPECT_EQ(plan.items[1].dest_index, (MetadataIndex{"value", {}, {}}));
  EXPECT_EQ(plan.items[1].storage_index, (MetadataIndex{"value", {}, {}}));
  EXPECT_EQ(plan.items[2], read_item("st", {8}, {0}, {8}, {0}, {8}));
}

// test_planner.py: test_load_with_resharding
TEST(DefaultLoadPlannerTest, HalfAsManyRanksReadTwoShardsEach) {
  EXPECT_THAT(plan_of({shard_entry(1, 32, 4)}, sharded_catalogue(16, 8)).items,
              ElementsAre(read_item("st", {32}, {0}, {32}, {0}, {16}), read_item("st", {32}, {16}, {48}, {0}, {16})));
  EXPECT_THAT(plan_of({shard_entry(1, 16, 8)}, sharded_catalogue(32, 4)).items,
              ElementsAre(read_item("st", {16}, {0}, {0}, {16}, {16})));
}

// test_planner.py: test_load_with_world_size_diff_by_one
TEST(DefaultLoadPlannerTest, OneRankLessReadsAcrossShards) {
  EXPECT_THAT(plan_of({shard_entry(1, 40, 3)}, sharded_catalogue(30, 4)).items,
              ElementsAre(read_item("st", {40}, {0}, {30}, {10}, {20}), read_item("st", {40}, {20}, {60}, {0}, {20})));
}

// test_planner.py: test_create_read_item_from_chunks
TEST(DefaultLoadPlannerTest, ReadItemsOfOneChunk) {
  const TensorStorageMetadata stored{{}, {16}, {{{0}, {8}}, {{8}, {8}}}};
  EXPECT_THAT(create_read_items_for_chunk("foo", stored, {{4}, {7}}),
              ElementsAre(read_item("foo", {4}, {0}, {0}, {4}, {4}), read_item("foo", {4}, {4}, {8}, {0}, {3})));
  EXPECT_THAT(create_read_items_for_chunk("foo", stored, {{4}, {0}}), IsEmpty());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor",
               create_read_items_for_chunk("foo", stored, {{10}, {7}}));
}

// test_planner.py: test_strict
TEST(DefaultLoadPlannerTest, MissingKeyIsAnErrorUnlessAllowed) {
  const Metadata metadata = catalogue_of({{replica_entry("module.weight", {2, 2}), replica_entry("module.bias", {2})}});
  const std::vector<StateEntry> wanted{replica_entry("module.weight", {2, 2}), replica_entry("extra_param", {2, 2})};
  EXPECT_ERROR(ErrorCode::kNotFound, "Missing key in checkpoint state_dict: extra_param.; key extra_param",
               plan_of(wanted, metadata));
  LoadReport report;
  const LoadPlan plan = plan_of(wanted, metadata, {.allow_partial_load = true}, &report);
  EXPECT_EQ(plan.items.size(), 1u);
  EXPECT_THAT(report.missing, ElementsAre("extra_param"));
  EXPECT_THAT(report.unexpected, ElementsAre("module.bias"));
}

TEST(DefaultLoadPlannerTest, AllMissingKeysAreCountedInOneError) {
  EXPECT_ERROR(ErrorCode::kNotFound, "state_dict: a. So are 2 more: b, c.",
               plan_of({bytes_entry("a", 1), bytes_entry("b", 1), bytes_entry("c", 1)}, Metadata{}));
}

// test_planner.py: test_load_different_sizes_throws
TEST(DefaultLoadPlannerTest, SizeMismatchNamesBothSizes) {
  const Metadata metadata = catalogue_of({{replica_entry("module.weight", {2, 2})}});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "Size mismatch between saved [2, 2] and current: [3, 2] for module.weight",
               plan_of({replica_entry("module.weight", {3, 2})}, metadata));
}

TEST(DefaultLoadPlannerTest, ShapesThatDifferAreReportedWhereTheCallerAllowsThem) {
  const Metadata metadata = catalogue_of({{replica_entry("head", {2, 2}), replica_entry("body", {4})}});
  const std::vector<StateEntry> wanted{replica_entry("head", {3, 2}), replica_entry("body", {4})};
  LoadReport report;
  const LoadPlan plan = plan_of(wanted, metadata, {.allow_shape_mismatch = true}, &report);
  ASSERT_EQ(plan.items.size(), 1u);
  EXPECT_EQ(plan.items[0].dest_index.fqn, "body");
  EXPECT_THAT(report.shape, ElementsAre("head: [2, 2] -> [3, 2]"));
  EXPECT_THAT(report.missing, IsEmpty());
  EXPECT_THAT(report.unexpected, IsEmpty());
}

TEST(DefaultLoadPlannerTest, DtypeMismatchIsAnErrorUnlessCastsAreAllowed) {
  const Metadata metadata = catalogue_of({{replica_entry("w", {2})}});
  const std::vector<StateEntry> wanted{replica_entry("w", {2}, DType::kBFloat16)};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "dtype mismatch between saved float32 and current: bfloat16 for w",
               plan_of(wanted, metadata));
  LoadReport report;
  EXPECT_EQ(plan_of(wanted, metadata, {.allow_cast = true}, &report).items.size(), 1u);
  EXPECT_THAT(report.cast, ElementsAre("w: float32 -> bfloat16"));
}

TEST(DefaultLoadPlannerTest, TensorAndValueDoNotMix) {
  const Metadata metadata = catalogue_of({{replica_entry("t", {2}), bytes_entry("v", 3)}});
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key t; wanted a value that is not a tensor, found a tensor",
               plan_of({bytes_entry("t", 0)}, metadata));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key v; wanted a tensor, found a value that is not a tensor",
               plan_of({replica_entry("v", {2})}, metadata));
}

TEST(DefaultLoadPlannerTest, WantedPartThatNothingCoversIsCorruptData) {
  // PyTorch leaves such elements untouched without a word.
  Metadata metadata = sharded_catalogue(4, 4);
  auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("st"));
  tensor.chunks.erase(tensor.chunks.begin() + 2);
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored at [8]", plan_of({replica_entry("st", {16})}, metadata));
  EXPECT_EQ(plan_of({shard_entry(1, 4, 4)}, metadata).items.size(), 1u) << "the hole is elsewhere";
  tensor.chunks.clear();
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored at [4]", plan_of({shard_entry(1, 4, 4)}, metadata));
}

TEST(DefaultLoadPlannerTest, OverlapThatHidesAHoleIsCorruptData) {
  // 4 + 4 elements for 8, but two of them twice and two not at all.
  Metadata metadata = catalogue_of({{tensor_entry("w", {8}, {{{0}, {4}}, {{4}, {4}}})}});
  auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w"));
  tensor.chunks[1].offsets = {2};
  EXPECT_ERROR(ErrorCode::kCorruptData, "overlap at [2]", plan_of({replica_entry("w", {8})}, metadata));
}

TEST(DefaultLoadPlannerTest, ChunkOutsideItsTensorIsCorruptData) {
  Metadata metadata = sharded_catalogue(4, 2);
  auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("st"));
  tensor.chunks[1].sizes = {5};
  EXPECT_ERROR(ErrorCode::kCorruptData, "lies outside its tensor", plan_of({replica_entry("st", {8})}, metadata));
  tensor.chunks[1] = {{4, 0}, {4, 1}};
  EXPECT_ERROR(ErrorCode::kCorruptData, "lies outside its tensor", plan_of({replica_entry("st", {8})}, metadata));
}

TEST(DefaultLoadPlannerTest, EmptyChunksAndEmptyTensorsReadNothing) {
  Metadata metadata = catalogue_of({{tensor_entry("w", {3}, {{{0}, {3}}}), replica_entry("e", {0, 2})}});
  // As PyTorch writes them: a chunk without elements at the end.
  std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w")).chunks.push_back({{3}, {0}});
  const LoadPlan plan =
      plan_of({tensor_entry("w", {3}, {{{0}, {0}}, {{1}, {2}}}), replica_entry("e", {0, 2})}, metadata);
  EXPECT_THAT(plan.items, ElementsAre(read_item("w", {1}, {0}, {0}, {1}, {2})));
}

TEST(DefaultLoadPlannerTest, ZeroDimensionalTensorIsRead) {
  const LoadPlan plan = plan_of({replica_entry("step", {})}, catalogue_of({{replica_entry("step", {})}}));
  EXPECT_THAT(plan.items, ElementsAre(read_item("step", {}, {}, {}, {}, {})));
}

TEST(DefaultLoadPlannerTest, BadDestinationChunksAreRefused) {
  const Metadata metadata = sharded_catalogue(4, 2);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor",
               plan_of({tensor_entry("st", {8}, {{{6}, {3}}})}, metadata));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "start at the same offsets",
               plan_of({tensor_entry("st", {8}, {{{0}, {3}}, {{0}, {4}}})}, metadata));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "same flattened name",
               plan_of({replica_entry("st", {8}), replica_entry("st", {8})}, metadata));
}

TEST(DefaultLoadPlannerTest, CheckpointBefore24IsReadUnderItsOwnNames) {
  // There a container without tensors was one value.
  const Metadata metadata = catalogue_of({{replica_entry("w", {2}), bytes_entry("optim.param_groups", 30)}});
  MemoryLoadState state({replica_entry("w", {2}), bytes_entry("optim.param_groups.0.lr", 0)});
  state.set_entries_before_24({replica_entry("w", {2}), bytes_entry("optim.param_groups", 0)});
  DefaultLoadPlanner planner;
  planner.set_up_planner(state, metadata, true);
  const LoadPlan plan = planner.create_local_plan();
  ASSERT_EQ(plan.items.size(), 2u);
  EXPECT_EQ(plan.items[1].dest_index.fqn, "optim.param_groups");
  planner.load_bytes(plan.items[1], as_bytes("groups"));
  EXPECT_EQ(state.value(1, FlattenRule::kBefore24), "groups");
}

TEST(DefaultLoadPlannerTest, OldNamesAreNotTriedWhereTheyMatchNothing) {
  const Metadata metadata = catalogue_of({{replica_entry("w", {2}), replica_entry("unrelated", {2})}});
  MemoryLoadState state({replica_entry("w", {2}), bytes_entry("a.b", 0)});
  state.set_entries_before_24({replica_entry("w", {2}), bytes_entry("a", 0)});
  DefaultLoadPlanner planner;
  planner.set_up_planner(state, metadata, true);
  EXPECT_ERROR(ErrorCode::kNotFound, "state_dict: a.b.", planner.create_local_plan());
}

TEST(DefaultLoadPlannerTest, ViewsPointIntoTheDestinationAndCastsAreCommitted) {
  const Metadata metadata =
      catalogue_of({{tensor_entry("w", {4, 4}, {{{0, 0}, {2, 4}}, {{2, 0}, {2, 4}}}), replica_entry("c", {2})}});
  MemoryLoadState state({tensor_entry("w", {4, 4}, {{{1, 1}, {3, 2}}}), replica_entry("c", {2}, DType::kFloat64)});
  DefaultLoadPlanner planner({.allow_cast = true});
  planner.set_up_planner(state, metadata, true);
  const LoadPlan plan = planner.create_local_plan();
  ASSERT_EQ(plan.items.size(), 3u);
  EXPECT_EQ(plan.items[1].lengths, (Dims{2, 2}));
  const MutableTensorView view = planner.resolve_tensor(plan.items[1]);
  EXPECT_EQ(view.data, state.memory().buffer(0).data() + 2 * sizeof(float));  // second row of the chunk
  EXPECT_EQ(view.sizes, (Dims{2, 2}));

  const MutableTensorView cast = planner.resolve_tensor(plan.items[2]);
  EXPECT_EQ(cast.dtype, DType::kFloat32) << "memory of the stored dtype is asked for";
  const float stored[] = {1.5f, -2.0f};
  std::memcpy(cast.data, stored, sizeof(stored));
  planner.commit_tensor(plan.items[2], cast);
  double wanted[2];
  std::memcpy(wanted, state.memory().buffer(1).data(), sizeof(wanted));
  EXPECT_EQ(wanted[0], 1.5);
  EXPECT_EQ(wanted[1], -2.0);
}

TEST(DefaultLoadPlannerTest, ThePlanMayBeAskedForAgain) {
  const Metadata metadata = sharded_catalogue(4, 2);
  MemoryLoadState state({replica_entry("st", {8}), bytes_entry("missing", 0)});
  DefaultLoadPlanner planner({.allow_partial_load = true});
  planner.set_up_planner(state, metadata, true);
  const LoadPlan plan = planner.create_local_plan();
  EXPECT_EQ(planner.create_local_plan().items, plan.items);
  EXPECT_THAT(planner.report().missing, ElementsAre("missing"));
}

TEST(DefaultLoadPlannerTest, ItemThatWasNotPlannedIsRefused) {
  MemoryLoadState state({replica_entry("w", {2})});
  const Metadata metadata = catalogue_of({{replica_entry("w", {2})}});
  DefaultLoadPlanner planner;
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "set_up_planner", planner.create_local_plan());
  planner.set_up_planner(state, metadata, true);
  planner.create_local_plan();
  EXPECT_ERROR(ErrorCode::kInternal, "did not plan", planner.resolve_tensor(read_item("x", {0}, {0}, {0}, {0}, {1})));
}

/// Pairwise intersection, the slow and plain way.
std::vector<ReadItem> pairwise(const std::string& fqn, const TensorStorageMetadata& stored, const Box& wanted) {
  std::vector<ReadItem> items;
  for (const Box& chunk : stored.chunks) {
    const auto common = intersect(chunk, wanted);
    if (!common) continue;
    ReadItem item = read_item(fqn, wanted.offsets, common->offsets, chunk.offsets, common->offsets, common->sizes);
    for (size_t i = 0; i < wanted.offsets.size(); ++i) {
      item.dest_offsets[i] -= wanted.offsets[i];
      item.storage_offsets[i] -= chunk.offsets[i];
    }
    items.push_back(std::move(item));
  }
  return items;
}

TEST(DefaultLoadPlannerTest, IntervalLookUpsFindWhatPairwiseIntersectionFinds) {
  Random random(3);
  for (int round = 0; round < 400; ++round) {
    const Dims shape = random_shape(random, 9);
    TensorStorageMetadata stored{{}, shape, random_tiling(random, shape, 60)};
    std::ranges::shuffle(stored.chunks, random);
    if (!shape.empty()) stored.chunks.push_back({shape, Dims(shape.size(), 0)});  // empty, at the end
    // Many wanted chunks, so that the stored ones are indexed; a tiling starts no two at the same offsets.
    std::vector<Box> wanted = random_tiling(random, shape, 60);
    std::vector<ReadItem> expected;
    for (const Box& box : wanted) {
      const auto items = pairwise("w", stored, box);
      EXPECT_EQ(create_read_items_for_chunk("w", stored, box), items);
      expected.insert(expected.end(), items.begin(), items.end());
    }
    Metadata metadata;
    metadata.state_dict_metadata.insert("w", stored);
    EXPECT_EQ(plan_of({tensor_entry("w", shape, wanted)}, metadata).items, expected);
    const Box any = random_box(random, shape);
    EXPECT_EQ(create_read_items_for_chunk("w", stored, any), pairwise("w", stored, any));
  }
}

TEST(DefaultLoadPlannerTest, IndexedLookUpsSeeHolesToo) {
  Metadata metadata = sharded_catalogue(1, 64);
  auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("st"));
  tensor.chunks.erase(tensor.chunks.begin() + 37);
  std::vector<Box> wanted;
  for (int64_t i = 0; i < 32; ++i) wanted.push_back({{2 * i}, {2}});
  EXPECT_ERROR(ErrorCode::kCorruptData, "nothing is stored at [37]",
               plan_of({tensor_entry("st", {64}, wanted)}, metadata));
}

}  // namespace
}  // namespace reshard
