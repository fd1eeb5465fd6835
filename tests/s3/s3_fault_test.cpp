// SPDX-License-Identifier: BSD-3-Clause
// A store that throttles, refuses, cuts connections, truncates, stalls and lies: at every request of a save over an older
// checkpoint and of a load, once or from then on. Afterwards the old checkpoint or the new one is there, bit for bit, the
// error said which, and nothing half-done is left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>
#include <thread>

#include "cli/run_cli.h"
#include "reshard/storage/checkpoint_manager.h"
#include "storage/checkpoint_runs.h"
#include "storage/generations.h"
#include "storage/hugging_face_runs.h"
#include "support/expect_error.h"
#include "support/s3_server.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using testing::AnyOf;
using testing::HasSubstr;
using testing::Not;

constexpr const char* kTransient[] = {"slow_down", "reset_before", "reset_after", "truncate"};

struct Outcome {
  bool failed = false;
  Committed committed = Committed::kYes;
  ErrorCode code = ErrorCode::kInternal;
  std::string text{};
};

class S3FaultTest : public testing::Test {
 protected:
  void SetUp() override {
    RESHARD_SKIP_WITHOUT_S3_SERVER();
    server_.tell("clear");
    uploads_ = server_.uploads();
    parts_ = server_.parts();
    directory_ = server_.new_prefix();
    // Every line of the log is kept, to look for secrets in it.
    set_log_sink([this](LogLevel, std::string_view text) {
      const std::lock_guard lock(mutex_);
      log_ += std::string(text) + "\n";
    });
  }
  void TearDown() override {
    set_log_sink(nullptr);
    if (!server_.missing().empty()) return;
    server_.tell("clear");
    expect_no_secret(log_);
    RecordProperty("faults injected", faults_);
    std::printf("%d faults injected\n", faults_);
    std::fflush(stdout);
  }
  static void expect_no_secret(const std::string& text) {
    for (const char* secret : {"AKID", "secret-of", "token-of"}) {
      EXPECT_THAT(text, Not(HasSubstr(secret)));
    }
  }

  Outcome save(int number, size_t ranks = 1, const S3Options& options = S3Server::instance().options()) {
    S3FileSystem s3(options);
    return outcome([&] { save_checkpoint(directory_, generation(number, ranks), {}, s3); });
  }
  Outcome outcome(const std::function<void()>& body) {
    try {
      body();
      return {};
    } catch (const CheckpointError& error) {
      expect_no_secret(error.what());
      EXPECT_THAT(error.what(), HasSubstr(directory_));
      return {true, error.committed(), error.code(), error.what()};
    }
  }
  int loaded(const S3Options& options = S3Server::instance().options()) {
    S3FileSystem s3(options);
    return loaded_generation(directory_, s3);
  }
  /// Injects and returns whether there was a request to hit.
  template <class Body>
  bool with_fault(const std::string& kind, int nth, int times, const Body& body) {
    server_.fault(kind, nth, times);
    body();
    const int hits = server_.counts().hits;
    what_ = server_.tell("last");
    server_.tell("clear");
    faults_ += hits;
    return hits > 0;
  }
  bool has_logged(const char* text) {
    const std::lock_guard lock(mutex_);
    return log_.find(text) != std::string::npos;
  }
  std::vector<std::string> names() { return S3FileSystem(server_.options()).list(directory_); }

  S3Server& server_ = S3Server::instance();
  std::string directory_;
  std::string what_;  // the request that the last fault hit
  int faults_ = 0;
  // Uploads before the test. One whose beginning had its answer lost has no parts and nobody knows it.
  int uploads_ = 0;
  int parts_ = 0;  // of those
  std::mutex mutex_;
  std::string log_;
};

S3Options impatient() {
  S3Options options = S3Server::instance().options();
  options.attempt_timeout = milliseconds(200);
  options.max_attempts = 20;
  return options;
}

