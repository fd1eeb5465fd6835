// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/training/state_dict.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <set>
#include <unordered_map>

#include "fsdp/engine.h"
#include "fsdp/optimizer_parameters.h"
#include "fsdp/shard_range.h"
#include "reshard/core/error.h"
#include "reshard/state_dict/wire.h"
#include "reshard/training/state_dict_utils.h"
#include "training/group_round.h"
#include "training/model_view.h"
#include "training/tensor_bytes.h"

namespace reshard {
namespace {

/// What the options make of a dict of views.
StateDict finish(StateDict state, const ModelView& view) {
  const StateDictOptions& options = view.options;
  if (options.full_state_dict && view.group) {
    return gather_state_dict(state, *view.group,
                             {.cpu_offload = options.cpu_offload,
                              .ranks_only = options.cpu_offload ? std::vector<int>{0} : std::vector<int>{}});
  }
  return options.cpu_offload ? offload_state_dict_to_cpu(state) : state;
}

StateDict read_model(const ModelView& view) {
  // One unit is gathered at a time; where only rank 0 is to have the result, that is done tensor by tensor instead.
  const bool gathered = view.options.full_state_dict && !view.options.cpu_offload;
  const StateDict of_shards = view.sharded == nullptr
                                  ? StateDict()
                                  : view.sharded->state_dict(gathered ? StateDictType::kFull : StateDictType::kSharded);
  StateDict result;
  for (const ModelView::Entry& entry : view.entries) {
    if (entry.extra != nullptr) {
      result[entry.key] = entry.extra->get_extra_state();
    } else if (view.sharded != nullptr) {
      result[entry.key] = of_shards.at(entry.fqn);
    } else {
      result[entry.key] = entry.parameter ? view.parameters[*entry.parameter].slice.detach() : entry.buffer.detach();
    }
  }
  return result;
}

/// {"state.<fqn>.exp_avg": .., "param_groups.<fqn>.lr": ..}
StateDict flatten_optimizer(const StateDict& nested) {
  StateDict flat;
  for (const auto& [fqn, entry] : nested.at("state").as<StateDict>().items()) {
    for (const auto& [key, value] : entry.as<StateDict>().items()) flat["state." + fqn + "." + key] = value;
  }
  for (const StateValue& group : nested.at("param_groups").as<StateList>()) {
    for (const StateValue& fqn : group.as<StateDict>().at("params").as<StateList>()) {
      for (const auto& [key, value] : group.as<StateDict>().items()) {
        if (key != "params") flat["param_groups." + fqn.as<std::string>() + "." + key] = value;
      }
    }
  }
  return flat;
}

bool is_equal(const StateValue& a, const StateValue& b) {
  const auto number = [](const StateValue& v) -> std::optional<double> {
    if (v.is<bool>()) return v.as<bool>() ? 1 : 0;
    if (v.is<int64_t>()) return static_cast<double>(v.as<int64_t>());
    if (v.is<double>()) return v.as<double>();
    if (v.is<at::Tensor>() && v.as<at::Tensor>().numel() == 1) return v.as<at::Tensor>().item().toDouble();
    return std::nullopt;
  };
  if (number(a) && number(b)) return *number(a) == *number(b);
  if (a.is<None>() || b.is<None>()) return a.is<None>() && b.is<None>();
  if (a.is<std::string>() && b.is<std::string>()) return a.as<std::string>() == b.as<std::string>();
  const auto items = [](const StateValue& v) -> const std::vector<StateValue>* {
    return v.is<StateTuple>() ? &v.as<StateTuple>().items : v.is<StateList>() ? &v.as<StateList>() : nullptr;
  };
  return items(a) != nullptr && items(b) != nullptr && std::ranges::equal(*items(a), *items(b), is_equal);
}

/// Adds to `nested` what the flat dict has for the groups of one optimizer, and takes that out of `flat`.
void unflatten_optimizer(std::map<std::string, StateValue>& flat, const ModelView& view,
                         torch::optim::Optimizer& optimizer, StateDict& nested) {
  /// Entries `<prefix>.<key>` by key, taken out. Keys have no dots, names have.
  const auto take = [&](const std::string& prefix) {
    StateDict taken;
    for (auto it = flat.lower_bound(prefix + "."); it != flat.end() && it->first.starts_with(prefix + ".");) {
      const std::string key = it->first.substr(prefix.size() + 1);
      if (key.find('.') != std::string::npos) {
        ++it;
        continue;
      }
      taken[key] = std::move(it->second);
      it = flat.erase(it);
    }
    return taken;
  };
  std::unordered_map<std::string, const ShardedParameter*> by_name;
  for (const ShardedParameter& p : view.parameters) by_name[p.names.front()] = &p;
  for (const std::vector<std::string>& canonical : names_of_groups(optimizer, view.parameters)) {
    StateDict group;
    StateList params;
    std::string first;
    for (const std::string& name : canonical) {
      const ShardedParameter& parameter = *by_name.at(name);
      if (!view.includes(parameter)) continue;
      for (const std::string& fqn : parameter.names) {
        const auto key = view.key_of(fqn);
        if (!key) continue;
        StateDict settings = take("param_groups." + *key);
        StateDict state = take("state." + *key);
        if (settings.empty() && state.empty()) continue;
        params.emplace_back(*key);
        if (!state.empty()) nested.at("state").as<StateDict>()[*key] = std::move(state);
        if (group.empty()) {
          group = std::move(settings);
          first = *key;
        }
        for (const auto& [setting, value] : settings.items()) {
          if (group.contains(setting) && is_equal(group.at(setting), value)) continue;
          throw Error(ErrorCode::kInvalidArgument, "parameters of one group have different settings",
                      {.key = "param_groups." + *key + "." + setting, .wanted = "that of " + first});
        }
        break;
      }
    }
    if (params.empty()) continue;
    group["params"] = std::move(params);
    nested.at("param_groups").as<StateList>().emplace_back(std::move(group));
  }
}

/// A copy of the nested dict in which keys are the model's names.
StateDict with_names_of_model(const StateDict& nested, const ModelView& view, std::vector<std::string>& unexpected) {
  std::unordered_map<std::string, std::string> names;
  for (const ShardedParameter& p : view.parameters) {
    if (!view.includes(p)) continue;
    for (const std::string& fqn : p.names) {
      if (const auto key = view.key_of(fqn)) names[*key] = fqn;
    }
  }
  const auto name_of = [&](const std::string& key) {
    const auto it = names.find(key);
    return it == names.end() ? key : it->second;
  };
  const auto part = [&](const char* key) -> const StateValue& {
    if (!nested.contains(key))
      throw Error(ErrorCode::kNotFound, "missing from the optimizer's state dict", {.key = key});
    return nested.at(key);
  };
  StateDict state;
  for (const auto& [key, value] : part("state").as<StateDict>().items()) {
    if (!names.contains(key)) unexpected.push_back("state." + key);
    state[name_of(key)] = value;
  }
  StateList groups;
  for (const StateValue& group : part("param_groups").as<StateList>()) {
    StateDict copy = group.as<StateDict>();
    if (copy.contains("params")) {
      for (StateValue& name : copy.at("params").as<StateList>()) name = name_of(name.as<std::string>());
    }
    groups.emplace_back(std::move(copy));
  }
  return {{"state", std::move(state)}, {"param_groups", std::move(groups)}};
}

std::string list(const std::vector<std::string>& keys) {
  std::string text;
  for (size_t i = 0; i < keys.size() && i < 10; ++i) text += (i == 0 ? "" : ", ") + keys[i];
  return keys.size() > 10 ? text + " and " + std::to_string(keys.size() - 10) + " more" : text;
}

/// A setter call: all that it will write, once that is known to fit.
class Load {
 public:
  explicit Load(const ModelView& view) : view_(view) {
    for (const ShardedParameter& p : view_.parameters) {
      if (!p.slice.is_meta()) {
        device_ = p.slice.device();
        break;
      }
    }
  }

