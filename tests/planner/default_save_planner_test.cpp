// SPDX-License-Identifier: BSD-3-Clause
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "reshard/planner/default_planner.h"
#include "support/expect_error.h"
#include "support/memory_state.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// {"tensor": replicated 10, "value": bytes, "st": 1-D, `shard` elements a rank}.
MemorySaveState usual_state(int rank, int world_size, int64_t shard = 8) {
  MemorySaveState state;
  state.add(replica_entry("tensor", {10}));
  state.add_value("value", "[1, 2, 3]");
  state.add(tensor_entry("st", {shard * world_size}, {{{shard * rank}, {shard}}}));
  return state;
}

SavePlan local_plan_of(const SaveState& state, bool is_coordinator = false) {
  DefaultSavePlanner planner;
  planner.set_up_planner(state, is_coordinator);
  return planner.create_local_plan();
}

std::vector<SavePlan> usual_plans(int world_size) {
  std::vector<SavePlan> plans;
  for (int rank = 0; rank < world_size; ++rank) plans.push_back(local_plan_of(usual_state(rank, world_size)));
  return plans;
}

SavePlan plan_of(std::vector<StateEntry> entries) { return local_plan_of(MemorySaveState(std::move(entries))); }

std::vector<std::string> names_of(const SavePlan& plan) {
  std::vector<std::string> names;
  for (const WriteItem& item : plan.items) names.push_back(to_string(item.index));
  return names;
}

GlobalSavePlan globally(std::vector<SavePlan> plans, DefaultSavePlannerOptions options = {}) {
  return DefaultSavePlanner(options).create_global_plan(std::move(plans));
}

// test_planner.py: test_local_plan
TEST(DefaultSavePlannerTest, LocalPlanProposesEverythingOnEveryRank) {
  const MemorySaveState state = usual_state(1, 4);
  for (const bool is_coordinator : {false, true}) {
    const SavePlan plan = local_plan_of(state, is_coordinator);
    ASSERT_EQ(plan.items.size(), 3u);
    const WriteItem& tensor = plan.items[0];
    EXPECT_EQ(tensor.index, (MetadataIndex{"tensor", Dims{0}, {}}));
    EXPECT_EQ(tensor.type, WriteItemType::kTensor);
    EXPECT_EQ(tensor.size, Dims{10});
    EXPECT_EQ(tensor.properties, TensorProperties{.dtype = DType::kFloat32});
    EXPECT_EQ(tensor.chunk, (Box{{0}, {10}}));
    EXPECT_EQ(plan.items[1].index, (MetadataIndex{"value", {}, {}}));
    EXPECT_EQ(plan.items[1].type, WriteItemType::kByteIo);
    EXPECT_EQ(plan.items[1].length, 9u);
    const WriteItem& shard = plan.items[2];
    EXPECT_EQ(shard.index, (MetadataIndex{"st", Dims{8}, {}}));
    EXPECT_EQ(shard.type, WriteItemType::kShard);
    EXPECT_EQ(shard.size, Dims{32});
    EXPECT_EQ(shard.chunk, (Box{{8}, {8}}));
    EXPECT_EQ(plan.planner_data->size(), 3u);
  }
}

// test_planner.py: test_global_plan
TEST(DefaultSavePlannerTest, GlobalPlanKeepsItemsAndHintsAtTheirChunks) {
  const std::vector<SavePlan> locals = usual_plans(4);
  const GlobalSavePlan global = globally(locals);
  ASSERT_EQ(global.plans.size(), 4u);
  size_t items = 0;
  for (size_t rank = 0; rank < 4; ++rank) {
    for (const WriteItem& item : global.plans[rank].items) {
      ++items;
      const auto original = std::ranges::find(locals[rank].items, item.index, &WriteItem::index);
      ASSERT_NE(original, locals[rank].items.end());
      WriteItem without_hint = item;
      without_hint.index.index.reset();
      EXPECT_EQ(without_hint, *original);
      const StorageMetadata* entry = global.metadata.state_dict_metadata.find(item.index.fqn);
      ASSERT_NE(entry, nullptr);
      if (item.type == WriteItemType::kByteIo) {
        EXPECT_TRUE(std::holds_alternative<BytesStorageMetadata>(*entry));
        EXPECT_FALSE(item.index.index.has_value());
      } else {
        const auto& tensor = std::get<TensorStorageMetadata>(*entry);
        EXPECT_EQ(tensor.size, item.size);
        EXPECT_EQ(tensor.properties, item.properties);
        EXPECT_EQ(tensor.chunks.at(static_cast<size_t>(item.index.index.value())), item.chunk);
      }
    }
  }
  EXPECT_EQ(items, 6u);  // tensor and value once, a shard from each rank
  // test_planner.py: test_version_key_in_planner_data
  EXPECT_EQ(global.metadata.version, "1.0.0");
}

