// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/sha256.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>

#include "reshard/core/error.h"

namespace reshard {
namespace {

void check(int ok) {
  if (ok != 1) throw Error(ErrorCode::kInternal, "libcrypto cannot compute SHA-256");
}

}  // namespace

// A save in the background may still be at work while the process exits: libcrypto must not clean up before it is done.
void keep_libcrypto() {
  static const int ok = OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, nullptr);
  check(ok);
}

struct Sha256::State {
  EVP_MD_CTX* context = (keep_libcrypto(), EVP_MD_CTX_new());
  State() { restart(); }
  ~State() { EVP_MD_CTX_free(context); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  void restart() { check(context != nullptr ? EVP_DigestInit_ex(context, EVP_sha256(), nullptr) : 0); }
};

std::string to_hex(const Sha256Digest& digest) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * digest.size());
  for (const std::byte b : digest) {
    text += kDigits[std::to_integer<unsigned>(b) >> 4];
    text += kDigits[std::to_integer<unsigned>(b) & 15];
  }
  return text;
}

Sha256::Sha256() : state_(std::make_unique<State>()) {}
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

Sha256& Sha256::update(ByteSpan data) {
  check(EVP_DigestUpdate(state_->context, data.data(), data.size()));
  return *this;
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest;
  check(EVP_DigestFinal_ex(state_->context, reinterpret_cast<unsigned char*>(digest.data()), nullptr));
  state_->restart();
  return digest;
}

Sha256Digest Sha256::of(ByteSpan data) { return Sha256().update(data).finish(); }

}  // namespace reshard