TEST_F(S3FaultTest, OneFaultThatPassesIsNotNoticedBySaveAndLoad) {
  int number = 1;
  ASSERT_FALSE(save(number).failed);
  const auto files = names().size();
  for (const char* kind : kTransient) {
    for (int nth = 1; nth < 200; ++nth) {
      Outcome result;
      const bool hit = with_fault(kind, nth, 1, [&] { result = save(++number); });
      SCOPED_TRACE(std::string(kind) + " at " + std::to_string(nth) + ": " + what_);
      ASSERT_FALSE(result.failed) << result.text;
      ASSERT_EQ(loaded(), number);
      ASSERT_EQ(server_.parts(), parts_);
      ASSERT_EQ(names().size(), files);
      if (!hit) break;
    }
    for (int nth = 1; nth < 200; ++nth) {
      int found = 0;
      const bool hit = with_fault(kind, nth, 1, [&] { found = loaded(); });
      ASSERT_EQ(found, number) << kind << " at " << nth << ": " << what_;
      if (!hit) break;
    }
  }
}

TEST_F(S3FaultTest, OneStallIsGivenUpAndTriedAgain) {
  int number = 1;
  ASSERT_FALSE(save(number).failed);
  for (int nth = 1; nth < 200; ++nth) {
    Outcome result;
    const bool hit = with_fault("stall", nth, 1, [&] { result = save(++number, 1, impatient()); });
    SCOPED_TRACE(std::to_string(nth) + ": " + what_);
    ASSERT_FALSE(result.failed) << result.text;
    ASSERT_EQ(loaded(), number);
    ASSERT_EQ(server_.parts(), parts_);
    if (!hit) break;
  }
  for (int nth = 1; nth < 200; ++nth) {
    int found = 0;
    const bool hit = with_fault("stall_before", nth, 1, [&] { found = loaded(impatient()); });
    ASSERT_EQ(found, number) << nth << ": " << what_;
    if (!hit) break;
  }
}

TEST_F(S3FaultTest, OneRefusalIsNotTriedAgainAndLeavesNothingHalfDone) {
  ASSERT_FALSE(save(1, 2).failed);
  int number = 1;
  for (int nth = 1; nth < 200; ++nth) {
    const auto before = names();
    Outcome result;
    const bool hit = with_fault("refuse", nth, 1, [&] { result = save(number + 1, 2); });
    SCOPED_TRACE(std::to_string(nth) + ": " + what_ + "\n" + result.text);
    if (result.failed) {
      EXPECT_EQ(result.code, ErrorCode::kIo);
      EXPECT_THAT(result.text, HasSubstr("the store answered 403"));
      EXPECT_EQ(result.committed, Committed::kNo);
      EXPECT_EQ(names(), before);
    } else {
      ++number;  // one that looked at the old save, or removed it
    }
    ASSERT_EQ(loaded(), number);
    ASSERT_EQ(server_.uploads(), uploads_);
    if (!hit) break;
  }
  for (int nth = 1; nth < 200; ++nth) {
    Outcome result;
    const bool hit = with_fault("refuse", nth, 1, [&] { result = outcome([&] { EXPECT_EQ(loaded(), number); }); });
    EXPECT_EQ(result.failed, hit) << nth << ": " << what_;
    if (!hit) break;
    EXPECT_EQ(result.code, ErrorCode::kIo) << result.text;
  }
}

