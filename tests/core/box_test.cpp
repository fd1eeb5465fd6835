// SPDX-License-Identifier: BSD-3-Clause
// Box algebra against brute force: every function has a slow and obvious twin here that looks at single elements.
#include "reshard/core/box.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "support/expect_error.h"

namespace reshard {
namespace {

using Random = std::mt19937_64;

int64_t uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

Dims random_shape(Random& random, size_t rank, int64_t low, int64_t high) {
  Dims shape(rank, 0);
  for (int64_t& size : shape) size = uniform(random, low, high);
  return shape;
}

Box random_box_inside(Random& random, const Dims& shape) {
  Box box{Dims(shape.size(), 0), Dims(shape.size(), 0)};
  for (size_t i = 0; i < shape.size(); ++i) {
    box.offsets[i] = uniform(random, 0, shape[i]);
    box.sizes[i] = uniform(random, 0, shape[i] - box.offsets[i]);
  }
  return box;
}

// Every coordinate of a box, in row-major order.
std::vector<Dims> points_of(const Box& box) {
  std::vector<Dims> points;
  if (std::any_of(box.sizes.begin(), box.sizes.end(), [](int64_t n) { return n == 0; })) return points;
  Dims at = box.offsets;
  for (;;) {
    points.push_back(at);
    size_t i = at.size();
    for (; i > 0; --i) {
      if (++at[i - 1] < box.offsets[i - 1] + box.sizes[i - 1]) break;
      at[i - 1] = box.offsets[i - 1];
    }
    if (i == 0) return points;
  }
}

int64_t flat_index(const Dims& shape, const Dims& at) {
  int64_t flat = 0;
  for (size_t i = 0; i < shape.size(); ++i) flat = flat * shape[i] + at[i];
  return flat;
}

bool holds(const Box& box, const Dims& at) {
  for (size_t i = 0; i < at.size(); ++i) {
    if (at[i] < box.offsets[i] || at[i] >= box.offsets[i] + box.sizes[i]) return false;
  }
  return true;
}

// --- small operations
// -------------------------------------------------------------------------------------------------

TEST(BoxTest, TextIsOffsetsPlusSizes) { EXPECT_EQ(to_string(Box{{2, 0}, {2, 8}}), "[2, 0]+[2, 8]"); }

TEST(BoxTest, InsideMeansNoElementOutside) {
  const Dims shape{4, 8};
  EXPECT_TRUE(is_inside(whole_box(shape), shape));
  EXPECT_TRUE(is_inside({{4, 8}, {0, 0}}, shape)) << "an empty box at the far corner";
  EXPECT_TRUE(is_inside({}, {}));
  EXPECT_FALSE(is_inside({{1, 0}, {4, 8}}, shape));
  EXPECT_FALSE(is_inside({{5, 0}, {0, 8}}, shape));
  EXPECT_FALSE(is_inside({{-1, 0}, {2, 8}}, shape));
  EXPECT_FALSE(is_inside({{0, 0}, {-1, 8}}, shape));
  EXPECT_FALSE(is_inside({{0}, {4}}, shape));
  EXPECT_FALSE(is_inside({{0, 0}, {4}}, shape));
}

TEST(BoxTest, InsideDoesNotOverflow) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_FALSE(is_inside({{kMax}, {kMax}}, {10}));
  EXPECT_FALSE(is_inside({{1}, {kMax}}, {kMax}));
  EXPECT_TRUE(is_inside({{1}, {kMax - 1}}, {kMax}));
}

TEST(BoxTest, IntersectionHoldsExactlyTheCommonElements) {
  Random random(1);
  for (int round = 0; round < 2000; ++round) {
    const Dims shape = random_shape(random, static_cast<size_t>(uniform(random, 0, 3)), 0, 4);
    const Box a = random_box_inside(random, shape);
    const Box b = random_box_inside(random, shape);
    std::vector<Dims> common;
    for (const Dims& at : points_of(a)) {
      if (holds(b, at)) common.push_back(at);
    }
    const auto result = intersect(a, b);
    ASSERT_EQ(result ? points_of(*result) : std::vector<Dims>(), common) << to_string(a) << " and " << to_string(b);
    ASSERT_EQ(result.has_value(), !common.empty());
  }
}

TEST(BoxTest, IntersectionRefusesOtherRanksAndEndsBeyondInt64) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "different rank", intersect({{0}, {1}}, {{0, 0}, {1, 1}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "different rank", intersect({{0}, {1, 2}}, {{0}, {1}}));
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_ERROR(ErrorCode::kCorruptData, "end of box", intersect({{1}, {kMax}}, {{0}, {1}}));
}

TEST(BoxTest, SplitGivesTheChunksOfTorchChunk) {
  const auto parts = [](int64_t n, int64_t count) {
    std::vector<std::pair<int64_t, int64_t>> result;
    for (int64_t i = 0; i < count; ++i) {
      const Box part = split_evenly({{7, 100}, {3, n}}, 1, count, i);
      EXPECT_EQ(part.offsets[0], 7);
      EXPECT_EQ(part.sizes[0], 3);
      result.emplace_back(part.offsets[1] - 100, part.sizes[1]);
    }
    return result;
  };
  using Parts = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(parts(8, 2), (Parts{{0, 4}, {4, 4}}));
  EXPECT_EQ(parts(5, 4), (Parts{{0, 2}, {2, 2}, {4, 1}, {5, 0}}));
  EXPECT_EQ(parts(1, 4), (Parts{{0, 1}, {1, 0}, {1, 0}, {1, 0}}));
  EXPECT_EQ(parts(0, 2), (Parts{{0, 0}, {0, 0}}));
  EXPECT_EQ(parts(9, 1), (Parts{{0, 9}}));
}

TEST(BoxTest, SplitPartsAlwaysTileTheDimension) {
  for (int64_t n = 0; n <= 20; ++n) {
    for (int64_t count = 1; count <= 25; ++count) {
      int64_t next = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Box part = split_evenly({{0}, {n}}, 0, count, i);
        ASSERT_EQ(part.offsets[0], next) << n << " in " << count;
        ASSERT_LE(part.sizes[0], (n + count - 1) / count);
        next += part.sizes[0];
      }
      ASSERT_EQ(next, n);
    }
  }
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(split_evenly({{0}, {kMax}}, 0, kMax, kMax - 1), (Box{{kMax - 1}, {1}}));
  EXPECT_EQ(split_evenly({{0}, {kMax - 1}}, 0, kMax, kMax - 1), (Box{{kMax - 1}, {0}}));
}

