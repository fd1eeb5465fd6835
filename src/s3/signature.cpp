// SPDX-License-Identifier: BSD-3-Clause
#include "s3/signature.h"

#include "reshard/format/sha256.h"

namespace reshard::s3 {
namespace {

/// RFC 2104. Keys here are shorter than a block or hashed to it.
Sha256Digest hmac(ByteSpan key, std::string_view text) {
  std::array<std::byte, 64> block{};
  Sha256Digest hashed;
  if (key.size() > block.size()) key = hashed = Sha256::of(key);
  std::copy(key.begin(), key.end(), block.begin());
  const auto padded = [&](unsigned char pad) {
    auto result = block;
    for (std::byte& b : result) b ^= std::byte{pad};
    return result;
  };
  const auto inner_key = padded(0x36);
  const auto outer_key = padded(0x5c);
  const Sha256Digest inner = Sha256().update(inner_key).update(as_bytes(text)).finish();
  return Sha256().update(outer_key).update(inner).finish();
}

}  // namespace

std::string uri_encode(std::string_view text, bool keep_slashes) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
                       c == '.' || c == '_' || c == '~' || (c == '/' && keep_slashes);
    if (plain) {
      out += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      out += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return out;
}

std::string canonical_query(const std::map<std::string, std::string>& query) {
  std::string out;
  for (const auto& [name, value] : query) {
    if (!out.empty()) out += '&';
    out += uri_encode(name, false) + "=" + uri_encode(value, false);
  }
  return out;
}

std::string authorization(const RequestToSign& request, const S3Credentials& credentials, const std::string& region) {
  std::string headers;
  std::string names;
  for (const auto& [name, value] : request.headers) {
    headers += name + ":" + value + "\n";
    names += (names.empty() ? "" : ";") + name;
  }
  const std::string canonical = request.method + "\n" + request.path + "\n" + canonical_query(request.query) + "\n" +
                                headers + "\n" + names + "\n" + request.headers.at("x-amz-content-sha256");
  const std::string& time = request.headers.at("x-amz-date");
  const std::string date = time.substr(0, 8);
  const std::string scope = date + "/" + region + "/s3/aws4_request";
  const std::string text = "AWS4-HMAC-SHA256\n" + time + "\n" + scope + "\n" + to_hex(Sha256::of(as_bytes(canonical)));
  Sha256Digest key = hmac(as_bytes("AWS4" + credentials.secret_access_key), date);
  for (const std::string_view step :
       {std::string_view(region), std::string_view("s3"), std::string_view("aws4_request")}) {
    key = hmac(key, step);
  }
  return "AWS4-HMAC-SHA256 Credential=" + credentials.access_key_id + "/" + scope + ",SignedHeaders=" + names +
         ",Signature=" + to_hex(hmac(key, text));
}

}  // namespace reshard::s3
