// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// CheckpointManager: the checkpoints of one training run, a directory `step-<n>` each, below one root.
//
//   rank 0                                       every rank
//   CheckpointManager manager(root, {.keep_last = 3});
//   manager.resume()  -> tell all ranks          load from step_directory(root, step)
//                                                save into step_directory(root, step)
//   manager.saved(step)
//
// Only the coordinator (rank 0) has a manager; the other ranks need step_directory() alone. Which steps there are is
// always read from what is committed: a step is there once its directory holds a catalogue (`.metadata`). There is no
// tracker file that could lag behind or name a step that never finished.
//
// One writer at a time: the manager holds a lock on `root/.reshard-lock`. It ends with its process, so nothing has to be
// taken away after a crash. Jobs on several hosts exclude one another where the file system's flock() does: local file
// systems, NFS with a lock service, Lustre mounted with `flock`. A process forked from rank 0 shares the lock and keeps
// it until it ends, too. Readers take no lock. In an object store the lock is a lease (S3Options::lock_lease), which a job that
// follows a killed one waits for; a manager that could not renew it in time refuses to remove anything
// (kFailedPrecondition).
//
// Start a job anew only after all ranks of the former one have ended: the lock tells of rank 0 alone.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reshard/io/file_system.h"

namespace reshard {

/// "root/step-<n>". kInvalidArgument for a negative step.
std::string step_directory(const std::string& root, int64_t step);

/// The committed steps, ascending; none where there is no root. Any process, with or without a manager at work; a step
/// can be deleted right after. Throws where it cannot tell (kIo), rather than to name an older step.
std::vector<int64_t> committed_steps(const std::string& root, FileSystem& file_system = local_file_system());

struct CheckpointManagerOptions {
  /// How many committed steps stay: the newest. 0: all.
  int64_t keep_last = 0;
};

/// Not thread-safe.
class CheckpointManager {
 public:
  /// Makes the root if missing, and takes the lock. kFailedPrecondition if another job has it, naming its host, process
  /// and start. `file_system` is borrowed.
  explicit CheckpointManager(std::string root, CheckpointManagerOptions options = {},
                             FileSystem& file_system = local_file_system());
  ~CheckpointManager();
  CheckpointManager(const CheckpointManager&) = delete;
  CheckpointManager& operator=(const CheckpointManager&) = delete;

  std::vector<int64_t> steps() const { return committed_steps(root_, file_system_); }
  /// The largest committed step.
  std::optional<int64_t> latest() const;

  /// At the start of a job, before its first save: removes what unfinished saves and deletions left (files of
  /// checkpoints in step directories without a catalogue; anything else in them stays, and so does their directory then)
  /// and returns latest(). What cannot be removed is a warning.
  std::optional<int64_t> resume();

  /// After a save of `step` has returned: makes sure that it is committed (kFailedPrecondition if not) and durable, then
  /// deletes all committed steps but the `keep_last` largest and this one. Never touches a step that is not committed. A
  /// deletion that fails is a warning; the next call or resume() goes on with it. Test points: manager.before_delete,
  /// manager.uncommitted, manager.deleting.
  void saved(int64_t step);

 private:
  void require_lock() const;
  void remove_files(const std::string& directory);
  bool is_gone(const std::string& directory) const noexcept;

  std::string root_;
  CheckpointManagerOptions options_;
  FileSystem& file_system_;
  std::unique_ptr<FileLock> lock_;
};

}  // namespace reshard
