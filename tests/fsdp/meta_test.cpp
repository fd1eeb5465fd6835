// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/meta.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/api/include/torch/nn/init.h>
#include <torch/csrc/api/include/torch/nn/modules.h>

#include "fsdp/test_model.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

/// Initialisers of many kinds, random numbers that depend on others, a tensor that is not registered, and a second seed
/// on the way.
struct ZooImpl : torch::nn::Module {
  ZooImpl() {
    namespace init = torch::nn::init;
    const auto parameter = [&](const char* name, std::vector<int64_t> sizes) {
      return register_parameter(name, at::empty(sizes));
    };
    init::orthogonal_(parameter("orthogonal", {4, 3}));
    init::eye_(parameter("eye", {3, 3}));
    init::dirac_(parameter("dirac", {2, 2, 3}));
    init::xavier_normal_(parameter("xavier", {7, 40}));
    init::kaiming_normal_(parameter("kaiming", {40, 7}));
    const at::Tensor base = parameter("base", {6});
    init::normal_(base, 1.0, 0.1);
    register_parameter("derived", (base.detach() * 2 + at::rand({6})).clone());
    at::manual_seed(99);
    register_parameter("reseeded", at::randn({11}));
    at::manual_seed(99);
    register_parameter("reseeded_again", at::randn({11}));
    const at::Tensor probabilities = at::sigmoid(at::randn({8}));
    mask = register_buffer("mask", at::bernoulli(probabilities));
    order = register_buffer("order", at::randint(9, {9}, at::kLong));
    register_buffer("table", torch::tensor({{1.0, 2.0}, {3.0, 4.0}}));
    register_buffer("joined", at::cat({at::arange(3, at::kFloat), at::linspace(0, 1, 4)}).cumsum(0));
    register_buffer("view", mask.view({2, 4}).t());
    unregistered = at::full({2}, 0.5) + mask.sum();
    overwritten = register_module("overwritten", torch::nn::Linear(5, 3));
    const at::NoGradGuard no_grad;
    overwritten->weight.copy_(at::ones({3, 5}).triu() * base[0]);
  }
  at::Tensor mask, order, unregistered;
  torch::nn::Linear overwritten{nullptr};
};
TORCH_MODULE(Zoo);

template <class Build>
void expect_bitwise(const std::shared_ptr<ProcessGroup>& group, const char* name, Build build) {
  SCOPED_TRACE(name);
  at::manual_seed(21);
  auto reference = build();
  const at::Tensor wanted_next = at::rand({3});
  at::manual_seed(21);
  auto meta = on_meta(build);
  const at::Tensor next = at::rand({3});
  EXPECT_TRUE(at::equal(next, wanted_next)) << "the generator goes on where the ordinary build left it";
  for (const at::Tensor& parameter : meta.module()->parameters()) EXPECT_TRUE(parameter.is_meta());
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    at::manual_seed(21);
    auto again = on_meta(build);
    at::manual_seed(1234);
    const at::Tensor state = at::detail::getDefaultCPUGenerator().get_state();
    auto model = FullyShardedDataParallel(
        again, {.process_group = group,
                .wrap_policy = wrap_by_predicate(
                    [](const std::string&, const torch::nn::Module& m) { return m.children().empty(); }),
                .layout = layout});
    EXPECT_TRUE(at::equal(at::detail::getDefaultCPUGenerator().get_state(), state)) << "wrapping draws nothing";
    const SummonFullParams full(model);
    const auto wanted = reference->named_parameters();
    for (const auto& item : model.module()->named_parameters()) {
      EXPECT_TRUE(at::equal(item.value(), wanted[item.key()])) << item.key();
      EXPECT_EQ(item.value().requires_grad(), wanted[item.key()].requires_grad());
    }
    const auto buffers = reference->named_buffers();
    for (const auto& item : model.module()->named_buffers()) {
      EXPECT_TRUE(at::equal(item.value(), buffers[item.key()])) << item.key();
      EXPECT_EQ(item.value().strides(), buffers[item.key()].strides()) << item.key();
    }
    if constexpr (std::is_same_v<decltype(reference), Zoo>) {
      EXPECT_TRUE(at::equal(model.module()->unregistered, reference->unregistered));
      EXPECT_TRUE(model.module()->mask.is_alias_of(model.module()->named_buffers()["view"])) << "views stay views";
    }
  }
}

RESHARD_DISTRIBUTED_TEST(MetaTest, EqualsTheOrdinaryBuildBitForBitOnOneToThreeRanks, .ranks = 3) {
  using namespace torch::nn;
  const auto world = process_group();
  const auto alone = new_group({0});
  const auto two = new_group({0, 1});
  for (const auto& group : {alone, two, world}) {
    if (!group->is_member()) continue;
    expect_bitwise(group, "LanguageModel", [] { return LanguageModel(); });
    expect_bitwise(group, "Zoo", [] { return Zoo(); });
    expect_bitwise(group, "Transformer", [] {
      return Transformer(TransformerOptions(8, 2).num_encoder_layers(2).num_decoder_layers(1).dim_feedforward(16));
    });
    expect_bitwise(group, "LSTM", [] { return LSTM(LSTMOptions(4, 3).num_layers(2)); });
    expect_bitwise(group, "Convolutions", [] {
      return Sequential(Conv2d(Conv2dOptions(3, 4, 3)), BatchNorm2d(4), PReLU(), GroupNorm(2, 4), Flatten(),
                        Bilinear(3, 4, 5));
    });
    expect_bitwise(group, "Embeddings",
                   [] { return Sequential(Embedding(EmbeddingOptions(9, 5).padding_idx(1)), EmbeddingBag(9, 5)); });
  }
  world->barrier();
}

