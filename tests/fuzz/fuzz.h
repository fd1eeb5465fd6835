// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A fuzz target: one decoder, given any bytes at all. Each *_fuzz.cpp defines target(); fuzz.cpp is the rest:
// the entry that libFuzzer calls, or a program that replays the corpus in every build, and the watch over memory.

#include <functional>
#include <optional>
#include <utility>

#include "reshard/core/bytes.h"

namespace reshard::fuzz {

/// Runs `body`, which may allocate at most `bytes` in all at any time, counted from what is allocated now.
void limit_memory(size_t bytes, const std::function<void()>& body);

/// What reading `input` gives. It may take per_byte times the input, and 16 KiB for errors and first blocks.
template <class Read>
auto bounded(size_t per_byte, ByteSpan input, Read&& read) {
  std::optional<decltype(read())> result;
  limit_memory(per_byte * input.size() + (16 << 10), [&] { result.emplace(read()); });
  return *std::move(result);
}

/// Reads the input. To refuse it is to throw an Error with kCorruptData or kUnsupported; anything else that leaves is a
/// finding.
void target(ByteSpan input);

/// Ends the program with a line if a property does not hold.
void require(bool holds, const char* property);

}  // namespace reshard::fuzz