TEST_F(S3FaultTest, StoreThatGoesAwayForGoodLeavesTheOldOneOrTheNewOne) {
  int number = 1;
  ASSERT_FALSE(save(number).failed);
  S3Options options = server_.options();
  options.max_attempts = 2;
  for (const char* kind : {"slow_down", "reset_before", "reset_after"}) {
    for (int nth = 1; nth < 200; ++nth) {
      Outcome result;
      const bool hit = with_fault(kind, nth, S3Server::kForever, [&] { result = save(number + 1, 1, options); });
      SCOPED_TRACE(std::string(kind) + " from " + std::to_string(nth) + ": " + what_ + "\n" + result.text);
      const int found = loaded();
      if (!result.failed) {
        ASSERT_EQ(found, number + 1);
      } else {
        EXPECT_THAT(result.code, AnyOf(ErrorCode::kUnavailable, ErrorCode::kIo));
        EXPECT_THAT(result.text, HasSubstr("2 attempts failed"));
        if (result.committed == Committed::kNo) {
          ASSERT_EQ(found, number);
        }
        if (result.committed == Committed::kYes) {
          ASSERT_EQ(found, number + 1);
        }
        ASSERT_THAT(found, AnyOf(number, number + 1));
      }
      number = found;
      if (!hit) break;
    }
  }
  for (int nth = 1; nth < 200; ++nth) {
    Outcome result;
    const bool hit = with_fault("slow_down", nth, S3Server::kForever,
                                [&] { result = outcome([&] { EXPECT_EQ(loaded(options), number); }); });
    EXPECT_EQ(result.failed, hit);
    if (!hit) break;
    EXPECT_EQ(result.code, ErrorCode::kUnavailable) << result.text;
    EXPECT_THAT(result.text, HasSubstr("503"));
  }
}

TEST_F(S3FaultTest, RequestWhoseAnswersAreAllLostIsLookedAt) {
  int number = 1;
  ASSERT_FALSE(save(number).failed);
  S3Options options = server_.options();
  options.max_attempts = 2;
  int committed = 0;
  for (const char* kind : {"reset_after", "slow_down"}) {
    for (int nth = 1; nth < 200; ++nth) {
      Outcome result;
      const bool hit = with_fault(kind, nth, 2, [&] { result = save(number + 1, 1, options); });
      SCOPED_TRACE(std::string(kind) + " at " + std::to_string(nth) + ": " + what_ + "\n" + result.text);
      if (result.failed) {
        // The store is back in time for the upload to be called off.
        EXPECT_EQ(result.committed, Committed::kNo);
      } else {
        ++number;
        if (what_.starts_with("POST") && what_.find("?uploadId=") != std::string::npos) ++committed;
      }
      ASSERT_EQ(loaded(), number);
      ASSERT_EQ(server_.parts(), parts_);
      if (!hit) break;
    }
  }
  EXPECT_GE(committed, 1) << "both answers to a completion lost";
}

TEST_F(S3FaultTest, ErrorThatComesAfter200IsOne) {
  int number = 1;
  ASSERT_FALSE(save(number).failed);
  for (int nth = 1; nth < 200; ++nth) {
    Outcome result;
    const bool hit = with_fault("late_error", nth, 1, [&] { result = save(++number); });
    ASSERT_FALSE(result.failed) << result.text;
    ASSERT_EQ(loaded(), number) << what_;
    if (!hit) break;
  }
}

TEST_F(S3FaultTest, AnswersThatLieAreErrorsNotValues) {
  ASSERT_FALSE(save(1).failed);
  std::map<std::string, int> failures;
  for (const char* kind : {"wrong_etag", "wrong_range"}) {
    for (int nth = 1; nth < 200; ++nth) {
      Outcome result;
      const bool hit = with_fault(kind, nth, 1, [&] { result = outcome([&] { EXPECT_EQ(loaded(), 1); }); });
      if (result.failed) {
        ++failures[kind];
        EXPECT_THAT(result.code, AnyOf(ErrorCode::kFailedPrecondition, ErrorCode::kCorruptData)) << result.text;
      }
      if (!hit) break;
    }
  }
  EXPECT_GT(failures["wrong_etag"], 3);
  EXPECT_GT(failures["wrong_range"], 1);
  int number = 1;
  for (int nth = 1; nth < 200; ++nth) {
    Outcome result;
    const bool hit = with_fault("wrong_etag", nth, 1, [&] { result = save(number + 1); });
    if (!result.failed) ++number;
    ASSERT_EQ(loaded(), number) << what_ << result.text;
    ASSERT_EQ(server_.uploads(), uploads_);
    if (!hit) break;
  }
}

