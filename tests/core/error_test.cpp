// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/error.h"

#include <gtest/gtest.h>

#include <new>
#include <system_error>

#include "support/expect_error.h"

namespace reshard {
namespace {

TEST(ErrorTest, TextHoldsEveryPartOfTheContext) {
  const Error error(
      ErrorCode::kCorruptData, "checksum differs",
      {.rank = 2, .key = "model.weight", .file = "__0_0.distcp", .offset = 123, .wanted = "0xAB", .found = "0xCD"});
  EXPECT_STREQ(error.what(),
               "corrupt data: checksum differs; rank 2, key model.weight, file __0_0.distcp, offset 123; wanted 0xAB, "
               "found 0xCD");
  EXPECT_EQ(error.message(), "checksum differs");
  EXPECT_EQ(error.code(), ErrorCode::kCorruptData);
}

TEST(ErrorTest, TextLeavesOutWhatIsNotKnown) {
  EXPECT_STREQ(Error(ErrorCode::kNotFound, "no such key").what(), "not found: no such key");
  EXPECT_STREQ(Error(ErrorCode::kIo, "cannot read", {.file = "f", .offset = 0}).what(),
               "input/output error: cannot read; file f, offset 0");
  EXPECT_STREQ(Error(ErrorCode::kTimeout, "silent", {.wanted = "an answer"}).what(),
               "timeout: silent; wanted an answer");
}

TEST(ErrorTest, OuterContextFillsOnlyWhatIsMissing) {
  const Error inner(ErrorCode::kCorruptData, "bad", {.key = "a", .offset = 7});
  const Error outer = inner.with_context({.rank = 3, .key = "b", .file = "f", .offset = 9});
  EXPECT_STREQ(outer.what(), "corrupt data: bad; rank 3, key a, file f, offset 7");
  EXPECT_EQ(outer.message(), "bad");
}

TEST(ErrorTest, ContextIsAddedToErrorsThatPass) {
  EXPECT_EQ(with_error_context({.key = "a"}, [] { return 5; }), 5);
  EXPECT_ERROR(ErrorCode::kIo, "key a", with_error_context({.key = "a"}, [] { throw Error(ErrorCode::kIo, "x"); }));
  EXPECT_THROW(with_error_context({.key = "a"}, [] { throw std::bad_alloc(); }), std::bad_alloc);
}

TEST(ErrorTest, CheckpointErrorsPassAContextUnchanged) {
  const CheckpointError thrown("write", {{1, {ErrorCode::kIo, "disk full"}}}, Committed::kNo);
  try {
    with_error_context({.key = "a"}, [&] { throw thrown; });
    FAIL() << "nothing was thrown";
  } catch (const CheckpointError& error) {
    EXPECT_STREQ(error.what(), thrown.what());
    EXPECT_EQ(error.failures().at(1).message, "disk full");
  }
}

TEST(ErrorTest, CheckpointErrorNamesEveryFailingRankAndTheFirstCauseFirst) {
  const CheckpointError error("write",
                              {{0, {ErrorCode::kTimeout, "timeout: rank 2 is silent"}},
                               {2, {ErrorCode::kIo, "input/output error: disk full"}},
                               {3, {ErrorCode::kCorruptData, "corrupt data: bad"}}},
                              Committed::kUnknown);
  EXPECT_STREQ(error.what(),
               "input/output error: write failed (committed: unknown) on 3 ranks\n"
               "  rank 2: input/output error: disk full\n"
               "  rank 0: timeout: rank 2 is silent\n"
               "  rank 3: corrupt data: bad");
  EXPECT_EQ(error.code(), ErrorCode::kIo) << "a silent peer is a consequence, not the cause";
  EXPECT_EQ(error.step(), "write");
  EXPECT_EQ(error.committed(), Committed::kUnknown);
}

TEST(ErrorTest, CheckpointErrorOfSilentPeersAloneIsATimeout) {
  const CheckpointError error("vote", {{4, {ErrorCode::kTimeout, "timeout: x"}}}, Committed::kYes);
  EXPECT_EQ(error.code(), ErrorCode::kTimeout);
  EXPECT_STREQ(error.what(), "timeout: vote failed (committed: yes) on 1 rank\n  rank 4: timeout: x");
}

RankFailure failure_of(const auto& exception) {
  try {
    throw exception;
  } catch (...) {
    return current_failure();
  }
}

TEST(ErrorTest, EveryKindOfExceptionBecomesAFailure) {
  const RankFailure own = failure_of(Error(ErrorCode::kNotFound, "no file", {.file = "f"}));
  EXPECT_EQ(own.code, ErrorCode::kNotFound);
  EXPECT_EQ(own.message, "not found: no file; file f");
  EXPECT_EQ(failure_of(std::bad_alloc()).message, "out of memory");
  const RankFailure system = failure_of(std::system_error(ENOSPC, std::generic_category(), "write"));
  EXPECT_EQ(system.code, ErrorCode::kIo);
  EXPECT_NE(system.message.find("No space left"), std::string::npos) << system.message;
  EXPECT_EQ(failure_of(std::logic_error("oops")).code, ErrorCode::kInternal);
  EXPECT_EQ(failure_of(std::logic_error("oops")).message, "oops");
  EXPECT_EQ(failure_of(42).code, ErrorCode::kInternal);
}

TEST(ErrorTest, EveryCodeHasItsOwnText) {
  std::map<std::string_view, int> texts;
  for (int i = 0; i <= static_cast<int>(ErrorCode::kInternal); ++i) ++texts[to_string(static_cast<ErrorCode>(i))];
  EXPECT_EQ(texts.size(), 10U);
  EXPECT_FALSE(texts.contains("unknown error"));
}

}  // namespace
}  // namespace reshard
