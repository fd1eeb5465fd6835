// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A real S3 server (moto) in a process of its own, with faults on demand: tests/s3/server.py has the commands. One a test
// program; ends with it. The target defines RESHARD_PYTHON and RESHARD_S3_SERVER, the script.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "reshard/s3/s3_file_system.h"

namespace reshard {

class S3Server {
 public:
  /// Started on first use.
  static S3Server& instance() {
    static S3Server server;
    return server;
  }
  /// One more, over TLS for the name localhost; its certificate is put into `certificate`.crt.
  explicit S3Server(const std::string& certificate) : certificate_(certificate) { start(); }
  ~S3Server() {
    if (to_ != -1) ::close(to_);
    if (from_ != -1) ::close(from_);
    if (pid_ > 0) ::waitpid(pid_, nullptr, 0);  // it ends with its stdin
  }
  S3Server(const S3Server&) = delete;
  S3Server& operator=(const S3Server&) = delete;

  /// Why there is none; empty if there is.
  const std::string& missing() const { return missing_; }
  std::string endpoint() const { return (certificate_.empty() ? "http://127.0.0.1:" : "https://localhost:") + port_; }
  const std::string& port() const { return port_; }

  /// Short waits, and credentials that a text can be searched for.
  S3Options options() const {
    return {.credentials = S3Credentials{"AKIDOFTHETEST", "secret-of-the-test", "token-of-the-test"},
            .region = "us-east-1",
            .endpoint = endpoint(),
            .part_bytes = 5 << 20,
            .range_bytes = 1 << 20,
            .parallel = 3,
            .max_attempts = 4,
            .first_backoff = std::chrono::milliseconds(1),
            .max_backoff = std::chrono::milliseconds(4),
            .attempt_timeout = std::chrono::milliseconds(20'000),
            .deadline = std::chrono::milliseconds(60'000)};
  }
  /// "s3://bucket/<n>", new each time.
  std::string new_prefix() { return "s3://bucket/prefix-" + std::to_string(++prefixes_); }

  std::string tell(const std::string& command) {
    const std::string line = command + "\n";
    if (::write(to_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
      throw std::runtime_error("write to the S3 server");
    return read_line();
  }
  static constexpr int kForever = 1'000'000;
  /// The nth request from now on and those after it, so many in all.
  void fault(const std::string& kind, int nth, int times = 1) {
    if (tell("fault " + kind + " " + std::to_string(nth) + " " + std::to_string(times)) != "ok") {
      throw std::runtime_error("fault");
    }
  }
  struct Counts {
    int requests = 0;
    int hits = 0;
  };
  Counts counts() {
    const std::string text = tell("count");
    return {std::stoi(text), std::stoi(text.substr(text.find(' ')))};
  }
  int peak() { return std::stoi(tell("peak")); }
  int uploads() { return std::stoi(tell("uploads")); }
  int parts() { return std::stoi(tell("parts")); }

 private:
  S3Server() { start(); }
  void start() {
    if (!std::filesystem::exists(RESHARD_PYTHON)) {
      missing_ = "there is no " RESHARD_PYTHON;
      return;
    }
    ::signal(SIGPIPE, SIG_IGN);
    int in[2];
    int out[2];
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(in[0], 0);
      ::dup2(out[1], 1);
      ::execl(RESHARD_PYTHON, RESHARD_PYTHON, RESHARD_S3_SERVER, certificate_.empty() ? nullptr : certificate_.c_str(),
              static_cast<char*>(nullptr));
      ::_exit(127);
    }
    ::close(in[0]);
    ::close(out[1]);
    to_ = in[1];
    from_ = out[0];
    port_ = read_line();
    if (port_.find_first_not_of("0123456789") != std::string::npos) missing_ = "moto is not installed: " + port_;
  }

  std::string read_line() {
    std::string line;
    for (char c = 0;;) {
      pollfd ready{from_, POLLIN, 0};
      if (::poll(&ready, 1, 60'000) != 1) throw std::runtime_error("the S3 server does not answer");
      if (::read(from_, &c, 1) != 1) throw std::runtime_error("the S3 server ended");
      if (c == '\n') return line;
      line += c;
    }
  }

  const std::string certificate_;
  pid_t pid_ = -1;
  int to_ = -1;
  int from_ = -1;
  std::string port_;
  std::string missing_;
  int prefixes_ = 0;
};

}  // namespace reshard

#define RESHARD_SKIP_WITHOUT_S3_SERVER() \
  if (!::reshard::S3Server::instance().missing().empty()) GTEST_SKIP() << ::reshard::S3Server::instance().missing()
