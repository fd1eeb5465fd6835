// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The compact binary form in which plans and catalogues travel between ranks: varints and length-prefixed strings;
// names and properties once a tensor, not once a chunk. Both sides run the same build, so there is no version
// negotiation; a first byte that differs is an error.
//
// Decoding is bounded: the memory it takes is at most a constant (some hundreds) times the input, whatever the input
// holds. Where a legal plan repeats a long name more often than that allows, encoding adds padding.

#include <string>
#include <unordered_map>

#include "reshard/planner/planner.h"

namespace reshard {

/// Throws kInvalidArgument naming the key for an item that is not well formed: negative numbers, or a tensor item that
/// is not named after its chunk.
Bytes encode_save_plan(const SavePlan& plan);
/// Throws kCorruptData for anything that encode_save_plan does not write.
SavePlan decode_save_plan(ByteSpan bytes);

/// Decodes the plans of many ranks, which share what they have in common: names, and paths where all are equal. Not
/// thread-safe; the plans may outlive it.
class SavePlanDecoder {
 public:
  /// As decode_save_plan().
  SavePlan decode(ByteSpan bytes);

 private:
  SharedStringPool names_;
  std::unordered_map<std::string, SharedPaths> paths_;  // by the names of the plan's keys and the bytes of the paths
};

/// The whole catalogue, some ten times smaller than `.metadata` and faster to read; all of it but hints (`index`) that
/// can be no position. Throws kInvalidArgument on negative sizes and offsets.
Bytes encode_catalogue(const Metadata& metadata);
/// Throws kCorruptData for anything that encode_catalogue does not write.
Metadata decode_catalogue(ByteSpan bytes);

}  // namespace reshard
