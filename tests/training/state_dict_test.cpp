// SPDX-License-Identifier: BSD-3-Clause
// Counterparts of PyTorch's test_state_dict.py: what the getters give and the setters take, over plain and sharded models.

#include "reshard/training/state_dict.h"

#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>
#include <torch/csrc/api/include/torch/optim/adagrad.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/lbfgs.h>
#include <torch/csrc/api/include/torch/optim/rmsprop.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <functional>
#include <memory>

#include "fsdp/test_model.h"
#include "reshard/state_dict/wire.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

using fsdp_test::distinct_parameters;
using fsdp_test::DoublePrecision;
using fsdp_test::expect_error;
using fsdp_test::LanguageModel;
using fsdp_test::max_difference;
using fsdp_test::tokens_of_step;

using Parameters = std::vector<at::Tensor>;
using OptimizerPtr = std::unique_ptr<torch::optim::Optimizer>;
struct Kind {
  const char* name;
  std::function<OptimizerPtr(Parameters)> make;
};

std::vector<Kind> kinds() {
  using namespace torch::optim;
  return {
      {"AdamW",
       [](Parameters p) { return std::make_unique<AdamW>(std::move(p), AdamWOptions(1e-2).amsgrad(true).eps(1e-3)); }},
      {"Adam", [](Parameters p) { return std::make_unique<Adam>(std::move(p), AdamOptions(1e-2).eps(1e-3)); }},
      {"SGD", [](Parameters p) { return std::make_unique<SGD>(std::move(p), SGDOptions(1e-2).momentum(0.9)); }},
      {"Adagrad", [](Parameters p) { return std::make_unique<Adagrad>(std::move(p), AdagradOptions(1e-2).eps(1e-3)); }},
      {"RMSprop",
       [](Parameters p) {
         return std::make_unique<RMSprop>(std::move(p), RMSpropOptions(1e-2).centered(true).eps(1e-3));
       }},
  };
}

std::vector<std::string> keys_of(const StateDict& dict) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : dict.items()) keys.push_back(key);
  return keys;
}

/// Equal in structure and value, tensors bit for bit.
void expect_equal(const StateValue& a, const StateValue& b, const std::string& path) {
  ASSERT_STREQ(a.type_name(), b.type_name()) << path;
  const auto items = [&](const std::vector<StateValue>& x, const std::vector<StateValue>& y) {
    ASSERT_EQ(x.size(), y.size()) << path;
    for (size_t i = 0; i < x.size(); ++i) expect_equal(x[i], y[i], path + "." + std::to_string(i));
  };
  if (a.is<StateDict>()) {
    ASSERT_EQ(keys_of(a.as<StateDict>()), keys_of(b.as<StateDict>())) << path;
    for (const auto& [key, value] : a.as<StateDict>().items())
      expect_equal(value, b.as<StateDict>().at(key), path + "." + key);
  } else if (a.is<StateList>()) {
    items(a.as<StateList>(), b.as<StateList>());
  } else if (a.is<StateTuple>()) {
    items(a.as<StateTuple>().items, b.as<StateTuple>().items);
  } else if (a.is<at::Tensor>()) {
    EXPECT_TRUE(at::equal(a.as<at::Tensor>(), b.as<at::Tensor>())) << path;
  } else if (a.is<double>()) {
    EXPECT_EQ(a.as<double>(), b.as<double>()) << path;
  } else if (a.is<int64_t>()) {
    EXPECT_EQ(a.as<int64_t>(), b.as<int64_t>()) << path;
  } else if (a.is<bool>()) {
    EXPECT_EQ(a.as<bool>(), b.as<bool>()) << path;
  } else if (a.is<std::string>()) {
    EXPECT_EQ(a.as<std::string>(), b.as<std::string>()) << path;
  } else {
    EXPECT_TRUE(a.is<None>()) << path;
  }
}

/// A copy that later steps do not change.
StateDict copy_of(const StateDict& state) {
  return transform_tensors(state, [](const at::Tensor& t) { return t.clone(); }).as<StateDict>();
}