TEST(BoxTest, SplitRefusesPartsThatDoNotExist) {
  const Box box{{0}, {4}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "dimension 1", split_evenly(box, 1, 2, 0));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "part 2 of 2", split_evenly(box, 0, 2, 2));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "part -1", split_evenly(box, 0, 2, -1));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "of 0", split_evenly(box, 0, 0, 0));
}

// --- flat ranges
// ------------------------------------------------------------------------------------------------------

void check_flat_range(const Dims& shape, int64_t begin, int64_t end) {
  const std::string label = to_string(shape) + " [" + std::to_string(begin) + ", " + std::to_string(end) + ")";
  const std::vector<Box> boxes = flat_range_to_boxes(shape, begin, end);
  const size_t rank = shape.size();
  ASSERT_LE(boxes.size(), rank == 0 ? 1 : 2 * rank - 1) << label;
  int64_t next = begin;
  for (const Box& box : boxes) {
    const std::vector<Dims> points = points_of(box);
    ASSERT_FALSE(points.empty()) << label;
    for (const Dims& at : points) ASSERT_EQ(flat_index(shape, at), next++) << label << " " << to_string(box);
  }
  ASSERT_EQ(next, end) << label;
}

TEST(BoxTest, FlatRangesOfAllSmallTensorsAreCoveredInOrder) {
  for (const Dims& shape : {Dims(), Dims{1}, Dims{7}, Dims{3, 4}, Dims{1, 5}, Dims{5, 1}, Dims{2, 3, 4}, Dims{3, 1, 4},
                            Dims{1, 1, 1}, Dims{2, 2, 2, 3}, Dims{2, 1, 3, 2}, Dims{0}, Dims{3, 0, 2}}) {
    const int64_t n = volume(shape);
    for (int64_t begin = 0; begin <= n; ++begin) {
      for (int64_t end = begin; end <= n; ++end) check_flat_range(shape, begin, end);
    }
  }
}

TEST(BoxTest, FlatRangesOfRandomTensorsAreCoveredInOrder) {
  Random random(2);
  for (int round = 0; round < 2000; ++round) {
    const Dims shape = random_shape(random, static_cast<size_t>(uniform(random, 0, 5)), 1, 5);
    const int64_t begin = uniform(random, 0, volume(shape));
    check_flat_range(shape, begin, uniform(random, begin, volume(shape)));
  }
}

