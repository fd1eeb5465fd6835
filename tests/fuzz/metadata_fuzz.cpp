// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a `.metadata` file, its digest not checked so that damage gets past it; what was read survives being
// written, as a file and on the wire.
#include "format/metadata_scan.h"
#include "fuzz/fuzz.h"
#include "reshard/core/box.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/planner/plan_wire.h"

namespace reshard::fuzz {

void target(ByteSpan input) {
  if (const auto scanned = scan_metadata(input)) {
    try {
      require(scanned->metadata == decode_metadata_tree(input).metadata, "both ways to read it give the same");
    } catch (const Error&) {
      require(false, "what the scanner reads, the tree reads");
    }
  }
  const Metadata metadata = bounded(512, input, [&] { return decode_metadata(input, false); });
  const Bytes file = encode_metadata(metadata);
  require(decode_metadata(file) == metadata, "a catalogue survives being written");
  require(encode_metadata(decode_metadata(file)) == file, "the same catalogue is the same bytes");
  require(decode_catalogue(encode_catalogue(metadata)) == metadata, "a catalogue survives being sent");
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    if (const auto* tensor = std::get_if<TensorStorageMetadata>(&entry))
      check_exact_tiling(tensor->size, tensor->chunks);
  }
}

}  // namespace reshard::fuzz
