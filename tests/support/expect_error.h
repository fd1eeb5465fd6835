// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Expecting a reshard::Error: its code, and a piece of its text.

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <utility>

#include "reshard/core/error.h"

namespace reshard {

/// Runs `body`, which must throw an Error of this code whose what() holds `text`.
template <class Body>
::testing::AssertionResult throws_error(ErrorCode code, std::string_view text, Body&& body) {
  const auto name = [](ErrorCode c) { return std::string(to_string(c)); };
  try {
    std::forward<Body>(body)();
  } catch (const Error& error) {
    const std::string what = error.what();
    if (error.code() != code) {
      return ::testing::AssertionFailure() << "wanted code '" << name(code) << "', got: " << what;
    }
    if (what.find(text) == std::string::npos) {
      return ::testing::AssertionFailure() << "wanted '" << text << "' in: " << what;
    }
    return ::testing::AssertionSuccess();
  } catch (const std::exception& error) {
    return ::testing::AssertionFailure() << "wanted '" << name(code) << "', got another exception: " << error.what();
  }
  return ::testing::AssertionFailure() << "wanted '" << name(code) << "', but nothing was thrown";
}

}  // namespace reshard

/// EXPECT_ERROR(ErrorCode::kCorruptData, "piece of the text", expression);
#define EXPECT_ERROR(code, text, ...) \
  EXPECT_TRUE(::reshard::throws_error((code), (text), [&] { static_cast<void>(__VA_ARGS__); }))
