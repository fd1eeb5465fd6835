// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints in S3 and in object stores that speak its protocol: a FileSystem over a bucket, for the writers and readers of
// storage/filesystem.h. docs/object-stores.md has credentials, permissions, and what is promised.
//
//   S3FileSystem s3;
//   save(state, FileSystemWriter("s3://bucket/run/step-100", {}, s3));
//   load(state, FileSystemReader("s3://bucket/run/step-100", {}, s3));
//
// Each object appears whole, when its file is closed (publishes_on_close()), and a save commits by publishing `.metadata`
// last. A rename is a copy on the server's side, then a removal. Directories are prefixes; one without objects is an empty
// directory. There are no links. A lock is a lease: an object that its holder renews; it ends some time after its holder.
//
// Every failure names "s3://bucket/key"; no error and no log line holds a credential. Codes: kNotFound, kAlreadyExists,
// kFailedPrecondition (an object changed while it was read), kCorruptData (an answer that breaks the protocol), kIo (the
// service refused, with its own code and words), kUnavailable (all attempts failed), kTimeout (the deadline passed).

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/io/file_system.h"

namespace reshard {

struct S3Credentials {
  std::string access_key_id;
  std::string secret_access_key;
  std::string session_token{};  // of temporary credentials
};

struct S3Options {
  /// Unset: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; without those, and whenever `profile` is given,
  /// the profile in AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials), then in AWS_CONFIG_FILE (~/.aws/config).
  std::optional<S3Credentials> credentials{};
  /// Empty: AWS_PROFILE, then "default".
  std::string profile{};
  /// Empty: AWS_REGION, AWS_DEFAULT_REGION, the profile's `region`, "us-east-1".
  std::string region{};
  /// "http[s]://host[:port]" of another store. Empty: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's `endpoint_url`;
  /// without any, Amazon's of the region.
  std::string endpoint{};
  /// Bucket in the path (http://host/bucket/key) or in the host name. Unset: in the path where an endpoint is given, and for
  /// buckets whose name has a dot.
  std::optional<bool> path_style{};
  /// Objects of more bytes are uploaded in parts of so many: 5 MiB to 5 GiB. Doubles after each thousand parts, since an
  /// object has at most 10000.
  uint64_t part_bytes = 16 << 20;
  /// A read of more bytes is made of ranges of so many, at the same time.
  uint64_t range_bytes = 8 << 20;
  /// Parts of one file, or ranges of one read, under way at the same time. A file being written takes this many + 1 parts
  /// of memory.
  int parallel = 8;
  /// Requests for one thing: the first one and its repetitions.
  int max_attempts = 8;
  /// Before the first repetition; doubles with each to at most `max_backoff`. What is waited is random, up to that.
  std::chrono::milliseconds first_backoff{100};
  std::chrono::milliseconds max_backoff{10'000};
  /// Of one attempt, and of all attempts for one thing together.
  std::chrono::milliseconds attempt_timeout{60'000};
  std::chrono::milliseconds deadline{180'000};
  /// Objects of more bytes are copied in parts of so many: 5 MiB to 5 GiB.
  uint64_t copy_bytes = 512 << 20;
  /// A lock is another's to take so long after its holder last renewed it, which it does three times as often.
  std::chrono::milliseconds lock_lease{60'000};
  /// A new data object never replaces one (If-None-Match). Off, for stores that refuse conditions: looks first.
  bool conditional_writes = true;
};

struct S3Counters {
  uint64_t requests = 0;  // repetitions included
  uint64_t retries = 0;
  uint64_t bytes_sent = 0;      // of bodies
  uint64_t bytes_received = 0;  // of bodies
};

/// True for what S3FileSystem takes as a path: "s3://...".
bool is_s3_url(std::string_view path);

class S3Client;

/// Thread-safe.
class S3FileSystem final : public FileSystem {
 public:
  /// Reads environment and files once. kInvalidArgument for options out of range and for an endpoint that is none;
  /// kFailedPrecondition, naming where it looked, where there are no credentials.
  explicit S3FileSystem(S3Options options = {});
  ~S3FileSystem() override;

  S3Counters counters() const;

  /// kTruncate replaces when the file is closed, kExclusive finds out then that there is an object (kAlreadyExists).
  /// kExisting is kUnsupported. Written from the beginning to the end; anything else is kUnsupported. A file that is
  /// destroyed without close() leaves nothing behind.
  std::unique_ptr<WritableFile> create(const std::string& path, CreateMode mode) override;
  /// Reads are bound to the object that is there now: one that is replaced meanwhile is kFailedPrecondition.
  std::unique_ptr<RandomAccessFile> open(const std::string& path) override;
  std::unique_ptr<RandomAccessFile> open_beneath(const std::string& directory,
                                                 const std::string& relative_path) override;
  std::string real_path(const std::string& path) override;
  /// kUnsupported.
  void rename(const std::string& from, const std::string& to) override;
  bool remove(const std::string& path) override;
  /// False.
  bool remove_directory(const std::string& path) override;
  /// Nothing to do.
  void create_directories(const std::string& path) override;
  /// Nothing to do.
  void sync_directory(const std::string& path) override;
  /// Empty where nothing begins with the prefix.
  std::vector<std::string> list(const std::string& path) override;
  std::optional<FileStatus> status(const std::string& path) override;
  /// kUnsupported.
  std::unique_ptr<FileLock> try_lock(const std::string& path, std::string_view holder) override;
  bool publishes_on_close() const override { return true; }

 private:
  std::shared_ptr<S3Client> client_;
};

}  // namespace reshard
