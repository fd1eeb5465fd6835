// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/crc32.h"

#include <libdeflate.h>
#include <zlib.h>

namespace reshard {

uint32_t crc32(ByteSpan data, uint32_t seed) { return libdeflate_crc32(seed, data.data(), data.size()); }

uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t length_b) {
  return static_cast<uint32_t>(::crc32_combine(a, b, static_cast<z_off_t>(length_b)));
}

}  // namespace reshard
