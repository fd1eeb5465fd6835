// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/optimizer_state.h"

#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/optim/adagrad.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/lbfgs.h>
#include <torch/csrc/api/include/torch/optim/rmsprop.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <algorithm>
#include <functional>
#include <unordered_map>
#include <utility>

#include "fsdp/engine.h"
#include "fsdp/optimizer_parameters.h"
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
GroupField integer(const char* key, int64_t& field) {
  return {key, [&field] { return StateValue(field); },
          [&field](const StateValue& v) { field = static_cast<int64_t>(as_number(v)); }};
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
  if (auto* lbfgs = dynamic_cast<torch::optim::LBFGSOptions*>(&options)) {
    auto& max_eval = lbfgs->max_eval();
    auto& search = lbfgs->line_search_fn();
    return {number("lr", lbfgs->lr()),
            integer("max_iter", lbfgs->max_iter()),
            {"max_eval", [&max_eval] { return max_eval ? StateValue(*max_eval) : StateValue(None{}); },
             [&max_eval](const StateValue& v) {
               max_eval = v.is<None>() ? std::nullopt : std::optional(static_cast<int64_t>(as_number(v)));
             }},
            number("tolerance_grad", lbfgs->tolerance_grad()),
            number("tolerance_change", lbfgs->tolerance_change()),
            integer("history_size", lbfgs->history_size()),
            {"line_search_fn", [&search] { return search ? StateValue(*search) : StateValue(None{}); },
             [&search](const StateValue& v) {
               search = v.is<None>() ? std::nullopt : std::optional(v.as<std::string>());
             }}};
  }
  throw Error(ErrorCode::kUnsupported, "the state of this optimizer is not known",
              {.wanted = "SGD, Adam, AdamW, Adagrad, RMSprop or LBFGS"});
}

/// Of the tensor that PyTorch counts steps with.
at::ScalarType dtype_of_step() {
  return c10::get_default_dtype_as_scalartype() == at::kDouble ? at::kDouble : at::kFloat;
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
  if (dynamic_cast<const LBFGSOptions*>(&options) != nullptr) return {};  // it is of all parameters together: below
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

using torch::optim::LBFGSParamState;

bool is_lbfgs(const OptimizerOptions& options) {
  return dynamic_cast<const torch::optim::LBFGSOptions*>(&options) != nullptr;
}

/// LBFGS keeps one state, of all parameters flattened, at its first. It exists after the first step.
StateDict read_lbfgs(const LBFGSParamState& state) {
  const auto list = [](const auto& tensors) {
    StateList result;
    for (const at::Tensor& tensor : tensors)
      result.push_back(tensor.defined() ? StateValue(tensor) : StateValue(None{}));
    return result;
  };
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? StateValue(tensor) : StateValue(None{});
  };
  StateDict result{{"func_evals", state.func_evals()},
                   {"n_iter", state.n_iter()},
                   {"d", optional(state.d())},
                   {"t", state.t()},
                   {"old_dirs", list(state.old_dirs())},
                   {"old_stps", list(state.old_stps())},
                   {"ro", list(state.ro())},
                   {"H_diag", optional(state.H_diag())},
                   {"prev_flat_grad", optional(state.prev_flat_grad())},
                   {"prev_loss", state.prev_loss()}};
  if (state.al()) result["al"] = list(*state.al());
  return result;
}

/// `template_tensor` has the device and dtype of the parameters.
LBFGSParamState lbfgs_state_from(const StateDict& dict, const at::Tensor& template_tensor, const std::string& path) {
  const auto value = [&](const char* key) -> const StateValue& {
    if (!dict.contains(key))
      throw Error(ErrorCode::kNotFound, "missing from the optimizer's state dict", {.key = path + "." + key});
    return dict.at(key);
  };
  const auto tensor = [&](const StateValue& v) {
    if (v.is<None>()) return at::Tensor();
    const at::Tensor given = v.is<at::Tensor>() ? v.as<at::Tensor>() : at::scalar_tensor(as_number(v));
    return given.to(template_tensor.options()).clone();
  };
  const auto list = [&]<class Container>(const StateValue& v, Container result) {
    for (const StateValue& item : v.as<StateList>()) result.push_back(tensor(item));
    return result;
  };
  LBFGSParamState state;
  state.func_evals(static_cast<int64_t>(as_number(value("func_evals"))));
  state.n_iter(static_cast<int64_t>(as_number(value("n_iter"))));
  state.d(tensor(value("d")));
  state.t(as_number(value("t")));
  state.old_dirs(list(value("old_dirs"), std::deque<at::Tensor>()));
  state.old_stps(list(value("old_stps"), std::deque<at::Tensor>()));
  state.ro(list(value("ro"), std::deque<at::Tensor>()));
  state.H_diag(tensor(value("H_diag")));
  state.prev_flat_grad(tensor(value("prev_flat_grad")));
  state.prev_loss(as_number(value("prev_loss")));
  if (dict.contains("al") && !dict.at("al").is<None>()) state.al(list(dict.at("al"), std::vector<at::Tensor>()));
  return state;
}