  void plan_model(const StateDict& state) {
    std::unordered_map<std::string, const ModelView::Entry*> by_key;
    for (const ModelView::Entry& entry : view_.entries) by_key[entry.key] = &entry;
    std::set<size_t> found;
    IncompatibleKeys keys;
    for (const auto& [key, value] : state.items()) {
      const auto it = by_key.find(key);
      if (it == by_key.end()) {
        keys.unexpected_keys.push_back(key);
        continue;
      }
      const ModelView::Entry& entry = *it->second;
      if (entry.extra != nullptr) {
        writes_.push_back({&value, [extra = entry.extra](const StateValue& v) { extra->set_extra_state(v); }});
      } else if (entry.parameter) {
        plan_parameter(view_.parameters[*entry.parameter], key, value);
        found.insert(*entry.parameter);
      } else {
        plan_tensor(entry.buffer, key, value);
      }
    }
    for (const ModelView::Entry& entry : view_.entries) {
      if (entry.parameter ? !found.contains(*entry.parameter) : !state.contains(entry.key))
        keys.missing_keys.push_back(entry.key);
    }
    if (view_.options.strict) {
      if (!keys.missing_keys.empty()) {
        throw Error(ErrorCode::kNotFound, "Missing key(s) in the model's state dict: " + list(keys.missing_keys),
                    {.key = keys.missing_keys.front()});
      }
      if (!keys.unexpected_keys.empty()) {
        throw Error(ErrorCode::kInvalidArgument,
                    "Unexpected key(s) in the model's state dict: " + list(keys.unexpected_keys),
                    {.key = keys.unexpected_keys.front()});
      }
    }
    add(std::move(keys));
    loads_model_ = true;
  }

