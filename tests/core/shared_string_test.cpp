// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/shared_string.h"

#include <gtest/gtest.h>

#include <thread>
#include <utility>
#include <vector>

namespace reshard {
namespace {

TEST(SharedStringTest, CopiesShareOneMemoryAndOutliveTheFirst) {
  SharedString first(std::string("a name that does not fit into the object"));
  const SharedString copy = first;
  EXPECT_EQ(copy.str().data(), first.str().data());
  const char* data = first.c_str();
  const SharedString moved = std::move(first);
  EXPECT_EQ(moved.c_str(), data);
  first = "another";
  EXPECT_EQ(copy, "a name that does not fit into the object");
  EXPECT_EQ(first, "another");
}

TEST(SharedStringTest, EqualTextIsEqualWhereverItCameFrom) {
  EXPECT_EQ(SharedString("name"), SharedString(std::string_view("name")));
  EXPECT_EQ(SharedString("name").hash(), SharedString("name").hash());
  EXPECT_FALSE(SharedString("name") == SharedString("nome"));
  EXPECT_TRUE("name" == SharedString("name"));
  EXPECT_LT(SharedString("a"), SharedString("b"));
  EXPECT_EQ(SharedStringHash{}(std::string_view("name")), SharedStringHash{}(SharedString("name")));
}

TEST(SharedStringTest, APermanentOneOutlivesItsCopies) {
  static const SharedString permanent = SharedString::permanent("torch.strided");
  const char* text = permanent.c_str();
  for (int i = 0; i < 3; ++i) {
    SharedString copy = permanent;
    SharedString moved = std::move(copy);
    copy = moved;
    EXPECT_EQ(copy.c_str(), text);
  }
  EXPECT_EQ(permanent, "torch.strided");
  EXPECT_TRUE(SharedString::permanent("").empty());
}

TEST(SharedStringTest, AnEmptyOneIsTheDefault) {
  EXPECT_TRUE(SharedString("").empty());
  EXPECT_EQ(SharedString(""), SharedString());
  EXPECT_EQ(SharedString().size(), 0U);
  EXPECT_EQ(SharedStringHash{}(std::string_view()), SharedString().hash());
}

TEST(SharedStringTest, APoolGivesTheSameMemoryForEqualText) {
  SharedStringPool pool;
  const SharedString a = pool.get("model.weight");
  EXPECT_EQ(pool.get(std::string("model.") + "weight").c_str(), a.c_str());
  EXPECT_NE(pool.get("model.bias").c_str(), a.c_str());
}

TEST(SharedStringTest, CopiesMayComeAndGoOnSeveralThreads) {
  const SharedString shared("shared by all threads");
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 1000; ++i) {
          std::vector<SharedString> copies(10, shared);
          copies.pop_back();
        }
      });
    }
  }
  EXPECT_EQ(shared, "shared by all threads");
}

}  // namespace
}  // namespace reshard
