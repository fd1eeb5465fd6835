// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/optimizer_state.h"

#include <torch/csrc/api/include/torch/optim/adagrad.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/lbfgs.h>
#include <torch/csrc/api/include/torch/optim/rmsprop.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <functional>

#include "fsdp/test_model.h"
#include "fsdp/whole_state.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

using Parameters = std::vector<at::Tensor>;
using Factory = std::function<std::unique_ptr<torch::optim::Optimizer>(Parameters)>;

std::vector<std::string> keys_of(const StateDict& dict) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : dict.items()) keys.push_back(key);
  return keys;
}

struct Kind {
  const char* name;
  Factory make;
  std::vector<std::string> state_keys;  // as PyTorch writes them
  std::vector<std::string> group_keys;
};

std::vector<Kind> kinds() {
  using namespace torch::optim;
  const std::vector<std::string> adam_group = {
      "lr",         "betas",          "eps",   "weight_decay",           "amsgrad", "maximize", "foreach",
      "capturable", "differentiable", "fused", "decoupled_weight_decay", "params"};
  return {
      {"AdamW",
       [](Parameters p) { return std::make_unique<AdamW>(std::move(p), AdamWOptions(0.05).amsgrad(true).eps(1e-3)); },
       {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
       adam_group},
      {"Adam",
       [](Parameters p) {
         return std::make_unique<Adam>(std::move(p), AdamOptions(0.05).betas({0.8, 0.9}).eps(1e-3));
       },
       {"step", "exp_avg", "exp_avg_sq"},
       adam_group},
      {"SGD with momentum",
       [](Parameters p) { return std::make_unique<SGD>(std::move(p), SGDOptions(0.05).momentum(0.9)); },
       {"momentum_buffer"},
       {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused",
        "params"}},
      {"SGD",
       [](Parameters p) { return std::make_unique<SGD>(std::move(p), SGDOptions(0.05)); },
       {},
       {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused",
        "params"}},
      {"Adagrad",
       [](Parameters p) {
         return std::make_unique<Adagrad>(std::move(p), AdagradOptions(0.05).initial_accumulator_value(0.1));
       },
       {"step", "sum"},
       {"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "foreach", "maximize", "differentiable",
        "fused", "params"}},
      {"RMSprop",
       [](Parameters p) {
         return std::make_unique<RMSprop>(std::move(p), RMSpropOptions(0.01).momentum(0.9).centered(true));
       },
       {"step", "square_avg", "momentum_buffer", "grad_avg"},
       {"lr", "momentum", "alpha", "eps", "centered", "weight_decay", "capturable", "foreach", "maximize",
        "differentiable", "params"}},
  };
}

struct SmallImpl : torch::nn::Module {
  SmallImpl() {
    first = register_module("first", torch::nn::Linear(5, 7));
    second = register_module("second", torch::nn::Linear(7, 3));
    scale = register_parameter("scale", at::ones({}));
    second->bias.set_requires_grad(false);
  }
  at::Tensor forward(const at::Tensor& x) {
    return (second->forward(at::tanh(first->forward(x))) * scale).square().mean();
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
  at::Tensor scale;
};
TORCH_MODULE(Small);

/// A sharded model and its optimizer.
struct TrainingRun {
  TrainingRun(const std::shared_ptr<ProcessGroup>& group, const Kind& kind, ShardLayout layout, uint64_t seed)
      : model((at::manual_seed(seed), Small()),
              {.process_group = group, .wrap_policy = wrap_by_name({"first"}), .layout = layout}),
        optimizer(kind.make(model.parameters())) {}
  void steps(int count, int first = 0) {
    for (int i = first; i < first + count; ++i) {
      at::manual_seed(200 + static_cast<uint64_t>(i));
      optimizer->zero_grad();
      model(at::rand({4, 5})).backward();  // the same on every rank: results do not depend on their number
      optimizer->step();
    }
  }
  FullyShardedDataParallel<Small> model;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
};

RESHARD_DISTRIBUTED_TEST(OptimizerStateTest, ContinuesOnOtherRanksAndLayoutsAsIfNothingHappened, .ranks = 3) {
  const DoublePrecision in_double;
  const auto world = process_group();
  const auto pair = new_group({0, 2});
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TrainingRun run(world, kind, ShardLayout::kFlat, 41);
    run.steps(3);
    const uint64_t sent = world->traffic().bytes;
    const StateDict state = optimizer_state_dict(*run.optimizer, run.model);
    EXPECT_EQ(world->traffic().bytes, sent) << "no communication";

    // The shape that PyTorch gives it.
    EXPECT_EQ(keys_of(state), (std::vector<std::string>{"state", "param_groups"}));
    const StateDict& group = state.at("param_groups").as<StateList>().at(0);
    EXPECT_EQ(keys_of(group), kind.group_keys);
    const StateDict& values = state.at("state");
    EXPECT_EQ(values.size(), kind.state_keys.empty() ? 0u : 4u) << "each parameter but the frozen one";
    for (const auto& [name, entry] : values.items()) {
      EXPECT_EQ(keys_of(entry), kind.state_keys) << name;
      if (!entry.as<StateDict>().contains("step")) continue;
      const at::Tensor& step = entry.as<StateDict>().at("step").as<at::Tensor>();
      EXPECT_EQ(step.dim(), 0);
      EXPECT_EQ(step.scalar_type(), at::kDouble) << "as PyTorch counts where the default dtype is float64";
      EXPECT_EQ(step.item<double>(), 3.0);
    }
    std::vector<std::string> parameters;
    for (const StateValue& name : group.at("params").as<StateList>()) parameters.push_back(name.as<std::string>());
    EXPECT_EQ(parameters,
              (std::vector<std::string>{"scale", "first.weight", "first.bias", "second.weight", "second.bias"}));

    const StateDict model_state = whole_state(run.model.state_dict(StateDictType::kSharded), *world);
    const StateDict optimizer_state = whole_state(state, *world);
    run.steps(3, 3);
    const StateDict wanted = run.model.state_dict(StateDictType::kFull);
    // The unsharded model goes the same way.
    at::manual_seed(41);
    Small reference;
    const auto reference_optimizer = kind.make(reference->parameters());
    for (int i = 0; i < 6; ++i) {
      at::manual_seed(200 + static_cast<uint64_t>(i));
      reference_optimizer->zero_grad();
      reference(at::rand({4, 5})).backward();
      reference_optimizer->step();
    }
    EXPECT_LT(difference_to(run.model, *run.model.module(), *reference), 1e-12);
    for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
      if (!pair->is_member()) continue;
      TrainingRun resumed(pair, kind, layout, 42);
      resumed.model.load_state_dict(model_state);
      // Settings come with the state.
      const double lr = resumed.optimizer->param_groups()[0].options().get_lr();
      resumed.optimizer->param_groups()[0].options().set_lr(lr * 100);
      load_optimizer_state_dict(*resumed.optimizer, resumed.model, optimizer_state);
      EXPECT_EQ(resumed.optimizer->param_groups()[0].options().get_lr(), lr);
      resumed.steps(3, 3);
      const StateDict found = resumed.model.state_dict(StateDictType::kFull);
      for (const auto& [name, value] : wanted.items()) {
        EXPECT_LT(max_difference(value.as<at::Tensor>(), found.at(name).as<at::Tensor>()), 1e-12) << name;
      }
      if (kind.state_keys.empty()) continue;
      // The control: without the moments it goes elsewhere.
      TrainingRun forgetful(pair, kind, layout, 42);
      forgetful.model.load_state_dict(model_state);
      forgetful.steps(3, 3);
      const StateDict other = forgetful.model.state_dict(StateDictType::kFull);
      EXPECT_GT(max_difference(wanted.at("first.weight").as<at::Tensor>(), other.at("first.weight").as<at::Tensor>()),
                1e-6);
    }
    world->barrier();
  }
}