// test_planner.py: test_dedup_plans
TEST(DefaultSavePlannerTest, DedupLeavesNoPlanThatHeldReplicasAsItWas) {
  // Enough replicas for every rank to lose one.
  std::vector<SavePlan> plans;
  for (int64_t rank = 0; rank < 4; ++rank) {
    plans.push_back(plan_of({replica_entry("a", {10}), replica_entry("b", {10}), replica_entry("c", {10}),
                             replica_entry("d", {10}), tensor_entry("st", {32}, {{{8 * rank}, {8}}})}));
  }
  std::vector<SavePlan> deduped = plans;
  dedup_save_plans(deduped, DedupPolicy::kBalanced);
  ASSERT_EQ(deduped.size(), plans.size());
  for (size_t rank = 0; rank < plans.size(); ++rank) {
    EXPECT_NE(deduped[rank], plans[rank]);
    EXPECT_EQ(deduped[rank].items.size(), 2u);  // balanced: one replica each
  }
}

// test_dedup_tensors.py: test_dedup_shards
TEST(DefaultSavePlannerTest, DedupKeepsAnItemWhereTheLeastIsWritten) {
  std::vector<SavePlan> plans{plan_of({tensor_entry("tensor_0", {4}, {{{0}, {4}}}), replica_entry("r0", {10})}),
                              plan_of({tensor_entry("tensor_0", {4}, {{{0}, {4}}}), replica_entry("r1", {10})})};
  std::vector<SavePlan> lowest = plans;
  for (const auto policy : {DedupPolicy::kBalanced, DedupPolicy::kLowestRank}) {
    std::vector<SavePlan> deduped = plans;
    dedup_save_plans(deduped, policy);
    EXPECT_THAT(names_of(deduped[0]), ElementsAre("tensor_0 [0]", "r0 [0]"));  // a tie goes to the lowest rank
    EXPECT_THAT(names_of(deduped[1]), ElementsAre("r1 [0]"));
  }
  plans[0] = plan_of({tensor_entry("tensor_0", {4}, {{{0}, {4}}}), replica_entry("r0", {1000})});
  std::vector<SavePlan> balanced = plans;
  dedup_save_plans(balanced, DedupPolicy::kBalanced);
  EXPECT_THAT(names_of(balanced[0]), ElementsAre("r0 [0]"));
  EXPECT_THAT(names_of(balanced[1]), ElementsAre("tensor_0 [0]", "r1 [0]"));
  dedup_save_plans(plans, DedupPolicy::kLowestRank);
  EXPECT_THAT(names_of(plans[0]), ElementsAre("tensor_0 [0]", "r0 [0]"));
}

