// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/s3/s3_file_system.h"

#include <algorithm>
#include <charconv>
#include <deque>
#include <functional>
#include <future>
#include <set>
#include <utility>

#include "reshard/core/hooks.h"
#include "s3/client.h"
#include "s3/lease.h"
#include "s3/signature.h"

namespace reshard {
namespace {

constexpr uint64_t kMaxParts = 10'000;
uint64_t size_of(const S3Response& response, const S3Location& location) {
  const std::string& text = response.header("content-length");
  uint64_t size = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), size);
  if (parsed.ec != std::errc{} || parsed.ptr != text.data() + text.size()) {
    throw Error(ErrorCode::kCorruptData, "the store does not tell the object's size",
                {.file = location.url(), .found = text});
  }
  return size;
}

std::string percent_decoded(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned value = 0;
    if (text[i] == '%' && i + 2 < text.size() &&
        std::from_chars(text.data() + i + 1, text.data() + i + 3, value, 16).ptr == text.data() + i + 3) {
      out += static_cast<char>(value);
      i += 2;
    } else {
      out += text[i] == '+' ? ' ' : text[i];
    }
  }
  return out;
}

/// The names below a prefix, sorted; `one_is_enough` to know whether there are any.
std::vector<std::string> list_names(S3Client& client, const std::string& path, bool one_is_enough) {
  const S3Location location = parse_s3_url(path);
  const std::string prefix = location.key.empty() ? "" : location.key + "/";
  std::set<std::string> names;
  std::string token;
  do {
    S3Request request{.method = "GET",
                      .location = location,
                      .operation = "list",
                      .of_bucket = true,
                      .query = {{"delimiter", "/"}, {"encoding-type", "url"}, {"list-type", "2"}, {"prefix", prefix}}};
    if (one_is_enough) request.query["max-keys"] = "1";
    if (!token.empty()) request.query["continuation-token"] = token;
    const S3Response response = client.send(request);
    if (response.body.find("<ListBucketResult") == std::string::npos) {
      throw Error(ErrorCode::kCorruptData, "the store did not answer with a list", {.file = path});
    }
    const auto take = [&](std::string_view element, std::string_view inside) {
      for (size_t at = 0;;) {
        const auto outer = xml_element(response.body, element, &at);
        if (!outer) return;
        std::string key = percent_decoded(xml_element(*outer, inside).value_or(""));
        if (!key.starts_with(prefix)) {
          throw Error(ErrorCode::kCorruptData, "the store lists a key that was not asked for",
                      {.file = path, .wanted = prefix, .found = key});
        }
        key.erase(0, prefix.size());
        while (key.ends_with('/')) key.pop_back();
        if (!key.empty()) names.insert(key);
      }
    };
    take("Contents", "Key");
    take("CommonPrefixes", "Prefix");
    const bool more = xml_element(response.body, "IsTruncated") == "true";
    const std::string next = more ? xml_element(response.body, "NextContinuationToken").value_or("") : "";
    if (more && (next.empty() || next == token)) {
      throw Error(ErrorCode::kCorruptData, "the store's list does not go on", {.file = path});
    }
    token = next;
  } while (!token.empty() && !one_is_enough);
  return {names.begin(), names.end()};
}

// --- reading
// -----------------------------------------------------------------------------------------------------------

class S3ReadFile final : public RandomAccessFile {
 public:
  S3ReadFile(std::shared_ptr<S3Client> client, S3Location location, uint64_t size, std::string etag)
      : client_(std::move(client)), location_(std::move(location)), size_(size), etag_(std::move(etag)) {}

  uint64_t size() const override { return size_; }
  uint64_t preferred_read_bytes() const override {
    return client_->options().range_bytes * static_cast<uint64_t>(client_->options().parallel);
  }