TEST(BoxTest, FlatRangeMayNeedAllOfItsBoxes) {
  const std::vector<Box> boxes = flat_range_to_boxes({4, 4, 4}, 3, 61);
  EXPECT_EQ(boxes, (std::vector<Box>{{{0, 0, 3}, {1, 1, 1}},
                                     {{0, 1, 0}, {1, 3, 4}},
                                     {{1, 0, 0}, {2, 4, 4}},
                                     {{3, 0, 0}, {1, 3, 4}},
                                     {{3, 3, 0}, {1, 1, 1}}}));
}

TEST(BoxTest, FlatRangeOutsideTheTensorIsRefused) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "[0, 13)", flat_range_to_boxes({3, 4}, 0, 13));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "[-1, 3)", flat_range_to_boxes({3, 4}, -1, 3));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "[3, 2)", flat_range_to_boxes({3, 4}, 3, 2));
}

// --- runs
// -------------------------------------------------------------------------------------------------------------

TEST(BoxTest, RunsVisitEveryElementOnceAndAreMaximal) {
  Random random(3);
  for (int round = 0; round < 3000; ++round) {
    const size_t rank = static_cast<size_t>(uniform(random, 0, 4));
    Box container{random_shape(random, rank, -3, 3), random_shape(random, rank, 0, 4)};
    Box part = random_box_inside(random, container.sizes);
    for (size_t i = 0; i < rank; ++i) part.offsets[i] += container.offsets[i];

    std::vector<int64_t> wanted;
    for (Dims at : points_of(part)) {
      for (size_t i = 0; i < rank; ++i) at[i] -= container.offsets[i];
      wanted.push_back(flat_index(container.sizes, at));
    }
    std::vector<int64_t> visited;
    for_each_run(container, part, [&](int64_t container_offset, int64_t part_offset, int64_t length) {
      ASSERT_GT(length, 0);
      ASSERT_EQ(part_offset, static_cast<int64_t>(visited.size()));
      if (!visited.empty()) {
        ASSERT_NE(container_offset, visited.back() + 1) << "two runs should have been one";
      }
      for (int64_t i = 0; i < length; ++i) visited.push_back(container_offset + i);
    });
    ASSERT_EQ(visited, wanted) << to_string(part) << " in " << to_string(container);
  }
}

TEST(BoxTest, RunsCollapseWholeTrailingDimensions) {
  using Run = std::tuple<int64_t, int64_t, int64_t>;
  const auto runs = [](const Box& container, const Box& part) {
    std::vector<Run> result;
    for_each_run(container, part, [&](int64_t c, int64_t p, int64_t n) { result.emplace_back(c, p, n); });
    return result;
  };
  EXPECT_EQ(runs(whole_box({4, 8}), {{1, 0}, {2, 8}}), (std::vector<Run>{{8, 0, 16}}));
  EXPECT_EQ(runs(whole_box({4, 8}), {{1, 2}, {2, 3}}), (std::vector<Run>{{10, 0, 3}, {18, 3, 3}}));
  EXPECT_EQ(runs(whole_box({}), {}), (std::vector<Run>{{0, 0, 1}}));
  EXPECT_EQ(runs(whole_box({4, 8}), {{1, 2}, {0, 3}}), std::vector<Run>());
}

TEST(BoxTest, RunsRefuseAPartOutsideTheContainer) {
  const auto nothing = [](int64_t, int64_t, int64_t) {};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "is not inside", for_each_run({{2}, {2}}, {{1}, {2}}, nothing));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "is not inside", for_each_run({{0}, {2}}, {{0, 0}, {1, 1}}, nothing));
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "is not inside", for_each_run({{1}, {2}}, {{kMin}, {1}}, nothing));
}

// --- tiling
// -----------------------------------------------------------------------------------------------------------

// A tiling made by cutting boxes in two at random until luck or size stops it.
void cut_at_random(Random& random, const Box& box, double stop, std::vector<Box>& tiles) {
  std::vector<size_t> dims;
  for (size_t i = 0; i < box.sizes.size(); ++i) {
    if (box.sizes[i] > 1) dims.push_back(i);
  }
  if (dims.empty() || std::uniform_real_distribution<>()(random) < stop) {
    tiles.push_back(box);
    return;
  }
  const size_t dim = dims[static_cast<size_t>(uniform(random, 0, static_cast<int64_t>(dims.size()) - 1))];
  const int64_t cut = uniform(random, 1, box.sizes[dim] - 1);
  Box low = box;
  Box high = box;
  low.sizes[dim] = cut;
  high.offsets[dim] += cut;
  high.sizes[dim] -= cut;
  cut_at_random(random, low, stop, tiles);
  cut_at_random(random, high, stop, tiles);
}