TEST(DefaultSavePlannerTest, OneNodeWritesAllOfATensorWhereItHoldsAllOfIt) {
  // Hybrid sharding over two nodes of two ranks: ranks 0 and 2 hold the first half of each tensor, 1 and 3 the second. Rank 0 has something
  // large for itself.
  const auto plans_with = [](const std::vector<StateEntry>& of_rank_0) {
    std::vector<SavePlan> plans;
    for (int64_t rank = 0; rank < 4; ++rank) {
      std::vector<StateEntry> entries;
      if (rank == 0) entries = of_rank_0;
      for (const char* name : {"a", "b", "c", "d", "e"})
        entries.push_back(tensor_entry(name, {2000}, {{{1000 * (rank % 2)}, {1000}}}));
      plans.push_back(plan_of(entries));
    }
    return plans;
  };
  const auto nodes_of = [](const std::vector<SavePlan>& plans, const std::string& fqn) {
    std::set<size_t> nodes;
    for (size_t rank = 0; rank < plans.size(); ++rank) {
      for (const WriteItem& item : plans[rank].items) {
        if (item.index.fqn == fqn) nodes.insert(rank / 2);
      }
    }
    return nodes;
  };
  std::vector<SavePlan> plans = plans_with({tensor_entry("own", {2500}, {{{0}, {2500}}})});
  dedup_save_plans(plans, DedupPolicy::kSameNode, 2);
  std::map<size_t, int> tensors;
  for (const char* name : {"a", "b", "c", "d", "e"}) {
    const std::set<size_t> nodes = nodes_of(plans, name);
    ASSERT_EQ(nodes.size(), 1U) << name;
    ++tensors[*nodes.begin()];
  }
  EXPECT_EQ(tensors[0], 2) << "what rank 0 writes alone weighs more than a tensor";
  EXPECT_EQ(tensors[1], 3);
  EXPECT_EQ(plans[1].items.size(), 2U);
  EXPECT_EQ(plans[2].items.size(), 3U);
  EXPECT_EQ(plans[3].items.size(), 3U);
  std::vector<SavePlan> balanced = plans_with({tensor_entry("own", {2500}, {{{0}, {2500}}})});
  dedup_save_plans(balanced, DedupPolicy::kBalanced);
  EXPECT_EQ(nodes_of(balanced, "a").size(), 2U) << "the control";

  // Whole replicas: on either node, on the rank with the least to write.
  std::vector<SavePlan> replicas(4, plan_of({replica_entry("r", {10}), replica_entry("s", {10}),
                                             replica_entry("t", {10}), replica_entry("u", {10})}));
  dedup_save_plans(replicas, DedupPolicy::kSameNode, 2);
  for (const SavePlan& plan : replicas) EXPECT_EQ(plan.items.size(), 1U);

  // A part that only one rank holds, on the other node than the other part: nobody has all of it.
  std::vector<SavePlan> apart{
      plan_of({tensor_entry("w", {3}, {{{0}, {1}}})}), plan_of({tensor_entry("w", {3}, {{{1}, {1}}})}),
      plan_of({tensor_entry("w", {3}, {{{0}, {1}}})}), plan_of({tensor_entry("w", {3}, {{{2}, {1}}})})};
  dedup_save_plans(apart, DedupPolicy::kSameNode, 2);
  EXPECT_EQ(apart[0].items.size() + apart[2].items.size(), 1U);
  EXPECT_EQ(nodes_of(apart, "w").size(), 2U);
  // It pins the rest where the node has it.
  std::vector<SavePlan> pinned{plan_of({tensor_entry("w", {2}, {{{0}, {1}}})}), plan_of({replica_entry("x", {1})}),
                               plan_of({tensor_entry("w", {2}, {{{0}, {1}}})}),
                               plan_of({tensor_entry("w", {2}, {{{1}, {1}}})})};
  dedup_save_plans(pinned, DedupPolicy::kSameNode, 2);
  EXPECT_EQ(nodes_of(pinned, "w"), std::set<size_t>{1});

  EXPECT_ERROR(ErrorCode::kInvalidArgument, "number of ranks of a node",
               dedup_save_plans(pinned, DedupPolicy::kSameNode));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "two ways of dedup",
               globally(plans, {.dedup_save_to_lowest_rank = true, .dedup_ranks_per_node = 2}));
  const GlobalSavePlan global = globally(plans_with({}), {.dedup_ranks_per_node = 2});
  EXPECT_EQ(nodes_of(global.plans, "a").size(), 1U);
}

TEST(DefaultSavePlannerTest, LoadIsCountedInBytesOfTheChunkNotOfTheTensor) {
  // Rank 0 holds a small part of a large tensor, rank 1 most of it: the replica belongs on rank 0.
  std::vector<SavePlan> plans{plan_of({tensor_entry("large", {100000}, {{{0}, {10}}}), replica_entry("r", {10})}),
                              plan_of({tensor_entry("large", {100000}, {{{10}, {99990}}}), replica_entry("r", {10})})};
  dedup_save_plans(plans, DedupPolicy::kBalanced);
  EXPECT_THAT(names_of(plans[0]), ElementsAre("large [0]", "r [0]"));
  EXPECT_THAT(names_of(plans[1]), ElementsAre("large [10]"));
}

TEST(DefaultSavePlannerTest, ReplicasAreSpreadEvenlyAndDeterministically) {
  Random random(7);
  std::vector<StateEntry> entries;
  int64_t total = 0;
  for (int i = 0; i < 200; ++i) {
    const int64_t n = random_between(random, 1, 20000);
    entries.push_back(replica_entry("t" + std::to_string(i), {n}));
    total += 4 * n;
  }
  const std::vector<SavePlan> locals(8, plan_of(entries));
  std::vector<SavePlan> plans = locals;
  dedup_save_plans(plans, DedupPolicy::kBalanced);
  std::set<std::string> seen;
  for (const SavePlan& plan : plans) {
    int64_t bytes = 0;
    for (const WriteItem& item : plan.items) {
      EXPECT_TRUE(seen.insert(item.index.fqn).second);
      bytes += 4 * volume(item.chunk.sizes);
    }
    EXPECT_LE(static_cast<double>(bytes), 1.1 * static_cast<double>(total) / 8);
    EXPECT_TRUE(std::ranges::is_sorted(plan.items, {}, [&](const WriteItem& item) {
      return std::ranges::find(locals[0].items, item.index, &WriteItem::index) - locals[0].items.begin();
    }));
  }
  EXPECT_EQ(seen.size(), 200u);
  std::vector<SavePlan> again = locals;
  dedup_save_plans(again, DedupPolicy::kBalanced);
  EXPECT_EQ(again, plans);
}