struct PlainRun {
  PlainRun(const Kind& kind, uint64_t seed)
      : model((at::manual_seed(seed), LanguageModel())), optimizer(kind.make(distinct_parameters(*model))) {}
  void steps(int first, int count) {
    for (int step = first; step < first + count; ++step) {
      optimizer->zero_grad();
      model(tokens_of_step(step)).backward();
      optimizer->step();
    }
  }
  LanguageModel model;
  OptimizerPtr optimizer;
};

struct ShardedRun {
  ShardedRun(const std::shared_ptr<ProcessGroup>& group, const Kind& kind, uint64_t seed)
      : model((at::manual_seed(seed), LanguageModel()),
              {.process_group = group, .wrap_policy = wrap_by_type<fsdp_test::BlockImpl>()}),
        optimizer(kind.make(model.parameters())) {}
  /// Every rank takes the whole batch, so that what comes out does not depend on their number.
  void steps(int first, int count) {
    for (int step = first; step < first + count; ++step) {
      optimizer->zero_grad();
      model(tokens_of_step(step)).backward();
      optimizer->step();
    }
  }
  FullyShardedDataParallel<LanguageModel> model;
  OptimizerPtr optimizer;
};

double difference(const StateDict& a, const StateDict& b) {
  double worst = 0;
  EXPECT_EQ(keys_of(a), keys_of(b));
  for (const auto& [key, value] : a.items()) {
    if (value.is<at::Tensor>())
      worst = std::max(worst, max_difference(value.as<at::Tensor>(), b.at(key).as<at::Tensor>()));
  }
  return worst;
}

// test_single_gpu, test_no_dist: a plain module in a process of its own, with every optimizer, in both forms of the optimizer's dict.
TEST(ModelStateDictTest, APlainModelGoesOnWhereAnotherStopped) {
  const DoublePrecision in_double;
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    PlainRun run(kind, 1);
    run.steps(0, 3);
    for (const bool flat : {false, true}) {
      const StateDictOptions options{.flatten_optimizer_state_dict = flat};
      auto [model_state, optimizer_state] = get_state_dict(run.model, *run.optimizer, options);
      EXPECT_EQ(optimizer_state.contains("param_groups.norm.weight.lr"), flat);
      PlainRun resumed(kind, 2);
      resumed.optimizer->param_groups()[0].options().set_lr(7);
      const IncompatibleKeys keys = set_state_dict(resumed.model, *resumed.optimizer, model_state, optimizer_state);
      EXPECT_TRUE(keys.missing_keys.empty());
      EXPECT_TRUE(keys.unexpected_keys.empty());
      EXPECT_EQ(resumed.optimizer->param_groups()[0].options().get_lr(), 1e-2);
      expect_equal(get_model_state_dict(resumed.model), model_state, "model");
      expect_equal(get_optimizer_state_dict(resumed.model, *resumed.optimizer, options), optimizer_state, "optimizer");
      PlainRun straight(kind, 1);
      straight.steps(0, 5);
      resumed.steps(3, 2);
      EXPECT_EQ(difference(get_model_state_dict(resumed.model), get_model_state_dict(straight.model)), 0);
    }
  }
}