  void plan_optimizers(const OptimizersRef& optimizers, const StateDict& given) {
    StateDict nested = given;
    IncompatibleKeys keys;
    if (!given.contains("param_groups") || !given.at("param_groups").is<StateList>()) {
      std::map<std::string, StateValue> flat;
      for (const auto& [key, value] : given.items()) flat[key] = value;
      nested = {{"state", StateDict()}, {"param_groups", StateList()}};
      for (torch::optim::Optimizer* optimizer : optimizers.optimizers())
        unflatten_optimizer(flat, view_, *optimizer, nested);
      for (const auto& [key, value] : flat) keys.unexpected_keys.push_back(key);
    }
    optimizer_state_ = with_names_of_model(nested, view_, keys.unexpected_keys);
    for (torch::optim::Optimizer* optimizer : optimizers.optimizers()) {
      OptimizerLoad load{.strict = false, .includes = [this](const ShardedParameter& p) { return view_.includes(p); }};
      plan_optimizer_load(*optimizer, view_.parameters, view_.sharded == nullptr, optimizer_state_, load);
      writes_.insert(writes_.end(), load.writes.begin(), load.writes.end());
      keys.missing_keys.insert(keys.missing_keys.end(), load.missing.begin(), load.missing.end());
      keys.unexpected_keys.insert(keys.unexpected_keys.end(), load.unexpected.begin(), load.unexpected.end());
    }
    if (view_.options.strict && !keys.missing_keys.empty()) {
      throw Error(ErrorCode::kNotFound, "Missing key(s) in the optimizer's state dict: " + list(keys.missing_keys),
                  {.key = keys.missing_keys.front()});
    }
    add(std::move(keys));
  }

  /// Parameters that lie together on one device, to which tensors are sent.
  void require_one_device() const {
    for (const ShardedParameter& p : view_.parameters) {
      if (p.slice.is_meta() || p.slice.device() == device_) continue;
      throw Error(ErrorCode::kInvalidArgument, "Multiple devices found: a broadcast needs a model on one device",
                  {.key = p.names.front(), .wanted = device_.str(), .found = p.slice.device().str()});
    }
  }

  /// What the writes of this rank take from the wire, for comparison with the other ranks.
  Bytes describe() const {
    std::string text;
    for (const StateWrite& write : writes_) {
      if (write.value == nullptr) continue;
      transform_tensors(*write.value, [&](const at::Tensor& t) {
        text += to_string(to_dims(t.sizes())) + c10::toString(t.scalar_type());
        return t;
      });
      text += ";";
    }
    const ByteSpan bytes = as_bytes(text);
    return {bytes.begin(), bytes.end()};
  }

