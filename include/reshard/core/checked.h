// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Integer arithmetic on numbers that come from files or from other ranks: an overflow is corrupt data, never a wrap.

#include <concepts>
#include <string>
#include <string_view>

#include "reshard/core/error.h"

namespace reshard {

/// a + b; throws kCorruptData naming `what` if it does not fit.
template <std::integral T>
T checked_add(T a, T b, std::string_view what) {
  T result;
  if (__builtin_add_overflow(a, b, &result)) throw Error(ErrorCode::kCorruptData, std::string(what) + " overflows");
  return result;
}

/// a * b; throws kCorruptData naming `what` if it does not fit.
template <std::integral T>
T checked_mul(T a, T b, std::string_view what) {
  T result;
  if (__builtin_mul_overflow(a, b, &result)) throw Error(ErrorCode::kCorruptData, std::string(what) + " overflows");
  return result;
}

}  // namespace reshard
