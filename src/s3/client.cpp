// SPDX-License-Identifier: BSD-3-Clause
#include "s3/client.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <thread>

#include "reshard/core/hooks.h"
#include "reshard/format/sha256.h"
#include "s3/config.h"
#include "s3/signature.h"

namespace reshard {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kMaxBodyBytes = 16 << 20;  // of an answer that is not a range: a list of a thousand long keys, encoded
constexpr size_t kMaxHeaderBytes = 64 << 10;
constexpr size_t kMaxMessageBytes = 300;
constexpr long kConnectMilliseconds = 10'000;
constexpr const char* kPrefix = "s3://";

/// What the callbacks of one attempt fill.
struct Answer {
  CURL* curl;
  const S3Request& request;
  S3Response response{};
  size_t header_bytes = 0;
  size_t part = 0;        // of request.into that is being filled
  size_t filled = 0;      // bytes of it
  uint64_t received = 0;  // of the body
  bool too_long = false;
  bool has_all_headers = false;

  bool take(const char* data, size_t size) {
    long status = 0;
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    received += size;
    if (status != 206) {
      too_long = response.body.size() + size > kMaxBodyBytes;
      if (!too_long) response.body.append(data, size);
      return !too_long;
    }
    while (size > 0) {
      while (part < request.into.size() && filled == request.into[part].size()) {
        ++part;
        filled = 0;
      }
      if (part == request.into.size()) {
        too_long = true;
        return false;
      }
      const size_t count = std::min(size, request.into[part].size() - filled);
      std::copy_n(reinterpret_cast<const std::byte*>(data), count,
                  request.into[part].begin() + static_cast<ptrdiff_t>(filled));
      filled += count;
      data += count;
      size -= count;
    }
    return true;
  }
  bool take_header(std::string_view line) {
    if (line.starts_with("HTTP/")) response.headers.clear();
    has_all_headers = line == "\r\n" || line == "\n";
    header_bytes += line.size();
    if (header_bytes > kMaxHeaderBytes) return false;
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) return true;
    std::string name(line.substr(0, colon));
    std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    const std::string_view value = line.substr(colon + 1);
    const size_t begin = value.find_first_not_of(" \t\r\n");
    response.headers[name] = begin == std::string_view::npos
                                 ? ""
                                 : std::string(value.substr(begin, value.find_last_not_of(" \t\r\n") - begin + 1));
    return true;
  }
};

size_t on_body(char* data, size_t, size_t size, void* answer) {
  return static_cast<Answer*>(answer)->take(data, size) ? size : 0;
}

size_t on_header(char* data, size_t, size_t size, void* answer) {
  return static_cast<Answer*>(answer)->take_header({data, size}) ? size : 0;
}

std::string now_as_text() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[17];
  std::strftime(text, sizeof text, "%Y%m%dT%H%M%SZ", &utc);
  return text;
}

/// Failures of a transfer that another attempt may not see.
bool is_transient(CURLcode code) {
  switch (code) {
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_URL_MALFORMAT:
    case CURLE_WRITE_ERROR:
    case CURLE_OUT_OF_MEMORY:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CERTPROBLEM:
      return false;
    default:
      return true;
  }
}

bool is_transient(long status, const std::string& code) {
  static const std::set<std::string> kCodes{"InternalError",  "SlowDown",           "ServiceUnavailable",
                                            "RequestTimeout", "OperationAborted",   "ConditionalRequestConflict",
                                            "Throttling",     "ThrottlingException"};
  return status == 429 || status == 500 || status == 502 || status == 503 || status == 504 || kCodes.contains(code);
}

milliseconds random_wait(milliseconds longest) {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return milliseconds(std::uniform_int_distribution<int64_t>(0, longest.count())(generator));
}

void require(bool ok, const char* what, const std::string& wanted, const std::string& found) {
  if (!ok)
    throw Error(ErrorCode::kInvalidArgument, std::string(what) + " of S3Options", {.wanted = wanted, .found = found});
}