TEST(ModelStateDictTest, GivesTheTensorsOfTheModelItself) {
  PlainRun run(kinds()[0], 3);
  const StateDict state = get_model_state_dict(run.model);
  EXPECT_EQ(state.at("head.weight").as<at::Tensor>().const_data_ptr(),
            state.at("embedding.weight").as<at::Tensor>().const_data_ptr());
  EXPECT_FALSE(state.at("norm.weight").as<at::Tensor>().requires_grad());
  state.at("norm.weight").as<at::Tensor>().fill_(4);
  EXPECT_EQ(run.model->norm->weight[0].item<float>(), 4);
  // Before the first step the optimizer's tensors are there to be loaded into.
  const StateDict optimizer = get_optimizer_state_dict(run.model, *run.optimizer);
  const StateDict& entry = optimizer.at("state").as<StateDict>().at("norm.weight");
  EXPECT_EQ(keys_of(entry), (std::vector<std::string>{"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}));
  entry.at("exp_avg").as<at::Tensor>().fill_(0.5);
  auto& state_of = static_cast<torch::optim::AdamWParamState&>(
      *run.optimizer->state().at(run.model->norm->weight.unsafeGetTensorImpl()));
  EXPECT_EQ(state_of.exp_avg()[0].item<float>(), 0.5);
}

TEST(ModelStateDictTest, LbfgsGoesOnWithItsHistory) {
  const DoublePrecision in_double;
  struct Run {
    explicit Run(uint64_t seed)
        : model((at::manual_seed(seed), torch::nn::Linear(4, 3))),
          optimizer(model->parameters(),
                    torch::optim::LBFGSOptions(0.5).max_iter(3).history_size(4).line_search_fn("strong_wolfe")) {}
    void steps(int first, int count) {
      for (int i = first; i < first + count; ++i) {
        at::manual_seed(60 + static_cast<uint64_t>(i));
        const at::Tensor x = at::rand({8, 4});
        optimizer.step([&] {
          optimizer.zero_grad();
          at::Tensor loss = (model(x) - 1).pow(2).mean();
          loss.backward();
          return loss;
        });
      }
    }
    torch::nn::Linear model;
    torch::optim::LBFGS optimizer;
  };
  Run run(1);
  // Before its first step there is nothing but settings.
  EXPECT_TRUE(get_optimizer_state_dict(run.model, run.optimizer).at("state").as<StateDict>().empty());
  run.steps(0, 2);
  auto [model_state, optimizer_state] = get_state_dict(run.model, run.optimizer);
  EXPECT_GT(
      optimizer_state.at("state").as<StateDict>().at("weight").as<StateDict>().at("old_dirs").as<StateList>().size(),
      1u);
  Run resumed(2);
  set_state_dict(resumed.model, resumed.optimizer, model_state, optimizer_state);
  Run straight(1), forgetful(2);
  straight.steps(0, 4);
  set_model_state_dict(forgetful.model, model_state);
  resumed.steps(2, 2);
  EXPECT_EQ(difference(get_model_state_dict(resumed.model), get_model_state_dict(straight.model)), 0);
  forgetful.steps(2, 2);
  EXPECT_GT(difference(get_model_state_dict(forgetful.model), get_model_state_dict(straight.model)), 1e-6);
}

// test_fsdp, test_shared_weight: sharded and plain run alike and take each other's state.
RESHARD_DISTRIBUTED_TEST(ModelStateDictDistributedTest, ShardedAndPlainModelsTakeEachOthersState, .ranks = 3) {
  const DoublePrecision in_double;
  const auto world = process_group();
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    PlainRun plain(kind, 11);
    ShardedRun sharded(world, kind, 11);
    plain.steps(0, 3);
    sharded.steps(0, 3);
    const StateDictOptions full{.full_state_dict = true};
    auto [model_state, optimizer_state] = get_state_dict(sharded.model, *sharded.optimizer, full);
    EXPECT_LT(difference(model_state, get_model_state_dict(plain.model)), 1e-9);
    // The names are those of the plain model, entry by entry.
    const StateDict plain_optimizer = get_optimizer_state_dict(plain.model, *plain.optimizer);
    EXPECT_EQ(keys_of(optimizer_state.at("state")), keys_of(plain_optimizer.at("state")));

    PlainRun plain_resumed(kind, 12);
    set_state_dict(plain_resumed.model, *plain_resumed.optimizer, model_state, optimizer_state);
    ShardedRun sharded_resumed(world, kind, 12);
    const StateDictOptions flat{.flatten_optimizer_state_dict = true};
    set_state_dict(sharded_resumed.model, *sharded_resumed.optimizer, get_model_state_dict(plain.model),
                   get_optimizer_state_dict(plain.model, *plain.optimizer, flat), full);
    plain.steps(3, 2);
    plain_resumed.steps(3, 2);
    sharded_resumed.steps(3, 2);
    EXPECT_LT(difference(get_model_state_dict(plain.model), get_model_state_dict(plain_resumed.model)), 1e-9);
    EXPECT_LT(difference(get_model_state_dict(plain.model), get_model_state_dict(sharded_resumed.model, full)), 1e-9);
  }
}

// test_flattened_osd: all four combinations, sharded.
RESHARD_DISTRIBUTED_TEST(ModelStateDictDistributedTest, FlatAndNestedOptimizerStatesAreTheSame, .ranks = 2) {
  const auto world = process_group();
  const Kind adamw = kinds()[0];
  ShardedRun run(world, adamw, 21);
  run.steps(0, 2);
  const StateDictOptions whole{.full_state_dict = true};
  const StateDict wanted = get_optimizer_state_dict(run.model, *run.optimizer, whole);
  for (const bool saved_flat : {false, true}) {
    const StateDict state =
        get_optimizer_state_dict(run.model, *run.optimizer, {.flatten_optimizer_state_dict = saved_flat});
    if (saved_flat) {
      EXPECT_TRUE(state.at("state.norm.weight.exp_avg").is<ShardedTensor>());
      EXPECT_EQ(state.at("param_groups.norm.bias.lr").as<double>(), 1e-2);
      EXPECT_FALSE(state.contains("state.head.weight.step")) << "a tied parameter has one name here";
    }
    ShardedRun other(world, adamw, 22);
    const IncompatibleKeys keys = set_optimizer_state_dict(other.model, *other.optimizer, state);
    EXPECT_TRUE(keys.unexpected_keys.empty());
    expect_equal(get_optimizer_state_dict(other.model, *other.optimizer, whole), wanted, "optimizer");
  }
  StateDict contradictory = get_optimizer_state_dict(run.model, *run.optimizer, {.flatten_optimizer_state_dict = true});
  contradictory["param_groups.norm.bias.lr"] = 0.5;
  expect_error(ErrorCode::kInvalidArgument, {"different settings", "param_groups.norm.bias.lr"},
               [&] { set_optimizer_state_dict(run.model, *run.optimizer, contradictory); });
}

// test_strict.
TEST(ModelStateDictTest, StrictNamesWhatDoesNotFitAndOtherwiseReportsIt) {
  PlainRun run(kinds()[0], 31);
  StateDict state = copy_of(get_model_state_dict(run.model));
  state["abc"] = at::zeros({10});
  expect_error(ErrorCode::kInvalidArgument, {"Unexpected key", "abc"}, [&] { set_model_state_dict(run.model, state); });
  StateDict shorter;
  for (const auto& [key, value] : state.items()) {
    if (key != "norm.bias") shorter[key] = value;
  }
  const IncompatibleKeys keys = set_model_state_dict(run.model, shorter, {.strict = false});
  EXPECT_EQ(keys.missing_keys, std::vector<std::string>{"norm.bias"});
  EXPECT_EQ(keys.unexpected_keys, std::vector<std::string>{"abc"});
  // One name of a tied parameter is enough; nothing is written before all is known to fit.
  StateDict wrong;
  for (const auto& [key, value] : shorter.items()) {
    if (key != "abc" && key != "head.weight") wrong[key] = value;
  }
  wrong["embedding.weight"] = at::full({13, 6}, 9.0f);
  expect_error(ErrorCode::kNotFound, {"Missing key", "norm.bias"}, [&] { set_model_state_dict(run.model, wrong); });
  wrong["norm.bias"] = at::zeros({7});
  expect_error(ErrorCode::kInvalidArgument, {"shape differs", "norm.bias", "[6]", "[7]"},
               [&] { set_model_state_dict(run.model, wrong); });
  EXPECT_NE(run.model->embedding->weight[0][0].item<float>(), 9.0f);
  wrong["norm.bias"] = at::zeros({6}, at::kDouble);
  expect_error(ErrorCode::kInvalidArgument, {"dtype differs", "norm.bias"},
               [&] { set_model_state_dict(run.model, wrong); });
  wrong["norm.bias"] = at::zeros({6});
  set_model_state_dict(run.model, wrong);
  EXPECT_EQ(run.model->head->weight[0][0].item<float>(), 9.0f);

  StateDict optimizer = get_optimizer_state_dict(run.model, *run.optimizer);
  StateDict& entries = optimizer.at("state").as<StateDict>();
  StateDict fewer;
  for (const auto& [key, value] : entries.items()) {
    if (key != "norm.weight") fewer[key] = value;
  }
  fewer["stranger"] = StateDict{{"step", 1}};
  entries = fewer;
  expect_error(ErrorCode::kNotFound, {"Missing key", "state.norm.weight"},
               [&] { set_optimizer_state_dict(run.model, *run.optimizer, optimizer); });
  const IncompatibleKeys of_optimizer =
      set_optimizer_state_dict(run.model, *run.optimizer, optimizer, {.strict = false});
  EXPECT_EQ(of_optimizer.missing_keys, std::vector<std::string>{"state.norm.weight"});
  EXPECT_EQ(of_optimizer.unexpected_keys, std::vector<std::string>{"state.stranger"});
}

// test_cpu_offload_full_state_dict.
RESHARD_DISTRIBUTED_TEST(ModelStateDictDistributedTest, FullAndOffloadedStatesAreRankZerosAlone, .ranks = 3) {
  const auto world = process_group();
  const Kind adamw = kinds()[0];
  ShardedRun run(world, adamw, 41);
  run.steps(0, 1);
  const auto [on_cpu, optimizer_on_cpu] = get_state_dict(run.model, *run.optimizer, {.cpu_offload = true});
  EXPECT_TRUE(on_cpu.at("norm.weight").is<ShardedTensor>());
  const StateDict full = get_model_state_dict(run.model, {.full_state_dict = true});
  for (const auto& [key, value] : full.items()) EXPECT_TRUE(value.is<at::Tensor>()) << key;
  const uint64_t sent = world->traffic().bytes;
  const auto [both, optimizer_both] =
      get_state_dict(run.model, *run.optimizer, {.full_state_dict = true, .cpu_offload = true});
  EXPECT_GT(world->traffic().bytes, sent);
  if (world->rank() == 0) {
    expect_equal(both, full, "model");
    EXPECT_EQ(both.at("head.weight").as<at::Tensor>().const_data_ptr(),
              both.at("embedding.weight").as<at::Tensor>().const_data_ptr())
        << "tied names stay tied";
    EXPECT_TRUE(
        optimizer_both.at("state").as<StateDict>().at("norm.weight").as<StateDict>().at("exp_avg").is<at::Tensor>());
  } else {
    EXPECT_TRUE(both.empty());
    EXPECT_TRUE(optimizer_both.empty());
  }
}

// test_broadcast_from_rank0, test_setting_meta_device_model_broadcasting_and_memory.
RESHARD_DISTRIBUTED_TEST(ModelStateDictDistributedTest, OnlyRankZeroNeedsTheWholeState, .ranks = 3) {
  const auto world = process_group();
  for (const Kind& kind : {kinds()[0], kinds()[2]}) {
    SCOPED_TRACE(kind.name);
    ShardedRun run(world, kind, 51);
    run.steps(0, 2);
    const StateDictOptions keep{.full_state_dict = true, .cpu_offload = true};
    auto [model_state, optimizer_state] = get_state_dict(run.model, *run.optimizer, keep);
    const StateDictOptions whole{.full_state_dict = true};
    const StateDict wanted = get_model_state_dict(run.model, whole);
    const StateDict wanted_optimizer = get_optimizer_state_dict(run.model, *run.optimizer, whole);
    run.steps(2, 1);
    EXPECT_GT(difference(get_model_state_dict(run.model, whole), wanted), 0);

    const StateDictOptions broadcast{.full_state_dict = true, .broadcast_from_rank0 = true};
    set_state_dict(run.model, *run.optimizer, model_state, optimizer_state, broadcast);
    EXPECT_EQ(difference(get_model_state_dict(run.model, whole), wanted), 0);
    expect_equal(get_optimizer_state_dict(run.model, *run.optimizer, whole), wanted_optimizer, "optimizer");

    // What is wrong on rank 0 is every rank's error, and the next call works.
    if (world->rank() == 0) {
      StateDict shorter;
      for (const auto& [key, value] : model_state.items()) {
        if (key != "norm.bias") shorter[key] = value;
      }
      model_state = shorter;
    }
    expect_error(ErrorCode::kNotFound, {"Missing key", "norm.bias", "rank 0"},
                 [&] { set_model_state_dict(run.model, model_state, broadcast); });
    set_model_state_dict(run.model, model_state,
                         {.full_state_dict = true, .broadcast_from_rank0 = true, .strict = false});
  }
  expect_error(ErrorCode::kInvalidArgument, {"full_state_dict"},
               [&] { set_model_state_dict(torch::nn::Linear(2, 2), StateDict(), {.broadcast_from_rank0 = true}); });
}

// test_set_cpu_model_state_dict_broadcast_from_rank0, test_setting_meta_device_model.
RESHARD_DISTRIBUTED_TEST(ModelStateDictDistributedTest, PlainModelsAreSetByBroadcastAndGetMemoryIfTheyHaveNone,
                         .ranks = 2) {
  at::manual_seed(61);
  const torch::nn::Linear source(4, 3);
  const StateDict state = process_group()->rank() == 0 ? get_model_state_dict(source) : StateDict();
  const StateDictOptions broadcast{.full_state_dict = true, .broadcast_from_rank0 = true};
  torch::nn::Linear zeroed(4, 3);
  {
    const at::NoGradGuard no_grad;
    zeroed->weight.zero_();
  }
  set_model_state_dict(zeroed, state, broadcast);
  EXPECT_TRUE(at::equal(zeroed->weight, source->weight));
  const auto on_meta_device = on_meta([] { return torch::nn::Linear(4, 3); });
  const torch::nn::Linear& meta = on_meta_device.module();
  ASSERT_TRUE(meta->weight.is_meta());
  set_model_state_dict(meta, state, broadcast);
  EXPECT_TRUE(meta->weight.is_cpu());
  EXPECT_TRUE(meta->weight.requires_grad());
  EXPECT_TRUE(at::equal(meta->weight, source->weight));
  // Ranks that have different models find out before anything is sent.
  const torch::nn::Linear narrow(4, process_group()->rank() == 0 ? 3 : 2);
  expect_error(ErrorCode::kInvalidArgument, {"rank 1", "shape differs", "weight"},
               [&] { set_model_state_dict(narrow, state, broadcast); });
}

struct WithExtraImpl : torch::nn::Module, ExtraState {
  WithExtraImpl() { linear = register_module("linear", torch::nn::Linear(2, 2)); }
  StateValue get_extra_state() const override { return text; }
  void set_extra_state(const StateValue& value) override { text = value.as<std::string>(); }
  std::string text = "MyState";
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(WithExtra);

struct NestImpl : torch::nn::Module {
  NestImpl() {
    pretrain = register_module("pretrain", WithExtra());
    head = register_module("head", torch::nn::Linear(2, 2));
    cache = register_buffer("cache", at::zeros({3}));
    pretrain->linear->bias.set_requires_grad(false);
  }
  at::Tensor forward(const at::Tensor& x) { return head(pretrain->linear(x)).square().mean(); }
  WithExtra pretrain{nullptr};
  torch::nn::Linear head{nullptr};
  at::Tensor cache;
};
TORCH_MODULE(Nest);

// test_extra_state, test_non_persistent_buffers, test_deprecate_api (submodules), test_state_dict_with_hook_on_keys, test_fine_tuning.
TEST(ModelStateDictTest, ExtraStatesSubmodulesExclusionsAndNewNames) {
  at::manual_seed(71);
  const Nest model;
  using Keys = std::vector<std::string>;
  EXPECT_EQ(keys_of(get_model_state_dict(model)), (Keys{"cache", "pretrain._extra_state", "pretrain.linear.weight",
                                                        "pretrain.linear.bias", "head.weight", "head.bias"}));
  EXPECT_EQ(get_model_state_dict(model).at("pretrain._extra_state").as<std::string>(), "MyState");
  EXPECT_EQ(keys_of(get_model_state_dict(model, {.exclude = {"cache", "pretrain._extra_state"}})),
            (Keys{"pretrain.linear.weight", "pretrain.linear.bias", "head.weight", "head.bias"}));
  EXPECT_EQ(
      keys_of(get_model_state_dict(model, {.ignore_frozen_params = true, .submodules = {"pretrain.linear", "head"}})),
      (Keys{"pretrain.linear.weight", "head.weight", "head.bias"}));
  const StateDictOptions part{.submodules = {"pretrain"}, .keep_submodule_prefixes = false};
  const StateDict pretrained = copy_of(get_model_state_dict(model, part));
  EXPECT_EQ(keys_of(pretrained), (Keys{"_extra_state", "linear.weight", "linear.bias"}));

  at::manual_seed(72);
  Nest other;
  other->pretrain->text = "changed";
  set_model_state_dict(other, pretrained, part);
  EXPECT_EQ(other->pretrain->text, "MyState");
  EXPECT_TRUE(at::equal(other->pretrain->linear->weight, model->pretrain->linear->weight));
  EXPECT_FALSE(at::equal(other->head->weight, model->head->weight)) << "not in the submodule";
  expect_error(ErrorCode::kInvalidArgument, {"no submodule", "absent"},
               [&] { get_model_state_dict(model, {.submodules = {"absent"}}); });
  expect_error(ErrorCode::kInvalidArgument, {"one submodule"}, [&] {
    get_model_state_dict(model, {.submodules = {"pretrain", "head"}, .keep_submodule_prefixes = false});
  });

  // A model whose keys were renamed when it was saved.
  const StateDictOptions renaming{
      .rename = [](const std::string& fqn) { return fqn.starts_with("head.") ? "classifier." + fqn.substr(5) : fqn; }};
  const StateDict renamed = get_model_state_dict(model, renaming);
  EXPECT_TRUE(renamed.contains("classifier.weight"));
  expect_error(ErrorCode::kNotFound, {"Missing key", "head.weight"}, [&] { set_model_state_dict(other, renamed); });
  set_model_state_dict(other, renamed, renaming);
  EXPECT_TRUE(at::equal(other->head->weight, model->head->weight));
  expect_error(ErrorCode::kInvalidArgument, {"one key", "cache", "pretrain._extra_state"},
               [&] { get_model_state_dict(model, {.rename = [](const std::string&) { return "same"; }}); });

  // The optimizer's names follow the same options.
  torch::optim::AdamW optimizer(other->parameters(), torch::optim::AdamWOptions(1e-3));
  other(at::ones({2, 2})).backward();
  optimizer.step();
  const StateDict state = get_optimizer_state_dict(other, optimizer, renaming);
  EXPECT_EQ(keys_of(state.at("state")), (Keys{"pretrain.linear.weight", "classifier.weight", "classifier.bias"}));
  const StateDictOptions trainable{.ignore_frozen_params = true, .submodules = {"pretrain"}};
  const StateDict of_part = get_optimizer_state_dict(other, optimizer, trainable);
  EXPECT_EQ(keys_of(of_part.at("state")), (Keys{"pretrain.linear.weight"}));
  Nest third;
  torch::optim::AdamW third_optimizer(third->parameters(), torch::optim::AdamWOptions(1));
  set_optimizer_state_dict(third, third_optimizer, state, renaming);
  expect_equal(get_optimizer_state_dict(third, third_optimizer), get_optimizer_state_dict(other, optimizer),
               "optimizer");
  Nest fourth;
  torch::optim::AdamW fourth_optimizer(fourth->parameters(), torch::optim::AdamWOptions(1));
  set_optimizer_state_dict(fourth, fourth_optimizer, of_part, trainable);
  expect_equal(get_optimizer_state_dict(fourth, fourth_optimizer, trainable), of_part, "optimizer of a part");
}

// test_multi_param_groups, test_optim_state_dict_param_matching.
TEST(ModelStateDictTest, GroupsAreFoundByTheirParametersAndUnknownSettingsReported) {
  using torch::optim::AdamW;
  using torch::optim::AdamWOptions;
  using torch::optim::OptimizerParamGroup;
  const auto groups_of = [](const torch::nn::Linear& a, const torch::nn::Linear& b, double first, double second) {
    std::vector<OptimizerParamGroup> groups;
    groups.emplace_back(a->parameters(), std::make_unique<AdamWOptions>(first));
    groups.emplace_back(b->parameters(), std::make_unique<AdamWOptions>(second));
    groups.emplace_back(std::vector<at::Tensor>(), std::make_unique<AdamWOptions>(first + second));
    return groups;
  };
  struct PairImpl : torch::nn::Module {
    PairImpl()
        : fc(register_module("fc", torch::nn::Linear(4, 4))), fc1(register_module("fc1", torch::nn::Linear(4, 4))) {}
    torch::nn::Linear fc, fc1;
  };
  const auto model = std::make_shared<PairImpl>();
  AdamW optimizer(groups_of(model->fc, model->fc1, 0.1, 0.2));
  model->fc1(model->fc(at::rand({3, 4}))).sum().backward();
  optimizer.step();
  const StateDict state = get_optimizer_state_dict(model, optimizer);

  const auto other = std::make_shared<PairImpl>();
  AdamW swapped(groups_of(other->fc1, other->fc, 7, 8));
  StateDict with_extra = state;
  StateDict& group = with_extra.at("param_groups").as<StateList>()[0].as<StateDict>();
  group["initial_lr"] = 0.1;
  const IncompatibleKeys keys = set_optimizer_state_dict(other, swapped, with_extra);
  EXPECT_EQ(keys.unexpected_keys, std::vector<std::string>{"param_groups.fc.weight.initial_lr"});
  EXPECT_EQ(swapped.param_groups()[0].options().get_lr(), 0.2);
  EXPECT_EQ(swapped.param_groups()[1].options().get_lr(), 0.1);
  EXPECT_DOUBLE_EQ(swapped.param_groups()[2].options().get_lr(), 0.1 + 0.2);
  expect_equal(get_optimizer_state_dict(other, swapped).at("state").as<StateDict>().at("fc.weight"),
               state.at("state").as<StateDict>().at("fc.weight"), "fc.weight");
  group["maximize"] = true;
  expect_error(ErrorCode::kUnsupported, {"param_groups[1].maximize"},
               [&] { set_optimizer_state_dict(other, swapped, with_extra); });

  // Two optimizers of one model are one state dict.
  AdamW first(model->fc->parameters(), AdamWOptions(0.3)), second(model->fc1->parameters(), AdamWOptions(0.4));
  const StateDict both = get_optimizer_state_dict(model, std::vector<torch::optim::Optimizer*>{&first, &second});
  EXPECT_EQ(both.at("state").as<StateDict>().size(), 4u);
  AdamW third(other->fc1->parameters(), AdamWOptions(1)), fourth(other->fc->parameters(), AdamWOptions(1));
  set_optimizer_state_dict(other, std::vector<torch::optim::Optimizer*>{&third, &fourth}, both);
  EXPECT_EQ(third.param_groups()[0].options().get_lr(), 0.4);
  EXPECT_EQ(fourth.param_groups()[0].options().get_lr(), 0.3);
  expect_error(ErrorCode::kInvalidArgument, {"two optimizers", "fc.weight"}, [&] {
    get_optimizer_state_dict(model, std::vector<torch::optim::Optimizer*>{&first, &first});
  });
  expect_error(ErrorCode::kInvalidArgument, {"not a parameter of the model", "param_groups[0].params[0]"},
               [&] { get_optimizer_state_dict(other, first); });
}

}  // namespace
}  // namespace reshard
