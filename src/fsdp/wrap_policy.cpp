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

}  // namespace reshard