void decode_entities(std::string& text) {
  static const std::map<std::string, char> kEntities{
      {"amp", '&'}, {"lt", '<'}, {"gt", '>'}, {"quot", '"'}, {"apos", '\''}};
  for (size_t at = 0; (at = text.find('&', at)) != std::string::npos; ++at) {
    const size_t end = text.find(';', at);
    if (end == std::string::npos) return;
    const std::string name = text.substr(at + 1, end - at - 1);
    if (const auto known = kEntities.find(name); known != kEntities.end()) {
      text.replace(at, end - at + 1, 1, known->second);
    } else if (name.starts_with("#")) {
      const bool hex = name.size() > 1 && name[1] == 'x';
      unsigned value = 0;
      const char* last = name.data() + name.size();
      const auto parsed = std::from_chars(name.data() + (hex ? 2 : 1), last, value, hex ? 16 : 10);
      // Keys come percent-encoded, so only ASCII matters.
      if (parsed.ec == std::errc{} && parsed.ptr == last && value > 0 && value < 128) {
        text.replace(at, end - at + 1, 1, static_cast<char>(value));
      }
    }
  }
}

}  // namespace

S3Location parse_s3_url(const std::string& url) {
  const auto fail = [&](const char* what) -> S3Location {
    throw Error(ErrorCode::kInvalidArgument, what, {.file = url, .wanted = "s3://bucket/key"});
  };
  if (!is_s3_url(url)) return fail("this is no place in an object store");
  const std::string rest = url.substr(std::string_view(kPrefix).size());
  const size_t slash = rest.find('/');
  S3Location location{rest.substr(0, slash), slash == std::string::npos ? "" : rest.substr(slash + 1)};
  const bool plain = std::ranges::all_of(
      location.bucket, [](unsigned char c) { return std::isalnum(c) != 0 || c == '.' || c == '-' || c == '_'; });
  if (location.bucket.size() < 3 || location.bucket.size() > 63 || !plain || location.bucket[0] == '.') {
    return fail("this is no name of a bucket");
  }
  while (location.key.ends_with('/')) location.key.pop_back();
  if (location.key.find('\0') != std::string::npos || location.key.starts_with('/')) return fail("this is no key");
  return location;
}

std::optional<std::string> xml_element(std::string_view document, std::string_view name, size_t* from) {
  const std::string open = "<" + std::string(name) + ">";
  const std::string close = "</" + std::string(name) + ">";
  const size_t begin = document.find(open, from != nullptr ? *from : 0);
  if (begin == std::string_view::npos) return std::nullopt;
  const size_t end = document.find(close, begin + open.size());
  if (end == std::string_view::npos) return std::nullopt;
  if (from != nullptr) *from = end + close.size();
  std::string text(document.substr(begin + open.size(), end - begin - open.size()));
  decode_entities(text);
  return text;
}

const std::string& S3Response::header(const std::string& name) const {
  static const std::string kNone;
  const auto found = headers.find(name);
  return found != headers.end() ? found->second : kNone;
}

struct S3Client::Outcome {
  S3Response response;
  std::optional<std::string> failure;  // of the transfer
  bool transient = false;
  bool broken = false;  // the answer breaks the protocol
};

S3Client::S3Client(S3Options options) : options_(s3::resolve(std::move(options))) {
  static const CURLcode ready = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (ready != CURLE_OK) throw Error(ErrorCode::kInternal, "libcurl cannot be initialized");
  constexpr uint64_t kMinPart = 5 << 20;
  constexpr uint64_t kMaxPart = uint64_t{5} << 30;
  require(options_.part_bytes >= kMinPart && options_.part_bytes <= kMaxPart, "part_bytes", "5 MiB to 5 GiB",
          std::to_string(options_.part_bytes));
  require(options_.range_bytes >= 1, "range_bytes", "1 or more", "0");
  require(options_.parallel >= 1 && options_.parallel <= 256, "parallel", "1 to 256",
          std::to_string(options_.parallel));
  require(options_.max_attempts >= 1, "max_attempts", "1 or more", std::to_string(options_.max_attempts));
  require(options_.copy_bytes >= kMinPart && options_.copy_bytes <= kMaxPart, "copy_bytes", "5 MiB to 5 GiB",
          std::to_string(options_.copy_bytes));
  require(options_.lock_lease >= milliseconds(1000), "lock_lease", "1 s or more",
          std::to_string(options_.lock_lease.count()) + " ms");
  for (const milliseconds time : {options_.attempt_timeout, options_.deadline}) {
    require(time.count() >= 1, "a time", "1 ms or more", std::to_string(time.count()));
  }
  require(options_.first_backoff.count() >= 0 && options_.max_backoff >= options_.first_backoff, "max_backoff",
          "first_backoff or more", std::to_string(options_.max_backoff.count()));
  const std::string& endpoint = options_.endpoint;
  if (endpoint.empty()) {
    scheme_ = "https://";
    return;
  }
  const size_t slashes = endpoint.find("://");
  scheme_ = slashes == std::string::npos ? "" : endpoint.substr(0, slashes + 3);
  if (scheme_ != "") host_ = endpoint.substr(slashes + 3);
  while (host_.ends_with('/')) host_.pop_back();
  // Not shown: it may hold a password.
  require((scheme_ == "http://" || scheme_ == "https://") && !host_.empty() &&
              host_.find_first_of("@/?# \t\r\n") == std::string::npos,
          "endpoint", "http[s]://host[:port], without user, password and path", "something else");
}

