// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Saves that a process of their own makes: what plans, writes, syncs and commits is in there, and this process only hands it the messages of
// the other ranks. The two share the memory that the state was staged in; all else goes over a socket.
//
//   this process                                            the other one, `reshard save-worker`
//   SaveProcess::save(): the job (names, boxes, places)  -> run_save() over a transport that asks
//   the rank's own transport, asked                     <-> send, receive, gather, heartbeat
//   the result, or the error                             <- what came of run_save()
//
// It knows no LibTorch and is started afresh (not forked), so it holds nothing of the program: no threads, locks or devices.

#include <sys/types.h>

#include <chrono>
#include <string>

#include "reshard/core/hooks.h"
#include "reshard/planner/state.h"
#include "reshard/protocol/protocol.h"
#include "reshard/storage/filesystem.h"

namespace reshard {

/// A save for SaveProcess::save.
struct ProcessSave {
  const SaveState& state;
  /// A file in memory and where it is mapped here: most of the state's tensors lie in it. (Those that do not travel with the job.)
  int memory_fd = -1;
  ByteSpan memory = {};
  const FileSystemWriter& writer;
  bool verify_replicas = false;
  /// How long the other process may say nothing.
  std::chrono::milliseconds silence;
  ProgressFn progress = {};
};

/// The other process, started by the first save and again where it has ended. Used by one thread at a time.
class SaveProcess {
 public:
  /// `program`: the `reshard` command of this version, a path or a name in PATH.
  explicit SaveProcess(std::string program) : program_(std::move(program)) {}
  ~SaveProcess() { end(); }
  SaveProcess(const SaveProcess&) = delete;
  SaveProcess& operator=(const SaveProcess&) = delete;

  /// Throws kUnsupported for a writer that only this process knows (one of another file system, or with a stream transform of the user's own), and kNotFound, kUnavailable or kIo where the other
  /// process cannot be had: nothing was sent to other ranks then. Else as run_save(); where the process ends or falls silent half-way, the
  /// CheckpointError names this rank, and the other ranks learn of it by its silence.
  SaveResult save(Transport& transport, const ProcessSave& save);

 private:
  void start();
  std::string end() noexcept;

  std::string program_;
  pid_t pid_ = -1;
  int socket_ = -1;
};

/// The other process's main function: makes saves until the other end of `socket` is closed.
void serve_saves(int socket);

}  // namespace reshard
