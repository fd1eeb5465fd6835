// SPDX-License-Identifier: BSD-3-Clause
// The fault injector itself: a test double that fails to fail would make every sweep over it worthless.
#include "support/fault_file_system.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;

class FaultFileSystemTest : public ::testing::Test {
 protected:
  void put(const std::string& text) {
    const auto file = fs.create(dir / "f", CreateMode::kTruncate);
    file->write(0, as_bytes(text));
    file->close();
  }
  std::string content() { return std::string(as_text(local_file_system().read_file(dir / "f", 1 << 20))); }

  TemporaryDirectory dir;
  FaultFileSystem fs;
};

TEST_F(FaultFileSystemTest, CallsAreForwardedCountedAndRecorded) {
  put("0123456789");
  Bytes out(4);
  fs.open(dir / "f")->read_exactly(3, out, "part");
  EXPECT_EQ(as_text(out), "3456");
  EXPECT_EQ(fs.open_beneath(dir.path(), "f")->size(), 10U);
  fs.create_directories(dir / "d");
  fs.rename(dir / "f", dir / "g");
  EXPECT_TRUE(fs.status(dir / "g").has_value());
  EXPECT_THAT(fs.list(dir.path()), ElementsAre("d", "g"));
  EXPECT_TRUE(fs.remove(dir / "g"));
  fs.sync_directory(dir.path());

  EXPECT_EQ(fs.calls(), 12U);
  EXPECT_EQ(fs.calls(FileCall::kOpen), 2U);
  EXPECT_EQ(fs.calls(FileCall::kSync), 0U);
  EXPECT_EQ(fs.bytes(FileCall::kWrite), 10U);
  EXPECT_EQ(fs.bytes(FileCall::kRead), 4U);
  std::vector<std::string> trace;
  for (const FileCallRecord& record : fs.trace()) trace.push_back(to_string(record));
  const std::string f = dir / "f";
  EXPECT_THAT(trace, ElementsAre("create " + f, "write " + f + " [0, 10)", "close " + f, "open " + f,
                                 "read " + f + " [3, 7)", "open " + f, "mkdirs " + (dir / "d"),
                                 "rename " + f + " -> " + (dir / "g"), "status " + (dir / "g"), "list " + dir.path(),
                                 "remove " + (dir / "g"), "sync_directory " + dir.path()));
}

TEST_F(FaultFileSystemTest, OnlyTheChosenCallFails) {
  put("0123456789");
  const auto file = fs.open(dir / "f");
  Bytes out(4);
  fs.inject({.call = FileCall::kRead, .nth = 2, .error = EACCES});
  file->read_exactly(0, out, "part");
  EXPECT_EQ(fs.status(dir / "f")->size, 10U) << "calls of another kind do not count";
  EXPECT_ERROR(ErrorCode::kIo, "cannot read (injected): Permission denied; file " + (dir / "f"),
               file->read_exactly(0, out, "part"));
  file->read_exactly(0, out, "part");
}

TEST_F(FaultFileSystemTest, MemoryCanEndInACall) {
  fs.inject({.call = FileCall::kWrite, .out_of_memory = true});
  EXPECT_THROW(put("x"), std::bad_alloc);
  put("x");
  EXPECT_EQ(content(), "x");
}

TEST_F(FaultFileSystemTest, LocksAndDirectoriesFail) {
  fs.create_directories(dir / "d");
  fs.inject({.call = FileCall::kLock, .error = ENOLCK});
  fs.inject({.call = FileCall::kRemoveDirectory, .error = EIO});
  EXPECT_ERROR(ErrorCode::kIo, "lock (injected)", fs.try_lock(dir / "l", "me"));
  EXPECT_ERROR(ErrorCode::kIo, "rmdir (injected)", fs.remove_directory(dir / "d"));
  EXPECT_NE(fs.try_lock(dir / "l", "me"), nullptr);
  EXPECT_TRUE(fs.remove_directory(dir / "d"));
}

TEST_F(FaultFileSystemTest, FaultForEverStays) {
  fs.inject({.call = FileCall::kCreate, .error = ENOSPC, .forever = true});
  for (int i = 0; i < 3; ++i) EXPECT_ERROR(ErrorCode::kIo, "No space left", put("x"));
  EXPECT_FALSE(fs.remove(dir / "f"));
}

TEST_F(FaultFileSystemTest, SeveralFaultsWaitForTheirOwnCalls) {
  fs.inject({.call = FileCall::kWrite, .error = EIO});
  fs.inject({.call = FileCall::kCreate, .error = EDQUOT});
  EXPECT_ERROR(ErrorCode::kIo, "create (injected)", put("x"));
  EXPECT_ERROR(ErrorCode::kIo, "write (injected)", put("x"));
  put("x");
  EXPECT_EQ(content(), "x");
}

TEST_F(FaultFileSystemTest, TornWriteStoresItsFirstBytes) {
  const auto file = fs.create(dir / "f", CreateMode::kExclusive);
  fs.inject({.call = FileCall::kWrite, .error = ENOSPC, .torn_bytes = 5});
  const std::vector<ByteSpan> parts{as_bytes("abc"), as_bytes("defg"), as_bytes("hi")};
  EXPECT_ERROR(ErrorCode::kIo, "write (injected)", file->write_gather(1, parts));
  using namespace std::string_literals;
  EXPECT_EQ(content(), "\0abcde"s);
}

TEST_F(FaultFileSystemTest, FailedCallHasNoEffectUnlessItIsSaidToHaveIt) {
  put("x");
  fs.inject({.call = FileCall::kRemove});
  EXPECT_ERROR(ErrorCode::kIo, "remove (injected)", fs.remove(dir / "f"));
  EXPECT_EQ(content(), "x");
  fs.inject({.call = FileCall::kRemove, .after_effect = true});
  EXPECT_ERROR(ErrorCode::kIo, "remove (injected)", fs.remove(dir / "f"));
  EXPECT_EQ(fs.status(dir / "f"), std::nullopt);
}

TEST_F(FaultFileSystemTest, FilesMayOutliveIt) {
  std::unique_ptr<WritableFile> file;
  {
    FaultFileSystem short_lived;
    file = short_lived.create(dir / "f", CreateMode::kExclusive);
  }
  file->write(0, as_bytes("x"));
  file->close();
  EXPECT_EQ(content(), "x");
}

}  // namespace
}  // namespace reshard
