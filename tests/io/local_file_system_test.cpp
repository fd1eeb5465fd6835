// SPDX-License-Identifier: BSD-3-Clause
// The FileSystem on the real system: each promise of io/file_system.h, tried on real files.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "reshard/io/file_system.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class LocalFileSystemTest : public ::testing::Test {
 protected:
  void put(const std::string& name, std::string_view text) {
    const auto file = fs.create(dir / name, CreateMode::kTruncate);
    file->write(0, as_bytes(text));
    file->close();
  }
  std::string get(const std::string& name) { return std::string(as_text(fs.read_file(dir / name, 1 << 20))); }

  TemporaryDirectory dir;
  FileSystem& fs = local_file_system();
};

// --- writing
// ----------------------------------------------------------------------------------------------------------

TEST_F(LocalFileSystemTest, WhatIsWrittenIsReadBack) {
  const auto file = fs.create(dir / "f", CreateMode::kExclusive);
  const std::vector<ByteSpan> parts{as_bytes("abc"), as_bytes(""), as_bytes("defg")};
  file->write_gather(2, parts);
  file->write(20, as_bytes("z"));
  file->start_write_back(0, 1 << 20);
  file->write_back(0, 1 << 20);
  file->sync();
  file->close();
  using namespace std::string_literals;
  EXPECT_EQ(get("f"), "\0\0abcdefg\0\0\0\0\0\0\0\0\0\0\0z"s) << "bytes never written are zero";
}

TEST_F(LocalFileSystemTest, ExclusiveCreateRefusesWhatExists) {
  put("f", "old");
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "cannot create: File exists; file " + (dir / "f"),
               fs.create(dir / "f", CreateMode::kExclusive));
  EXPECT_EQ(get("f"), "old");
  fs.create(dir / "f", CreateMode::kTruncate)->close();
  EXPECT_EQ(get("f"), "");
}

TEST_F(LocalFileSystemTest, CreateFollowsNoSymlinkAndTakesNoFifo) {
  put("target", "kept");
  ASSERT_EQ(::symlink("target", (dir / "link").c_str()), 0);
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_ERROR(ErrorCode::kIo, "cannot create", fs.create(dir / "link", CreateMode::kTruncate));
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "cannot create", fs.create(dir / "link", CreateMode::kExclusive));
  EXPECT_ERROR(ErrorCode::kIo, "cannot create", fs.create(dir / "fifo", CreateMode::kTruncate));
  const int reader = ::open((dir / "fifo").c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_NE(reader, -1);
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "found a FIFO", fs.create(dir / "fifo", CreateMode::kTruncate));
  ::close(reader);
  EXPECT_EQ(get("target"), "kept");
}

TEST_F(LocalFileSystemTest, SeveralMayWriteAFileThatExists) {
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot create", fs.create(dir / "f", CreateMode::kExisting));
  EXPECT_EQ(fs.status(dir / "f"), std::nullopt);
  put("f", "0123456789");
  const auto one = fs.create(dir / "f", CreateMode::kExisting);
  const auto two = fs.create(dir / "f", CreateMode::kExisting);
  one->write(2, as_bytes("ab"));
  two->write(8, as_bytes("cdef"));
  one->close();
  two->close();
  EXPECT_EQ(get("f"), "01ab4567cdef");
  ASSERT_EQ(::symlink("f", (dir / "link").c_str()), 0);
  EXPECT_ERROR(ErrorCode::kIo, "cannot create", fs.create(dir / "link", CreateMode::kExisting));
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  const int reader = ::open((dir / "fifo").c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_NE(reader, -1);
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "found a FIFO", fs.create(dir / "fifo", CreateMode::kExisting));
  ::close(reader);
}

TEST_F(LocalFileSystemTest, TheRealPathLeadsThroughNoSymlink) {
  fs.create_directories(dir / "blobs");
  put("blobs/b", "content");
  ASSERT_EQ(::symlink("blobs", (dir / "also").c_str()), 0);
  ASSERT_EQ(::symlink("also/b", (dir / "link").c_str()), 0);
  const std::string root = fs.real_path(dir.path());
  EXPECT_EQ(fs.real_path(dir / "link"), root + "/blobs/b");
  EXPECT_EQ(fs.real_path(dir / "also/b"), root + "/blobs/b");
  EXPECT_EQ(as_text(fs.read_file(fs.real_path(dir / "link"), 100)), "content");
  EXPECT_EQ(fs.real_path(""), fs.real_path("."));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot follow", fs.real_path(dir / "none"));
  ASSERT_EQ(::symlink("round", (dir / "round").c_str()), 0);
  EXPECT_ERROR(ErrorCode::kIo, "cannot follow", fs.real_path(dir / "round"));
}