  /// `source`: the group whose rank 0 has the values, or null if this rank's are real.
  IncompatibleKeys apply(ProcessGroup* source) {
    const at::NoGradGuard no_grad;
    for (const StateWrite& write : writes_) {
      if (write.value == nullptr) {
        write.apply(StateValue());
      } else if (source == nullptr) {
        write.apply(*write.value);
      } else {
        write.apply(transform_tensors(*write.value, [&](const at::Tensor& t) { return broadcast(t, *source); }));
      }
    }
    if (loads_model_ && view_.sharded != nullptr) view_.sharded->engine()->note_load();
    return std::move(keys_);
  }

 private:
  void add(IncompatibleKeys keys) {
    keys_.missing_keys.insert(keys_.missing_keys.end(), keys.missing_keys.begin(), keys.missing_keys.end());
    keys_.unexpected_keys.insert(keys_.unexpected_keys.end(), keys.unexpected_keys.begin(), keys.unexpected_keys.end());
  }

  void plan_parameter(const ShardedParameter& p, const std::string& key, const StateValue& value) {
    if (view_.sharded == nullptr) {
      plan_tensor(p.slice, key, value);
      return;
    }
    check_fills(value, {p.shape, p.begin, p.end, p.slice}, key);
    writes_.push_back({&value, [&p](const StateValue& v) { fill(v, {p.shape, p.begin, p.end, p.slice}); }});
  }

  void plan_tensor(const at::Tensor& tensor, const std::string& key, const StateValue& value) {
    const Dims shape = to_dims(tensor.sizes());
    check_fills(value, {shape, 0, tensor.numel(), tensor}, key);
    writes_.push_back({&value, [tensor, device = device_](const StateValue& v) {
                         if (tensor.is_meta()) {
                           const at::Tensor memory = at::empty_like(tensor, tensor.options().device(device));
                           tensor.unsafeGetTensorImpl()->shallow_copy_from(memory.getIntrusivePtr());
                         }
                         fill_tensor(v, tensor);
                       }});
  }

  at::Tensor broadcast(const at::Tensor& tensor, ProcessGroup& group) const {
    if (tensor.dim() == 0) return tensor;  // came with the structure
    const c10::Device carrier = group.has_backend(device_.type()) ? device_ : c10::Device(c10::kCPU);
    at::Tensor carried = group.rank() == 0 ? tensor.to(carrier).contiguous()
                                           : at::empty(tensor.sizes(), tensor.options().device(carrier));
    at::Tensor bytes = byte_alias(carried);
    if (bytes.numel() > 0) group.broadcast(bytes, 0);
    return carried;
  }