  void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const override {
    uint64_t wanted = 0;
    for (const MutableByteSpan part : parts) wanted += part.size();
    if (offset > size_ || wanted > size_ - offset) {
      throw Error(ErrorCode::kCorruptData, std::string(what) + ": the file ends too early",
                  {.file = location_.url(),
                   .offset = offset,
                   .wanted = std::to_string(wanted) + " bytes",
                   .found = std::to_string(offset > size_ ? 0 : size_ - offset) + " bytes"});
    }
    if (wanted == 0) return;
    // Ranges of equal size, at most range_bytes each, cut from the parts.
    std::vector<Range> ranges(1, Range{offset, 0, {}});
    const uint64_t limit = client_->options().range_bytes;
    for (MutableByteSpan part : parts) {
      while (!part.empty()) {
        if (ranges.back().length == limit) ranges.push_back({ranges.back().offset + limit, 0, {}});
        Range& range = ranges.back();
        const auto count = static_cast<size_t>(std::min<uint64_t>(part.size(), limit - range.length));
        range.into.push_back(part.first(count));
        range.length += count;
        part = part.subspan(count);
      }
    }
    // Those ahead of the one that is waited for are under way.
    std::deque<std::future<void>> under_way;
    const auto ahead = static_cast<size_t>(client_->options().parallel);
    for (size_t i = 0; i + 1 < ranges.size(); ++i) {
      if (under_way.size() + 1 >= ahead) {
        under_way.front().get();
        under_way.pop_front();
      }
      under_way.push_back(std::async(std::launch::async, [this, &range = ranges[i], what] { read(range, what); }));
    }
    read(ranges.back(), what);
    for (auto& range : under_way) range.get();
  }

 private:
  struct Range {
    uint64_t offset;
    uint64_t length;
    std::vector<MutableByteSpan> into;
  };

  void read(const Range& range, std::string_view what) const {
    const std::string bytes = std::to_string(range.offset) + "-" + std::to_string(range.offset + range.length - 1);
    const S3Request request{.method = "GET",
                            .location = location_,
                            .operation = "read",
                            .headers = {{"range", "bytes=" + bytes}, {"if-match", etag_}},
                            .into = range.into,
                            .also = {404, 412}};
    const ErrorContext where{.file = location_.url(), .offset = range.offset};
    const S3Response response = with_error_context(where, [&] { return client_->send(request); });
    const auto changed = [&](const std::string& found) {
      throw Error(ErrorCode::kFailedPrecondition, std::string(what) + ": the object changed while it was read",
                  {.file = where.file, .offset = where.offset, .wanted = etag_, .found = found});
    };
    if (response.status == 412) changed("another version");
    if (response.status == 404) changed("no object");
    if (response.header("etag") != etag_) changed(response.header("etag"));
    const std::string wanted = "bytes " + bytes + "/" + std::to_string(size_);
    if (response.status != 206 || response.header("content-range") != wanted) {
      throw Error(ErrorCode::kCorruptData,
                  std::string(what) + ": the store did not answer with the range that it was asked for",
                  {.file = where.file,
                   .offset = where.offset,
                   .wanted = "206 " + wanted,
                   .found = std::to_string(response.status) + " " + response.header("content-range")});
    }
  }

  std::shared_ptr<S3Client> client_;
  S3Location location_;
  uint64_t size_;
  std::string etag_;
};

/// What asks for the content of another object, in that version.
std::map<std::string, std::string> copy_headers(const S3Location& source, const std::string& etag) {
  return {{"x-amz-copy-source", "/" + source.bucket + "/" + s3::uri_encode(source.key, true)},
          {"x-amz-copy-source-if-match", etag}};
}

// --- writing
// -----------------------------------------------------------------------------------------------------------

