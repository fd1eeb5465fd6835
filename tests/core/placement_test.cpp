// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/placement.h"

#include <gtest/gtest.h>

#include <random>

#include "support/expect_error.h"
#include "support/random_tiling.h"

namespace reshard {
namespace {

std::vector<Dims> coordinates_of(const Dims& mesh_shape) {
  std::vector<Dims> result{Dims(mesh_shape.size(), 0)};
  for (size_t m = 0; m < mesh_shape.size(); ++m) {
    std::vector<Dims> longer;
    for (const Dims& coordinate : result) {
      for (int64_t i = 0; i < mesh_shape[m]; ++i) {
        longer.push_back(coordinate);
        longer.back()[m] = i;
      }
    }
    result = std::move(longer);
  }
  return result;
}

/// The boxes of the first part at each coordinate, in row-major order of the mesh.
std::vector<Box> first_boxes(const Dims& shape, const Dims& mesh_shape, const Placements& placements) {
  std::vector<Box> boxes;
  for (const Dims& coordinate : coordinates_of(mesh_shape)) {
    const LocalLayout layout = compute_local_layout(shape, mesh_shape, coordinate, placements);
    EXPECT_EQ(layout.parts.size(), 1u);
    EXPECT_EQ(layout.sizes, layout.parts[0].box.sizes);
    EXPECT_EQ(layout.parts[0].local_offsets, Dims(shape.size(), 0));
    boxes.push_back(layout.parts[0].box);
  }
  return boxes;
}

TEST(PlacementTest, OneDimensionIsCutAsTorchChunkDoes) {
  using Boxes = std::vector<Box>;
  EXPECT_EQ(first_boxes({5, 2}, {4}, {Shard(0)}),
            (Boxes{{{0, 0}, {2, 2}}, {{2, 0}, {2, 2}}, {{4, 0}, {1, 2}}, {{5, 0}, {0, 2}}}));
  EXPECT_EQ(first_boxes({5, 2}, {2}, {Shard(-1)}), (Boxes{{{0, 0}, {5, 1}}, {{0, 1}, {5, 1}}}));
  EXPECT_EQ(first_boxes({5, 2}, {2}, {Replicate()}), (Boxes(2, {{0, 0}, {5, 2}})));
  EXPECT_EQ(first_boxes({}, {2}, {Replicate()}), (Boxes(2, {{}, {}})));
  EXPECT_EQ(first_boxes({1}, {3}, {Shard(0)}), (Boxes{{{0}, {1}}, {{1}, {0}}, {{1}, {0}}}));
}

TEST(PlacementTest, DimensionsOfTheMeshCutOneAfterTheOther) {
  using Boxes = std::vector<Box>;
  EXPECT_EQ(first_boxes({5, 4}, {2, 2}, {Shard(0), Shard(0)}),
            (Boxes{{{0, 0}, {2, 4}}, {{2, 0}, {1, 4}}, {{3, 0}, {1, 4}}, {{4, 0}, {1, 4}}}));
  EXPECT_EQ(first_boxes({5, 4}, {2, 2}, {Shard(0), Shard(1)}),
            (Boxes{{{0, 0}, {3, 2}}, {{0, 2}, {3, 2}}, {{3, 0}, {2, 2}}, {{3, 2}, {2, 2}}}));
  EXPECT_EQ(first_boxes({5, 4}, {2, 2}, {Replicate(), Shard(1)}),
            (Boxes{{{0, 0}, {5, 2}}, {{0, 2}, {5, 2}}, {{0, 0}, {5, 2}}, {{0, 2}, {5, 2}}}));
  // An inner chunk that is empty lies at the end of the whole, not of the outer chunk.
  EXPECT_EQ(first_boxes({3}, {2, 2}, {Shard(0), Shard(0)}), (Boxes{{{0}, {1}}, {{1}, {1}}, {{2}, {1}}, {{3}, {0}}}));
  EXPECT_EQ(first_boxes({4}, {2, 3}, {Shard(0), Shard(0)}),
            (Boxes{{{0}, {1}}, {{1}, {1}}, {{4}, {0}}, {{2}, {1}}, {{3}, {1}}, {{4}, {0}}}));
}

TEST(PlacementTest, AStridedShardIsCutAfterTheDimensionOfTheMeshBehindIt) {
  using Boxes = std::vector<Box>;
  EXPECT_EQ(first_boxes({8}, {2, 2}, {StridedShard(0, 2), Shard(0)}),
            (Boxes{{{0}, {2}}, {{4}, {2}}, {{2}, {2}}, {{6}, {2}}}));
  EXPECT_EQ(first_boxes({8}, {2}, {StridedShard(0, 1)}), first_boxes({8}, {2}, {Shard(0)}));

  // Alone it has gaps: 0-4 and 5-8 each in four chunks.
  using Part = LocalLayout::Part;
  const auto layout = [](int64_t rank) { return compute_local_layout({9}, {4}, {rank}, {StridedShard(0, 2)}); };
  EXPECT_EQ(layout(0).sizes, Dims{3});
  EXPECT_EQ(layout(0).parts, (std::vector<Part>{{{{0}, {2}}, {0}}, {{{5}, {1}}, {2}}}));
  EXPECT_EQ(layout(2).parts, (std::vector<Part>{{{{4}, {1}}, {0}}, {{{7}, {1}}, {1}}}));
  EXPECT_EQ(layout(3).parts, (std::vector<Part>{{{{8}, {1}}, {0}}}));
  // In two dimensions, the last running fastest.
  const LocalLayout both = compute_local_layout({4, 4}, {2, 2}, {0, 1}, {StridedShard(0, 2), StridedShard(1, 2)});
  EXPECT_EQ(both.sizes, (Dims{2, 2}));
  EXPECT_EQ(both.parts, (std::vector<Part>{{{{0, 1}, {1, 1}}, {0, 0}},
                                           {{{0, 3}, {1, 1}}, {0, 1}},
                                           {{{2, 1}, {1, 1}}, {1, 0}},
                                           {{{2, 3}, {1, 1}}, {1, 1}}}));
  // Without elements it is one part all the same.
  const LocalLayout empty = compute_local_layout({0, 4}, {2}, {1}, {StridedShard(1, 2)});
  EXPECT_EQ(empty.sizes, (Dims{0, 2}));
  EXPECT_EQ(empty.parts, (std::vector<Part>{{{{0, 1}, {0, 2}}, {0, 0}}}));
}

// Every element of the whole is at exactly one coordinate, but for the replicas; the local tensor has no gap.
TEST(PlacementTest, PartsTileTheWholeAndTheLocalTensor) {
  Random random(11);
  for (int round = 0; round < 400; ++round) {
    Dims shape(static_cast<size_t>(random_between(random, 1, 3)), 0);
    for (int64_t& size : shape) size = random_between(random, 0, 9);
    Dims mesh_shape(static_cast<size_t>(random_between(random, 1, 3)), 0);
    Placements placements;
    std::vector<size_t> replicating;
    for (size_t m = 0; m < mesh_shape.size(); ++m) {
      mesh_shape[m] = random_between(random, 1, 4);
      const int64_t dim = random_between(random, 0, static_cast<int64_t>(shape.size()) - 1);
      switch (random_between(random, 0, 2)) {
        case 0:
          placements.emplace_back(Replicate());
          replicating.push_back(m);
          break;
        case 1:
          placements.emplace_back(Shard(dim));
          break;
        default:
          placements.emplace_back(StridedShard(dim, random_between(random, 1, 5)));
      }
    }
    SCOPED_TRACE(to_string(shape) + " over " + to_string(mesh_shape) + " by " + to_string(placements));
    std::vector<Box> boxes;
    for (const Dims& coordinate : coordinates_of(mesh_shape)) {
      const LocalLayout layout = compute_local_layout(shape, mesh_shape, coordinate, placements);
      std::vector<Box> local;
      for (const LocalLayout::Part& part : layout.parts) local.push_back({part.local_offsets, part.box.sizes});
      const auto error = check_exact_tiling(layout.sizes, local);
      EXPECT_FALSE(error) << to_string(*error, local);
      bool is_first_replica = true;
      for (const size_t m : replicating) is_first_replica = is_first_replica && coordinate[m] == 0;
      for (const LocalLayout::Part& part : layout.parts) {
        if (is_first_replica) boxes.push_back(part.box);
      }
    }
    const auto error = check_exact_tiling(shape, boxes);
    EXPECT_FALSE(error) << to_string(*error, boxes);
  }
}

TEST(PlacementTest, NamesWhatDoesNotFit) {
  const auto code = ErrorCode::kInvalidArgument;
  EXPECT_ERROR(code, "wanted 2, found [Shard(0)] at coordinate [0, 0]",
               compute_local_layout({4}, {2, 2}, {0, 0}, {Shard(0)}));
  EXPECT_ERROR(code, "wanted 1, found [Replicate()] at coordinate [0, 0]",
               compute_local_layout({4}, {2}, {0, 0}, {Replicate()}));
  EXPECT_ERROR(code, "wanted inside [2], found [2]", compute_local_layout({4}, {2}, {2}, {Shard(0)}));
  EXPECT_ERROR(code, "wanted inside [2], found [-1]", compute_local_layout({4}, {2}, {-1}, {Replicate()}));
  EXPECT_ERROR(code, "wanted one of the 1 of [4], found Shard(1)", compute_local_layout({4}, {2}, {0}, {Shard(1)}));
  EXPECT_ERROR(code, "found Shard(-2)", compute_local_layout({4}, {2}, {0}, {Shard(-2)}));
  EXPECT_ERROR(code, "found Shard(0)", compute_local_layout({}, {2}, {0}, {Shard(0)}));
  EXPECT_ERROR(code, "found StridedShard(0, 0)", compute_local_layout({4}, {2}, {0}, {StridedShard(0, 0)}));
}

}  // namespace
}  // namespace reshard
