// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/value_codec.h"

#include <gtest/gtest.h>

#include <limits>

#include "reshard/core/error.h"
#include "reshard/format/torch_archive.h"

namespace reshard {
namespace {

StateValue round_trip(const StateValue& value) { return decode_value(encode_value(value)); }

TEST(ValueCodecTest, KeepsEveryPlainType) {
  EXPECT_TRUE(round_trip(None{}).is<None>());
  EXPECT_EQ(round_trip(true).as<bool>(), true);
  for (int64_t v :
       {int64_t{0}, int64_t{-1}, int64_t{255}, int64_t{65536}, int64_t{1} << 40, std::numeric_limits<int64_t>::min()}) {
    EXPECT_EQ(round_trip(v).as<int64_t>(), v);
  }
  EXPECT_EQ(round_trip(0.1).as<double>(), 0.1);
  EXPECT_EQ(round_trip("h\xC3\xA9llo").as<std::string>(), "h\xC3\xA9llo");
  const std::string raw("\x00\xFF\x80", 3);
  EXPECT_EQ(round_trip(ByteString{raw}).as<ByteString>().data, raw);
  EXPECT_EQ(round_trip(ByteString{}).as<ByteString>().data, "");
}

TEST(ValueCodecTest, KeepsNestedContainersAndTheTensorsInThem) {
  const at::Tensor t = at::arange(6, at::kFloat).view({2, 3}).t();
  const StateValue value = StateTuple{{t, StateList{1, StateDict{{"k", StateTuple{{0.9, 0.999}}}}}}};
  const StateValue back = round_trip(value);
  const auto& items = back.as<StateTuple>().items;
  EXPECT_TRUE(items[0].as<at::Tensor>().equal(t));
  EXPECT_EQ(items[1].as<StateList>()[1].as<StateDict>().at("k").as<StateTuple>().items[1].as<double>(), 0.999);
}

TEST(ValueCodecTest, WhatHasNoTypeHereStaysOpaqueAndUnchanged) {
  pickle::Tree tree;
  pickle::Object thing;
  thing.callable = tree.global("some.module", "Thing");
  thing.args = tree.tuple({tree.integer(1)});
  const pickle::Value user_class = tree.object(thing);
  const Bytes archive = encode_value_archive(user_class);
  const StateValue value = decode_value(archive);
  ASSERT_TRUE(value.is<OpaqueValue>());
  EXPECT_EQ(encode_value(value), archive);
  EXPECT_TRUE(decode_value(encode_value_archive(tree.dict({{tree.integer(1), tree.str("x")}}))).is<OpaqueValue>());
}

/// A call of torch._utils.<function> that rebuilds a float32 tensor, if it is one, from storage 0 of 4 bytes.
pickle::Value rebuilt(pickle::Tree& tree, const std::string& function, int64_t size, int64_t stride) {
  const auto call = [&](const char* module, const std::string& name, std::vector<pickle::Value> args) {
    pickle::Object object;
    object.callable = tree.global(module, name);
    object.args = tree.tuple(args);
    return tree.object(object);
  };
  const pickle::Value storage = tree.persistent(tree.tuple(
      {tree.str("storage"), tree.global("torch", "FloatStorage"), tree.str("0"), tree.str("cpu"), tree.integer(1)}));
  return call("torch._utils", function,
              {storage, tree.integer(0), tree.tuple({tree.integer(size)}), tree.tuple({tree.integer(stride)}),
               tree.boolean(false), call("collections", "OrderedDict", {})});
}

TEST(ValueCodecTest, TensorsThatCannotBeHeldStayOpaque) {
  const Bytes one(4);
  const std::vector<ByteSpan> storages = {one};
  pickle::Tree tree;
  const auto decoded = [&](const pickle::Value& value) {
    const Bytes archive = encode_value_archive(value, storages);
    const StateValue back = decode_value(archive);
    EXPECT_TRUE(!back.is<OpaqueValue>() || encode_value(back) == archive);
    return back;
  };
  EXPECT_TRUE(decoded(tree.tuple({rebuilt(tree, "_rebuild_sparse_tensor", 1, 1)})).is<OpaqueValue>());
  // One element, expanded to a terabyte; and one of a moderate size, a thousand times.
  EXPECT_TRUE(decoded(rebuilt(tree, "_rebuild_tensor_v2", int64_t{1} << 38, 0)).is<OpaqueValue>());
  const pickle::Value megabyte = rebuilt(tree, "_rebuild_tensor_v2", 1 << 18, 0);
  EXPECT_TRUE(decoded(tree.list(std::vector<pickle::Value>(1000, megabyte))).is<OpaqueValue>());
  const StateValue few = decoded(tree.list(std::vector<pickle::Value>(3, megabyte)));
  EXPECT_EQ(few.as<StateList>()[2].as<at::Tensor>().numel(), 1 << 18);
}

TEST(ValueCodecTest, RefusesWhatCannotBeSavedInsideAnotherValue) {
  const ShardedTensor sharded({2}, at::kFloat, {{{{0}, {2}}, at::zeros({2})}});
  EXPECT_THROW(encode_value(StateTuple{{sharded}}), Error);
}

}  // namespace
}  // namespace reshard