TEST(DefaultSavePlannerTest, HybridShardingWritesEachShardOnce) {
  // Two replicas of a tensor in two shards each.
  std::vector<SavePlan> plans;
  for (int64_t rank = 0; rank < 4; ++rank) {
    plans.push_back(plan_of({tensor_entry("w", {6, 4}, {{{rank % 2 * 3, 0}, {3, 4}}})}));
  }
  const GlobalSavePlan global = globally(plans);
  const auto& tensor = std::get<TensorStorageMetadata>(*global.metadata.state_dict_metadata.find("w"));
  EXPECT_THAT(tensor.chunks, ElementsAre(Box{{0, 0}, {3, 4}}, Box{{3, 0}, {3, 4}}));
}

TEST(DefaultSavePlannerTest, ValueOnSeveralRanksIsAReplica) {
  const GlobalSavePlan global = globally({plan_of({bytes_entry("v", 5)}), plan_of({bytes_entry("v", 7)})});
  EXPECT_EQ(global.plans[0].items.size() + global.plans[1].items.size(), 1u);
  EXPECT_EQ(global.metadata.state_dict_metadata.size(), 1u);
}

TEST(DefaultSavePlannerTest, CatalogueIsInOrderOfFirstAppearanceRankByRank) {
  const GlobalSavePlan global = globally({plan_of({tensor_entry("b", {4}, {{{0}, {2}}}), bytes_entry("z", 1)}),
                                          plan_of({bytes_entry("a", 1), tensor_entry("b", {4}, {{{2}, {2}}})})});
  std::vector<std::string> keys;
  for (const auto& [fqn, entry] : global.metadata.state_dict_metadata) keys.push_back(fqn);
  EXPECT_THAT(keys, ElementsAre("b", "z", "a"));
}

TEST(DefaultSavePlannerTest, PathsOfAllRanksAreMergedAndTheLowerRankWins) {
  SavePlan a = plan_of({bytes_entry("x.y", 1)});
  SavePlan b = plan_of({bytes_entry("q", 1), bytes_entry("x.y", 1)});
  b.planner_data = {};
  b.planner_data.edit().insert("q", ObjectPath{"q"});
  b.planner_data.edit().insert("x.y", ObjectPath{"x.y"});
  const GlobalSavePlan global = globally({a, b});
  ASSERT_TRUE(global.metadata.planner_data.has_value());
  EXPECT_EQ(*global.metadata.planner_data->find("x.y"), (ObjectPath{"x", "y"}));
  EXPECT_EQ(*global.metadata.planner_data->find("q"), (ObjectPath{"q"}));
}

TEST(DefaultSavePlannerTest, RanksMayHoldDifferentKeys) {
  const GlobalSavePlan global =
      globally({plan_of({replica_entry("stage0", {4})}), plan_of({replica_entry("stage1", {4})}), plan_of({})});
  EXPECT_EQ(global.metadata.state_dict_metadata.size(), 2u);
  EXPECT_TRUE(global.plans[2].items.empty());
}

TEST(DefaultSavePlannerTest, EmptyStateIsALegalCheckpoint) {
  const GlobalSavePlan global = globally({plan_of({}), plan_of({})});
  EXPECT_TRUE(global.metadata.state_dict_metadata.empty());
  EXPECT_EQ(global.plans.size(), 2u);
}

TEST(DefaultSavePlannerTest, ChunksWithoutElementsAreLeftOut) {
  // 5 rows over 4 ranks: 2, 2, 1, 0.
  std::vector<SavePlan> plans;
  for (int64_t rank = 0; rank < 4; ++rank) {
    plans.push_back(plan_of({tensor_entry("w", {5, 3}, {split_evenly(whole_box({5, 3}), 0, 4, rank)})}));
  }
  EXPECT_TRUE(plans[3].items.empty());
  const GlobalSavePlan global = globally(plans);
  const auto& tensor = std::get<TensorStorageMetadata>(*global.metadata.state_dict_metadata.find("w"));
  EXPECT_EQ(tensor.chunks.size(), 3u);
}

