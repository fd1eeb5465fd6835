// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// One rank's failure as part of a message.

#include <string_view>

#include "reshard/core/bytes.h"
#include "reshard/core/error.h"

namespace reshard {

/// `limit`: of the text, in bytes.
inline void put_failure(ByteWriter& out, const RankFailure& failure, size_t limit = std::string_view::npos) {
  out.u8(static_cast<uint8_t>(failure.code));
  out.string(std::string_view(failure.message).substr(0, limit));
}

inline ErrorCode get_error_code(ByteReader& in) {
  const uint8_t code = in.u8();
  if (code > static_cast<uint8_t>(ErrorCode::kInternal)) {
    throw Error(ErrorCode::kCorruptData, "unknown error code in a message", {.found = std::to_string(code)});
  }
  return static_cast<ErrorCode>(code);
}

inline RankFailure get_failure(ByteReader& in) {
  const ErrorCode code = get_error_code(in);
  return {code, in.string()};
}

}  // namespace reshard
