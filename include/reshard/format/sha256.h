// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// SHA-256, for digests that bind one file or message to another and for `reshard digest`.

#include <array>
#include <cstddef>
#include <memory>
#include <string>

#include "reshard/core/bytes.h"

namespace reshard {

using Sha256Digest = std::array<std::byte, 32>;

/// 64 lower-case hexadecimal digits.
std::string to_hex(const Sha256Digest& digest);

/// Incremental SHA-256. One object is used by one thread at a time.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;

  Sha256& update(ByteSpan data);
  /// The digest of all that was given; the object then starts anew.
  Sha256Digest finish();

  /// The digest of one buffer.
  static Sha256Digest of(ByteSpan data);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace reshard
