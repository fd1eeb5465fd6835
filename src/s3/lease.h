// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A lock in a store that has none: an object that its holder writes anew, three times in a lease. Each write holds only if
// the object is still the one that the holder wrote last (If-Match), and no two writes have the same content, so of two
// that want the lock one gets it. Whoever finds an object that is older than its lease takes it over in the same way; its age
// is told by the store's clock alone.

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "s3/client.h"

namespace reshard {

class S3Lease final : public FileLock {
 public:
  /// Null if another has it.
  static std::unique_ptr<S3Lease> take(std::shared_ptr<S3Client> client, const S3Location& location,
                                       std::string holder);
  ~S3Lease() override;
  bool is_held() const override;

 private:
  using Clock = std::chrono::steady_clock;

  S3Lease(std::shared_ptr<S3Client> client, S3Location location, std::string holder);
  /// Writes the object under a condition. False if that does not hold.
  bool write(const std::string& header, const std::string& value);
  void keep();

  const std::shared_ptr<S3Client> client_;
  const S3Location location_;
  const std::string holder_;
  const std::string id_ = random_id();
  uint64_t writes_ = 0;
  std::string etag_;  // of the last one
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  Clock::time_point renewed_;  // when the last write that succeeded was begun
  bool lost_ = false;
  bool ends_ = false;
  std::thread keeper_;
};

}  // namespace reshard