TEST_F(S3FaultTest, DeadlineEndsTheAttempts) {
  ASSERT_FALSE(save(1).failed);
  S3Options options = server_.options();
  options.max_attempts = 1000;
  options.attempt_timeout = milliseconds(50);
  options.deadline = milliseconds(300);
  server_.fault("stall_before", 1, S3Server::kForever);
  S3FileSystem s3(options);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_ERROR(ErrorCode::kTimeout, "in 300 ms, the last one: ", s3.status(directory_ + "/.metadata"));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  EXPECT_GT(s3.counters().requests, 1U);
  EXPECT_EQ(s3.counters().retries, s3.counters().requests - 1);
}

TEST_F(S3FaultTest, LargeObjectsGoInPartsAtTheSameTimeAndSurviveFaultsInAnyPart) {
  Bytes large(16 << 20);
  for (size_t i = 0; i < large.size(); ++i) large[i] = static_cast<std::byte>(i * 2654435761U >> 13);
  S3FileSystem s3(server_.options());
  const auto write = [&](const std::string& name) {
    const auto file = s3.create(directory_ + "/" + name, CreateMode::kExclusive);
    const std::vector<ByteSpan> parts{ByteSpan(large).first(7), ByteSpan(large).subspan(7)};
    file->write_gather(0, parts);
    file->close();
  };
  // Three at a time, as the options say.
  write("whole");
  EXPECT_THAT(server_.peak(), AnyOf(2, 3));
  const auto file_of_whole = s3.open(directory_ + "/whole");
  server_.tell("clear");
  Bytes whole(large.size());
  file_of_whole->read_exactly(0, whole, "all");
  EXPECT_TRUE(whole == large);
  EXPECT_EQ(server_.counts().requests, 16) << "ranges of 1 MiB";
  EXPECT_THAT(server_.peak(), AnyOf(2, 3));

  int number = 0;
  for (int nth = 1; nth < 50; ++nth) {
    const std::string name = std::to_string(++number);
    const bool hit = with_fault("reset_after", nth, 1, [&] { write(name); });
    Bytes found(large.size());
    with_fault("truncate", 2 + nth % 16, 1, [&] { s3.open(directory_ + "/" + name)->read_exactly(0, found, "all"); });
    ASSERT_TRUE(found == large) << what_;
    if (!hit) break;
  }
  EXPECT_GE(number, 6) << "begin, four parts, complete";
  uploads_ = server_.uploads();
  // One part is refused: neither object nor parts are left.
  with_fault("refuse", 3, 1, [&] { EXPECT_ERROR(ErrorCode::kIo, "cannot upload a part", write("refused")); });
  EXPECT_EQ(server_.uploads(), uploads_);
  EXPECT_EQ(s3.status(directory_ + "/refused"), std::nullopt);
  // Given up by its writer.
  s3.create(directory_ + "/dropped", CreateMode::kTruncate)->write(0, large);
  EXPECT_EQ(server_.uploads(), uploads_);
  EXPECT_EQ(s3.status(directory_ + "/dropped"), std::nullopt);
}

TEST_F(S3FaultTest, ObjectThatIsReplacedWhileItIsReadIsAnError) {
  S3FileSystem s3(server_.options());
  const auto write = [&](std::string_view text) {
    const auto file = s3.create(directory_ + "/f", CreateMode::kTruncate);
    file->write(0, as_bytes(text));
    file->close();
  };
  write("0123456789");
  const auto file = s3.open(directory_ + "/f");
  write("abcdefghij");
  Bytes out(4);
  EXPECT_ERROR(ErrorCode::kFailedPrecondition,
               "elements: the object changed while it was read; file " + directory_ + "/f, offset 2",
               file->read_exactly(2, out, "elements"));
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "found another version", file->read_exactly(2, out, "elements"));
  s3.remove(directory_ + "/f");
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "found no object", file->read_exactly(2, out, "elements"));
}

TEST_F(S3FaultTest, ListsOfManyPagesAreWhole) {
  S3FileSystem s3(server_.options());
  std::vector<std::string> wanted;
  for (int i = 0; i < 1003; ++i) {
    wanted.push_back("f" + std::to_string(10000 + i));
    s3.create(directory_ + "/" + wanted.back(), CreateMode::kExclusive)->close();
  }
  EXPECT_EQ(s3.list(directory_), wanted);
}

