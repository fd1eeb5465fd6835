// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What the commands that write have in common: where they may write, how far they are, and how they end when they are
// interrupted.

#include <chrono>
#include <functional>
#include <string>
#include <string_view>

#include "reshard/convert/open_checkpoint.h"
#include "reshard/core/hooks.h"

namespace reshard::cli {

/// Throws unless `destination` may be written: kInvalidArgument if it is the source or lies inside it, kAlreadyExists if
/// something is there that is not to be replaced. `force` replaces a checkpoint by a checkpoint and a file by a file, nothing
/// else. `kind`: of what is written.
void check_destination(const std::string& source, const std::string& destination, CheckpointKind kind, bool force);
/// The same for a file that is no checkpoint.
void check_file_destination(const std::string& source, const std::string& destination, bool force);

/// Makes `path` hold what `write` gives to its argument, whole and durable, or leaves it as it is.
void write_file_atomically(const std::string& path,
                           const std::function<void(const std::function<void(ByteSpan)>& sink)>& write);

/// A line on stderr that says how far a command is, if stderr is a terminal; gone when it is destroyed.
class ProgressBar {
 public:
  ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar();
  /// Throws when the program was interrupted.
  void show(std::string_view step, uint64_t done, uint64_t total);
  /// show() as a function for the library. Borrows the bar.
  ProgressFn fn();

 private:
  bool is_terminal_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point begin_;
  std::chrono::steady_clock::time_point last_;
};

/// From now on SIGINT and SIGTERM end the program at the next step of a ProgressBar, after it has cleaned up.
void catch_interrupts();
/// The signal that came, 0 for none.
int interrupted_by();

}  // namespace reshard::cli