TEST_F(LocalFileSystemTest, CreateWithoutADirectoryIsNotFound) {
  EXPECT_ERROR(ErrorCode::kNotFound, "No such file", fs.create(dir / "no/f", CreateMode::kTruncate));
}

TEST_F(LocalFileSystemTest, DisjointRangesMayBeWrittenByManyThreads) {
  const auto file = fs.create(dir / "f", CreateMode::kExclusive);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 100; ++i) {
        const std::string text(10, static_cast<char>('a' + t));
        file->write((i * 4 + t) * 10, as_bytes(text));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  file->close();
  std::string wanted;
  for (size_t i = 0; i < 400; ++i) wanted += std::string(10, static_cast<char>('a' + i % 4));
  EXPECT_EQ(get("f"), wanted);
}

TEST_F(LocalFileSystemTest, FullDiskIsAnErrorThatSaysSo) {
  // A limit on the size of files gives what a full disk gives: a short write, then an error. In a child, because the
  // limit stays.
  const auto child = [&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{5, RLIM_INFINITY};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) ::_exit(2);
    try {
      fs.create(dir / "f", CreateMode::kExclusive)->write(0, as_bytes("0123456789"));
    } catch (const Error& error) {
      const bool named = std::string(error.what()).find("cannot write: File too large") != std::string::npos;
      ::_exit(error.code() == ErrorCode::kIo && named ? 0 : 3);
    }
    ::_exit(4);
  };
  EXPECT_EXIT(child(), ::testing::ExitedWithCode(0), "");
  EXPECT_EQ(get("f"), "01234") << "the short write that came first";
}

TEST_F(LocalFileSystemTest, OffsetsBeyondTheSystemAreErrorsNotWraps) {
  const auto file = fs.create(dir / "f", CreateMode::kExclusive);
  EXPECT_ERROR(ErrorCode::kIo, "cannot write", file->write(~uint64_t{0}, as_bytes("x")));
  EXPECT_ERROR(ErrorCode::kIo, "cannot write", file->write((uint64_t{1} << 63) - 1, as_bytes("x")));
}

TEST_F(LocalFileSystemTest, OnlyTheFirstCloseActs) {
  const auto file = fs.create(dir / "f", CreateMode::kExclusive);
  file->close();
  file->close();
  EXPECT_EQ(get("f"), "");
}

// --- reading
// ----------------------------------------------------------------------------------------------------------

TEST_F(LocalFileSystemTest, ScatterFillsThePartsInOrder) {
  put("f", "0123456789");
  const auto file = fs.open(dir / "f");
  EXPECT_EQ(file->size(), 10U);
  Bytes a(3);
  Bytes b(0);
  Bytes c(4);
  const std::vector<MutableByteSpan> parts{a, b, c};
  file->read_scatter(2, parts, "item");
  EXPECT_EQ(as_text(a), "234");
  EXPECT_EQ(as_text(c), "5678");
  file->read_exactly(10, {}, "nothing at the end");
}