  const ModelView& view_;
  c10::Device device_ = c10::kCPU;
  StateDict optimizer_state_;
  std::vector<StateWrite> writes_;
  IncompatibleKeys keys_;
  bool loads_model_ = false;
};

IncompatibleKeys set(const ModelRef& model, const OptimizersRef* optimizers, const StateDict* model_state,
                     const StateDict* optimizer_state, const StateDictOptions& options) {
  const ModelView view(model, options);
  Load load(view);
  const auto plan = [&](const StateDict* of_model, const StateDict* of_optimizers) {
    if (of_model != nullptr) load.plan_model(*of_model);
    if (of_optimizers != nullptr) load.plan_optimizers(*optimizers, *of_optimizers);
  };
  if (options.broadcast_from_rank0 && !options.full_state_dict) {
    throw Error(ErrorCode::kInvalidArgument, "broadcast_from_rank0 sends whole tensors: set full_state_dict, too");
  }
  if (!options.broadcast_from_rank0 || !view.group || view.group->size() == 1) {
    plan(model_state, optimizer_state);
    return load.apply(nullptr);
  }
  ProcessGroup& group = *view.group;
  const bool is_source = group.rank() == 0;
  GroupRounds rounds(&group);
  const Bytes structure = rounds.round(
      "state dict",
      [&] {
        load.require_one_device();
        if (!is_source) return Bytes();
        StateDict both;
        if (model_state != nullptr) both["model"] = *model_state;
        if (optimizer_state != nullptr) both["optimizer"] = *optimizer_state;
        std::vector<at::Tensor> tensors;
        return encode_state_dict(both, tensors);
      },
      [](std::vector<Bytes> of_ranks) { return std::move(of_ranks[0]); });
  StateDict described;
  rounds.round(
      "state dict",
      [&] {
        if (is_source) {
          plan(model_state, optimizer_state);
        } else {
          described = decode_state_dict(structure, [](at::ScalarType dtype, const Dims& sizes) {
            return at::empty({sizes.data(), sizes.size()}, at::TensorOptions().dtype(dtype).device(c10::kMeta));
          });
          plan(described.contains("model") ? &described.at("model").as<StateDict>() : nullptr,
               described.contains("optimizer") ? &described.at("optimizer").as<StateDict>() : nullptr);
        }
        return load.describe();
      },
      [](const std::vector<Bytes>& of_ranks) {
        for (size_t r = 1; r < of_ranks.size(); ++r) {
          if (of_ranks[r] != of_ranks[0]) {
            throw Error(ErrorCode::kInvalidArgument, "the ranks have different models or optimizers",
                        {.wanted = "those of rank 0", .found = "others on rank " + std::to_string(r)});
          }
        }
        return Bytes();
      });
  return load.apply(&group);
}

}  // namespace

StateDict get_model_state_dict(ModelRef model, const StateDictOptions& options) {
  const ModelView view(model, options);
  return finish(read_model(view), view);
}

StateDict get_optimizer_state_dict(ModelRef model, OptimizersRef optimizers, const StateDictOptions& options) {
  const ModelView view(model, options);
  std::unordered_map<std::string, std::string> keys;  // by canonical name
  for (const ShardedParameter& p : view.parameters) {
    if (!view.includes(p)) continue;
    for (const std::string& name : p.names) {
      if (const auto key = view.key_of(name)) {
        keys[p.names.front()] = *key;
        break;
      }
    }
  }
  StateDict state;
  StateList groups;
  for (torch::optim::Optimizer* optimizer : optimizers.optimizers()) {
    const StateDict one = read_optimizer(*optimizer, view.parameters, view.sharded == nullptr);
    for (const auto& [name, value] : one.at("state").as<StateDict>().items()) {
      const auto it = keys.find(name);
      if (it == keys.end()) continue;
      if (state.contains(it->second))
        throw Error(ErrorCode::kInvalidArgument, "two optimizers train one parameter", {.key = it->second});
      state[it->second] = value;
    }
    for (StateValue group : one.at("param_groups").as<StateList>()) {
      StateList params;
      for (const StateValue& name : group.as<StateDict>().at("params").as<StateList>()) {
        const auto it = keys.find(name.as<std::string>());
        if (it != keys.end()) params.emplace_back(it->second);
      }
      group.as<StateDict>()["params"] = std::move(params);
      groups.push_back(std::move(group));
    }
  }
  const StateDict nested{{"state", std::move(state)}, {"param_groups", std::move(groups)}};
  return finish(options.flatten_optimizer_state_dict ? flatten_optimizer(nested) : nested, view);
}

ModelAndOptimizerState get_state_dict(ModelRef model, OptimizersRef optimizers, const StateDictOptions& options) {
  ModelAndOptimizerState result;
  result.model = get_model_state_dict(model, options);
  result.optimizer = get_optimizer_state_dict(model, std::move(optimizers), options);
  return result;
}

IncompatibleKeys set_model_state_dict(ModelRef model, const StateDict& state, const StateDictOptions& options) {
  return set(model, nullptr, &state, nullptr, options);
}

IncompatibleKeys set_optimizer_state_dict(ModelRef model, OptimizersRef optimizers, const StateDict& state,
                                          const StateDictOptions& options) {
  return set(model, &optimizers, nullptr, &state, options);
}

IncompatibleKeys set_state_dict(ModelRef model, OptimizersRef optimizers, const StateDict& model_state,
                                const StateDict& optimizer_state, const StateDictOptions& options) {
  return set(model, &optimizers, &model_state, &optimizer_state, options);
}

}  // namespace reshard