TEST_F(S3FaultTest, WhatAnObjectStoreCannotDoIsRefusedByName) {
  S3FileSystem s3(server_.options());
  EXPECT_ERROR(ErrorCode::kUnsupported, "several processes", s3.create(directory_ + "/a", CreateMode::kExisting));
  EXPECT_ERROR(ErrorCode::kUnsupported, "wanted offset 0, found 3",
               s3.create(directory_ + "/a", CreateMode::kTruncate)->write(3, as_bytes("x")));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "wanted s3://bucket/key", s3.open("/local/file"));
  EXPECT_ERROR(ErrorCode::kNotFound, "s3://no-such-bucket", s3.list("s3://no-such-bucket/x"));
}

TEST_F(S3FaultTest, WrongCredentialsAndDeadHostsAreNamedWithoutSecrets) {
  S3Options options = server_.options();
  options.credentials->secret_access_key = "another-secret";
  S3FileSystem wrong(options);
  try {
    wrong.list(directory_);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("cannot list: the store answered 403 SignatureDoesNotMatch"));
    EXPECT_THAT(error.what(), HasSubstr("***"));
    EXPECT_THAT(error.what(), Not(HasSubstr("another-secret")));
    expect_no_secret(error.what());
  }
  options = server_.options();
  options.endpoint = "http://127.0.0.1:1";
  EXPECT_ERROR(ErrorCode::kUnavailable, "4 attempts failed, the last one: ", S3FileSystem(options).list(directory_));
}

// A lost answer to the last copy leaves open whether the checkpoint is there; everything else is known.
TEST_F(S3FaultTest, ASafetensorsSaveTellsWhetherItIsCommitted) {
  S3Options once = server_.options();
  once.max_attempts = 1;
  const Dims size{40, 3};
  int unknown = 0;
  for (const char* kind : {"slow_down", "reset_before", "reset_after"}) {
    for (int nth = 1; nth < 200; ++nth) {
      directory_ = server_.new_prefix();
      Outcome result;
      const bool hit = with_fault(kind, nth, 1, [&] {
        S3FileSystem s3(once);
        const auto state = sharded<MemorySaveState>("w", size, split(size, 0, 2));
        result = outcome([&] { save_safetensors(directory_, state, {.consolidate = false}, s3); });
      });
      SCOPED_TRACE(std::string(kind) + " at " + std::to_string(nth) + ": " + what_ + "; " + result.text);
      S3FileSystem s3(server_.options());
      bool whole = false;
      try {
        auto target = sharded<MemoryLoadState>("w", size, split(size, 1, 2));
        load_safetensors(directory_, target, {}, s3);
        whole = first_difference(target).empty();
      } catch (const CheckpointError&) {
        // There is none.
      }
      if (result.committed == Committed::kUnknown) {
        ++unknown;
      } else {
        EXPECT_EQ(whole, result.committed == Committed::kYes);
      }
      if (!hit) break;
    }
  }
  EXPECT_GT(unknown, 0);
}

// --- locks
// -----------------------------------------------------------------------------------------------------------------

S3Options with_short_lease() {
  S3Options options = S3Server::instance().options();
  options.lock_lease = milliseconds(1500);
  return options;
}

/// Asks until somebody gets the lock: the store's clock alone ends a lease.
std::unique_ptr<FileLock> take(S3FileSystem& s3, const std::string& path) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  for (;;) {
    if (auto lock = s3.try_lock(path, "another")) return lock;
    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("the lock is never free");
    std::this_thread::sleep_for(milliseconds(50));
  }
}

TEST_F(S3FaultTest, ALockIsHeldForAsLongAsItsHolderLives) {
  S3FileSystem s3(with_short_lease());
  const std::string path = directory_ + "/lock";
  auto lock = s3.try_lock(path, "me");
  ASSERT_NE(lock, nullptr);
  // Renewed until its lease would have ended twice.
  bool renewed = false;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!renewed && std::chrono::steady_clock::now() < end) {
    EXPECT_EQ(s3.try_lock(path, "another"), nullptr);
    try {
      renewed = as_text(s3.read_file(path, 100)) == "me, renewed 6 times";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kFailedPrecondition) << error.what();  // renewed while it was read
    }
  }
  EXPECT_TRUE(renewed);
  EXPECT_TRUE(lock->is_held());
  lock.reset();
  EXPECT_EQ(s3.status(path), std::nullopt);
  EXPECT_NE(s3.try_lock(path, "another"), nullptr);
}

