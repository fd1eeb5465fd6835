// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/rank_local.h"

#include <string>
#include <utility>

namespace reshard {
namespace {

std::string name_on(const ProcessGroup& group) {
  return "rank_" + std::to_string(group.rank()) + "_of_" + std::to_string(group.size());
}

}  // namespace

StateDict rank_local(StateValue value, const ProcessGroup& group) { return {{name_on(group), std::move(value)}}; }

const StateValue& rank_local_value(const StateDict& dict, const ProcessGroup& group) { return dict.at(name_on(group)); }

}  // namespace reshard
