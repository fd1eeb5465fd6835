// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a sidecar, as they are and behind the digest that fits them, as a forger would write them.
#include "reshard/format/sidecar.h"

#include "fuzz/fuzz.h"

namespace reshard::fuzz {

namespace {

void round_trip(ByteSpan file) {
  Sidecar sidecar;
  try {
    sidecar = bounded(32, file, [&] { return decode_sidecar(file); });
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported,
            "a sidecar is refused with kCorruptData or kUnsupported");
    return;
  }
  Sidecar back = decode_sidecar(encode_sidecar(sidecar));
  back.library_version = sidecar.library_version;  // the writer's own
  require(back == sidecar, "a sidecar survives being written");
}

}  // namespace

void target(ByteSpan input) {
  round_trip(input);
  const Sha256Digest digest = Sha256::of(input);
  Bytes sealed(input.begin(), input.end());
  sealed.insert(sealed.end(), digest.begin(), digest.end());
  round_trip(sealed);
}

}  // namespace reshard::fuzz
