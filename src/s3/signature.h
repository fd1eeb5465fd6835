// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// AWS Signature Version 4, as its documentation for S3 has it ("Authenticating Requests: Using the Authorization Header").
//
// Ours, because libcurl's signs neither sorted nor encoded queries before 8.x, and Debian 12 has 7.88.

#include <map>
#include <string>
#include <string_view>

#include "reshard/s3/s3_file_system.h"

namespace reshard::s3 {

/// Percent-encoded but for unreserved characters, and slashes if they are to stay.
std::string uri_encode(std::string_view text, bool keep_slashes);

struct RequestToSign {
  std::string method;
  std::string path;                          // encoded, with its slash
  std::map<std::string, std::string> query;  // not encoded
  std::map<std::string, std::string>
      headers;  // lower-case names; all are signed; x-amz-date and x-amz-content-sha256 among them
};

/// "a=b&c=" of the query, sorted and encoded.
std::string canonical_query(const std::map<std::string, std::string>& query);
/// The value of the header Authorization.
std::string authorization(const RequestToSign& request, const S3Credentials& credentials, const std::string& region);

}  // namespace reshard::s3
