// SPDX-License-Identifier: BSD-3-Clause
#include "cli/output.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>

#include "cli/commands.h"
#include "reshard/core/error.h"
#include "reshard/storage/filesystem.h"

namespace reshard::cli {
namespace {

namespace fs = std::filesystem;

volatile std::sig_atomic_t g_signal = 0;
static_assert(sizeof(std::sig_atomic_t) >= sizeof(int));

[[noreturn]] void exists(const std::string& what, const std::string& destination) {
  throw Error(ErrorCode::kAlreadyExists, what, {.file = destination});
}

void check_apart(const std::string& source, const std::string& destination) {
  const fs::path from = fs::canonical(source);
  const fs::path to = fs::weakly_canonical(fs::absolute(destination));
  const auto [end, unused] = std::mismatch(from.begin(), from.end(), to.begin(), to.end());
  if (end != from.end()) return;
  throw Error(ErrorCode::kInvalidArgument,
              from == to ? "the destination is the source" : "the destination lies inside the source",
              {.file = destination});
}

void check_file(const std::string& destination, bool force) {
  const fs::file_status status = fs::symlink_status(destination);
  if (!fs::exists(status)) return;
  if (!fs::is_regular_file(status)) exists("only a file can be replaced by a file", destination);
  if (!force) exists("the destination is there; --force replaces it", destination);
}

}  // namespace

void check_file_destination(const std::string& source, const std::string& destination, bool force) {
  if (!fs::exists(source)) throw Error(ErrorCode::kNotFound, "there is no such checkpoint", {.file = source});
  check_apart(source, destination);
  check_file(destination, force);
}

void check_destination(const std::string& source, const std::string& destination, CheckpointKind kind, bool force) {
  if (kind == CheckpointKind::kTorch) return check_file_destination(source, destination, force);
  if (!fs::exists(source)) throw Error(ErrorCode::kNotFound, "there is no such checkpoint", {.file = source});
  check_apart(source, destination);
  const fs::file_status status = fs::status(destination);
  if (!fs::exists(status) && !fs::is_symlink(fs::symlink_status(destination))) return;
  if (!fs::is_directory(status)) exists("a checkpoint is a directory, and something else is there", destination);
  if (fs::is_empty(destination)) return;
  if (kind == CheckpointKind::kSafetensors) exists("safetensors files need a directory of their own", destination);
  if (!fs::exists(fs::path(destination) / kMetadataFileName)) {
    exists("the directory holds something else than a checkpoint", destination);
  }
  if (!force) exists("the destination is there; --force replaces it", destination);
}

void write_file_atomically(const std::string& path,
                           const std::function<void(const std::function<void(ByteSpan)>& sink)>& write) {
  const fs::path whole = fs::absolute(path);
  replace_file_atomically(local_file_system(), whole.parent_path().string(), whole.filename().string(),
                          [&](WritableFile& file) {
                            uint64_t position = 0;
                            write([&](ByteSpan bytes) {
                              file.write(position, bytes);
                              position += bytes.size();
                            });
                          });
}

ProgressBar::ProgressBar() : is_terminal_(::isatty(STDERR_FILENO) != 0), begin_(std::chrono::steady_clock::now()) {}

ProgressBar::~ProgressBar() {
  if (!shown_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
}

void ProgressBar::show(std::string_view step, uint64_t done, uint64_t total) {
  if (g_signal != 0) throw Error(ErrorCode::kFailedPrecondition, "interrupted");
  if (!is_terminal_) return;
  constexpr std::chrono::milliseconds kEvery{100};
  const auto now = std::chrono::steady_clock::now();
  if (shown_ && now - last_ < kEvery) return;
  shown_ = true;
  last_ = now;
  const double seconds = std::chrono::duration<double>(now - begin_).count();
  const double share = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
  const auto speed = static_cast<uint64_t>(static_cast<double>(done) / std::max(seconds, 1e-3));
  std::fprintf(stderr, "\r%s %3.0f%%  %s of %s  %s/s\x1b[K", std::string(step).c_str(), 100 * share,
               readable_bytes(done).c_str(), readable_bytes(total).c_str(), readable_bytes(speed).c_str());
  std::fflush(stderr);
}

ProgressFn ProgressBar::fn() {
  return [this](const Progress& progress) { show(progress.step, progress.done, progress.total); };
}

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = [](int signal) { g_signal = signal; };
  action.sa_flags = SA_RESTART | SA_RESETHAND;  // a second one ends the program at once
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

int interrupted_by() { return g_signal; }

}  // namespace reshard::cli