TEST_F(S3FaultTest, ALockOfAKilledProcessIsTakenWhenItsLeaseHasEnded) {
  const std::string path = directory_ + "/lock";
  const pid_t child = ::fork();
  if (child == 0) {
    S3FileSystem s3(with_short_lease());
    const auto lock = s3.try_lock(path, "the dead");
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  S3FileSystem s3(with_short_lease());
  EXPECT_EQ(as_text(s3.read_file(path, 100)), "the dead");
  EXPECT_EQ(s3.try_lock(path, "another"), nullptr);
  const auto lock = take(s3, path);
  EXPECT_TRUE(lock->is_held());
  EXPECT_THAT(std::string(as_text(s3.read_file(path, 100))), testing::StartsWith("another"));
}

TEST_F(S3FaultTest, ALockThatCannotBeRenewedIsNotHeldUntilItCan) {
  S3FileSystem s3(with_short_lease());
  const auto lock = s3.try_lock(directory_ + "/lock", "me");
  const auto wait_until = [&](bool held) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (lock->is_held() != held && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(milliseconds(20));
    }
    return lock->is_held() == held;
  };
  server_.fault("refuse", 1, S3Server::kForever);
  EXPECT_TRUE(wait_until(false));
  server_.tell("clear");
  EXPECT_TRUE(wait_until(true)) << "nobody has taken it meanwhile";
  // Where somebody has, it does not come back.
  replace_file_atomically(s3, directory_, "lock", as_bytes("somebody else"));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!has_logged("is lost: another has taken it") && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(milliseconds(20));
  }
  EXPECT_TRUE(has_logged("is lost: another has taken it"));
  EXPECT_FALSE(lock->is_held());
  EXPECT_EQ(as_text(s3.read_file(directory_ + "/lock", 100)), "somebody else");
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "no lock of this library", s3.try_lock(directory_ + "/lock", "me"));
}

TEST_F(S3FaultTest, AManagerWithoutItsLockRemovesNothing) {
  const std::string root = directory_ + "/run";
  S3FileSystem s3(with_short_lease());
  CheckpointManager manager(root, {.keep_last = 1}, s3);
  for (const int64_t step : {1, 2}) save_checkpoint(step_directory(root, step), generation(1, 1), {}, s3);
  s3.remove(root + "/.reshard-lock");  // as if another job had taken it, and ended
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  std::string text;
  while (text.empty() && std::chrono::steady_clock::now() < end) {
    try {
      EXPECT_EQ(manager.resume(), 2);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kFailedPrecondition);
      text = error.what();
    }
  }
  EXPECT_THAT(text, HasSubstr("another job may write"));
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, root, manager.saved(2));
  EXPECT_THAT(manager.steps(), testing::ElementsAre(1, 2));
}

TEST_F(S3FaultTest, OneFaultThatPassesIsNotNoticedByLocksAndRenames) {
  for (const char* kind : kTransient) {
    for (int nth = 1; nth < 50; ++nth) {
      S3Options options = server_.options();
      options.copy_bytes = 5 << 20;
      S3FileSystem s3(options);
      const std::string prefix = directory_ + "/" + kind + std::to_string(nth);
      const std::string content(nth % 2 == 0 ? 11 << 20 : 100, 'x');
      const auto file = s3.create(prefix + "/from", CreateMode::kExclusive);
      file->write(0, as_bytes(content));
      file->close();
      const bool hit = with_fault(kind, nth, 1, [&] {
        auto lock = s3.try_lock(prefix + "/lock", "me");
        ASSERT_NE(lock, nullptr);
        EXPECT_EQ(s3.try_lock(prefix + "/lock", "another"), nullptr);
        s3.rename(prefix + "/from", prefix + "/to");
        lock.reset();
      });
      SCOPED_TRACE(std::string(kind) + " at " + std::to_string(nth) + ": " + what_);
      EXPECT_EQ(s3.list(prefix), (std::vector<std::string>{"to"}));
      EXPECT_TRUE(as_text(s3.read_file(prefix + "/to", 1 << 30)) == content);
      ASSERT_EQ(server_.parts(), parts_);
      if (!hit) break;
    }
  }
}