std::vector<Box> random_tiling(Random& random, const Dims& shape, double stop) {
  std::vector<Box> tiles;
  cut_at_random(random, whole_box(shape), stop, tiles);
  std::shuffle(tiles.begin(), tiles.end(), random);
  return tiles;
}

// Zero to three of: a chunk lost, doubled, replaced, made from nothing, or an empty one added.
void damage(Random& random, const Dims& shape, std::vector<Box>& chunks) {
  for (int64_t i = uniform(random, 0, 3); i > 0; --i) {
    const auto any = [&] { return static_cast<size_t>(uniform(random, 0, static_cast<int64_t>(chunks.size()) - 1)); };
    switch (chunks.empty() ? 3 : uniform(random, 0, 4)) {
      case 0:
        chunks.erase(chunks.begin() + static_cast<std::ptrdiff_t>(any()));
        break;
      case 1:
        chunks.push_back(chunks[any()]);
        break;
      case 2:
        chunks[any()] = random_box_inside(random, shape);
        break;
      case 3:
        chunks.push_back(random_box_inside(random, shape));
        break;
      default:
        Box empty = random_box_inside(random, shape);
        if (!shape.empty()) {
          empty.sizes[0] = 0;
          chunks.push_back(empty);
        }
    }
  }
}

// The verdict of one counter for each element. `smallest` also demands the first defect in row-major order.
void check_against_bitmap(const Dims& shape, const std::vector<Box>& chunks, bool smallest) {
  std::vector<int> count(static_cast<size_t>(volume(shape)));
  for (const Box& chunk : chunks) {
    for (const Dims& at : points_of(chunk)) ++count[static_cast<size_t>(flat_index(shape, at))];
  }
  std::string label = to_string(shape);
  if (chunks.size() < 20) {
    for (const Box& chunk : chunks) label += "\n" + to_string(chunk);
  }
  const auto first_defect = std::find_if(count.begin(), count.end(), [](int n) { return n != 1; });
  const auto error = check_exact_tiling(shape, chunks);
  ASSERT_EQ(error.has_value(), first_defect != count.end()) << label << (error ? to_string(*error, chunks) : "");
  if (!error) return;
  label += "\n" + to_string(*error, chunks);
  ASSERT_NE(error->kind, TilingError::Kind::kOutOfBounds) << label;
  const auto at = static_cast<size_t>(flat_index(shape, error->at));
  ASSERT_LT(at, count.size()) << label;
  if (smallest) {
    ASSERT_EQ(at, static_cast<size_t>(first_defect - count.begin())) << label;
  }
  if (error->kind == TilingError::Kind::kHole) {
    ASSERT_EQ(count[at], 0) << label;
  } else {
    ASSERT_GE(count[at], 2) << label;
    ASSERT_LT(error->first, error->second) << label;
    ASSERT_TRUE(holds(chunks.at(error->first), error->at)) << label;
    ASSERT_TRUE(holds(chunks.at(error->second), error->at)) << label;
  }
}

TEST(BoxTest, ExactTilingAgreesWithABitmap) {
  Random random(4);
  int defects = 0;
  for (int round = 0; round < 20000; ++round) {
    const size_t rank = static_cast<size_t>(round % 5);
    const Dims shape = random_shape(random, rank, round % 50 == 0 ? 0 : 1, rank > 2 ? 4 : 6);
    std::vector<Box> chunks = random_tiling(random, shape, 0.2);
    damage(random, shape, chunks);
    check_against_bitmap(shape, chunks, true);
    if (HasFatalFailure()) return;
    defects += check_exact_tiling(shape, chunks).has_value() ? 1 : 0;
  }
  EXPECT_GT(defects, 5000);
  EXPECT_LT(defects, 15000);
}

TEST(BoxTest, ExactTilingWithManyCutsAndManyChunksAgreesWithABitmap) {
  Random random(5);
  const Dims shape(12, 2);  // 12 cut dimensions: corners would outnumber the chunks by far
  for (int round = 0; round < 8; ++round) {
    std::vector<Box> chunks = random_tiling(random, shape, 0.02);
    ASSERT_GT(chunks.size(), (size_t{1} << 22) >> 12) << "few enough chunks for the other method";
    if (round != 0) damage(random, shape, chunks);
    check_against_bitmap(shape, chunks, false);
    if (HasFatalFailure()) return;
  }
}

