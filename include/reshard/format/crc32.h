// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// CRC-32 as zip archives carry it (the polynomial of zlib and Ethernet), at memory speed. Pure and thread-safe.

#include <cstdint>

#include "reshard/core/bytes.h"

namespace reshard {

/// CRC-32 of `data`, going on from `seed`: crc32(ab) == crc32(b, crc32(a)). 0 for no data.
uint32_t crc32(ByteSpan data, uint32_t seed = 0);

/// CRC-32 of a followed by b, from the two CRCs and the number of bytes of b: joins parts that were summed in parallel.
uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t length_b);

}  // namespace reshard
