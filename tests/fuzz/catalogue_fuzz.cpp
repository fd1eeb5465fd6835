// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a catalogue sent by the coordinator; what was read survives being sent.
#include "fuzz/fuzz.h"
#include "reshard/planner/plan_wire.h"

namespace reshard::fuzz {

void target(ByteSpan input) {
  const Metadata metadata = bounded(512, input, [&] { return decode_catalogue(input); });
  const Metadata back = decode_catalogue(encode_catalogue(metadata));
  require(back == metadata, "a catalogue survives being sent");
  auto it = metadata.storage_data.begin();
  for (const auto& [index, info] : back.storage_data) {
    require(index.index == (it++)->first.index, "the hint of an item survives being sent");
  }
}

}  // namespace reshard::fuzz