// --- TLS
// -------------------------------------------------------------------------------------------------------------------

TEST_F(S3FaultTest, CertificatesAreChecked) {
  const TemporaryDirectory directory;
  S3Server secure(directory / "server");
  ASSERT_EQ(secure.missing(), "");
  const auto number = [&](const S3Options& options) {
    S3FileSystem s3(options);
    const std::string place = secure.new_prefix();
    save_checkpoint(place, generation(3, 2), {}, s3);
    return loaded_generation(place, s3);
  };
  // Nobody vouches for it; that is said at once.
  const auto refused = [&](const S3Options& options) {
    try {
      S3FileSystem(options).list("s3://bucket/x");
      ADD_FAILURE() << "trusted " << options.endpoint;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo) << error.what();
      EXPECT_THAT(error.what(), AnyOf(HasSubstr("certificate"), HasSubstr("SSL")));
    }
  };
  refused(secure.options());
  ::setenv("AWS_CA_BUNDLE", (directory / "server.crt").c_str(), 1);
  EXPECT_EQ(number(secure.options()), 3);
  S3Options elsewhere = secure.options();
  elsewhere.endpoint = "https://127.0.0.1:" + secure.port();  // another name than the certificate's
  refused(elsewhere);
  ::setenv("AWS_CA_BUNDLE", (directory / "none.crt").c_str(), 1);
  refused(secure.options());
  ::unsetenv("AWS_CA_BUNDLE");
  S3Options plain = secure.options();
  plain.endpoint = "http://localhost:" + secure.port();
  EXPECT_THROW(S3FileSystem(plain).list("s3://bucket/x"), Error);
}

// --- the command line
// --------------------------------------------------------------------------------------------------

TEST_F(S3FaultTest, CommandsReadStores) {
  ASSERT_FALSE(save(1, 2).failed);
  const TemporaryDirectory local;
  save_checkpoint(local / "checkpoint", generation(1, 2));
  for (const auto& [name, value] : std::map<std::string, std::string>{{"AWS_ENDPOINT_URL", server_.endpoint()},
                                                                      {"AWS_ACCESS_KEY_ID", "AKIDOFTHETEST"},
                                                                      {"AWS_SECRET_ACCESS_KEY", "secret-of-the-test"},
                                                                      {"AWS_SESSION_TOKEN", "token-of-the-test"},
                                                                      {"AWS_REGION", "us-east-1"}}) {
    ::setenv(name.c_str(), value.c_str(), 1);
  }
  EXPECT_EQ(reshard_command({"digest", directory_}).out, reshard_command({"digest", local / "checkpoint"}).out);
  const CommandResult inspected = reshard_command({"inspect", directory_});
  EXPECT_THAT(inspected.out, HasSubstr("weight")) << inspected.err;
  EXPECT_EQ(reshard_command({"diff", directory_, local / "checkpoint"}).exit_code, 0);
  CommandResult verified = reshard_command({"verify", directory_});
  EXPECT_EQ(verified.exit_code, 0) << verified.err;
  EXPECT_THAT(verified.out, HasSubstr("whole: 2 tensors and 1 values"));
  S3FileSystem s3(server_.options());
  s3.remove(directory_ + "/__0_0.distcp");
  verified = reshard_command({"verify", directory_});
  EXPECT_EQ(verified.exit_code, 1);
  EXPECT_THAT(verified.err, HasSubstr("__0_0.distcp"));
  EXPECT_THAT(reshard_command({"inspect", "s3://bucket/none"}).err, HasSubstr("s3://bucket/none"));
}

}  // namespace
}  // namespace reshard