TEST(DefaultSavePlannerTest, TensorWithoutElementsKeepsOneChunk) {
  // On one rank with an empty chunk, on another without any.
  DefaultSavePlanner planner;
  const MemorySaveState with({tensor_entry("e", {0, 4}, {{{0, 0}, {0, 4}}}), replica_entry("f", {3, 0})});
  planner.set_up_planner(with, true);
  const SavePlan local = planner.create_local_plan();
  const GlobalSavePlan global = planner.create_global_plan({local, plan_of({tensor_entry("e", {0, 4}, {})})});
  for (const char* key : {"e", "f"}) {
    const auto& tensor = std::get<TensorStorageMetadata>(*global.metadata.state_dict_metadata.find(key));
    EXPECT_THAT(tensor.chunks, ElementsAre(whole_box(tensor.size)));
  }
  const TensorView view = planner.resolve_tensor(local.items[0]);
  EXPECT_EQ(view.sizes, (Dims{0, 4}));
  EXPECT_TRUE(is_contiguous(view.sizes, view.strides));
}

TEST(DefaultSavePlannerTest, ZeroDimensionalTensorIsOneReplicatedElement) {
  const GlobalSavePlan global = globally({plan_of({replica_entry("step", {})}), plan_of({replica_entry("step", {})})});
  const auto& tensor = std::get<TensorStorageMetadata>(*global.metadata.state_dict_metadata.find("step"));
  EXPECT_THAT(tensor.chunks, ElementsAre(Box{}));
  EXPECT_EQ(global.plans[0].items.size(), 1u);
  EXPECT_EQ(global.plans[0].items[0].index.offset, Dims{});
}

// test_planner.py: test_non_overlapping_chunks
TEST(DefaultSavePlannerTest, ExactTilingIsValid) {
  std::vector<SavePlan> plans;
  for (int64_t rank = 0; rank < 4; ++rank) plans.push_back(plan_of({tensor_entry("param", {4}, {{{rank}, {1}}})}));
  EXPECT_NO_THROW(globally(plans));
}

// test_planner.py: test_detect_overlapping_chunks
TEST(DefaultSavePlannerTest, OverlappingChunksNameKeyRanksAndPlace) {
  const auto save = [] {
    globally(
        {plan_of({tensor_entry("param", {4}, {{{0}, {2}}})}), plan_of({tensor_entry("param", {4}, {{{1}, {3}}})})});
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "overlap at [1]", save());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key param", save());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "[0]+[2] of rank 0 and [1]+[3] of rank 1", save());
}

TEST(DefaultSavePlannerTest, MissingChunkIsNamed) {
  const auto save = [] {
    globally({plan_of({tensor_entry("param", {4, 2}, {{{0, 0}, {2, 2}}})}),
              plan_of({tensor_entry("param", {4, 2}, {{{3, 0}, {1, 2}}})})});
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no rank supplies the part of a tensor at [2, 0]", save());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key param", save());
}

TEST(DefaultSavePlannerTest, TensorOfWhichNoRankHoldsAPartIsNamed) {
  // It would be missing from the checkpoint without a word.
  const auto save = [](std::vector<Box> of_rank_1) {
    return globally({plan_of({replica_entry("other", {2}), tensor_entry("w", {4}, {})}),
                     plan_of({tensor_entry("w", {4}, std::move(of_rank_1))})});
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no rank supplies any part of a tensor; key w", save({}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no rank supplies any part of a tensor; key w", save({{{4}, {0}}}));
  EXPECT_NO_THROW(save({{{0}, {4}}}));
}

TEST(DefaultSavePlannerTest, SingleRankMustHoldAllOfATensorToo) {
  // PyTorch skips this check where only one rank takes part.
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no rank supplies",
               globally({plan_of({tensor_entry("w", {4}, {{{0}, {3}}})})}));
}

TEST(DefaultSavePlannerTest, ChunksOfDifferentSizeAtTheSameOffsetsAreAnOverlap) {
  // By key and offsets alone they would pass for replicas.
  const auto save = [] {
    globally({plan_of({tensor_entry("w", {8}, {{{0}, {4}}})}), plan_of({tensor_entry("w", {8}, {{{0}, {8}}})})});
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "ranks 0 and 1 hold overlapping chunks", save());
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "rank 0: [0]+[4], rank 1: [0]+[8]", save());
}

