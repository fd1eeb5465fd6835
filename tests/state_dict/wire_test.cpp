// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/wire.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>

#include "reshard/core/error.h"

namespace reshard {
namespace {

at::Tensor on_meta_device(at::ScalarType dtype, const Dims& sizes) {
  return at::empty({sizes.data(), sizes.size()}, at::TensorOptions().dtype(dtype).device(c10::kMeta));
}

StateDict example() {
  const at::Tensor base = at::arange(12, at::kFloat).reshape({3, 4});
  const at::Tensor part = at::arange(8, at::kBFloat16).reshape({2, 4});
  return {{"none", None{}},
          {"flag", true},
          {"off", false},
          {"int", int64_t{-5}},
          {"float", std::numeric_limits<double>::denorm_min()},
          {"text", "h\xC3\xA9"},
          {"bytes", ByteString{std::string("\0\xFF", 2)}},
          {"step", at::scalar_tensor(7, at::kFloat)},
          {"half", at::scalar_tensor(1.5, at::kHalf)},
          {"a", base},
          {"tied", base.view({3, 4})},
          {"transposed", base.t()},
          {"empty", at::empty({0, 4})},
          {"also empty", at::empty({0, 4}, at::kLong)},
          {"sharded", ShardedTensor({5, 4}, at::kBFloat16, {{{{3, 0}, {2, 4}}, part}}, true)},
          {"nowhere", ShardedTensor({5, 4}, at::kFloat, {})},
          {"list", StateList{1, StateDict{{"deep", base}}, StateTuple{{0.25, None{}}}}},
          {"opaque", OpaqueValue{std::make_shared<const Bytes>(Bytes{std::byte{1}, std::byte{2}})}}};
}

TEST(WireTest, BringsEverythingButElements) {
  const StateDict state = example();
  std::vector<at::Tensor> sent;
  const Bytes message = encode_state_dict(state, sent);
  ASSERT_EQ(sent.size(), 5u) << "a, its transpose, two empty ones and a shard";
  size_t made = 0;
  const StateDict got = decode_state_dict(message, [&](at::ScalarType dtype, const Dims& sizes) {
    EXPECT_EQ(to_dims(sent[made].sizes()), sizes);
    EXPECT_EQ(sent[made].scalar_type(), dtype);
    return sent[made++].clone();
  });
  EXPECT_EQ(made, sent.size());
  ASSERT_EQ(got.size(), state.size());
  auto other = state.items().begin();
  for (const auto& [key, value] : got.items()) {
    EXPECT_EQ(key, other->first);
    EXPECT_STREQ(value.type_name(), other->second.type_name()) << key;
    ++other;
  }
  EXPECT_TRUE(got.at("flag").as<bool>());
  EXPECT_FALSE(got.at("off").as<bool>());
  EXPECT_EQ(got.at("int").as<int64_t>(), -5);
  EXPECT_EQ(got.at("float").as<double>(), std::numeric_limits<double>::denorm_min());
  EXPECT_EQ(got.at("text").as<std::string>(), "h\xC3\xA9");
  EXPECT_EQ(got.at("bytes").as<ByteString>().data, std::string("\0\xFF", 2));
  EXPECT_EQ(got.at("step").as<at::Tensor>().item<float>(), 7);
  EXPECT_EQ(got.at("half").as<at::Tensor>().scalar_type(), at::kHalf);
  EXPECT_EQ(got.at("half").as<at::Tensor>().item<float>(), 1.5f);
  EXPECT_TRUE(at::equal(got.at("a").as<at::Tensor>(), state.at("a").as<at::Tensor>()));
  EXPECT_EQ(got.at("tied").as<at::Tensor>().const_data_ptr(), got.at("a").as<at::Tensor>().const_data_ptr());
  EXPECT_TRUE(at::equal(got.at("transposed").as<at::Tensor>(), state.at("a").as<at::Tensor>().t()));
  const ShardedTensor& sharded = got.at("sharded").as<ShardedTensor>();
  EXPECT_EQ(sharded.size(), (Dims{5, 4}));
  EXPECT_TRUE(sharded.requires_grad());
  ASSERT_EQ(sharded.shards().size(), 1u);
  EXPECT_EQ(sharded.shards()[0].box, (Box{{3, 0}, {2, 4}}));
  EXPECT_TRUE(got.at("nowhere").as<ShardedTensor>().shards().empty());
  const StateList& list = got.at("list").as<StateList>();
  EXPECT_EQ(list[1].as<StateDict>().at("deep").as<at::Tensor>().const_data_ptr(),
            got.at("a").as<at::Tensor>().const_data_ptr());
  EXPECT_EQ(list[2].as<StateTuple>().items[0].as<double>(), 0.25);
  EXPECT_EQ(*got.at("opaque").as<OpaqueValue>().archive, *state.at("opaque").as<OpaqueValue>().archive);
}

TEST(WireTest, EveryCutAndEveryChangedByteIsAnErrorOrAnotherDict) {
  std::vector<at::Tensor> sent;
  const Bytes message = encode_state_dict(example(), sent);
  for (size_t n = 0; n < message.size(); ++n) {
    EXPECT_THROW(decode_state_dict(ByteSpan(message).first(n), on_meta_device), Error) << n;
    for (const int bit : {0, 3, 7}) {
      Bytes changed = message;
      changed[n] ^= static_cast<std::byte>(1 << bit);
      try {
        decode_state_dict(changed, on_meta_device);
      } catch (const Error&) {
      } catch (const c10::Error&) {  // sizes that no tensor has
      }
    }
  }
  Bytes longer = message;
  longer.push_back({});
  EXPECT_THROW(decode_state_dict(longer, on_meta_device), Error);
}

TEST(WireTest, RefusesWhatHasNoDenseElementsByName) {
  std::vector<at::Tensor> sent;
  for (const at::Tensor& tensor :
       {at::Tensor(), at::ones({2, 2}).to_sparse(), at::empty({2}, at::device(c10::kMeta))}) {
    try {
      encode_state_dict({{"outer", StateDict{{"bad", tensor}}}}, sent);
      FAIL() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_EQ(error.context().key, "outer.bad");
    }
  }
  StateDict deep;
  for (int i = 0; i < 2000; ++i) deep = {{"d", deep}};
  EXPECT_THROW(encode_state_dict(deep, sent), Error);
}

TEST(WireTest, TransformingKeepsAllButTheTensors) {
  const StateDict state = example();
  int count = 0;
  const StateDict doubled = transform_tensors(state, [&](const at::Tensor& t) {
                              ++count;
                              return t + t;
                            }).as<StateDict>();
  EXPECT_EQ(count, 9);
  EXPECT_EQ(doubled.at("step").as<at::Tensor>().item<float>(), 14);
  EXPECT_TRUE(at::equal(doubled.at("sharded").as<ShardedTensor>().shards()[0].tensor,
                        state.at("sharded").as<ShardedTensor>().shards()[0].tensor * 2));
  EXPECT_EQ(doubled.at("text").as<std::string>(), "h\xC3\xA9");
}

}  // namespace
}  // namespace reshard
