// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/async_executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <mutex>
#include <string>
#include <vector>

#include "storage/generations.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Job = AsyncSaveExecutor::Job;

/// A save whose id is `id`, or which fails as staging did.
Job job(
    const std::string& id, std::function<void()> stage = [] {}) {
  return {.stage = std::move(stage), .save = [id](const std::exception_ptr& failure) -> SaveResult {
            if (failure) std::rethrow_exception(failure);
            return {.save_id = id};
          }};
}
Job failing_job(const std::string& why) {
  return job("never", [why] { throw Error(ErrorCode::kIo, why); });
}

/// Warnings that were logged meanwhile.
class Warnings {
 public:
  Warnings() {
    set_log_sink([this](LogLevel level, std::string_view text) {
      const std::lock_guard lock(mutex_);
      if (level == LogLevel::kWarning) texts_.emplace_back(text);
    });
  }
  ~Warnings() { set_log_sink(nullptr); }
  std::vector<std::string> texts() const {
    const std::lock_guard lock(mutex_);
    return texts_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> texts_;
};

TEST(AsyncSaveExecutorTest, SavesInTheBackgroundWhatWasStagedBefore) {
  AsyncSaveExecutor executor;
  std::promise<void> go;
  const auto caller = std::this_thread::get_id();
  std::thread::id staged_on, saved_on;
  const AsyncSaveResponse response =
      executor.submit({.stage = [&] { staged_on = std::this_thread::get_id(); },
                       .save =
                           [&](const std::exception_ptr&) {
                             go.get_future().wait();
                             saved_on = std::this_thread::get_id();
                             return SaveResult{.save_id = "a", .bytes_written = 3, .items = 2};
                           }});
  EXPECT_TRUE(response.staging_completion.is_done());
  EXPECT_FALSE(response.upload_completion.is_done());
  EXPECT_FALSE(response.upload_completion.wait_for(std::chrono::milliseconds(1)));
  go.set_value();
  const SaveResult result = response.upload_completion.get();
  EXPECT_EQ(result.save_id, "a");
  EXPECT_EQ(result.bytes_written, 3U);
  EXPECT_TRUE(response.upload_completion.is_done());
  EXPECT_EQ(staged_on, caller);
  EXPECT_NE(saved_on, caller);
}

TEST(AsyncSaveExecutorTest, StagesInTheBackgroundWhereAsked) {
  AsyncSaveExecutor executor;
  std::promise<void> go;
  const AsyncSaveResponse response = executor.submit(job("a", [&] { go.get_future().wait(); }), /*in_background=*/true);
  EXPECT_FALSE(response.staging_completion.is_done());
  go.set_value();
  response.staging_completion.wait();
  EXPECT_TRUE(response.staging_completion.is_done());
  EXPECT_EQ(response.upload_completion.get().save_id, "a");
}

TEST(AsyncSaveExecutorTest, OneInFlightIsWaitedForBeforeTheNextIsStaged) {
  AsyncSaveExecutor executor;
  std::atomic<bool> first_ended = false;
  std::promise<void> second_submitted;
  executor.submit({.stage = [] {},
                   .save =
                       [&](const std::exception_ptr&) {
                         // It cannot be submitted as long as this one is under way.
                         EXPECT_EQ(second_submitted.get_future().wait_for(std::chrono::milliseconds(50)),
                                   std::future_status::timeout);
                         first_ended = true;
                         return SaveResult{};
                       }});
  executor.submit(job("second", [&] { EXPECT_TRUE(first_ended); }));
  second_submitted.set_value();
  executor.wait();
}

TEST(AsyncSaveExecutorTest, SeveralInFlightAreStagedAtOnceAndSavedInOrder) {
  AsyncSaveExecutor executor(3);
  std::promise<void> go, next_began;
  std::vector<AsyncSaveResponse> responses;
  responses.push_back(executor.submit({.stage = [] {},
                                       .save =
                                           [&](const std::exception_ptr&) {
                                             go.get_future().wait();
                                             EXPECT_EQ(next_began.get_future().wait_for(std::chrono::milliseconds(50)),
                                                       std::future_status::timeout);
                                             return SaveResult{};
                                           }}));
  responses.push_back(executor.submit({.stage = [] {},
                                       .save =
                                           [&](const std::exception_ptr&) {
                                             next_began.set_value();
                                             return SaveResult{};
                                           }}));
  responses.push_back(executor.submit(job("third")));
  for (const auto& response : responses) {
    EXPECT_TRUE(response.staging_completion.is_done());
    EXPECT_FALSE(response.upload_completion.is_done());
  }
  go.set_value();
  executor.submit(job("fourth"));
  EXPECT_TRUE(responses[0].upload_completion.is_done()) << "the oldest has to end before a fourth one starts";
  executor.wait();
  EXPECT_EQ(responses[2].upload_completion.get().save_id, "third");
}

TEST(AsyncSaveExecutorTest, AFailureIsThrownToWhoAsks) {
  const Warnings warnings;
  {
    AsyncSaveExecutor executor;
    for (const bool in_background : {false, true}) {
      const AsyncSaveResponse response = executor.submit(failing_job("no space"), in_background);
      response.staging_completion.wait();
      EXPECT_ERROR(ErrorCode::kIo, "no space", response.upload_completion.get());
      EXPECT_ERROR(ErrorCode::kIo, "no space", response.upload_completion.get());
    }
    EXPECT_EQ(executor.submit(job("next")).upload_completion.get().save_id, "next");
    executor.wait();
  }
  EXPECT_THAT(warnings.texts(), ElementsAre());
}

// The others are told of the refusal, so the job is called all the same.
TEST(AsyncSaveExecutorTest, AFailureThatNobodyAskedForIsThrownByTheNextSaveWhichIsRefused) {
  const Warnings warnings;
  {
    AsyncSaveExecutor executor;
    executor.submit(failing_job("no space"));
    bool staged = false;
    std::string told;
    const auto next = [&] {
      executor.submit({.stage = [&] { staged = true; },
                       .save = [&](const std::exception_ptr& failure) -> SaveResult {
                         try {
                           std::rethrow_exception(failure);
                         } catch (const Error& error) {
                           told = error.what();
                           throw;
                         }
                       }});
    };
    EXPECT_ERROR(ErrorCode::kIo, "no space", next());
    executor.wait();  // the refused one was reported by the throw
    EXPECT_FALSE(staged);
    EXPECT_THAT(told, HasSubstr("an earlier asynchronous save failed, and this rank had not asked for its outcome: "
                                "input/output error: no space"));
    EXPECT_EQ(executor.submit(job("next")).upload_completion.get().save_id, "next");
  }
  EXPECT_THAT(warnings.texts(), ElementsAre());
}

TEST(AsyncSaveExecutorTest, WaitThrowsEachUnseenFailureOnce) {
  AsyncSaveExecutor executor(3);
  std::promise<void> go;
  const auto fail = [started = go.get_future().share()](const std::string& why) {
    return Job{.stage = [] {},
               .save = [started, why](const std::exception_ptr&) -> SaveResult {
                 started.wait();
                 throw Error(ErrorCode::kIo, why);
               }};
  };
  executor.submit(fail("first"));
  const UploadCompletion seen = executor.submit(fail("second")).upload_completion;
  executor.submit(fail("third"));
  go.set_value();
  EXPECT_ERROR(ErrorCode::kIo, "second", seen.get());
  EXPECT_ERROR(ErrorCode::kIo, "first", executor.wait());
  EXPECT_ERROR(ErrorCode::kIo, "third", executor.wait());
  executor.wait();
}

TEST(AsyncSaveExecutorTest, TheDestructorWaitsAndLogsWhatNobodyAskedFor) {
  const Warnings warnings;
  std::atomic<bool> saved = false;
  std::optional<UploadCompletion> outlives;
  {
    std::promise<void> leaving;
    AsyncSaveExecutor executor(2);
    executor.submit({.stage = [] {},
                     .save = [&, left = leaving.get_future().share()](const std::exception_ptr&) -> SaveResult {
                       left.wait();
                       saved = true;
                       throw Error(ErrorCode::kIo, "disk gone");
                     }});
    outlives = executor.submit(job("last")).upload_completion;
    leaving.set_value();
  }
  EXPECT_TRUE(saved);
  EXPECT_TRUE(outlives->is_done());
  EXPECT_EQ(outlives->get().save_id, "last");
  ASSERT_EQ(warnings.texts().size(), 1U);
  EXPECT_THAT(warnings.texts()[0], HasSubstr("nobody asked for its outcome: input/output error: disk gone"));
}

TEST(AsyncSaveExecutorTest, WhatASaveHoldsIsFreedWhenItEnds) {
  AsyncSaveExecutor executor;
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watched = held;
  const auto response = executor.submit(
      {.stage = [] {}, .save = [held = std::move(held)](const std::exception_ptr&) { return SaveResult{}; }});
  response.upload_completion.get();
  EXPECT_TRUE(watched.expired());
}

// Rank 1 cannot stage: it is the others' error as well, and the older checkpoint stays.
TEST(AsyncSaveExecutorTest, AFailedStagingIsEveryRanksErrorWithItsCause) {
  const TemporaryDirectory directory;
  save_checkpoint(directory.path(), generation(1, 3));
  const auto states = generation(2, 3);
  for (const int culprit : {0, 1}) {
    ThreadHub hub(3, std::chrono::seconds(30));
    run_ranks(3, [&](int rank) {
      AsyncSaveExecutor executor;
      const auto transport = hub.transport(rank);
      FileSystemWriter writer(directory.path(), {.sync_files = false});
      const auto response =
          executor.submit({.stage =
                               [&] {
                                 if (rank == culprit) throw std::bad_alloc();
                               },
                           .save = [&](const std::exception_ptr& failure) -> SaveResult {
                             if (failure) run_failed_save(*transport, writer, failure);
                             DefaultSavePlanner planner;
                             return run_save(*transport, states[static_cast<size_t>(rank)], planner, writer);
                           }});
      try {
        response.upload_completion.get();
        ADD_FAILURE() << "saved";
      } catch (const CheckpointError& error) {
        EXPECT_EQ(error.step(), "plan");
        EXPECT_EQ(error.committed(), Committed::kNo);
        ASSERT_EQ(error.failures().size(), 1U);
        EXPECT_EQ(error.failures().begin()->first, culprit);
        EXPECT_THAT(error.what(), HasSubstr("out of memory"));
      }
    });
    EXPECT_EQ(loaded_generation(directory.path()), 1);
  }
}

}  // namespace
}  // namespace reshard