S3Client::~S3Client() {
  for (CURL* handle : idle_) curl_easy_cleanup(handle);
}

std::string random_id() {
  std::random_device device;
  std::string text;
  for (int i = 0; i < 32; ++i) text += "0123456789abcdef"[device() % 16];
  return text;
}

std::optional<S3Response> head(S3Client& client, const S3Location& location) {
  S3Response response = client.send({.method = "HEAD", .location = location, .operation = "look", .also = {404}});
  if (response.status == 404) return std::nullopt;
  return response;
}

S3Counters S3Client::counters() const { return {requests_, retries_, sent_, received_}; }

S3Client::Outcome S3Client::attempt(const S3Request& request, milliseconds timeout) {
  const S3Location& at = request.location;
  const bool in_path = options_.path_style.value_or(!host_.empty() || at.bucket.find('.') != std::string::npos);
  std::string host = !host_.empty() ? host_
                                    : "s3." + options_.region +
                                          (options_.region.starts_with("cn-") ? ".amazonaws.com.cn" : ".amazonaws.com");
  if (!in_path) host = at.bucket + "." + host;
  s3::RequestToSign sign{
      request.method, (in_path ? "/" + at.bucket : "") + "/" + (request.of_bucket ? "" : s3::uri_encode(at.key, true)),
      request.query, request.headers};
  sign.headers["host"] = host;
  sign.headers["x-amz-date"] = now_as_text();
  sign.headers["x-amz-content-sha256"] = to_hex(Sha256::of(request.body));
  if (!options_.credentials->session_token.empty()) {
    sign.headers["x-amz-security-token"] = options_.credentials->session_token;
  }
  curl_slist* list = nullptr;
  const auto add = [&](const std::string& line) {
    curl_slist* longer = curl_slist_append(list, line.c_str());
    if (longer == nullptr) throw std::bad_alloc();
    list = longer;
  };
  const std::unique_ptr<curl_slist*, void (*)(curl_slist**)> free_list(&list,
                                                                       [](curl_slist** l) { curl_slist_free_all(*l); });
  for (const auto& [name, value] : sign.headers) add(name + ": " + value);
  add("authorization: " + s3::authorization(sign, *options_.credentials, options_.region));
  for (const char* none : {"Accept:", "Content-Type:", "Expect:"}) add(none);

  CURL* curl = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      curl = idle_.back();
      idle_.pop_back();
    }
  }
  if (curl == nullptr) curl = curl_easy_init();
  if (curl == nullptr) throw std::bad_alloc();
  std::unique_ptr<CURL, void (*)(CURL*)> handle(curl, curl_easy_cleanup);

  const std::string query = s3::canonical_query(sign.query);
  const std::string url = scheme_ + host + sign.path + (query.empty() ? "" : "?" + query);
  Answer answer{curl, request};
  char reason[CURL_ERROR_SIZE] = "";
  curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, reason);
  curl_easy_setopt(curl, CURLOPT_HTTPHEADER, list);
  curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, std::min<long>(kConnectMilliseconds, timeout.count()));
  curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, static_cast<long>(timeout.count()));
  curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
  curl_easy_setopt(curl, CURLOPT_WRITEDATA, &answer);
  curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, on_header);
  curl_easy_setopt(curl, CURLOPT_HEADERDATA, &answer);
  if (const char* bundle = std::getenv("AWS_CA_BUNDLE")) curl_easy_setopt(curl, CURLOPT_CAINFO, bundle);
  if (request.method == "HEAD") {
    curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);
  } else if (request.method == "PUT" || request.method == "POST") {
    static const char kEmpty = 0;
    curl_easy_setopt(curl, CURLOPT_POST, 1L);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(request.body.size()));
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS,
                     request.body.empty() ? &kEmpty : reinterpret_cast<const char*>(request.body.data()));
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
  } else if (request.method != "GET") {
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
  }

  const CURLcode code = curl_easy_perform(curl);
  ++requests_;
  received_ += answer.received;
  if (code == CURLE_OK) sent_ += request.body.size();
  Outcome outcome{std::move(answer.response), {}, false, false};
  curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &outcome.response.status);
  if (answer.too_long) {
    outcome.failure = "the answer is longer than it may be";
    outcome.broken = true;
  } else if (code != CURLE_OK) {
    outcome.failure = reason[0] != '\0' ? reason : curl_easy_strerror(code);
    outcome.transient = is_transient(code);
  } else {
    curl_easy_reset(curl);
    const std::lock_guard lock(mutex_);
    idle_.push_back(curl);
    static_cast<void>(handle.release());
    uint64_t wanted = 0;
    for (const MutableByteSpan part : request.into) wanted += part.size();
    if (!answer.has_all_headers) {
      outcome.failure = "the answer ends within its headers";
      outcome.transient = true;
    } else if (outcome.response.status == 206 && answer.received != wanted) {
      outcome.failure =
          "the answer ends after " + std::to_string(answer.received) + " of " + std::to_string(wanted) + " bytes";
      outcome.transient = true;
    }
  }
  return outcome;
}

