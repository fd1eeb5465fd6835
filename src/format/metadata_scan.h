// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Two ways to read the pickle of a catalogue. Both give the same result wherever the first gives one.

#include <optional>

#include "reshard/core/bytes.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

struct DecodedMetadata {
  Metadata metadata;     // not validated
  bool is_ours = false;  // has attributes that only this library writes
};

/// Reads it in one pass that makes no tree: what the usual streams hold millions of (chunks, items and their places) goes
/// straight where it belongs. For a catalogue as this library and torch 2.3 and later write it; nothing for a stream that
/// is anything else, broken ones included. Takes memory in proportion to the file: what a stream can refer to for a few
/// bytes is short or is shared.
std::optional<DecodedMetadata> scan_metadata(ByteSpan file);

/// By way of a tree of all values: any catalogue that decode_metadata() accepts, with its errors.
DecodedMetadata decode_metadata_tree(ByteSpan file);

}  // namespace reshard
