// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Saves in the background: what becomes of a save between the call that starts it and its commit. Knows neither tensors nor
// what carries the bytes; checkpoint/async_save.h is the door for programs.
//
//   caller's thread      submit(): waits until fewer than max_in_flight saves are under way, then starts this one
//   a thread a save      stage, unless the caller's thread did; then, when the save before has ended, save
//
// So saves end in the order in which they were submitted, on every rank, and talk one at a time. Each wait is for a save, which
// has the deadlines of its transport.
//
// A failure is never lost: it is thrown by UploadCompletion::get(). Where nobody asked for it there, the next submit() throws
// it, or wait(), or the destructor logs it as a warning.

#include <chrono>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <thread>

#include "reshard/protocol/protocol.h"

namespace reshard {

struct AsyncSave;

/// Tells when the state that is saved may be changed again. Copies are cheap; any thread; may outlive the executor.
class StagingCompletion {
 public:
  explicit StagingCompletion(std::shared_ptr<const AsyncSave> save) : save_(std::move(save)) {}
  /// Waits until the state is not read any more, also where staging failed: that the upload tells.
  void wait() const;
  bool is_done() const;

 private:
  std::shared_ptr<const AsyncSave> save_;
};

/// What becomes of the save. Copies are cheap; any thread; may outlive the executor.
class UploadCompletion {
 public:
  explicit UploadCompletion(std::shared_ptr<AsyncSave> save) : save_(std::move(save)) {}
  /// Waits for the end of the save. Throws its CheckpointError, the same on every rank, each time.
  SaveResult get() const;
  bool is_done() const;
  /// Waits for so long at most; is_done().
  bool wait_for(std::chrono::milliseconds timeout) const;

 private:
  std::shared_ptr<AsyncSave> save_;
};

struct AsyncSaveResponse {
  StagingCompletion staging_completion;
  UploadCompletion upload_completion;
};

/// The saves of one rank. Used by one thread.
class AsyncSaveExecutor {
 public:
  struct Job {
    /// Copies the state.
    std::function<void()> stage;
    /// Saves the copy. `failure` is not null where there is none, because stage() threw or the job was refused: then it lets
    /// the other ranks know, by run_failed_save(). Called once; both functions are destroyed before the save counts as ended.
    std::function<SaveResult(const std::exception_ptr& failure)> save;
  };

  explicit AsyncSaveExecutor(size_t max_in_flight = 1);
  /// Waits for all saves, and logs failures that nobody looked at.
  ~AsyncSaveExecutor();
  AsyncSaveExecutor(const AsyncSaveExecutor&) = delete;

  /// Waits as submit() does. A save before it that failed stays to be reported.
  void wait_for_room();
  /// Starts a save. With `in_background`, staging is part of that; else it is done when submit() returns. Throws the failure of
  /// an earlier save that nobody has looked at. The job is refused then, which the other ranks learn as an error of this rank:
  /// so every rank makes the same number of saves, whoever looked at what.
  AsyncSaveResponse submit(Job job, bool in_background = false);
  /// Waits for all saves. Throws the first failure that nobody has looked at.
  void wait();

 private:
  struct InFlight {
    std::shared_ptr<AsyncSave> save;
    std::thread thread;
  };
  void end_first();
  std::exception_ptr take_unseen_failure();

  size_t max_in_flight_;
  std::deque<InFlight> in_flight_;
  std::deque<std::shared_ptr<AsyncSave>> failed_;  // ended, and perhaps not looked at
};

/// This rank's part in a save that it cannot make: every rank gets a CheckpointError in step "plan" with `failure` as the cause
/// of this one.
[[noreturn]] void run_failed_save(Transport& transport, StorageWriter& writer, std::exception_ptr failure);

}  // namespace reshard