/// A module whose constructor is the given function.
struct CustomImpl : torch::nn::Module {
  explicit CustomImpl(const std::function<void(CustomImpl&)>& build) { build(*this); }
  at::Tensor extra;
};

void expect_refused(const std::vector<std::string>& parts, const std::function<void(CustomImpl&)>& build) {
  expect_error(ErrorCode::kUnsupported, parts, [&] { on_meta([&] { return std::make_shared<CustomImpl>(build); }); });
}

RESHARD_DISTRIBUTED_TEST(MetaTest, RefusesByNameWhatCannotBeReplayed, .ranks = 1) {
  expect_refused({"aten::item"}, [](CustomImpl&) { at::rand({1}).item<float>(); });
  expect_refused({"aten::randperm"}, [](CustomImpl&) { at::randperm(9); });  // LibTorch has no meta kernel for it
  expect_refused({"aten::nonzero"}, [](CustomImpl&) { at::nonzero(at::ones({3})); });
  expect_refused({"raw access"}, [](CustomImpl&) { at::zeros({3}).data_ptr<float>()[0] = 1; });
  expect_refused({"raw access", "std::vector"}, [](CustomImpl&) { torch::tensor(std::vector<float>{1, 2, 3}); });
  expect_refused({"aten::empty", "cuda"}, [](CustomImpl&) { at::empty({3}, at::kCUDA); });
  expect_refused({"aten::rand", "generator of its own"},
                 [](CustomImpl&) { at::rand({3}, at::detail::createCPUGenerator(5), at::TensorOptions()); });
  const at::Tensor outside = at::zeros({3});
  expect_refused({"aten::copy_", "made outside"}, [&](CustomImpl&) { at::Tensor(outside).copy_(at::ones({3})); });
  expect_refused({"aten::uniform_", "made outside"}, [&](CustomImpl&) { at::Tensor(outside).uniform_(); });
  expect_refused({"aten::rand", "other means"}, [](CustomImpl&) {
    at::rand({3});
    at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>()->random();
    at::rand({3});
  });
  // A refusal leaves the generator as it was, and recording ends with it.
  at::manual_seed(4);
  const at::Tensor state = at::detail::getDefaultCPUGenerator().get_state();
  expect_refused({"aten::item"}, [](CustomImpl&) { at::rand({1}).item<float>(); });
  EXPECT_TRUE(at::equal(at::detail::getDefaultCPUGenerator().get_state(), state));
  EXPECT_FALSE(at::rand({3}).is_meta());
  expect_error(ErrorCode::kFailedPrecondition, {"inside on_meta"},
               [] { on_meta([] { return on_meta([] { return torch::nn::Linear(1, 1); }).module(); }); });
}

RESHARD_DISTRIBUTED_TEST(MetaTest, TakesTensorsMadeOutsideAndRefusesWhatItDoesNotKnow, .ranks = 1) {
  const auto group = process_group();
  // Values that exist already stay what they are, also where recorded operations read them.
  const at::Tensor outside = at::arange(6, at::kFloat).view({2, 3});
  const at::Tensor changing = outside.clone();
  auto built = on_meta([&] {
    return std::make_shared<CustomImpl>([&](CustomImpl& m) {
      m.register_parameter("given", outside.clone());
      m.register_parameter("made", at::ones({2, 3}) + outside);
      m.register_buffer("scaled", outside * 2);
      const std::vector<float> gone{1, 2, 3};
      const at::Tensor borrowed = at::from_blob(const_cast<float*>(gone.data()), {3, 1}).expand({3, 2}).t();
      const at::NoGradGuard no_grad;
      m.register_parameter("copied", at::zeros({2, 3})).copy_(changing);
      m.register_parameter("borrowed", at::zeros({2, 3})).add_(borrowed);
    });
  });
  changing.fill_(77);  // what it was while the module was built is what counts
  auto model = FullyShardedDataParallel(built, {.process_group = group});
  {
    const SummonFullParams full(model);
    EXPECT_TRUE(at::equal(model.module()->named_parameters()["given"], outside));
    EXPECT_TRUE(at::equal(model.module()->named_parameters()["made"], outside + 1));
    EXPECT_TRUE(at::equal(model.module()->named_parameters()["copied"], outside));
    EXPECT_TRUE(
        at::equal(model.module()->named_parameters()["borrowed"], at::arange(1, 4).expand({2, 3}).to(at::kFloat)));
    EXPECT_TRUE(at::equal(model.module()->named_buffers()["scaled"], outside * 2));
  }
  expect_error(ErrorCode::kInvalidArgument, {"meta device", "weight"}, [&] {
    auto linear = torch::nn::Linear(2, 2);
    linear->weight.unsafeGetTensorImpl()->shallow_copy_from(at::empty({2, 2}, at::kMeta).getIntrusivePtr());
    FullyShardedDataParallel(linear, {.process_group = group});
  });
  expect_error(ErrorCode::kUnsupported, {"not registered", "shares memory"}, [&] {
    auto meta = on_meta([] {
      return std::make_shared<CustomImpl>(
          [](CustomImpl& m) { m.extra = m.register_parameter("weight", at::ones({4})).detach().slice(0, 0, 2); });
    });
    FullyShardedDataParallel(meta, {.process_group = group});
  });
}

}  // namespace
}  // namespace reshard::fsdp_test
