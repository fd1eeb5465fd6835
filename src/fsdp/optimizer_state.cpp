// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/optimizer_state.h"

#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/optim/adagrad.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/rmsprop.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <algorithm>
#include <functional>
#include <unordered_map>

#include "fsdp/shard_range.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

using torch::optim::Optimizer;
using torch::optim::OptimizerOptions;
using torch::optim::OptimizerParamState;

/// The state of one parameter by PyTorch's names.
struct ParameterState {
  std::vector<std::pair<const char*, at::Tensor*>> tensors;
  int64_t* step = nullptr;  // null: the optimizer counts no steps
};

/// The settings of one group in PyTorch's order: what LibTorch has, and what it lacks with the value that PyTorch
/// writes for it.
struct GroupField {
  const char* key;
  std::function<StateValue()> get;
  std::function<void(const StateValue&)> set;  // null: LibTorch lacks it; only the value of get() is accepted
};

double as_number(const StateValue& value) {
  if (value.is<double>()) return value.as<double>();
  if (value.is<int64_t>()) return static_cast<double>(value.as<int64_t>());
  if (value.is<at::Tensor>() && value.as<at::Tensor>().numel() == 1) return value.as<at::Tensor>().item().toDouble();
  throw Error(ErrorCode::kInvalidArgument, "not a number", {.found = value.type_name()});
}

bool as_flag(const StateValue& value) {
  if (value.is<None>()) return false;  // foreach and fused: none means no choice
  return value.is<bool>() ? value.as<bool>() : as_number(value) != 0;
}

GroupField number(const char* key, double& field) {
  return {key, [&field] { return StateValue(field); }, [&field](const StateValue& v) { field = as_number(v); }};
}
GroupField flag(const char* key, bool& field) {
  return {key, [&field] { return StateValue(field); }, [&field](const StateValue& v) { field = as_flag(v); }};
}
/// A setting that LibTorch does not have.
GroupField constant(const char* key, StateValue value) {
  return {key, [value] { return value; }, nullptr};
}
GroupField pair_of_numbers(const char* key, std::tuple<double, double>& field) {
  return {key,
          [&field] {
            return StateValue(StateTuple{{std::get<0>(field), std::get<1>(field)}});
          },
          [&field](const StateValue& v) {
            const std::vector<StateValue>* items = v.is<StateTuple>()  ? &v.as<StateTuple>().items
                                                   : v.is<StateList>() ? &v.as<StateList>()
                                                                       : nullptr;
            if (items == nullptr || items->size() != 2)
              throw Error(ErrorCode::kInvalidArgument, "not two numbers", {.found = v.type_name()});
            field = {as_number((*items)[0]), as_number((*items)[1])};
          }};
}

// What PyTorch's optimizers write, in its order.
template <class Options>
std::vector<GroupField> adam_fields(Options& o, bool decoupled) {
  return {number("lr", o.lr()),
          pair_of_numbers("betas", o.betas()),
          number("eps", o.eps()),
          number("weight_decay", o.weight_decay()),
          flag("amsgrad", o.amsgrad()),
          constant("maximize", false),
          constant("foreach", None{}),
          constant("capturable", false),
          constant("differentiable", false),
          constant("fused", None{}),
          constant("decoupled_weight_decay", decoupled)};
}

std::vector<GroupField> group_fields(OptimizerOptions& options) {
  if (auto* adamw = dynamic_cast<torch::optim::AdamWOptions*>(&options)) return adam_fields(*adamw, true);
  if (auto* adam = dynamic_cast<torch::optim::AdamOptions*>(&options)) return adam_fields(*adam, false);
  if (auto* sgd = dynamic_cast<torch::optim::SGDOptions*>(&options)) {
    return {number("lr", sgd->lr()),
            number("momentum", sgd->momentum()),
            number("dampening", sgd->dampening()),
            number("weight_decay", sgd->weight_decay()),
            flag("nesterov", sgd->nesterov()),
            constant("maximize", false),
            constant("foreach", None{}),
            constant("differentiable", false),
            constant("fused", None{})};
  }
  if (auto* adagrad = dynamic_cast<torch::optim::AdagradOptions*>(&options)) {
    return {number("lr", adagrad->lr()),
            number("lr_decay", adagrad->lr_decay()),
            number("eps", adagrad->eps()),
            number("weight_decay", adagrad->weight_decay()),
            number("initial_accumulator_value", adagrad->initial_accumulator_value()),
            constant("foreach", None{}),
            constant("maximize", false),
            constant("differentiable", false),
            constant("fused", None{})};
  }
  if (auto* rms = dynamic_cast<torch::optim::RMSpropOptions*>(&options)) {
    return {number("lr", rms->lr()),           number("momentum", rms->momentum()),
            number("alpha", rms->alpha()),     number("eps", rms->eps()),
            flag("centered", rms->centered()), number("weight_decay", rms->weight_decay()),
            constant("capturable", false),     constant("foreach", None{}),
            constant("maximize", false),       constant("differentiable", false)};
  }
  throw Error(ErrorCode::kUnsupported, "the state of this optimizer is not known",
              {.wanted = "SGD, Adam, AdamW, Adagrad or RMSprop"});
}

