// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The `.metadata` file: one pickle of the catalogue. Pure and thread-safe.

#include "reshard/core/bytes.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

/// Reads the catalogue of torch 2.0 to 2.15 or of this library and validates it (metadata.h). Objects that the
/// catalogue does not need (a foreign planner's data, say) are passed over without being run. Throws kCorruptData or
/// kUnsupported naming key and cause. A catalogue of this library ends with a digest of itself: any changed byte is
/// kCorruptData, unless `verify_digest` is false.
Metadata decode_metadata(ByteSpan file, bool verify_digest = true);

/// Writes it so that torch 2.1 to 2.15 load it: classes under names that all of them resolve. What those releases do
/// not share (storage_meta, the digests of the sidecars, the digest of the file) goes into attributes of our own, whose
/// names begin with `reshard_`, which PyTorch keeps and ignores. Same catalogue, same bytes.
Bytes encode_metadata(const Metadata& metadata);

}  // namespace reshard