/// The parameter behind each tensor of each group.
std::vector<std::vector<const ShardedParameter*>> parameters_of(Optimizer& optimizer,
                                                                const std::vector<ShardedParameter>& parameters) {
  std::unordered_map<const void*, const ShardedParameter*> by_slice;
  for (const ShardedParameter& p : parameters) by_slice[p.slice.unsafeGetTensorImpl()] = &p;
  std::vector<std::vector<const ShardedParameter*>> result;
  for (size_t g = 0; g < optimizer.param_groups().size(); ++g) {
    auto& group = result.emplace_back();
    const auto& tensors = optimizer.param_groups()[g].params();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto it = by_slice.find(tensors[i].unsafeGetTensorImpl());
      if (it == by_slice.end()) {
        throw Error(ErrorCode::kInvalidArgument,
                    "the optimizer holds a tensor that is not a parameter of the model (of a sharded one: not a slice "
                    "of it; give the optimizer the model's parameters())",
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

/// A group of the optimizer and the one of the state dict that has its parameters.
const StateDict* group_with(const StateList& groups, const std::vector<const ShardedParameter*>& parameters,
                            const std::string& path) {
  const StateDict* only_empty = nullptr;
  for (const StateValue& candidate : groups) {
    std::vector<std::string> names;
    for (const StateValue& name : find(candidate, "params", path + ".params").as<StateList>())
      names.push_back(name.as<std::string>());
    if (parameters.empty()) {  // nothing tells which it is, unless there is one
      if (!names.empty()) continue;
      if (only_empty != nullptr) return nullptr;
      only_empty = &candidate.as<StateDict>();
      continue;
    }
    const auto is_named = [&](const std::string& name) { return std::ranges::find(names, name) != names.end(); };
    // A tied parameter may be known by any of its names.
    const auto is_in = [&](const ShardedParameter* p) { return std::ranges::any_of(p->names, is_named); };
    if (!is_in(parameters.front())) continue;
    for (const ShardedParameter* p : parameters) {
      if (!is_in(p)) {
        throw Error(ErrorCode::kInvalidArgument, "the groups of the optimizer's state dict are made up differently",
                    {.key = p->names.front()});
      }
    }
    if (names.size() != parameters.size()) {
      throw Error(ErrorCode::kInvalidArgument, "the groups of the optimizer's state dict are made up differently",
                  {.key = path + ".params",
                   .wanted = std::to_string(parameters.size()) + " parameters",
                   .found = std::to_string(names.size())});
    }
    return &candidate.as<StateDict>();
  }
  return only_empty;
}

/// The group's settings, taken into a copy: they decide which state there is (amsgrad, momentum, centered).
std::shared_ptr<OptimizerOptions> read_settings(const StateDict& group, const OptimizerOptions& options,
                                                const std::string& path, const std::string& name, OptimizerLoad& load) {
  std::shared_ptr<OptimizerOptions> loaded = options.clone();
  std::vector<std::string> known{"params"};
  for (const GroupField& field : group_fields(*loaded)) {
    known.emplace_back(field.key);
    const std::string key = path + "." + field.key;
    const StateValue& value = find(group, field.key, key);
    with_error_context({.key = key}, [&] {
      if (field.set) {
        field.set(value);
      } else if (!is_same_setting(value, field.get())) {
        throw Error(ErrorCode::kUnsupported, "LibTorch's optimizer does not have this setting");
      }
    });
  }
  for (const auto& [key, value] : group.items()) {
    if (std::ranges::find(known, key) == known.end()) {
      load.unexpected.push_back("param_groups." + name + (name.empty() ? "" : ".") + key);
    }
  }
  return loaded;
}

}  // namespace

StateDict read_optimizer(Optimizer& optimizer, const std::vector<ShardedParameter>& all, bool whole) {
  const auto parameters = parameters_of(optimizer, all);
  StateDict state;
  StateList groups;
  for (size_t g = 0; g < parameters.size(); ++g) {
    auto& options = optimizer.param_groups()[g].options();
    StateDict group;
    for (const GroupField& field : group_fields(options)) group[field.key] = field.get();
    if (is_lbfgs(options) && !parameters[g].empty()) {
      if (!whole) throw Error(ErrorCode::kUnsupported, "LBFGS cannot train slices: it needs whole parameters");
      const auto it = optimizer.state().find(parameters[g].front()->slice.unsafeGetTensorImpl());
      if (it != optimizer.state().end())
        state[parameters[g].front()->names.front()] = read_lbfgs(static_cast<const LBFGSParamState&>(*it->second));
    }
    StateList names;
    for (const ShardedParameter* p : parameters[g]) {
      names.emplace_back(p->names.front());
      if (!p->slice.requires_grad()) continue;
      const ParameterState values = parameter_state(optimizer, p->slice, options);
      if (values.tensors.empty()) continue;
      StateDict entry;
      if (values.step != nullptr) entry["step"] = at::full({}, static_cast<double>(*values.step), dtype_of_step());
      for (const auto& [key, tensor] : values.tensors) {
        if (whole) {
          entry[key] = *tensor;
        } else {
          entry[key] = as_sharded_tensor(*tensor, p->shape, p->begin, p->end);
        }
      }
      state[p->names.front()] = std::move(entry);
    }
    group["params"] = std::move(names);
    groups.emplace_back(std::move(group));
  }
  return {{"state", std::move(state)}, {"param_groups", std::move(groups)}};
}

void plan_optimizer_load(Optimizer& optimizer, const std::vector<ShardedParameter>& all, bool whole,
                         const StateDict& dict, OptimizerLoad& load) {
  auto parameters = parameters_of(optimizer, all);
  if (load.includes) {
    for (auto& group : parameters) std::erase_if(group, [&](const ShardedParameter* p) { return !load.includes(*p); });
  }
  const StateDict& state = find(dict, "state", "state").as<StateDict>();
  const StateList& groups = find(dict, "param_groups", "param_groups").as<StateList>();
  for (size_t g = 0; g < parameters.size(); ++g) {
    const std::string path = "param_groups[" + std::to_string(g) + "]";
    auto& options = optimizer.param_groups()[g].options();
    const std::string first = parameters[g].empty() ? "" : parameters[g].front()->names.front();
    std::shared_ptr<OptimizerOptions> loaded = options.clone();
    if (const StateDict* group = group_with(groups, parameters[g], path)) {
      loaded = read_settings(*group, options, path, first, load);
      load.writes.push_back({nullptr, [&options, loaded](const StateValue&) {
                               auto to = group_fields(options);
                               const auto from = group_fields(*loaded);
                               for (size_t i = 0; i < to.size(); ++i) {
                                 if (to[i].set) to[i].set(from[i].get());
                               }
                             }});
    } else if (!parameters[g].empty()) {
      if (load.strict)
        throw Error(ErrorCode::kNotFound, "no group of the optimizer's state dict has this parameter", {.key = first});
      load.missing.push_back("param_groups." + first);
    }

    for (const ShardedParameter* p : parameters[g]) {
      const auto name = std::ranges::find_if(p->names, [&](const std::string& n) { return state.contains(n); });
      const bool is_kept = name != p->names.end();
      if (is_lbfgs(options)) {
        if (!whole) throw Error(ErrorCode::kUnsupported, "LBFGS cannot train slices: it needs whole parameters");
        if (p != parameters[g].front() || !is_kept) continue;  // none is saved before the first step
        const std::string full_key = "state." + *name;
        lbfgs_state_from(state.at(*name).as<StateDict>(), p->slice, full_key);
        load.writes.push_back({&state.at(*name), [&optimizer, p, full_key](const StateValue& value) {
                                 state_of<LBFGSParamState>(optimizer, p->slice) =
                                     lbfgs_state_from(value.as<StateDict>(), p->slice.detach(), full_key);
                               }});
        continue;
      }
      if (!p->slice.requires_grad()) continue;
      const ParameterState values = parameter_state(optimizer, p->slice, *loaded);
      if (values.tensors.empty()) continue;
      if (!is_kept) {
        const std::string full_key = "state." + p->names.front();
        if (load.strict)
          throw Error(ErrorCode::kNotFound, "missing from the optimizer's state dict", {.key = full_key});
        load.missing.push_back(full_key);
        continue;
      }
      const StateDict& entry = state.at(*name).as<StateDict>();
      for (const auto& [key, tensor] : values.tensors) {
        const std::string full_key = "state." + *name + "." + key;
        const StateValue& value = find(entry, key, full_key);
        check_fills(value, range_of(*p, *tensor), full_key);
        load.writes.push_back({&value, [p, whole, t = *tensor](const StateValue& v) {
                                 if (whole) {
                                   fill_tensor(v, t);
                                 } else {
                                   fill(v, range_of(*p, t));
                                 }
                               }});
      }
      if (values.step != nullptr) {
        const std::string full_key = "state." + *name + ".step";
        const double step =
            with_error_context({.key = full_key}, [&] { return as_number(find(entry, "step", full_key)); });
        load.writes.push_back(
            {nullptr, [counter = values.step, step](const StateValue&) { *counter = static_cast<int64_t>(step); }});
      }
    }
  }
}

std::vector<std::vector<std::string>> names_of_groups(Optimizer& optimizer, const std::vector<ShardedParameter>& all) {
  std::vector<std::vector<std::string>> result;
  for (const auto& group : parameters_of(optimizer, all)) {
    auto& names = result.emplace_back();
    for (const ShardedParameter* p : group) names.push_back(p->names.front());
  }
  return result;
}

StateDict optimizer_state_dict(Optimizer& optimizer, const ShardedModule& model) {
  return read_optimizer(optimizer, model.sharded_parameters(), /*whole=*/false);
}

void load_optimizer_state_dict(Optimizer& optimizer, const ShardedModule& model, const StateDict& dict) {
  OptimizerLoad load;  // nothing is written before all is checked
  with_error_context({.rank = model.engine()->global_rank()},
                     [&] { plan_optimizer_load(optimizer, model.sharded_parameters(), /*whole=*/false, dict, load); });
  for (const StateWrite& write : load.writes) write.apply(write.value == nullptr ? StateValue() : *write.value);
}

}  // namespace reshard
