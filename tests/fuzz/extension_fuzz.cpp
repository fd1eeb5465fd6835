// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as an item that went through zstd: decoded up to a limit, as readers do it.
#include "reshard/format/extension.h"

#include "fuzz/fuzz.h"
#include "support/streams.h"

namespace reshard::fuzz {

void target(ByteSpan input) {
  constexpr size_t kMost = 1 << 20;  // a bomb goes on, and nobody asks for more
  Bytes decoded;
  try {
    // The largest window that is taken, and what is decoded.
    limit_memory((uint64_t{128} << 20) + 8 * kMost, [&] {
      MemoryInputStream in(input);
      const auto stream = ZStandard().transform_from(in);
      Bytes part(64 << 10);
      while (const size_t size = stream->read(part)) {
        require(size <= part.size(), "a stream fills no more than it was given");
        decoded.insert(decoded.end(), part.begin(), part.begin() + static_cast<ptrdiff_t>(size));
        if (decoded.size() > kMost) return;
      }
    });
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kCorruptData, "a stream is refused with kCorruptData");
    return;
  }
  require(restored(ZStandard(), transformed(ZStandard(), decoded)) == decoded, "what was decoded survives");
}

}  // namespace reshard::fuzz
