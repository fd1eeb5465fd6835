// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace reshard {

/// Copies past the caches: the old contents of the destination are not fetched before they are overwritten.
inline void stream_copy(std::byte* to, const std::byte* from, size_t size) {
#ifdef __SSE2__
  const size_t head = std::min(size, static_cast<size_t>(-reinterpret_cast<uintptr_t>(to) & 63));
  std::memcpy(to, from, head);
  size_t done = head;
  for (; size - done >= 64; done += 64) {
    const auto* source = reinterpret_cast<const __m128i*>(from + done);
    auto* destination = reinterpret_cast<__m128i*>(to + done);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(destination + i, _mm_loadu_si128(source + i));
  }
  std::memcpy(to + done, from + done, size - done);
  _mm_sfence();
#else
  std::memcpy(to, from, size);
#endif
}

}  // namespace reshard