TEST_F(LocalFileSystemTest, FileThatEndsTooEarlyIsCorruptAndNamed) {
  put("f", "0123456789");
  const auto file = fs.open(dir / "f");
  Bytes out(8);
  EXPECT_ERROR(
      ErrorCode::kCorruptData,
      "item model.weight: the file ends too early; file " + (dir / "f") + ", offset 4; wanted 8 bytes, found 6 bytes",
      file->read_exactly(4, out, "item model.weight"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found 0 bytes", file->read_exactly(1000, out, "item"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found 0 bytes", file->read_exactly(~uint64_t{0}, out, "item"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found 0 bytes", file->read_exactly((uint64_t{1} << 63) - 8, out, "item"));
}

TEST_F(LocalFileSystemTest, ReadsAndCountsBeyondTheLimitsOfOneCall) {
  // 2 GiB of hole and more in one call (the system moves less at once), into the same 32 MiB again and again.
  put("f", "head");
  std::filesystem::resize_file(dir / "f", (uint64_t{65} << 25) + 4);
  const int tail = ::open((dir / "f").c_str(), O_WRONLY);
  ASSERT_EQ(::pwrite(tail, "tail", 4, off_t{65} << 25), 4);
  ::close(tail);
  Bytes block(size_t{32} << 20);
  Bytes last(4);
  std::vector<MutableByteSpan> parts(65, block);
  parts.push_back(last);
  fs.open(dir / "f")->read_scatter(0, parts, "large");
  EXPECT_EQ(as_text(last), "tail");

  Bytes many(5000);
  parts.clear();
  for (std::byte& b : many) parts.emplace_back(&b, 1);
  fs.open(dir / "f")->read_scatter(0, parts, "many");
  EXPECT_EQ(as_text(many).substr(0, 4), "head");
}

TEST_F(LocalFileSystemTest, OneFileMayBeReadByManyThreads) {
  std::string text;
  for (int i = 0; i < 10000; ++i) text += static_cast<char>('a' + i % 26);
  put("f", text);
  const auto file = fs.open(dir / "f");
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Bytes out(100);
      for (size_t i = t; i < 9900; i += 4) {
        file->read_exactly(i, out, "part");
        wrong += as_text(out) == std::string_view(text).substr(i, 100) ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(LocalFileSystemTest, OpenTakesRegularFilesOnlyAndNeverWaits) {
  put("target", "x");
  ASSERT_EQ(::symlink("target", (dir / "link").c_str()), 0);
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  const int sock = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  (dir / "socket").copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(::bind(sock, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  ::close(sock);
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a symbolic link", fs.open(dir / "link"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a FIFO", fs.open(dir / "fifo"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a directory", fs.open(dir.path()));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a socket", fs.open(dir / "socket"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a device", fs.open("/dev/null"));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot open", fs.open(dir / "none"));
}

TEST_F(LocalFileSystemTest, ReadFileRefusesMoreThanItsLimit) {
  put("f", "0123456789");
  EXPECT_EQ(as_text(fs.read_file(dir / "f", 10)), "0123456789");
  EXPECT_ERROR(ErrorCode::kCorruptData, "wanted at most 9 bytes, found 10 bytes", fs.read_file(dir / "f", 9));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot open", fs.read_file(dir / "none", 10));
}

// --- staying below a directory
// ------------------------------------------------------------------------------------------

class OpenBeneathTest : public LocalFileSystemTest {
 protected:
  OpenBeneathTest() {
    fs.create_directories(dir / "ckpt/sub/deep");
    put("secret", "secret");
    put("ckpt/a", "a");
    put("ckpt/sub/deep/b", "b");
  }
  std::string read(const std::string& relative) {
    const auto file = fs.open_beneath(dir / "ckpt", relative);
    Bytes bytes(file->size());
    file->read_exactly(0, bytes, "file");
    return std::string(as_text(bytes));
  }
};

TEST_F(OpenBeneathTest, FilesAtAnyDepthAreFound) {
  EXPECT_EQ(read("a"), "a");
  EXPECT_EQ(read("sub/deep/b"), "b");
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot open", read("none"));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot open", read("sub/none/b"));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot open", fs.open_beneath(dir / "none", "a"));
}

TEST_F(OpenBeneathTest, TheDirectoryItselfMayBeASymlinkOrTheWorkingDirectory) {
  ASSERT_EQ(::symlink("ckpt", (dir / "latest").c_str()), 0);
  EXPECT_EQ(fs.open_beneath(dir / "latest", "a")->size(), 1U);
  EXPECT_EQ(fs.open_beneath((dir / "ckpt") + "/", "a")->size(), 1U);
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir / "ckpt");
  EXPECT_EQ(fs.open_beneath("", "sub/deep/b")->size(), 1U);
  std::filesystem::current_path(before);
}

TEST_F(OpenBeneathTest, PathsThatLeaveAreRefused) {
  using namespace std::string_literals;
  for (const std::string& path :
       {"../secret"s, "sub/../../secret"s, dir / "secret", ".."s, ""s, "."s, "a\0b"s, "sub/"s}) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "path of a data file", read(path));
  }
}

TEST_F(OpenBeneathTest, SymlinksAreRefusedAtEveryPlaceOfThePath) {
  ASSERT_EQ(::symlink("../secret", (dir / "ckpt/out").c_str()), 0);
  ASSERT_EQ(::symlink("a", (dir / "ckpt/in").c_str()), 0);
  ASSERT_EQ(::symlink("..", (dir / "ckpt/up").c_str()), 0);
  ASSERT_EQ(::symlink("sub", (dir / "ckpt/down").c_str()), 0);
  ASSERT_EQ(::symlink("../../..", (dir / "ckpt/sub/deep/up").c_str()), 0);
  EXPECT_ERROR(ErrorCode::kCorruptData, "symbolic link", read("out"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "symbolic link", read("in"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "symbolic link", read("up/secret"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "symbolic link", read("down/deep/b"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "symbolic link", read("sub/deep/up/secret"));
}

TEST_F(OpenBeneathTest, OtherKindsOfFilesAreRefused) {
  ASSERT_EQ(::mkfifo((dir / "ckpt/fifo").c_str(), 0600), 0);
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a FIFO", read("fifo"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "found a directory", read("sub"));
  EXPECT_ERROR(ErrorCode::kCorruptData, "leads through something else", read("a/b"));
}

// --- names
// ------------------------------------------------------------------------------------------------------------

TEST_F(LocalFileSystemTest, RenameReplacesAndRemoveTellsWhetherThereWasSomething) {
  put("a", "new");
  put("b", "old");
  fs.rename(dir / "a", dir / "b");
  EXPECT_EQ(get("b"), "new");
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot rename to " + (dir / "c"), fs.rename(dir / "a", dir / "c"));
  EXPECT_TRUE(fs.remove(dir / "b"));
  EXPECT_FALSE(fs.remove(dir / "b"));
  EXPECT_ERROR(ErrorCode::kIo, "cannot remove", fs.remove(dir.path()));
}

TEST_F(LocalFileSystemTest, DirectoriesAreMadeWithTheirParentsByAnyNumberOfRanks) {
  std::vector<std::thread> threads;
  std::atomic<int> failed = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        try {
          fs.create_directories(dir / ("x" + std::to_string(i) + "//y/z/"));
        } catch (const Error&) {
          ++failed;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(fs.status(dir / "x19/y/z"), (FileStatus{FileKind::kDirectory, 0}));
  fs.create_directories("");
  fs.create_directories("/");
  fs.create_directories(".");
}

TEST_F(LocalFileSystemTest, DirectoryIsNotMadeOverAFile) {
  put("f", "");
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "cannot create directory", fs.create_directories(dir / "f"));
  EXPECT_ERROR(ErrorCode::kIo, "Not a directory", fs.create_directories(dir / "f/g"));
  ASSERT_EQ(::symlink("nowhere", (dir / "dangling").c_str()), 0);
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "cannot create directory", fs.create_directories(dir / "dangling"));
}

TEST_F(LocalFileSystemTest, ListGivesSortedNames) {
  EXPECT_THAT(fs.list(dir.path()), IsEmpty());
  for (const char* name : {"b", "a", ".metadata", "B"}) put(name, "");
  fs.create_directories(dir / "c");
  EXPECT_THAT(fs.list(dir.path()), ElementsAre(".metadata", "B", "a", "b", "c"));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot list", fs.list(dir / "none"));
  EXPECT_ERROR(ErrorCode::kIo, "Not a directory", fs.list(dir / "a"));
}

TEST_F(LocalFileSystemTest, StatusTellsKindsApart) {
  put("f", "12345");
  ASSERT_EQ(::symlink("f", (dir / "link").c_str()), 0);
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(fs.status(dir / "f"), (FileStatus{FileKind::kRegular, 5}));
  EXPECT_EQ(fs.status(dir / "link"), (FileStatus{FileKind::kSymlink, 0}));
  EXPECT_EQ(fs.status(dir / "fifo"), (FileStatus{FileKind::kOther, 0}));
  EXPECT_EQ(fs.status(dir.path()), (FileStatus{FileKind::kDirectory, 0}));
  EXPECT_EQ(fs.status(dir / "none"), std::nullopt);
  EXPECT_EQ(fs.status(dir / "f/g"), std::nullopt);
}

TEST_F(LocalFileSystemTest, SyncDirectoryWantsADirectory) {
  fs.sync_directory(dir.path());
  fs.sync_directory("");
  put("f", "");
  EXPECT_ERROR(ErrorCode::kIo, "cannot sync directory", fs.sync_directory(dir / "f"));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot sync directory", fs.sync_directory(dir / "none"));
}

TEST_F(LocalFileSystemTest, RemoveDirectoryRemovesEmptyOnes) {
  fs.create_directories(dir / "d");
  EXPECT_TRUE(fs.remove_directory(dir / "d"));
  EXPECT_FALSE(fs.remove_directory(dir / "d"));
  put("f", "");
  EXPECT_ERROR(ErrorCode::kIo, "cannot remove directory: Not a directory", fs.remove_directory(dir / "f"));
  EXPECT_ERROR(ErrorCode::kIo, "cannot remove directory: Directory not empty", fs.remove_directory(dir.path()));
  EXPECT_EQ(get("f"), "");
}

TEST_F(LocalFileSystemTest, OneLockAtATime) {
  const std::string path = dir / "lock";
  auto lock = fs.try_lock(path, "the first, with a long name");
  ASSERT_NE(lock, nullptr);
  EXPECT_EQ(fs.try_lock(path, "the second"), nullptr);
  EXPECT_EQ(get("lock"), "the first, with a long name");
  lock.reset();
  lock = fs.try_lock(path, "the third");
  EXPECT_NE(lock, nullptr);
  EXPECT_EQ(get("lock"), "the third");
}

TEST_F(LocalFileSystemTest, OnlyARegularFileIsLocked) {
  ASSERT_EQ(::symlink("target", (dir / "link").c_str()), 0);
  EXPECT_ERROR(ErrorCode::kIo, "cannot lock", fs.try_lock(dir / "link", ""));
  EXPECT_FALSE(fs.status(dir / "target"));
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "cannot lock: not a regular file", fs.try_lock(dir / "fifo", ""));
  EXPECT_ERROR(ErrorCode::kNotFound, "cannot lock", fs.try_lock(dir / "none/lock", ""));
}

}  // namespace
}  // namespace reshard
