// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/io/file_system.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "reshard/core/hooks.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;

TEST(FileSystemTest, SystemErrorsKeepTheirMeaning) {
  EXPECT_EQ(os_error(ENOENT, "open", "f").code(), ErrorCode::kNotFound);
  EXPECT_EQ(os_error(EEXIST, "create", "f").code(), ErrorCode::kAlreadyExists);
  EXPECT_EQ(os_error(EACCES, "open", "f").code(), ErrorCode::kIo);
  EXPECT_STREQ(os_error(ENOSPC, "write", "d/f").what(),
               "input/output error: cannot write: No space left on device; file d/f");
}

TEST(FileSystemTest, PathsAreJoinedBelowTheDirectoryOnly) {
  EXPECT_EQ(join_path("d", "f"), "d/f");
  EXPECT_EQ(join_path("d/", "a/b"), "d/a/b");
  EXPECT_EQ(join_path("", "f"), "f");
  EXPECT_EQ(join_path("/", "f"), "/f");
  EXPECT_ERROR(ErrorCode::kCorruptData, "leaves", join_path("d", "../f"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "absolute", join_path("d", "/f"));
}

class ReplaceTest : public ::testing::Test {
 protected:
  void TearDown() override {
    set_test_point_handler(nullptr);
    set_log_sink(nullptr);
  }
  std::string content() { return std::string(as_text(local_file_system().read_file(dir / "f", 1 << 20))); }
  bool exists() { return local_file_system().status(dir / "f").has_value(); }
  std::vector<std::string> names() { return local_file_system().list(dir.path()); }
  void replace(FileSystem& fs, std::string_view text, bool durable = true, Committed* replaced = nullptr) {
    replace_file_atomically(fs, dir.path(), "f", as_bytes(text), durable, replaced);
  }
  std::vector<std::string> calls_of(const FaultFileSystem& fs) {
    std::vector<std::string> calls;
    for (const FileCallRecord& record : fs.trace()) calls.emplace_back(to_string(record.call));
    return calls;
  }

  TemporaryDirectory dir;
};

TEST_F(ReplaceTest, NewFileAppearsAndAnOldOneIsReplaced) {
  FaultFileSystem fs;
  Committed replaced = Committed::kNo;
  replace(fs, "one", true, &replaced);
  EXPECT_EQ(content(), "one");
  EXPECT_EQ(replaced, Committed::kYes);
  replace(fs, "two, longer");
  replace(fs, "");
  EXPECT_EQ(content(), "");
  EXPECT_THAT(names(), ElementsAre("f"));
}

TEST_F(ReplaceTest, EverythingIsDurableBeforeTheRenameAndTheNameAfterIt) {
  FaultFileSystem fs;
  replace(fs, "text");
  EXPECT_THAT(calls_of(fs), ElementsAre("create", "write", "sync", "close", "rename", "sync_directory"));
  const auto trace = fs.trace();
  EXPECT_EQ(trace[1].bytes, 4U);
  EXPECT_EQ(trace[4].path, trace[0].path);
  EXPECT_EQ(trace[4].to, dir / "f");
  EXPECT_EQ(trace[5].path, dir.path());
}

TEST_F(ReplaceTest, WithoutDurabilityNothingIsSynced) {
  FaultFileSystem fs;
  replace(fs, "text", false);
  EXPECT_THAT(calls_of(fs), ElementsAre("create", "write", "close", "rename"));
  EXPECT_EQ(content(), "text");
}

TEST_F(ReplaceTest, EveryCallMayFailAndTheFileIsOldOrNew) {
  set_log_sink([](LogLevel, std::string_view) {});  // the warnings are another test's matter
  for (const bool had_old : {false, true}) {
    for (const bool after_effect : {false, true}) {
      for (const bool forever : {false, true}) {
        uint64_t failures = 0;
        for (uint64_t n = 1;; ++n) {
          local_file_system().remove(dir / "f");
          if (had_old) replace(local_file_system(), "old");
          FaultFileSystem fs;
          fs.inject({.nth = n, .error = ENOSPC, .forever = forever, .after_effect = after_effect, .torn_bytes = 2});
          Committed replaced = Committed::kYes;
          std::optional<Error> error;
          try {
            replace(fs, "new content", true, &replaced);
          } catch (const Error& e) {
            error = e;
          }
          const std::string label = "call " + std::to_string(n) + " fails" + (forever ? " for ever" : "") +
                                    (after_effect ? " after its effect" : "");
          const std::string now = exists() ? content() : "";
          ASSERT_TRUE(now == "new content" || now == (had_old ? "old" : "")) << label << ": '" << now << "'";
          if (!error) {
            ASSERT_EQ(replaced, Committed::kYes) << label;
            ASSERT_EQ(now, "new content") << label;
            break;
          }
          ++failures;
          ASSERT_EQ(error->code(), ErrorCode::kIo) << label;
          ASSERT_NE(std::string(error->what()).find("No space left"), std::string::npos) << label;
          ASSERT_NE(replaced, Committed::kYes) << label;
          if (replaced == Committed::kNo) {
            ASSERT_NE(now, "new content") << label;
          }
          // What the failing create left (it had its effect) or a remove that fails, too, cannot be cleaned.
          if (!forever && !(after_effect && n == 1)) {
            for (const std::string& name : names()) ASSERT_EQ(name, "f") << label;
          }
          for (const std::string& name : names()) {
            if (name != "f") local_file_system().remove(dir / name);
          }
        }
        EXPECT_EQ(failures, 6U) << "create, write, sync, close, rename, sync_directory";
      }
    }
  }
}

TEST_F(ReplaceTest, TemporaryFileThatCannotBeRemovedIsReported) {
  std::string warning;
  set_log_sink([&](LogLevel, std::string_view message) { warning = message; });
  FaultFileSystem fs;
  fs.inject({.call = FileCall::kWrite, .error = EIO});
  fs.inject({.call = FileCall::kRemove, .error = EACCES});
  EXPECT_ERROR(ErrorCode::kIo, "write (injected)", replace(fs, "new"));
  EXPECT_NE(warning.find("stays behind"), std::string::npos) << warning;
  EXPECT_NE(warning.find(kTemporaryInfix), std::string::npos) << warning;
}

TEST_F(ReplaceTest, TestPointsMarkEveryStep) {
  std::vector<std::string> seen;
  std::vector<std::string> contents;
  replace(local_file_system(), "old");
  set_test_point_handler([&](std::string_view name) {
    seen.emplace_back(name);
    contents.push_back(content());
  });
  replace(local_file_system(), "new");
  EXPECT_THAT(seen, ElementsAre("commit.before_write", "commit.before_sync", "commit.before_rename",
                                "commit.after_rename", "commit.after_sync"));
  EXPECT_THAT(contents, ElementsAre("old", "old", "old", "new", "new"));
}

TEST_F(ReplaceTest, KilledAtAnyPointTheFileIsOldOrNew) {
  const char* points[] = {"commit.before_write", "commit.before_sync", "commit.before_rename", "commit.after_rename",
                          "commit.after_sync"};
  for (const char* point : points) {
    replace(local_file_system(), "old");
    const auto child = [&] {
      set_test_point_handler([&](std::string_view name) {
        if (name == point) ::_exit(7);
      });
      replace(local_file_system(), "new");
      ::_exit(0);
    };
    EXPECT_EXIT(child(), ::testing::ExitedWithCode(7), "") << point;
    EXPECT_EQ(content(), std::string_view(point).starts_with("commit.after") ? "new" : "old") << point;
  }
  replace(local_file_system(), "next");
  EXPECT_EQ(content(), "next") << "what killed writers left does not hinder the next one";
}

TEST_F(ReplaceTest, ErrorAtATestPointLeavesNoTemporaryFile) {
  replace(local_file_system(), "old");
  set_test_point_handler([](std::string_view name) {
    if (name == "commit.before_rename") throw Error(ErrorCode::kInternal, "injected");
  });
  Committed replaced = Committed::kYes;
  EXPECT_ERROR(ErrorCode::kInternal, "injected", replace(local_file_system(), "new", true, &replaced));
  EXPECT_EQ(replaced, Committed::kNo);
  EXPECT_EQ(content(), "old");
  EXPECT_THAT(names(), ElementsAre("f"));
}

TEST_F(ReplaceTest, WritersAtTheSameTimeNeverMix) {
  replace(local_file_system(), std::string(5000, 'a'));
  std::atomic<bool> stop = false;
  std::atomic<int> wrong = 0;
  std::thread reader([&] {
    do {
      const std::string now = content();
      if (now != std::string(5000, now.at(0))) ++wrong;
    } while (!stop);
  });
  std::vector<std::thread> writers;
  for (char letter : {'b', 'c', 'd'}) {
    writers.emplace_back([&, letter] {
      for (int i = 0; i < 50; ++i) replace(local_file_system(), std::string(5000, letter), false);
    });
  }
  for (std::thread& writer : writers) writer.join();
  stop = true;
  reader.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_THAT(names(), ElementsAre("f"));
}

TEST_F(ReplaceTest, NamesThatAreNoNamesAreRefused) {
  const auto named = [&](const std::string& name) {
    replace_file_atomically(local_file_system(), dir.path(), name, as_bytes("x"));
  };
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "slash", named("a/b"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "empty", named(""));
  EXPECT_ERROR(ErrorCode::kCorruptData, "leaves", named(".."));
  EXPECT_TRUE(names().empty());
}

}  // namespace
}  // namespace reshard