TEST(DefaultSavePlannerTest, RanksThatDisagreeOnAKeyAreNamedWithBothValues) {
  const auto save = [](StateEntry a, StateEntry b) { globally({plan_of({}), plan_of({a}), plan_of({b})}); };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "rank 1: [4], rank 2: [5]",
               save(replica_entry("w", {4}), replica_entry("w", {5})));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "rank 1: float32, rank 2: bfloat16",
               save(replica_entry("w", {4}), replica_entry("w", {4}, DType::kBFloat16)));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "rank 1: a tensor, rank 2: a value",
               save(replica_entry("w", {4}), bytes_entry("w", 4)));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "key w", save(bytes_entry("w", 4), replica_entry("w", {4})));
}

/// The plan of a rank that compares contents.
SavePlan digested_plan(const MemorySaveState& state, DefaultSavePlannerOptions options = {}) {
  DefaultSavePlanner planner(options);
  planner.set_up_planner(state, false);
  SavePlan plan = planner.create_local_plan();
  planner.add_content_digests(plan);
  return plan;
}

TEST(DefaultSavePlannerTest, ContentsOfOneKeyThatDifferAreRefusedByKeyAndRanks) {
  const auto make = [](std::string_view value) {
    MemorySaveState state({replica_entry("weight", {300, 100}), tensor_entry("shard", {4}, {{{0}, {4}}})});
    state.add_value("step", value);
    return state;
  };
  const MemorySaveState first = make("7"), second = make("7");
  {
    DefaultSavePlanner planner;
    const GlobalSavePlan global = planner.create_global_plan({digested_plan(first), digested_plan(second)});
    for (const SavePlan& plan : global.plans)
      for (const WriteItem& item : plan.items) EXPECT_FALSE(item.content) << "what was compared is not sent back";
  }
  const auto expect_refused = [&](const MemorySaveState& other, const std::string& key,
                                  DefaultSavePlannerOptions options) {
    DefaultSavePlanner planner;
    for (const DedupPolicy policy : {DedupPolicy::kBalanced, DedupPolicy::kLowestRank}) {
      std::vector<SavePlan> plans{digested_plan(first, options), digested_plan(second, options),
                                  digested_plan(other, options)};
      EXPECT_ERROR(ErrorCode::kInvalidArgument, "ranks 1 and 2 hold different contents",
                   dedup_save_plans(plans, policy));
      EXPECT_ERROR(ErrorCode::kInvalidArgument, key, dedup_save_plans(plans, policy));
    }
  };
  expect_refused(make("8"), "step", {});
  for (const size_t changed :
       {size_t{0}, size_t{65536}, size_t{119999}}) {  // the first byte, of the second block, the last
    MemorySaveState other = make("7");
    other.memory().buffer(0)[changed] ^= std::byte{1};
    expect_refused(other, "weight", {});
  }
  MemorySaveState other = make("7");
  other.memory().buffer(1)[5] ^= std::byte{1};
  DefaultSavePlanner planner;
  EXPECT_NO_THROW(planner.create_global_plan({digested_plan(first), digested_plan(other)})) << "a declared replica";
  expect_refused(other, "shard", {.verify_replicas = true});
}

TEST(DefaultSavePlannerTest, TiedItemsStayWithWhatTheyAreTiedTo) {
  // Balance alone would put "embedding" on one rank and "head" on the other.
  const auto entries = [](bool tied) {
    std::vector<StateEntry> list{replica_entry("embedding", {1000}), replica_entry("other", {700}),
                                 replica_entry("head", {1000})};
    if (tied) std::get<TensorEntry>(list[2].value).tied_to = 0;
    return list;
  };
  for (const bool lowest : {false, true}) {
    const auto global =
        globally({plan_of(entries(true)), plan_of(entries(true))}, {.dedup_save_to_lowest_rank = lowest});
    ASSERT_EQ(names_of(global.plans[0]).front(), "embedding [0]");
    ASSERT_EQ(names_of(global.plans[0]).back(), "head [0]");
    EXPECT_EQ(global.plans[0].items.back().tied_to, 0u);
    EXPECT_EQ(global.plans[1].items.size(), lowest ? 0u : 1u) << "what is tied weighs nothing";
  }
  // The index follows what it names when items before it go to other ranks.
  std::vector<StateEntry> shifted = entries(true);
  shifted.insert(shifted.begin(), replica_entry("first", {2000}));
  std::get<TensorEntry>(shifted[3].value).tied_to = 1;
  const auto global = globally({plan_of({replica_entry("first", {2000})}), plan_of(shifted)});
  EXPECT_EQ(names_of(global.plans[1]), (std::vector<std::string>{"embedding [0]", "other [0]", "head [0]"}));
  EXPECT_EQ(global.plans[1].items[2].tied_to, 0u);
  // Both ranks have all of it; the one that comes first has more to write already.
  const auto second = globally({plan_of(shifted), plan_of(entries(true))});
  EXPECT_EQ(names_of(second.plans[0]), (std::vector<std::string>{"first [0]"}));
  EXPECT_EQ(names_of(second.plans[1]), (std::vector<std::string>{"embedding [0]", "other [0]", "head [0]"}));
  EXPECT_EQ(second.plans[1].items[2].tied_to, 0u);
  // Ranks that disagree on what is tied.
  const auto mixed = globally({plan_of(entries(false)), plan_of(entries(true))});
  size_t heads = 0;
  for (const SavePlan& plan : mixed.plans) {
    for (const WriteItem& item : plan.items) {
      heads += item.index.fqn == "head" ? 1 : 0;
      if (item.tied_to) {
        EXPECT_EQ(plan.items.at(*item.tied_to).index.fqn, "embedding");
      }
    }
  }
  EXPECT_EQ(heads, 1u);
}

