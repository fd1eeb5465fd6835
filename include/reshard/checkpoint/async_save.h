// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// async_save: a save that blocks training for no longer than a copy in memory takes.
//
//   auto stager = std::make_shared<reshard::DefaultStager>();                   // once: its memory is used again by every save
//   for (int64_t step = 0;; ++step) {
//     ...                                                                       // forward, backward, optimizer.step()
//     auto saved = reshard::async_save(state, reshard::FileSystemWriter(dir), {.stager = stager});
//   }                                                                           // the state may be changed at once
//   stager->wait();                                                             // the last one, too, is committed
//
// Names and use are those of torch.distributed.checkpoint.async_save. What it copies (staging) is planned and written by a thread in
// the background, and committed as save() does it: docs/durability.md. That thread talks over the group's store, on connections and
// keys of this save alone, and never through collectives: it cannot get in the way of those of training, nor they in its.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/protocol/async_executor.h"

namespace reshard {

struct AsyncSaveOptions;

struct StagingOptions {
  /// Saves that may be under way at once. One more waits, inside async_save, for the oldest to end. They are written one after the
  /// other, and each has memory of the size of the state.
  size_t max_in_flight = 1;
  /// false: async_save returns when the state is staged. true: it returns at once, a thread copies, and the caller may not change
  /// tensors before staging_completion.wait() (and may read them: forward and backward can run meanwhile).
  bool use_async_staging = false;
  /// Not empty: a process of its own plans, writes and commits the saves (PyTorch's AsyncCheckpointerType.PROCESS): it shares no
  /// threads, allocator or locks with training, and what kills it leaves training alive. The name of the `reshard`
  /// command of this version, a path or in PATH; one process a stager, started by the first save. The state is staged in memory that both share,
  /// which is not pinned. Only for FileSystemWriter on the local file system and the default planner (kUnsupported, to every rank).
  std::string save_process = {};
};

/// What a stager did since it was made. Exact, so that tests can gate on it.
struct StagingCounters {
  uint64_t saves = 0;
  uint64_t bytes_staged = 0;     // copied
  uint64_t bytes_allocated = 0;  // of memory that was newly taken for that
  uint64_t allocations = 0;
};

/// Memory for copies of state dicts, kept from one save to the next, and the saves that read it. The memory is as large as the largest
/// state so far, once for each of max_in_flight, and pinned where a state has tensors on an accelerator. The first save pays for
/// fresh pages; a later one of no larger state allocates nothing.
///
/// Used by one thread. Every rank has its own, and uses it for the same saves in the same order.
class DefaultStager {
 public:
  explicit DefaultStager(const StagingOptions& options = {});
  /// Waits for all saves; a failure that nobody has looked at is logged as a warning.
  ~DefaultStager();
  DefaultStager(const DefaultStager&) = delete;

  /// Waits for all saves. Throws the first failure that nobody has looked at.
  void wait();
  StagingCounters counters() const;

 private:
  friend AsyncSaveResponse async_save(const StateDict&, std::shared_ptr<StorageWriter>, const AsyncSaveOptions&);
  struct State;
  std::unique_ptr<State> state_;
};

struct AsyncSaveOptions {
  std::shared_ptr<ProcessGroup> process_group = nullptr;  // as in SaveOptions
  /// As in SaveOptions. Its functions run in the background and see the staged copy, on the host.
  std::shared_ptr<SavePlanner> planner = nullptr;
  bool verify_replicas = false;
  /// Holds while a rank stages, too: it shows progress with each piece that it copies.
  std::optional<std::chrono::milliseconds> silence_timeout = {};
  ProgressFn progress = {};  // called in the background
  /// Null: one that the process has for all such saves, with the default options, and which is waited for at exit().
  std::shared_ptr<DefaultStager> stager = nullptr;
};

/// Starts a save of `state` as it is now; returns when it is staged (but see use_async_staging). Collective, as save(), in the order of
/// calls, with saves and loads that block in between. `state` itself may go away at once. Every tensor is copied once, however many
/// names and views it has: tied tensors stay tied. A device is asked for its copies on a stream of their own, after what the
/// current stream of this thread has been given so far.
///
/// The outcome is upload_completion.get(): the result, or the CheckpointError that every rank gets, whatever went wrong on whichever
/// rank, staging included. A failure that nobody got there is thrown by the next async_save with this stager instead of saving (to the
/// other ranks that save fails as this rank's), or by DefaultStager::wait(), or logged by its destructor.
///
/// Before the next save into the same directory by other means, and before CheckpointManager::saved(), wait for the upload. The process
/// that hosts the store (rank 0) has to live until all ranks have done so.
AsyncSaveResponse async_save(const StateDict& state, std::shared_ptr<StorageWriter> writer,
                             const AsyncSaveOptions& options = {});
AsyncSaveResponse async_save(const StateDict& state, FileSystemWriter writer, const AsyncSaveOptions& options = {});

}  // namespace reshard