/// What fits into one part and must not replace anything is one conditional PUT. Everything else is an upload of parts,
/// which can be called off: after a failed completion the upload is aborted, and once it is gone it cannot take effect
/// late. That is how a save that could not commit knows that it did not.
class S3WriteFile final : public WritableFile {
 public:
  S3WriteFile(std::shared_ptr<S3Client> client, S3Location location, bool exclusive)
      : client_(std::move(client)), location_(std::move(location)), exclusive_(exclusive) {}
  ~S3WriteFile() override {
    if (!upload_id_.empty()) {
      try {
        under_way_.clear();  // waits
        abort();
      } catch (const std::exception& error) {
        log(LogLevel::kWarning, std::string("parts of an upload that was given up are left: ") + error.what());
      }
    }
  }

  void write_gather(uint64_t offset, std::span<const ByteSpan> parts) override {
    if (offset != begin_ + buffer_.size()) {
      throw Error(ErrorCode::kUnsupported, "an object is written from its beginning to its end",
                  {.file = location_.url(),
                   .offset = offset,
                   .wanted = "offset " + std::to_string(begin_ + buffer_.size()),
                   .found = std::to_string(offset)});
    }
    for (ByteSpan part : parts) {
      while (!part.empty()) {
        const uint64_t limit = part_bytes();
        if (buffer_.size() == limit) {
          upload_part();
          continue;
        }
        const auto count = static_cast<size_t>(std::min<uint64_t>(part.size(), limit - buffer_.size()));
        buffer_.insert(buffer_.end(), part.begin(), part.begin() + static_cast<ptrdiff_t>(count));
        part = part.subspan(count);
      }
    }
  }
  void write_back(uint64_t, uint64_t) override {}
  void start_write_back(uint64_t, uint64_t) override {}

  /// Takes an object's content in parts, on the server's side. Nothing else is written.
  void copy_from(const S3Location& source, uint64_t size, const std::string& etag) {
    const uint64_t most = client_->options().copy_bytes;
    for (uint64_t begin = 0; begin < size; begin += most) {
      const std::string range =
          "bytes=" + std::to_string(begin) + "-" + std::to_string(std::min(size, begin + most) - 1);
      add_part([this, source, etag, range](uint64_t number) {
        auto headers = copy_headers(source, etag);
        headers["x-amz-copy-source-range"] = range;
        const S3Response response = client_->send({.method = "PUT",
                                                   .location = location_,
                                                   .operation = "copy a part",
                                                   .query = part_query(number),
                                                   .headers = std::move(headers)});
        return xml_element(response.body, "ETag").value_or("");
      });
    }
  }

  /// All that can fail but the publication itself.
  void sync() override {
    if (exclusive_ && upload_id_.empty()) return;
    if (!buffer_.empty() || parts_ == 0) upload_part();
    wait_for_parts(0);
  }

  void close() override {
    if (closed_) return;
    closed_ = true;
    sync();
    if (upload_id_.empty()) {
      put();
    } else {
      complete();
    }
  }

 private:
  uint64_t part_bytes() const { return client_->options().part_bytes << (parts_ / 1000); }

  std::map<std::string, std::string> conditions() const {
    if (!exclusive_ || !client_->options().conditional_writes) return {};
    return {{"if-none-match", "*"}};
  }

  bool is_published() {
    const auto found = head(*client_, location_);
    return found && found->header(kWriteId) == write_id_;
  }

  [[noreturn]] void refuse_existing() {
    throw Error(ErrorCode::kAlreadyExists, "cannot create: there is such an object", {.file = location_.url()});
  }

  void put() {
    S3Request request{.method = "PUT",
                      .location = location_,
                      .operation = "write",
                      .headers = conditions(),
                      .body = buffer_,
                      .also = {412}};
    request.headers[kWriteId] = write_id_;
    const S3Response response = client_->send(request);
    // The answer to an earlier attempt may have been lost.
    if (response.status == 412 && !(response.attempts > 1 && is_published())) refuse_existing();
  }

  std::map<std::string, std::string> part_query(uint64_t number) const {
    return {{"partNumber", std::to_string(number)}, {"uploadId", upload_id_}};
  }

