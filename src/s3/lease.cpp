// SPDX-License-Identifier: BSD-3-Clause
#include "s3/lease.h"

#include <charconv>
#include <utility>

#include "reshard/core/hooks.h"

namespace reshard {
namespace {

constexpr int kTries = 5;                                   // where others take and release it all the time
constexpr const char* kLease = "x-amz-meta-reshard-lease";  // milliseconds

/// Whether the store's own clock says that the lease of an object has ended. Its times are whole seconds.
bool has_ended(const S3Response& found, const S3Location& location) {
  const std::string& text = found.header(kLease);
  int64_t lease = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), lease);
  const std::time_t written = curl_getdate(found.header("last-modified").c_str(), nullptr);
  const std::time_t now = curl_getdate(found.header("date").c_str(), nullptr);
  if (parsed.ec != std::errc{} || parsed.ptr != text.data() + text.size() || lease < 0 || written == -1 || now == -1) {
    throw Error(ErrorCode::kFailedPrecondition, "the object is no lock of this library; remove it if it is not needed",
                {.file = location.url()});
  }
  return (now - written - 1) * 1000 > lease;
}

}  // namespace

std::unique_ptr<S3Lease> S3Lease::take(std::shared_ptr<S3Client> client, const S3Location& location,
                                       std::string holder) {
  std::unique_ptr<S3Lease> lease(new S3Lease(std::move(client), location, std::move(holder)));
  for (int number = 1; !lease->write("if-none-match", "*"); ++number) {
    const auto found = head(*lease->client_, location);
    if (!found) {  // it was released meanwhile
      if (number == kTries) return nullptr;
      continue;
    }
    if (!has_ended(*found, location) || !lease->write("if-match", found->header("etag"))) return nullptr;
    break;
  }
  lease->keeper_ = std::thread([&lease = *lease] { lease.keep(); });
  return lease;
}

S3Lease::S3Lease(std::shared_ptr<S3Client> client, S3Location location, std::string holder)
    : client_(std::move(client)), location_(std::move(location)), holder_(std::move(holder)) {}

S3Lease::~S3Lease() {
  if (!keeper_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
  }
  wake_.notify_all();
  keeper_.join();
  if (!is_held()) return;
  try {
    const auto found = head(*client_, location_);
    if (!found || found->header(kWriteId) != id_) return;
    client_->send({.method = "DELETE", .location = location_, .operation = "release a lock", .also = {404}});
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, std::string("a lock stays until its lease ends: ") + error.what());
  }
}

bool S3Lease::is_held() const {
  const std::lock_guard lock(mutex_);
  return !lost_ && Clock::now() - renewed_ < client_->options().lock_lease;
}

bool S3Lease::write(const std::string& header, const std::string& value) {
  const auto begun = Clock::now();
  const std::string text = holder_ + (writes_ == 0 ? "" : ", renewed " + std::to_string(writes_) + " times");
  const S3Response response = client_->send(
      {.method = "PUT",
       .location = location_,
       .operation = "write a lock",
       .headers = {{header, value}, {kWriteId, id_}, {kLease, std::to_string(client_->options().lock_lease.count())}},
       .body = as_bytes(text),
       .also = {404, 412}});
  std::string etag = response.header("etag");
  if (response.status == 404 || response.status == 412) {
    // Unless it was done, and the answer was lost.
    if (response.attempts == 1) return false;
    const auto found = head(*client_, location_);
    if (!found || found->header(kWriteId) != id_) return false;
    etag = found->header("etag");
  }
  ++writes_;
  etag_ = std::move(etag);
  const std::lock_guard lock(mutex_);
  renewed_ = begun;
  return true;
}

void S3Lease::keep() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, client_->options().lock_lease / 3, [&] { return ends_; })) {
    lock.unlock();
    std::string why;
    try {
      if (!write("if-match", etag_)) why = "another has taken it";
    } catch (const std::exception& error) {
      log(LogLevel::kWarning, std::string("a lock could not be renewed: ") + error.what());
    }
    lock.lock();
    if (why.empty()) continue;
    lost_ = true;
    log(LogLevel::kWarning, "the lock " + location_.url() + " is lost: " + why);
    return;
  }
}

}  // namespace reshard