TEST(DefaultSavePlannerTest, EachChunkOfATiedTensorIsTiedToItsOwn) {
  const std::vector<Box> chunks{{{0}, {2}}, {{2}, {3}}, {{5}, {1}}};
  std::vector<StateEntry> entries{bytes_entry("value", 1), tensor_entry("embedding", {6}, chunks),
                                  replica_entry("other", {6}), tensor_entry("head", {6}, chunks)};
  std::get<TensorEntry>(entries[3].value).tied_to = 1;
  const SavePlan plan = plan_of(entries);
  ASSERT_EQ(names_of(plan), (std::vector<std::string>{"value", "embedding [0]", "embedding [2]", "embedding [5]",
                                                      "other [0]", "head [0]", "head [2]", "head [5]"}));
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(plan.items[i].tied_to, i < 5 ? std::nullopt : std::optional<size_t>(i - 4)) << i;
  }
  EXPECT_NO_THROW(globally({plan}));
}

TEST(DefaultSavePlannerTest, ItemsTiedToOthersThanTheirEqualsAreRefused) {
  for (const auto& [name, tied_to] : {std::pair("itself", size_t{1}), std::pair("beyond", size_t{9}),
                                      std::pair("another size", size_t{0}), std::pair("a value", size_t{2})}) {
    SavePlan plan = plan_of({replica_entry("small", {3}), replica_entry("large", {4}), bytes_entry("value", 1),
                             replica_entry("tied", {4})});
    plan.items[name == std::string("itself") ? 1 : 3].tied_to = tied_to;
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "tied to something else", globally({plan})) << name;
  }
}

TEST(DefaultSavePlannerTest, NamesThatCollideAreRefused) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "same flattened name",
               plan_of({bytes_entry("a.b", 1), bytes_entry("a.b", 2)}));
}

TEST(DefaultSavePlannerTest, NamesThatAreNoTextAreRefused) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "the name of a value is no UTF-8", plan_of({bytes_entry("a\xff", 1)}));
}

TEST(DefaultSavePlannerTest, BadLocalChunksAreRefusedOnTheirRank) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor", plan_of({tensor_entry("w", {4}, {{{2}, {3}}})}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor", plan_of({tensor_entry("w", {4}, {{{-1}, {1}}})}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "start at the same offsets",
               plan_of({tensor_entry("w", {4}, {{{0}, {2}}, {{0}, {4}}})}));
  StateEntry partial = replica_entry("w", {4});
  std::get<TensorEntry>(partial.value).chunks = {{{0}, {2}}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "must be held whole", plan_of({partial}));
  constexpr int64_t kHuge = int64_t{1} << 40;
  MemorySaveState huge;
  StateEntry entry = tensor_entry("w", {kHuge, kHuge}, {});
  huge.add(entry);
  EXPECT_ERROR(ErrorCode::kCorruptData, "key w", local_plan_of(huge));
}

TEST(DefaultSavePlannerTest, ItemTwiceInOnePlanIsRefused) {
  SavePlan plan = plan_of({replica_entry("w", {4})});
  plan.items.push_back(plan.items[0]);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "twice in the plan of one rank", globally({plan}));
}

