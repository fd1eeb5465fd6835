// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/wrap_policy.h"

#include <algorithm>

namespace reshard {

WrapPolicy wrap_by_name(std::vector<std::string> names) {
  const auto wanted = names;
  return WrapPolicy(
      [names = std::move(names)](const std::string& name, const torch::nn::Module&) {
        return std::ranges::find(names, name) != names.end();
      },
      wanted);
}

WrapPolicy wrap_modules(std::vector<std::shared_ptr<torch::nn::Module>> modules) {
  return WrapPolicy([modules = std::move(modules)](const std::string&, const torch::nn::Module& module) {
    return std::ranges::any_of(modules, [&](const auto& wanted) { return wanted.get() == &module; });
  });
}

}  // namespace reshard
