// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// For tests of the launcher and the harness: a program run as a child, and a FIFO that tells whether any process is
// left.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace reshard {

constexpr auto kChildDeadline = std::chrono::seconds(30);

/// Reads from `fd` until `enough(text)` or end of file; throws when that takes longer than the deadline.
template <class Enough>
void read_until(int fd, std::string& text, Enough&& enough, std::chrono::milliseconds deadline = kChildDeadline) {
  const auto until = std::chrono::steady_clock::now() + deadline;
  while (!enough(text)) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now()).count();
    pollfd waiting = {fd, POLLIN, 0};
    if (left <= 0 || poll(&waiting, 1, static_cast<int>(left)) == 0) {
      throw std::runtime_error("nothing more within " + std::to_string(deadline.count()) + " ms after:\n" + text);
    }
    char buffer[4096];
    const ssize_t n = read(fd, buffer, sizeof(buffer));
    if (n == 0) return;
    if (n > 0) text.append(buffer, static_cast<size_t>(n));
  }
}

struct ChildResult {
  int exit_code = -1;  // or -1
  int signal = 0;      // or 0
  std::string output;  // stdout and stderr
};

/// A child process with its output in a pipe. Killed if the test forgets it.
class ChildProcess {
 public:
  /// `environment` is set on top of this process's own, without the launcher contract and GoogleTest's variables.
  explicit ChildProcess(std::vector<std::string> argv, const std::map<std::string, std::string>& environment = {}) {
    std::map<std::string, std::string> env;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string text = *entry;
      env[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
    }
    for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                             "CUDA_VISIBLE_DEVICES", "GTEST_FILTER", "GTEST_OUTPUT", "RESHARD_TEST_GPU_COUNT",
                             "RESHARD_TEST_DEADLINE_SCALE", "RESHARD_RESOURCE_FILE"}) {
      env.erase(name);
    }
    for (const auto& [name, value] : environment) env[name] = value;
    std::vector<std::string> entries;
    for (const auto& [name, value] : env) entries.push_back(name + "=" + value);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
    const int error =
        posix_spawnp(&pid_, argv[0].c_str(), &actions, nullptr, pointers(argv).data(), pointers(entries).data());
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    output_ = ends[0];
    if (error != 0) throw std::runtime_error("cannot start " + argv[0]);
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  ~ChildProcess() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(output_);
  }

  void kill(int signal) { ::kill(pid_, signal); }

  /// Waits for its end; throws after the deadline.
  ChildResult wait() {
    ChildResult result;
    read_until(output_, result.output, [](const std::string&) { return false; });
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
    return result;
  }

 private:
  static std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  }

  pid_t pid_ = 0;
  int output_ = -1;
};

/// A folder of the test's own.
class TestFolder {
 public:
  TestFolder() {
    std::string path = std::filesystem::temp_directory_path() / "reshard-launch-test-XXXXXX";
    if (mkdtemp(path.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = path;
  }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  ~TestFolder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Processes under test open path() for writing, write a line, and keep it open while they live.
class AliveFifo {
 public:
  AliveFifo() : path_(folder_.path() / "alive") {
    if (mkfifo(path_.c_str(), 0600) != 0) throw std::runtime_error("mkfifo");
    fd_ = open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  }
  AliveFifo(const AliveFifo&) = delete;
  AliveFifo& operator=(const AliveFifo&) = delete;
  ~AliveFifo() { close(fd_); }
  const std::string& path() const { return path_; }

  /// Waits until `count` processes have written their line.
  void wait_for_lines(int count) {
    read_until(fd_, text_,
               [count](const std::string& text) { return std::count(text.begin(), text.end(), '\n') >= count; });
  }
  /// Waits until no process has it open any more; throws when that takes longer than 10 s.
  void wait_until_nobody_is_left() {
    read_until(
        fd_, text_, [](const std::string&) { return false; }, std::chrono::seconds(10));
  }

 private:
  TestFolder folder_;
  std::string path_;
  int fd_ = -1;
  std::string text_;
};

}  // namespace reshard