TEST(DefaultSavePlannerTest, MalformedItemsOfAnotherPlannerAreRefused) {
  SavePlan plan = plan_of({replica_entry("w", {4})});
  SavePlan unnamed = plan;
  unnamed.items[0].index.offset.reset();
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "not named after its chunk", globally({unnamed}));
  SavePlan outside = plan;
  outside.items[0].chunk.sizes = {5};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor", globally({outside}));
  SavePlan other_rank = plan;
  other_rank.items[0].chunk.sizes = {4, 1};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "outside its tensor", globally({other_rank}));
  SavePlan value = plan_of({bytes_entry("v", 4)});
  value.items[0].index.offset = Dims{0};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "value has offsets", globally({value}));
}

TEST(DefaultSavePlannerTest, RandomTilingsOverRanksAreWhole) {
  Random random(11);
  for (int round = 0; round < 200; ++round) {
    const auto world_size = static_cast<size_t>(random_between(random, 1, 5));
    std::vector<MemorySaveState> states(world_size);
    std::map<std::string, size_t> chunks_of;
    for (int t = 0; t < 3; ++t) {
      const std::string key = "t" + std::to_string(t);
      const Dims shape = random_shape(random);
      std::vector<std::vector<Box>> parts(world_size);
      for (const Box& box : random_tiling(random, shape)) {
        ++chunks_of[key];
        // Some chunks are replicated.
        const auto owner = static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(world_size) - 1));
        for (size_t rank = 0; rank < world_size; ++rank) {
          if (rank == owner || random_between(random, 0, 4) == 0) parts[rank].push_back(box);
        }
      }
      for (size_t rank = 0; rank < world_size; ++rank) states[rank].add(tensor_entry(key, shape, parts[rank]));
    }
    std::vector<SavePlan> plans;
    for (const MemorySaveState& state : states) plans.push_back(local_plan_of(state));
    const GlobalSavePlan global = globally(plans, {.dedup_save_to_lowest_rank = round % 2 == 0});
    std::map<std::string, size_t> written;
    for (const SavePlan& plan : global.plans) {
      for (const WriteItem& item : plan.items) ++written[item.index.fqn];
    }
    EXPECT_EQ(written, chunks_of);

    // Without any one of its items, no longer.
    std::vector<SavePlan> damaged = global.plans;
    std::erase_if(damaged, [](const SavePlan& plan) { return plan.items.empty(); });
    auto& items =
        damaged[static_cast<size_t>(random_between(random, 0, static_cast<int64_t>(damaged.size()) - 1))].items;
    const auto key = items.back().index.fqn;
    const bool was_only_chunk = chunks_of[key] == 1;
    items.pop_back();
    if (was_only_chunk) continue;
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "no rank supplies", globally(damaged));
  }
}

TEST(DefaultSavePlannerTest, FinishedPlanGivesMemoryOfItsItems) {
  const MemorySaveState state = usual_state(1, 4);
  DefaultSavePlanner planner;
  planner.set_up_planner(state, false);
  const SavePlan plan = planner.finish_plan(planner.create_local_plan());
  EXPECT_EQ(planner.resolve_tensor(plan.items[0]).data, state.tensor(0, 0).data);
  EXPECT_EQ(as_text(planner.resolve_bytes(plan.items[1])), "[1, 2, 3]");
  EXPECT_EQ(planner.resolve_tensor(plan.items[2]).sizes, Dims{8});
}

TEST(DefaultSavePlannerTest, ItemThatTheRankDidNotProposeIsRefused) {
  const MemorySaveState state = usual_state(1, 4);
  DefaultSavePlanner planner;
  planner.set_up_planner(state, false);
  planner.create_local_plan();
  EXPECT_ERROR(ErrorCode::kInternal, "did not propose", planner.finish_plan(local_plan_of(usual_state(2, 4))));
}

TEST(DefaultSavePlannerTest, StateThatChangedAfterPlanningIsRefused) {
  MemorySaveState state;
  state.add_value("v", "abc");
  DefaultSavePlanner planner;
  planner.set_up_planner(state, false);
  const SavePlan plan = planner.create_local_plan();
  state.memory().buffer(0).resize(2);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "changed after the save was planned",
               planner.resolve_bytes(plan.items[0]));
}

TEST(DefaultSavePlannerTest, PlanningWithoutSetUpIsRefused) {
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "set_up_planner", DefaultSavePlanner().create_local_plan());
}

// test_planner.py: test_compare_save_plans
TEST(DefaultSavePlannerTest, PlansCompareByContent) {
  EXPECT_EQ(usual_plans(4)[0], usual_plans(4)[0]);
  EXPECT_NE(usual_plans(4)[0], usual_plans(4)[1]);
}

}  // namespace
}  // namespace reshard