  void upload_part() {
    const uint64_t size = buffer_.size();
    add_part([this, bytes = std::exchange(buffer_, {})](uint64_t number) {
      const S3Response response = client_->send({.method = "PUT",
                                                 .location = location_,
                                                 .operation = "upload a part",
                                                 .query = part_query(number),
                                                 .body = bytes});
      return response.header("etag");
    });
    begin_ += size;
  }

  /// `send` sends the part of a number and returns its ETag; while it runs, others may.
  void add_part(std::function<std::string(uint64_t)> send) {
    if (parts_ == kMaxParts) {
      throw Error(ErrorCode::kUnsupported, "an object has at most 10000 parts; make part_bytes larger",
                  {.file = location_.url(), .offset = begin_});
    }
    if (upload_id_.empty()) {
      const S3Response response = client_->send({.method = "POST",
                                                 .location = location_,
                                                 .operation = "begin an upload",
                                                 .query = {{"uploads", ""}},
                                                 .headers = {{kWriteId, write_id_}}});
      upload_id_ = xml_element(response.body, "UploadId").value_or("");
      if (upload_id_.empty()) {
        throw Error(ErrorCode::kCorruptData, "the store began an upload and does not name it",
                    {.file = location_.url()});
      }
    }
    wait_for_parts(static_cast<size_t>(client_->options().parallel) - 1);
    under_way_.push_back(std::async(std::launch::async, std::move(send), ++parts_));
  }

  void wait_for_parts(size_t most) {
    while (under_way_.size() > most) {
      // Taken out first: a future that threw is spent.
      std::future<std::string> oldest = std::move(under_way_.front());
      under_way_.pop_front();
      etags_.push_back(oldest.get());
    }
  }

  void complete() {
    std::string body = "<CompleteMultipartUpload>";
    for (size_t i = 0; i < etags_.size(); ++i) {
      body += "<Part><PartNumber>" + std::to_string(i + 1) + "</PartNumber><ETag>" + etags_[i] + "</ETag></Part>";
    }
    body += "</CompleteMultipartUpload>";
    const S3Request request{.method = "POST",
                            .location = location_,
                            .operation = "complete an upload",
                            .query = {{"uploadId", upload_id_}},
                            .headers = conditions(),
                            .body = as_bytes(body),
                            .also = {404, 412}};
    std::optional<Error> failure;
    try {
      const S3Response response = client_->send(request);
      if (response.status == 412) {
        if (response.attempts > 1 && is_published()) {
          upload_id_.clear();
          return;
        }
        refuse_existing();  // the destructor aborts the upload
      }
      if (response.status == 404) {
        failure = client_->refusal(request, response);
      } else {
        upload_id_.clear();
        return;
      }
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kAlreadyExists) throw;
      failure = error;
    }
    bool published = false;
    try {
      abort();
      published = is_published();
    } catch (const Error& error) {
      throw Error(ErrorCode::kUnavailable, failure->message() + "; it may still take effect, for: " + error.message(),
                  failure->context());
    }
    if (!published) throw Error(ErrorCode::kIo, failure->message(), failure->context());
  }

  /// When it returns, the upload is gone.
  void abort() {
    client_->send({.method = "DELETE",
                   .location = location_,
                   .operation = "abort an upload",
                   .query = {{"uploadId", upload_id_}},
                   .also = {404}});
    upload_id_.clear();
  }

  std::shared_ptr<S3Client> client_;
  const S3Location location_;
  const bool exclusive_;
  const std::string write_id_ = random_id();
  bool closed_ = false;
  uint64_t begin_ = 0;  // of the buffer in the object
  Bytes buffer_;
  std::string upload_id_;  // of an upload that is not complete
  uint64_t parts_ = 0;     // begun
  std::vector<std::string> etags_;
  std::deque<std::future<std::string>> under_way_;
};

}  // namespace

bool is_s3_url(std::string_view path) { return path.starts_with("s3://"); }

