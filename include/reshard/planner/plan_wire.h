// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The compact binary form in which plans travel between ranks: varints and length-prefixed strings, names and properties once a tensor, not once a chunk.
// Both sides run the same build, so there is no version negotiation; a first byte that differs is an error.

#include "reshard/planner/planner.h"

namespace reshard {

Bytes encode_save_plan(const SavePlan& plan);
/// Throws kCorruptData for anything that encode_save_plan does not write; allocates at most a small constant times the input.
SavePlan decode_save_plan(ByteSpan bytes);

}  // namespace reshard