S3Response S3Client::send(const S3Request& request) {
  const auto end = Clock::now() + options_.deadline;
  milliseconds backoff = options_.first_backoff;
  for (int number = 1;; ++number) {
    const auto left = std::chrono::ceil<milliseconds>(end - Clock::now());
    Outcome outcome = attempt(request, std::max(milliseconds(1), std::min(options_.attempt_timeout, left)));
    outcome.response.attempts = number;
    const long status = outcome.response.status;
    ErrorCode code = ErrorCode::kIo;
    std::string why;
    bool transient = outcome.transient;
    if (outcome.failure) {
      why = *outcome.failure;
      if (outcome.broken) code = ErrorCode::kCorruptData;
    } else {
      // An upload of many parts is answered with 200 before it is known whether it succeeds.
      const bool refused = status < 200 || status >= 300 || outcome.response.body.find("<Error>") != std::string::npos;
      if (!refused || request.also.contains(status)) return std::move(outcome.response);
      const Error error = refusal(request, outcome.response);
      transient = is_transient(status, xml_element(outcome.response.body, "Code").value_or(""));
      if (!transient) throw error;
      why = error.message();
    }
    const std::string what = "cannot " + std::string(request.operation) + ": ";
    const milliseconds wait = random_wait(backoff);
    const bool late = Clock::now() + wait >= end;
    if (!transient || number == options_.max_attempts || late) {
      if (transient) {
        code = late ? ErrorCode::kTimeout : ErrorCode::kUnavailable;
        why = std::to_string(number) + (number == 1 ? " attempt" : " attempts") + " failed" +
              (late ? " in " + std::to_string(options_.deadline.count()) + " ms" : "") + ", the last one: " + why;
      }
      throw Error(code, without_secrets(what + why), {.file = request.location.url()});
    }
    log(LogLevel::kInfo, without_secrets(request.location.url() + ": " + what + why + "; trying again"));
    std::this_thread::sleep_for(wait);
    backoff = std::min(options_.max_backoff, 2 * backoff);
    ++retries_;
  }
}

Error S3Client::refusal(const S3Request& request, const S3Response& response) const {
  const ErrorCode code = response.status == 404   ? ErrorCode::kNotFound
                         : response.status == 412 ? ErrorCode::kFailedPrecondition
                                                  : ErrorCode::kIo;
  std::string text =
      "cannot " + std::string(request.operation) + ": the store answered " + std::to_string(response.status);
  if (const auto name = xml_element(response.body, "Code")) text += " " + *name;
  if (const auto message = xml_element(response.body, "Message"))
    text += ": " + without_secrets(*message).substr(0, kMaxMessageBytes);
  if (const std::string& region = response.header("x-amz-bucket-region");
      !region.empty() && region != options_.region) {
    text += "; the bucket is in region " + region + ", asked was " + options_.region;
  }
  return Error(code, without_secrets(std::move(text)), {.file = request.location.url()});
}

std::string S3Client::without_secrets(std::string text) const {
  const S3Credentials& credentials = *options_.credentials;
  for (const std::string& secret :
       {credentials.secret_access_key, credentials.session_token, credentials.access_key_id}) {
    if (secret.empty()) continue;
    for (size_t at = 0; (at = text.find(secret, at)) != std::string::npos; at += 3)
      text.replace(at, secret.size(), "***");
  }
  return text;
}

}  // namespace reshard