S3FileSystem::S3FileSystem(S3Options options) : client_(std::make_shared<S3Client>(std::move(options))) {}
S3FileSystem::~S3FileSystem() = default;

S3Counters S3FileSystem::counters() const { return client_->counters(); }

std::unique_ptr<WritableFile> S3FileSystem::create(const std::string& path, CreateMode mode) {
  const S3Location location = parse_s3_url(path);
  if (mode == CreateMode::kExisting) {
    throw Error(ErrorCode::kUnsupported, "an object cannot be written by several processes", {.file = path});
  }
  const bool exclusive = mode == CreateMode::kExclusive;
  if (exclusive && !client_->options().conditional_writes && head(*client_, location)) {
    throw Error(ErrorCode::kAlreadyExists, "cannot create: there is such an object", {.file = path});
  }
  return std::make_unique<S3WriteFile>(client_, location, exclusive);
}

std::unique_ptr<RandomAccessFile> S3FileSystem::open(const std::string& path) {
  const S3Location location = parse_s3_url(path);
  const auto found = head(*client_, location);
  if (!found) throw Error(ErrorCode::kNotFound, "there is no such object", {.file = path});
  return std::make_unique<S3ReadFile>(client_, location, size_of(*found, location), found->header("etag"));
}

std::unique_ptr<RandomAccessFile> S3FileSystem::open_beneath(const std::string& directory,
                                                             const std::string& relative_path) {
  return open(join_path(directory, relative_path));
}

std::string S3FileSystem::real_path(const std::string& path) {
  if (!status(path)) throw Error(ErrorCode::kNotFound, "there is no such object", {.file = path});
  return path;
}

void S3FileSystem::rename(const std::string& from, const std::string& to) {
  const S3Location source = parse_s3_url(from);
  const S3Location location = parse_s3_url(to);
  const auto found = head(*client_, source);
  if (!found) throw Error(ErrorCode::kNotFound, "there is no such object to rename", {.file = from});
  const uint64_t size = size_of(*found, source);
  const std::string& etag = found->header("etag");
  if (size <= client_->options().copy_bytes) {
    client_->send({.method = "PUT", .location = location, .operation = "copy", .headers = copy_headers(source, etag)});
  } else {
    S3WriteFile copy(client_, location, /*exclusive=*/false);
    copy.copy_from(source, size, etag);
    copy.close();
  }
  remove(from);
}

bool S3FileSystem::remove(const std::string& path) {
  const S3Location location = parse_s3_url(path);
  if (!head(*client_, location)) return false;
  client_->send({.method = "DELETE", .location = location, .operation = "remove", .also = {404}});
  return true;
}

bool S3FileSystem::remove_directory(const std::string& path) {
  static_cast<void>(parse_s3_url(path));
  return false;
}

void S3FileSystem::create_directories(const std::string& path) { static_cast<void>(parse_s3_url(path)); }
void S3FileSystem::sync_directory(const std::string& path) { static_cast<void>(parse_s3_url(path)); }

std::vector<std::string> S3FileSystem::list(const std::string& path) { return list_names(*client_, path, false); }

std::optional<FileStatus> S3FileSystem::status(const std::string& path) {
  const S3Location location = parse_s3_url(path);
  if (!location.key.empty()) {
    if (const auto found = head(*client_, location)) return FileStatus{FileKind::kRegular, size_of(*found, location)};
  }
  if (list_names(*client_, path, true).empty()) return std::nullopt;
  return FileStatus{FileKind::kDirectory, 0};
}

std::unique_ptr<FileLock> S3FileSystem::try_lock(const std::string& path, std::string_view holder) {
  if (!client_->options().conditional_writes) {
    throw Error(ErrorCode::kUnsupported, "a lock needs a store with conditional writes", {.file = path});
  }
  return S3Lease::take(client_, parse_s3_url(path), std::string(holder));
}

}  // namespace reshard
