// SPDX-License-Identifier: BSD-3-Clause
// A store that throttles, refuses, cuts connections, truncates, stalls and lies: at every request of a save over an older
// checkpoint and of a load, once or from then on. Afterwards the old checkpoint or the new one is there, bit for bit, the
// error said which, and nothing half-done is left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

#include "cli/run_cli.h"
#include "storage/checkpoint_runs.h"
#include "storage/generations.h"
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
  EXPECT_ERROR(ErrorCode::kUnsupported, "cannot be renamed", s3.rename(directory_ + "/a", directory_ + "/b"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "no locks", s3.try_lock(directory_ + "/lock", "me"));
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