template <class State>
State& state_of(Optimizer& optimizer, const at::Tensor& slice) {
  auto& entry = optimizer.state()[slice.unsafeGetTensorImpl()];
  if (!entry) entry = std::make_unique<State>();
  return static_cast<State&>(*entry);
}

void create(at::Tensor& tensor, const at::Tensor& slice, double value = 0) {
  if (!tensor.defined()) tensor = at::full_like(slice.detach(), value);
}

template <class State, class Options>
ParameterState adam_state(Optimizer& optimizer, const at::Tensor& slice, const Options& options) {
  State& state = state_of<State>(optimizer, slice);
  create(state.exp_avg(), slice);
  create(state.exp_avg_sq(), slice);
  ParameterState result{{{"exp_avg", &state.exp_avg()}, {"exp_avg_sq", &state.exp_avg_sq()}}, &state.step()};
  if (options.amsgrad()) {
    create(state.max_exp_avg_sq(), slice);
    result.tensors.emplace_back("max_exp_avg_sq", &state.max_exp_avg_sq());
  }
  return result;
}

/// The state that the optimizer has for this slice under these options; what it has not made yet is made as it would be
/// before a first step.
ParameterState parameter_state(Optimizer& optimizer, const at::Tensor& slice, const OptimizerOptions& options) {
  const at::NoGradGuard no_grad;
  using namespace torch::optim;
  if (const auto* adamw = dynamic_cast<const AdamWOptions*>(&options))
    return adam_state<AdamWParamState>(optimizer, slice, *adamw);
  if (const auto* adam = dynamic_cast<const AdamOptions*>(&options))
    return adam_state<AdamParamState>(optimizer, slice, *adam);
  if (const auto* sgd = dynamic_cast<const SGDOptions*>(&options)) {
    if (sgd->momentum() == 0) return {};
    auto& state = state_of<SGDParamState>(optimizer, slice);
    create(state.momentum_buffer(), slice);
    return {{{"momentum_buffer", &state.momentum_buffer()}}, nullptr};
  }
  if (const auto* adagrad = dynamic_cast<const AdagradOptions*>(&options)) {
    auto& state = state_of<AdagradParamState>(optimizer, slice);
    create(state.sum(), slice, adagrad->initial_accumulator_value());
    return {{{"sum", &state.sum()}}, &state.step()};
  }
  const auto& rms = dynamic_cast<const RMSpropOptions&>(options);
  auto& state = state_of<RMSpropParamState>(optimizer, slice);
  create(state.square_avg(), slice);
  ParameterState result{{{"square_avg", &state.square_avg()}}, &state.step()};
  if (rms.momentum() > 0) {
    create(state.momentum_buffer(), slice);
    result.tensors.emplace_back("momentum_buffer", &state.momentum_buffer());
  }
  if (rms.centered()) {
    create(state.grad_avg(), slice);
    result.tensors.emplace_back("grad_avg", &state.grad_avg());
  }
  return result;
}

/// The sharded parameter behind each tensor of each group.
std::vector<std::vector<const ShardedParameter*>> parameters_of(Optimizer& optimizer, const ShardedModule& model) {
  std::unordered_map<const void*, const ShardedParameter*> by_slice;
  for (const ShardedParameter& p : model.sharded_parameters()) by_slice[p.slice.unsafeGetTensorImpl()] = &p;
  std::vector<std::vector<const ShardedParameter*>> result;
  for (size_t g = 0; g < optimizer.param_groups().size(); ++g) {
    auto& group = result.emplace_back();
    const auto& tensors = optimizer.param_groups()[g].params();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto it = by_slice.find(tensors[i].unsafeGetTensorImpl());
      if (it == by_slice.end()) {
        throw Error(
            ErrorCode::kInvalidArgument,
            "the optimizer holds a tensor that is not a slice of the sharded model: give it the model's parameters()",
            {.key = "param_groups[" + std::to_string(g) + "].params[" + std::to_string(i) + "]",
             .found = "a tensor of sizes " + to_string(to_dims(tensors[i].sizes()))});
      }
      group.push_back(it->second);
    }
  }
  return result;
}

ShardRange range_of(const ShardedParameter& p, const at::Tensor& tensor) { return {p.shape, p.begin, p.end, tensor}; }

const StateValue& find(const StateDict& dict, const std::string& key, const std::string& path) {
  if (!dict.contains(key)) throw Error(ErrorCode::kNotFound, "missing from the optimizer's state dict", {.key = path});
  return dict.at(key);
}

bool is_same_setting(const StateValue& found, const StateValue& only) {
  if (only.is<None>()) return !as_flag(found);
  return as_flag(found) == as_flag(only);
}

}  // namespace