TEST(BoxTest, ExactTilingOfTheHighestRankFindsTheLostChunk) {
  const Dims shape(kMaxTensorRank - 2, 2);  // 2^62 elements
  std::vector<Box> stairs;                  // half of it, half of the rest, ...
  Box rest = whole_box(shape);
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    Box low = rest;
    low.sizes[dim] = 1;
    stairs.push_back(low);
    rest.offsets[dim] = 1;
    rest.sizes[dim] = 1;
  }
  stairs.push_back(rest);
  EXPECT_EQ(check_exact_tiling(shape, stairs), std::nullopt);
  for (size_t lost : {size_t{0}, size_t{17}, stairs.size() - 1}) {
    std::vector<Box> chunks = stairs;
    chunks.erase(chunks.begin() + static_cast<std::ptrdiff_t>(lost));
    const auto error = check_exact_tiling(shape, chunks);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->kind, TilingError::Kind::kHole);
    EXPECT_EQ(error->at, stairs[lost].offsets);
  }
  stairs.push_back(stairs[40]);
  const auto error = check_exact_tiling(shape, stairs);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->kind, TilingError::Kind::kOverlap);
  EXPECT_EQ(error->first, 40U);
  EXPECT_EQ(error->second, stairs.size() - 1);
}

TEST(BoxTest, OverlapOfTheLastTwoChunksAlongAManyTimesCutTensorIsNamed) {
  Dims shape(24, 2);
  shape[0] = 6;
  std::vector<Box> chunks;
  Box rest = whole_box(shape);
  rest.sizes[0] = 2;
  for (size_t dim = 1; dim < shape.size(); ++dim) {  // [0, 2) along the first dimension, cut along all others
    Box low = rest;
    low.sizes[dim] = 1;
    chunks.push_back(low);
    rest.offsets[dim] = 1;
    rest.sizes[dim] = 1;
  }
  chunks.push_back(rest);
  Box high = whole_box(shape);
  high.offsets[0] = 2;
  high.sizes[0] = 4;
  chunks.push_back(high);
  EXPECT_EQ(check_exact_tiling(shape, chunks), std::nullopt);
  Box twice = high;
  twice.offsets[0] = 5;
  twice.sizes[0] = 1;
  chunks.push_back(twice);
  const auto error = check_exact_tiling(shape, chunks);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->kind, TilingError::Kind::kOverlap);
  EXPECT_EQ(error->first, chunks.size() - 2);
  EXPECT_EQ(error->second, chunks.size() - 1);
  EXPECT_EQ(error->at, twice.offsets);
}

TEST(BoxTest, ChunkOutsideTheTensorIsNamed) {
  const std::vector<Box> chunks{{{0}, {4}}, {{4}, {1}}};
  const auto error = check_exact_tiling({4}, chunks);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->kind, TilingError::Kind::kOutOfBounds);
  EXPECT_EQ(error->first, 1U);
  EXPECT_EQ(to_string(*error, chunks), "chunk 1 [4]+[1] lies outside the tensor");
}

TEST(BoxTest, EmptyTensorNeedsNoChunksAndTakesEmptyOnes) {
  EXPECT_EQ(check_exact_tiling({0, 3}, {}), std::nullopt);
  EXPECT_EQ(check_exact_tiling({0, 3}, std::vector<Box>{{{0, 0}, {0, 3}}, {{0, 1}, {0, 2}}}), std::nullopt);
  EXPECT_TRUE(check_exact_tiling({0, 3}, std::vector<Box>{{{0, 2}, {0, 2}}}).has_value());
}

TEST(BoxTest, ScalarNeedsExactlyOneChunk) {
  EXPECT_EQ(check_exact_tiling({}, std::vector<Box>(1)), std::nullopt);
  const auto none = check_exact_tiling({}, {});
  ASSERT_TRUE(none.has_value());
  EXPECT_EQ(to_string(*none, {}), "no chunk covers []");
  const std::vector<Box> two(2);
  const auto both = check_exact_tiling({}, two);
  ASSERT_TRUE(both.has_value());
  EXPECT_EQ(to_string(*both, two), "chunks 0 []+[] and 1 []+[] overlap at []");
}

TEST(BoxTest, ExactTilingOfALargeGridFindsTheOneLostChunk) {
  std::vector<Box> chunks;
  for (int64_t i = 0; i < 300; ++i) {
    for (int64_t j = 0; j < 1000; ++j) chunks.push_back({{i * 3, j * 5}, {3, 5}});
  }
  EXPECT_EQ(check_exact_tiling({900, 5000}, chunks), std::nullopt);
  std::shuffle(chunks.begin(), chunks.end(), Random(6));
  std::swap(chunks[150000], chunks.back());
  const Box lost = chunks.back();
  chunks.pop_back();
  const auto error = check_exact_tiling({900, 5000}, chunks);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->at, lost.offsets);
}

}  // namespace
}  // namespace reshard
