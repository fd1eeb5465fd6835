// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The little of UTF-8 that pickles need.

#include <optional>
#include <string>
#include <string_view>

#include "reshard/core/bytes.h"

namespace reshard {

/// True for UTF-8 without overlong forms and up to U+10FFFF; surrogates are let through, because Python's pickler
/// writes them.
bool is_utf8(std::string_view text);

/// Bytes as the characters U+0000 to U+00FF, and back; nothing if `text` holds others.
std::string latin1_to_utf8(ByteSpan data);
std::optional<std::string> utf8_to_latin1(std::string_view text);

}  // namespace reshard
