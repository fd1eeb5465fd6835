// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/checkpoint_manager.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <ctime>
#include <utility>

#include "reshard/core/hooks.h"
#include "storage/file_names.h"

namespace reshard {
namespace {

constexpr std::string_view kStepPrefix = "step-";
constexpr const char* kLockName = ".reshard-lock";
constexpr uint64_t kMaxHolderBytes = 4096;

/// n of a name "step-<n>", written as step_directory() does.
std::optional<int64_t> step_of(std::string_view name) {
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  name.remove_prefix(kStepPrefix.size());
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  if (error != std::errc{} || end != name.data() + name.size() || step < 0) return std::nullopt;
  return std::to_string(step) == name ? std::optional(step) : std::nullopt;
}

/// The steps that have a directory, ascending.
std::vector<int64_t> steps_in(const std::string& root, FileSystem& file_system) {
  std::vector<int64_t> steps;
  try {
    for (const std::string& name : file_system.list(root)) {
      if (const auto step = step_of(name)) steps.push_back(*step);
    }
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
  }
  std::ranges::sort(steps);
  return steps;
}

bool is_committed(const std::string& directory, FileSystem& file_system) {
  const auto status = file_system.status(join_path(directory, kMetadataFileName));
  return status && status->kind == FileKind::kRegular;
}

std::string this_process() {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '?';
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  std::array<char, 32> since{};
  ::gmtime_r(&now, &utc);
  std::strftime(since.data(), since.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return "process " + std::to_string(::getpid()) + " on host " + host.data() + " since " + since.data();
}

}  // namespace

std::string step_directory(const std::string& root, int64_t step) {
  if (step < 0) {
    throw Error(ErrorCode::kInvalidArgument, "step of a checkpoint",
                {.file = root, .wanted = "0 or more", .found = std::to_string(step)});
  }
  return join_path(root, std::string(kStepPrefix) + std::to_string(step));
}

std::vector<int64_t> committed_steps(const std::string& root, FileSystem& file_system) {
  std::vector<int64_t> steps = steps_in(root, file_system);
  std::erase_if(steps, [&](int64_t step) { return !is_committed(step_directory(root, step), file_system); });
  return steps;
}

CheckpointManager::CheckpointManager(std::string root, CheckpointManagerOptions options, FileSystem& file_system)
    : root_(std::move(root)), options_(options), file_system_(file_system) {
  if (options_.keep_last < 0) {
    throw Error(ErrorCode::kInvalidArgument, "keep_last of a CheckpointManager",
                {.file = root_, .wanted = "0 or more", .found = std::to_string(options_.keep_last)});
  }
  file_system_.create_directories(root_);
  const std::string path = join_path(root_, kLockName);
  lock_ = file_system_.try_lock(path, this_process());
  if (lock_) return;
  std::string holder = "another process";
  try {
    const Bytes text = file_system_.read_file(path, kMaxHolderBytes);
    if (!text.empty()) holder = as_text(text);
  } catch (const Error&) {
    // It is refused all the same.
  }
  throw Error(ErrorCode::kFailedPrecondition,
              "another job writes its checkpoints here: end it, or use another directory",
              {.file = root_, .found = holder});
}

CheckpointManager::~CheckpointManager() = default;

std::optional<int64_t> CheckpointManager::latest() const {
  const std::vector<int64_t> all = steps();
  return all.empty() ? std::nullopt : std::optional(all.back());
}

void CheckpointManager::require_lock() const {
  if (lock_->is_held()) return;
  throw Error(ErrorCode::kFailedPrecondition,
              "the lock could not be renewed in time: another job may write its checkpoints here by now",
              {.file = root_});
}

std::optional<int64_t> CheckpointManager::resume() {
  require_lock();
  for (const int64_t step : steps_in(root_, file_system_)) {
    const std::string directory = step_directory(root_, step);
    if (is_committed(directory, file_system_)) continue;
    try {
      remove_files(directory);
    } catch (const Error& error) {
      log(LogLevel::kWarning, std::string("what an unfinished save left stays behind: ") + error.what());
    }
  }
  return latest();
}

void CheckpointManager::saved(int64_t step) {
  const std::string directory = step_directory(root_, step);
  if (!is_committed(directory, file_system_)) {
    throw Error(ErrorCode::kFailedPrecondition, "the step was not saved", {.file = directory});
  }
  require_lock();
  if (options_.keep_last == 0) return;
  std::vector<int64_t> old;
  try {
    file_system_.sync_directory(directory);
    file_system_.sync_directory(root_);
    old = steps();
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, std::string("old checkpoints stay: ") + error.what());
    return;
  }
  old.resize(old.size() - std::min(old.size(), static_cast<size_t>(options_.keep_last)));
  for (const int64_t other : old) {
    if (other == step) continue;
    const std::string doomed = step_directory(root_, other);
    try {
      test_point("manager.before_delete");
      // Without its catalogue it is no checkpoint any more; a power loss must not bring that back alone.
      if (file_system_.remove(join_path(doomed, kMetadataFileName))) file_system_.sync_directory(doomed);
      test_point("manager.uncommitted");
      remove_files(doomed);
    } catch (const std::exception& error) {
      if (!is_gone(doomed)) log(LogLevel::kWarning, std::string("an old checkpoint stays behind: ") + error.what());
    }
  }
}

bool CheckpointManager::is_gone(const std::string& directory) const noexcept {
  try {
    return !file_system_.status(directory);  // somebody else deleted it
  } catch (...) {
    return false;
  }
}

/// Removes the files that saves make, then the directory if nothing else is in it.
void CheckpointManager::remove_files(const std::string& directory) {
  std::vector<std::string> names;
  try {
    names = file_system_.list(directory);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return;
    throw;
  }
  bool others = false;
  for (const std::string& name : names) {
    if (!is_checkpoint_file(name)) {
      others = true;
      continue;
    }
    file_system_.remove(join_path(directory, name));
    test_point("manager.deleting");
  }
  if (!others) file_system_.remove_directory(directory);
}

}  // namespace reshard