RESHARD_DISTRIBUTED_TEST(OptimizerStateTest, GivesTargetsForALoadAndNamesWhatDoesNotFit, .ranks = 2) {
  const auto group = process_group();
  const Kind adamw = kinds().front();
  TrainingRun run(group, adamw, ShardLayout::kFlat, 51);
  // Before the first step: zeros to load into, in place.
  const StateDict target = optimizer_state_dict(*run.optimizer, run.model);
  const StateDict& entry = target.at("state").as<StateDict>().at("first.weight");
  EXPECT_EQ(entry.at("step").as<at::Tensor>().item<float>(), 0.0f);
  EXPECT_EQ(entry.at("step").as<at::Tensor>().scalar_type(), at::kFloat);
  for (const LocalShard& shard : entry.at("exp_avg").as<ShardedTensor>().shards()) shard.tensor.fill_(0.25);
  entry.at("step").as<at::Tensor>().fill_(9);
  load_optimizer_state_dict(*run.optimizer, run.model, target);
  const StateDict again = optimizer_state_dict(*run.optimizer, run.model);
  const StateDict& loaded = again.at("state").as<StateDict>().at("first.weight");
  EXPECT_EQ(loaded.at("step").as<at::Tensor>().item<float>(), 9.0f);
  for (const LocalShard& shard : loaded.at("exp_avg").as<ShardedTensor>().shards())
    EXPECT_TRUE(at::all(shard.tensor == 0.25).item<bool>());
  // Creating state early changes nothing in training.
  TrainingRun eager(group, adamw, ShardLayout::kFlat, 52), lazy(group, adamw, ShardLayout::kFlat, 52);
  optimizer_state_dict(*eager.optimizer, eager.model);
  eager.steps(2);
  lazy.steps(2);
  EXPECT_TRUE(at::equal(eager.model.state_dict(StateDictType::kFull).at("first.weight").as<at::Tensor>(),
                        lazy.model.state_dict(StateDictType::kFull).at("first.weight").as<at::Tensor>()));

  const auto changed = [&](const std::function<void(StateDict&)>& change) {
    StateDict state = optimizer_state_dict(*run.optimizer, run.model);
    change(state);
    load_optimizer_state_dict(*run.optimizer, run.model, state);
  };
  const auto first_group = [](StateDict& state) -> StateDict& { return state.at("param_groups").as<StateList>()[0]; };
  const auto first_weight = [](StateDict& state) -> StateDict& {
    return state.at("state").as<StateDict>().at("first.weight");
  };
  expect_error(ErrorCode::kUnsupported, {"maximize"},
               [&] { changed([&](StateDict& s) { first_group(s)["maximize"] = true; }); });
  expect_error(ErrorCode::kUnsupported, {"decoupled_weight_decay"},
               [&] { changed([&](StateDict& s) { first_group(s)["decoupled_weight_decay"] = false; }); });
  expect_error(ErrorCode::kInvalidArgument, {"betas"},
               [&] { changed([&](StateDict& s) { first_group(s)["betas"] = 0.9; }); });
  expect_error(ErrorCode::kInvalidArgument, {"lr", "str"},
               [&] { changed([&](StateDict& s) { first_group(s)["lr"] = "fast"; }); });
  expect_error(ErrorCode::kInvalidArgument, {"second.bias", "made up differently"},
               [&] { changed([&](StateDict& s) { first_group(s).at("params").as<StateList>().pop_back(); }); });
  expect_error(ErrorCode::kInvalidArgument, {"state.first.weight.exp_avg", "shape"},
               [&] { changed([&](StateDict& s) { first_weight(s)["exp_avg"] = at::zeros({7}); }); });
  expect_error(ErrorCode::kNotFound, {"state.first.weight.max_exp_avg_sq"}, [&] {
    changed([&](StateDict& s) {
      first_weight(s) =
          StateDict{{"step", at::zeros({})}, {"exp_avg", at::zeros({7, 5})}, {"exp_avg_sq", at::zeros({7, 5})}};
    });
  });
  expect_error(ErrorCode::kNotFound, {"param_groups"}, [&] {
    load_optimizer_state_dict(*run.optimizer, run.model, StateDict{{"state", StateDict{}}});
  });
  // Whole numbers and fused or foreach choices as PyTorch may write them.
  changed([&](StateDict& s) {
    first_group(s)["weight_decay"] = int64_t{0};
    first_group(s)["betas"] = StateList{0.5, 0.75};
    first_group(s)["foreach"] = false;
  });
  const auto& options = static_cast<const torch::optim::AdamWOptions&>(run.optimizer->param_groups()[0].options());
  EXPECT_EQ(options.weight_decay(), 0.0);
  EXPECT_EQ(std::get<1>(options.betas()), 0.75);

  // With the module's own handles nothing would train, whatever the optimizer.
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TrainingRun misused(group, kind, ShardLayout::kFlat, 53);
    misused.optimizer = kind.make(misused.model.module()->parameters());
    expect_error(ErrorCode::kFailedPrecondition, {"parameters()", "scale"}, [&] { misused.steps(1); });
  }
  torch::optim::AdamW handles(run.model.module()->parameters());
  expect_error(ErrorCode::kInvalidArgument, {"not a slice", "param_groups[0].params[0]"},
               [&] { optimizer_state_dict(handles, run.model); });
  torch::optim::LBFGS unknown(run.model.parameters());
  expect_error(ErrorCode::kUnsupported, {"LBFGS cannot train slices"},
               [&] { optimizer_state_dict(unknown, run.model); });
}

}  // namespace
}  // namespace reshard::fsdp_test
