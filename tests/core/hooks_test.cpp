// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/hooks.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace reshard {
namespace {

class HooksTest : public ::testing::Test {
 protected:
  void TearDown() override {
    set_log_sink(nullptr);
    set_test_point_handler(nullptr);
  }
};

TEST_F(HooksTest, SinkReceivesEveryMessage) {
  std::vector<std::pair<LogLevel, std::string>> seen;
  set_log_sink([&](LogLevel level, std::string_view message) { seen.emplace_back(level, message); });
  log(LogLevel::kInfo, "one");
  log(LogLevel::kWarning, "two");
  ASSERT_EQ(seen.size(), 2U);
  EXPECT_EQ(seen[0], std::pair(LogLevel::kInfo, std::string("one")));
  EXPECT_EQ(seen[1], std::pair(LogLevel::kWarning, std::string("two")));
}

TEST_F(HooksTest, WithoutASinkOnlyWarningsReachStderr) {
  set_log_sink([](LogLevel, std::string_view) {});
  set_log_sink(nullptr);
  ::testing::internal::CaptureStderr();
  log(LogLevel::kInfo, "quiet");
  log(LogLevel::kWarning, "loud");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "[reshard] warning: loud\n");
}

TEST_F(HooksTest, SinkMayLogAndReplaceItself) {
  std::vector<std::string> seen;
  set_log_sink([&](LogLevel, std::string_view message) {
    seen.emplace_back(message);
    if (message != "outer") return;
    log(LogLevel::kInfo, "inner");
    set_log_sink([&](LogLevel, std::string_view m) { seen.push_back("second " + std::string(m)); });
  });
  log(LogLevel::kInfo, "outer");
  log(LogLevel::kInfo, "last");
  EXPECT_EQ(seen, (std::vector<std::string>{"outer", "inner", "second last"}));
}

TEST_F(HooksTest, TestPointHandlerSeesTheNameAndItsErrorLeavesThePlace) {
  test_point("before.any_handler");
  std::vector<std::string> seen;
  set_test_point_handler([&](std::string_view name) {
    seen.emplace_back(name);
    if (name == "fail.here") throw std::runtime_error("injected");
  });
  test_point("save.after_write");
  EXPECT_THROW(test_point("fail.here"), std::runtime_error);
  set_test_point_handler(nullptr);
  test_point("fail.here");
  EXPECT_EQ(seen, (std::vector<std::string>{"save.after_write", "fail.here"}));
}

TEST_F(HooksTest, HandlersMayChangeWhileThreadsCall) {
  std::atomic<int> calls = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  set_test_point_handler([&](std::string_view) { ++calls; });
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      do test_point("x");
      while (!stop);
    });
  }
  for (int i = 0; i < 1000; ++i) {
    auto state = std::make_shared<int>(i);  // lives as long as a call that uses it
    set_test_point_handler([&calls, state](std::string_view) { calls += *state >= 0 ? 1 : 1000000; });
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(calls, 3);
}

}  // namespace
}  // namespace reshard
