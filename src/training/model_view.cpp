// SPDX-License-Identifier: BSD-3-Clause
#include "training/model_view.h"

#include <torch/csrc/api/include/torch/nn/module.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "fsdp/engine.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

std::string join(const std::string& path, const std::string& name) { return path.empty() ? name : path + "." + name; }

}  // namespace

ModelView::ModelView(const ModelRef& model, const StateDictOptions& state_dict_options)
    : options(state_dict_options), sharded(model.sharded()), group(state_dict_options.process_group) {
  if (!options.keep_submodule_prefixes && options.submodules.size() > 1) {
    throw Error(ErrorCode::kInvalidArgument, "without their prefixes the keys of several submodules may be the same",
                {.wanted = "one submodule", .found = std::to_string(options.submodules.size())});
  }
  if (!group) group = sharded != nullptr ? sharded->engine()->shared_group() : try_default_process_group();

  std::unordered_map<std::string, size_t> by_name;
  std::unordered_map<const at::TensorImpl*, size_t> by_handle;
  if (sharded != nullptr) {
    parameters = sharded->sharded_parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      for (const std::string& name : parameters[i].names) by_name[name] = i;
    }
  }
  std::vector<std::string> unmet = options.submodules;
  const auto add = [&](Entry entry) {
    const auto key = key_of(entry.fqn);
    if (!key ||
        (entry.parameter && options.ignore_frozen_params && !parameters[*entry.parameter].slice.requires_grad()))
      return;
    entry.key = *key;
    entries.push_back(std::move(entry));
  };
  const std::function<void(const torch::nn::Module&, const std::string&)> visit = [&](const torch::nn::Module& module,
                                                                                      const std::string& path) {
    std::erase(unmet, path);
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      const std::string fqn = join(path, item.key());
      size_t index = 0;
      if (sharded != nullptr) {
        index = by_name.at(fqn);
      } else {
        const at::Tensor& handle = item.value();
        const auto [it, is_new] = by_handle.try_emplace(handle.unsafeGetTensorImpl(), parameters.size());
        index = it->second;
        if (is_new) {
          parameters.push_back(
              {.names = {}, .shape = to_dims(handle.sizes()), .begin = 0, .end = handle.numel(), .slice = handle});
        }
        parameters[index].names.push_back(fqn);
      }
      add({.fqn = fqn, .key = {}, .parameter = index, .buffer = {}});
    }
    for (const auto& item : module.named_buffers(/*recurse=*/false))
      add({.fqn = join(path, item.key()), .key = {}, .parameter = {}, .buffer = item.value()});
    if (const auto* extra = dynamic_cast<const ExtraState*>(&module)) {
      add({.fqn = join(path, "_extra_state"),
           .key = {},
           .parameter = {},
           .buffer = {},
           .extra = const_cast<ExtraState*>(extra)});
    }
    for (const auto& child : module.named_children()) visit(*child.value(), join(path, child.key()));
  };
  visit(model.module(), "");
  if (!unmet.empty())
    throw Error(ErrorCode::kInvalidArgument, "the model has no submodule of this name", {.key = unmet.front()});

  std::map<std::string, const std::string*> keys;
  for (const Entry& entry : entries) {
    const auto [it, is_new] = keys.try_emplace(entry.key, &entry.fqn);
    if (!is_new) {
      throw Error(ErrorCode::kInvalidArgument, "two names of the model come to one key",
                  {.key = entry.key, .found = *it->second + " and " + entry.fqn});
    }
  }
}

std::optional<std::string> ModelView::key_of(const std::string& fqn) const {
  if (std::ranges::find(options.exclude, fqn) != options.exclude.end()) return std::nullopt;
  std::string key = fqn;
  if (!options.submodules.empty()) {
    const auto inside = std::ranges::find_if(
        options.submodules, [&](const std::string& name) { return name.empty() || fqn.starts_with(name + "."); });
    if (inside == options.submodules.end()) return std::nullopt;
    if (!options.keep_submodule_prefixes && !inside->empty()) key = fqn.substr(inside->size() + 1);
  }
  return options.rename ? options.rename(key) : key;
}

bool ModelView::includes(const ShardedParameter& parameter) const {
  if (options.ignore_frozen_params && !parameter.slice.requires_grad()) return false;
  return std::ranges::any_of(parameter.names, [&](const std::string& name) { return key_of(name).has_value(); });
}

}  // namespace reshard
