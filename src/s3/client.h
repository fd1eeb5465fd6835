// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Signed requests to a store, repeated until they are answered or must be given up.

#include <curl/curl.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/s3/s3_file_system.h"

namespace reshard {

/// "s3://bucket/key"; the key may be empty and never begins or ends with a slash.
struct S3Location {
  std::string bucket;
  std::string key;
  std::string url() const { return "s3://" + bucket + "/" + key; }
};
/// kInvalidArgument for anything else.
S3Location parse_s3_url(const std::string& url);

struct S3Request {
  std::string method;
  S3Location location;
  const char* operation;   // for errors: "read", "upload a part"
  bool of_bucket = false;  // asks the bucket; the key is for errors
  std::map<std::string, std::string> query{};
  std::map<std::string, std::string> headers{};  // lower-case names
  ByteSpan body{};
  /// Where the body of an answer 206 goes, which must fill it exactly.
  std::span<const MutableByteSpan> into{};
  /// Answers besides 2xx that are returned rather than thrown.
  std::set<long> also{};
};

struct S3Response {
  long status = 0;
  std::map<std::string, std::string> headers;  // lower-case names
  std::string body;
  int attempts = 0;
  const std::string& header(const std::string& name) const;
};

/// The text of the first <name> in an XML document, after `from` if given, which it then moves behind it; nothing without one.
std::optional<std::string> xml_element(std::string_view document, std::string_view name, size_t* from = nullptr);

/// The header of an object that tells one write from every other.
inline constexpr const char* kWriteId = "x-amz-meta-reshard-write";
/// 32 hexadecimal digits.
std::string random_id();

class S3Client;
/// The headers of an object; nothing where there is none.
std::optional<S3Response> head(S3Client& client, const S3Location& location);

/// Thread-safe.
class S3Client {
 public:
  explicit S3Client(S3Options options);
  ~S3Client();
  S3Client(const S3Client&) = delete;
  S3Client& operator=(const S3Client&) = delete;

  const S3Options& options() const { return options_; }
  S3Response send(const S3Request& request);
  /// The error for an answer that send() returned.
  Error refusal(const S3Request& request, const S3Response& response) const;
  S3Counters counters() const;

 private:
  struct Outcome;
  Outcome attempt(const S3Request& request, std::chrono::milliseconds timeout);
  std::string without_secrets(std::string text) const;

  S3Options options_;
  std::string scheme_;  // with "://"
  std::string host_;    // with its port; empty: Amazon's
  std::mutex mutex_;    // of idle_
  std::vector<CURL*> idle_;
  std::atomic<uint64_t> requests_ = 0;
  std::atomic<uint64_t> retries_ = 0;
  std::atomic<uint64_t> sent_ = 0;
  std::atomic<uint64_t> received_ = 0;
};

}  // namespace reshard
