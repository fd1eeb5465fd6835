// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a save plan of another rank; what was read survives being sent.
#include "fuzz/fuzz.h"
#include "reshard/planner/plan_wire.h"

namespace reshard::fuzz {

void target(ByteSpan input) {
  const SavePlan plan = bounded(512, input, [&] { return decode_save_plan(input); });
  const SavePlan back = decode_save_plan(encode_save_plan(plan));
  require(back == plan, "a save plan survives being sent");
  for (size_t i = 0; i < plan.items.size(); ++i) {
    require(back.items[i].index.index == plan.items[i].index.index, "the hint of an item survives being sent");
  }
}

}  // namespace reshard::fuzz