StateDict optimizer_state_dict(Optimizer& optimizer, const ShardedModule& model) {
  const auto parameters = parameters_of(optimizer, model);
  StateDict state;
  StateList groups;
  for (size_t g = 0; g < parameters.size(); ++g) {
    auto& options = optimizer.param_groups()[g].options();
    StateDict group;
    for (const GroupField& field : group_fields(options)) group[field.key] = field.get();
    StateList names;
    for (const ShardedParameter* p : parameters[g]) {
      names.emplace_back(p->names.front());
      if (!p->slice.requires_grad()) continue;
      const ParameterState values = parameter_state(optimizer, p->slice, options);
      if (values.tensors.empty()) continue;
      StateDict entry;
      if (values.step != nullptr) entry["step"] = at::full({}, static_cast<double>(*values.step), at::kFloat);
      for (const auto& [key, tensor] : values.tensors)
        entry[key] = as_sharded_tensor(*tensor, p->shape, p->begin, p->end);
      state[p->names.front()] = std::move(entry);
    }
    group["params"] = std::move(names);
    groups.emplace_back(std::move(group));
  }
  return {{"state", std::move(state)}, {"param_groups", std::move(groups)}};
}

void load_optimizer_state_dict(Optimizer& optimizer, const ShardedModule& model, const StateDict& dict) {
  const auto parameters = parameters_of(optimizer, model);
  const StateDict& state = find(dict, "state", "state").as<StateDict>();
  const StateList& groups = find(dict, "param_groups", "param_groups").as<StateList>();
  std::vector<std::function<void()>> writes;  // nothing is written before all is checked

  with_error_context({.rank = model.process_group().rank()}, [&] {
    for (size_t g = 0; g < parameters.size(); ++g) {
      const std::string path = "param_groups[" + std::to_string(g) + "]";
      if (parameters[g].empty()) continue;
      // Groups are known by their parameters, not by their position.
      const std::string& first = parameters[g].front()->names.front();
      const StateDict* group = nullptr;
      std::vector<std::string> names;
      for (const StateValue& candidate : groups) {
        names.clear();
        for (const StateValue& name : find(candidate, "params", path + ".params").as<StateList>())
          names.push_back(name.as<std::string>());
        if (std::ranges::find(names, first) == names.end()) continue;
        group = &candidate.as<StateDict>();
        break;
      }
      if (group == nullptr)
        throw Error(ErrorCode::kNotFound, "no group of the optimizer's state dict has this parameter", {.key = first});
      for (const ShardedParameter* p : parameters[g]) {
        if (std::ranges::find(names, p->names.front()) == names.end()) {
          throw Error(ErrorCode::kInvalidArgument, "the groups of the optimizer's state dict are made up differently",
                      {.key = p->names.front()});
        }
      }
      if (names.size() != parameters[g].size()) {
        throw Error(ErrorCode::kInvalidArgument, "the groups of the optimizer's state dict are made up differently",
                    {.key = path + ".params",
                     .wanted = std::to_string(parameters[g].size()) + " parameters",
                     .found = std::to_string(names.size())});
      }

      auto& options = optimizer.param_groups()[g].options();
      // Settings are taken into a copy first: they decide which state there is (amsgrad, momentum, centered).
      std::shared_ptr<OptimizerOptions> loaded = options.clone();
      for (const GroupField& field : group_fields(*loaded)) {
        const std::string key = path + "." + field.key;
        const StateValue& value = find(*group, field.key, key);
        with_error_context({.key = key}, [&] {
          if (field.set) {
            field.set(value);
          } else if (!is_same_setting(value, field.get())) {
            throw Error(ErrorCode::kUnsupported, "LibTorch's optimizer does not have this setting");
          }
        });
      }
      writes.emplace_back([&options, loaded] {
        auto to = group_fields(options);
        const auto from = group_fields(*loaded);
        for (size_t i = 0; i < to.size(); ++i) {
          if (to[i].set) to[i].set(from[i].get());
        }
      });

      for (const ShardedParameter* p : parameters[g]) {
        if (!p->slice.requires_grad()) continue;
        const ParameterState values = parameter_state(optimizer, p->slice, *loaded);
        if (values.tensors.empty()) continue;
        const std::string& name = p->names.front();
        const StateDict& entry = find(state, name, "state." + name).as<StateDict>();
        for (const auto& [key, tensor] : values.tensors) {
          const std::string full_key = "state." + name + "." + key;
          const StateValue& value = find(entry, key, full_key);
          check_fills(value, range_of(*p, *tensor), full_key);
          writes.emplace_back([&value, p, t = *tensor] { fill(value, range_of(*p, t)); });
        }
        if (values.step != nullptr) {
          const std::string full_key = "state." + name + ".step";
          const double step =
              with_error_context({.key = full_key}, [&] { return as_number(find(entry, "step", full_key)); });
          writes.emplace_back([counter = values.step, step] { *counter = static_cast<int64_t>(step); });
        }
      }
    }
  });
  for (const auto& write : writes) write();
}

}  // namespace reshard
