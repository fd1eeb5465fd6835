// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/ordered_map.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace reshard {
namespace {

TEST(OrderedMapTest, IteratesInInsertionOrder) {
  OrderedMap<std::string, int> map;
  EXPECT_TRUE(map.insert("z", 1));
  EXPECT_TRUE(map.insert("a", 2));
  map["m"] = 3;
  map["z"] = 4;  // keeps its place
  EXPECT_FALSE(map.insert("a", 9));

  std::string seen;
  for (const auto& [key, value] : map) seen += key + std::to_string(value);
  EXPECT_EQ(seen, "z4a2m3");
  EXPECT_EQ(map.size(), 3U);
}

TEST(OrderedMapTest, FindsValuesAndTheirPositions) {
  OrderedMap<std::string, int> map;
  map.reserve(100);
  for (int i = 0; i < 100; ++i) map.insert(std::to_string(i), i);
  ASSERT_NE(map.find("57"), nullptr);
  EXPECT_EQ(*map.find("57"), 57);
  EXPECT_EQ(map.position("57"), 57U);
  EXPECT_EQ(map.find("100"), nullptr);
  EXPECT_EQ(map.position("100"), std::nullopt);
  *map.find("57") = 1;
  EXPECT_EQ(map["57"], 1);
  EXPECT_FALSE(map.contains("x"));
}

TEST(OrderedMapTest, ManyItemsAreTakenAtOnce) {
  OrderedMap<std::string, int> map;
  map.insert("before", 1);
  std::vector<std::pair<std::string, int>> items;
  for (int i = 0; i < 1000; ++i) items.emplace_back(std::to_string(i), i);
  EXPECT_EQ(map.assign(items), std::nullopt);
  EXPECT_EQ(map.size(), 1000U);
  EXPECT_FALSE(map.contains("before"));
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(map.position(std::to_string(i)), static_cast<size_t>(i));
  EXPECT_FALSE(map.insert("999", 0));
  EXPECT_TRUE(map.insert("1000", 0));
  EXPECT_EQ(map.assign({}), std::nullopt);
  EXPECT_TRUE(map.empty());
  EXPECT_FALSE(map.contains("5"));
}

TEST(OrderedMapTest, OfManyItemsTheFirstWhoseKeyIsThereTwiceIsNamed) {
  for (const size_t first : {0U, 5U, 90U, 98U}) {
    for (const size_t second : {99U, 100U}) {
      std::vector<std::pair<std::string, int>> items;
      for (int i = 0; i < 101; ++i) items.emplace_back(std::to_string(i), i);
      items[second].first = items[first].first;
      OrderedMap<std::string, int> map;
      EXPECT_EQ(map.assign(items), second) << first;
    }
  }
}

TEST(OrderedMapTest, EqualityIncludesTheOrder) {
  OrderedMap<std::string, int> a;
  OrderedMap<std::string, int> b;
  a.insert("x", 1);
  a.insert("y", 2);
  b.insert("y", 2);
  b.insert("x", 1);
  EXPECT_FALSE(a == b);
  OrderedMap<std::string, int> copy = a;
  EXPECT_TRUE(a == copy);
  copy["x"] = 5;
  EXPECT_EQ(*a.find("x"), 1) << "a copy shares nothing";
}

}  // namespace
}  // namespace reshard
