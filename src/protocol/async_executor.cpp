// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/async_executor.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <utility>

#include "reshard/planner/default_planner.h"

namespace reshard {

/// One save, shared by its thread, its handles and the executor.
struct AsyncSave {
  mutable std::mutex mutex;
  mutable std::condition_variable changed;
  bool staged = false;
  bool ended = false;
  bool seen = false;  // somebody was told of the failure
  SaveResult result;
  std::exception_ptr failure;

  void set(bool AsyncSave::*what) {
    const std::lock_guard lock(mutex);
    this->*what = true;
    changed.notify_all();
  }
  bool is(bool AsyncSave::*what) const {
    const std::lock_guard lock(mutex);
    return this->*what;
  }
  void wait_until(bool AsyncSave::*what) const {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return this->*what; });
  }
  /// The failure, once: null when it was seen.
  std::exception_ptr take_unseen() {
    const std::lock_guard lock(mutex);
    return std::exchange(seen, true) ? nullptr : failure;
  }
};

void StagingCompletion::wait() const { save_->wait_until(&AsyncSave::staged); }
bool StagingCompletion::is_done() const { return save_->is(&AsyncSave::staged); }

SaveResult UploadCompletion::get() const {
  save_->wait_until(&AsyncSave::ended);
  save_->set(&AsyncSave::seen);
  if (save_->failure) std::rethrow_exception(save_->failure);
  return save_->result;
}
bool UploadCompletion::is_done() const { return save_->is(&AsyncSave::ended); }
bool UploadCompletion::wait_for(std::chrono::milliseconds timeout) const {
  std::unique_lock lock(save_->mutex);
  return save_->changed.wait_for(lock, timeout, [&] { return save_->ended; });
}

namespace {

using Job = AsyncSaveExecutor::Job;

std::string text_of(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (...) {
    return current_failure().message;
  }
}

std::exception_ptr stage(const Job& job, AsyncSave& save) {
  std::exception_ptr failure;
  try {
    job.stage();
  } catch (...) {
    failure = std::current_exception();
  }
  save.set(&AsyncSave::staged);
  return failure;
}

/// What the thread of a save has, until the save ends.
struct Work {
  Job job;
  std::exception_ptr failure;  // of staging
};

void upload(Work& work, AsyncSave& save) {
  try {
    save.result = work.job.save(work.failure);
  } catch (...) {
    save.failure = std::current_exception();
  }
  work = {};
  save.set(&AsyncSave::ended);
}

/// A state that there is no copy of.
class FailedSaveState final : public SaveState {
 public:
  explicit FailedSaveState(std::exception_ptr failure) : failure_(std::move(failure)) {}
  const std::vector<StateEntry>& entries() const override { std::rethrow_exception(failure_); }
  TensorView tensor(size_t, size_t) const override { std::rethrow_exception(failure_); }
  ByteSpan bytes(size_t) const override { std::rethrow_exception(failure_); }

 private:
  std::exception_ptr failure_;
};

}  // namespace

AsyncSaveExecutor::AsyncSaveExecutor(size_t max_in_flight) : max_in_flight_(std::max<size_t>(max_in_flight, 1)) {}

AsyncSaveExecutor::~AsyncSaveExecutor() {
  while (!in_flight_.empty()) end_first();
  while (const std::exception_ptr failure = take_unseen_failure())
    log(LogLevel::kWarning, "an asynchronous save failed, and nobody asked for its outcome: " + text_of(failure));
}

void AsyncSaveExecutor::end_first() {
  InFlight first = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (first.thread.joinable()) first.thread.join();
  if (first.save->failure) failed_.push_back(std::move(first.save));
}

std::exception_ptr AsyncSaveExecutor::take_unseen_failure() {
  std::exception_ptr failure;
  while (!failure && !failed_.empty()) {
    failure = failed_.front()->take_unseen();
    failed_.pop_front();
  }
  return failure;
}

void AsyncSaveExecutor::wait_for_room() {
  while (in_flight_.size() >= max_in_flight_ || (!in_flight_.empty() && in_flight_.front().save->is(&AsyncSave::ended)))
    end_first();
}

AsyncSaveResponse AsyncSaveExecutor::submit(Job job, bool in_background) {
  wait_for_room();
  const auto save = std::make_shared<AsyncSave>();
  const auto before = in_flight_.empty() ? nullptr : in_flight_.back().save;
  const std::exception_ptr unseen = take_unseen_failure();
  if (unseen) {
    save->seen = true;
    job.stage = [text = text_of(unseen)] {
      throw Error(ErrorCode::kFailedPrecondition,
                  "an earlier asynchronous save failed, and this rank had not asked for its outcome: " + text);
    };
  }

  const auto work = std::make_shared<Work>(Work{std::move(job), nullptr});
  if (!in_background) work->failure = stage(work->job, *save);
  InFlight& started = in_flight_.emplace_back(InFlight{save, std::thread()});
  const auto run = [save, before, in_background, work] {
    if (in_background) work->failure = stage(work->job, *save);
    if (before) before->wait_until(&AsyncSave::ended);
    upload(*work, *save);
  };
  try {
    started.thread = std::thread(run);
  } catch (const std::system_error&) {
    run();  // no thread to be had: the save is a blocking one
  }
  if (unseen) std::rethrow_exception(unseen);
  return {StagingCompletion(save), UploadCompletion(save)};
}

void AsyncSaveExecutor::wait() {
  while (!in_flight_.empty()) end_first();
  if (const std::exception_ptr failure = take_unseen_failure()) std::rethrow_exception(failure);
}

void run_failed_save(Transport& transport, StorageWriter& writer, std::exception_ptr failure) {
  const FailedSaveState state(std::move(failure));
  DefaultSavePlanner planner;
  run_save(transport, state, planner, writer);
  throw Error(ErrorCode::kInternal, "a save without a state succeeded");
}

}  // namespace reshard
