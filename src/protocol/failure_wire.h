// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Failures of ranks as part of a message.

#include <map>
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

/// By rank. get_failures adds those that it reads to `failures`.
inline void put_failures(ByteWriter& out, const std::map<int, RankFailure>& failures) {
  out.varint(failures.size());
  for (const auto& [rank, failure] : failures) {
    out.varint(static_cast<uint64_t>(rank));
    put_failure(out, failure);
  }
}

inline void get_failures(ByteReader& in, std::map<int, RankFailure>& failures) {
  for (size_t n = in.count(3); n > 0; --n) {
    const int rank = static_cast<int>(in.varint());
    failures[rank] = get_failure(in);
  }
}

}  // namespace reshard
