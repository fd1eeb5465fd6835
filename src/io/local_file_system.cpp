// SPDX-License-Identifier: BSD-3-Clause
// FileSystem on POSIX calls. Every descriptor is close-on-exec.

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <utility>

#include "io/transfer.h"
#include "reshard/io/file_system.h"
#include "reshard/metadata/metadata.h"

namespace reshard {
namespace {

constexpr auto kMaxOffset = static_cast<uint64_t>(std::numeric_limits<off_t>::max());

template <class Call>
auto resumed(Call call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ != -1) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

std::string_view kind_text(mode_t mode) {
  if (S_ISREG(mode)) return "a regular file";
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISLNK(mode)) return "a symbolic link";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

Error wrong_kind(ErrorCode code, std::string_view operation, const std::string& path, std::string_view found) {
  return Error(code, "cannot " + std::string(operation) + ": not a regular file",
               {.file = path, .wanted = "a regular file", .found = std::string(found)});
}

struct stat status_of(int fd, std::string_view operation, const std::string& path) {
  struct stat status;
  if (::fstat(fd, &status) != 0) throw os_error(errno, operation, path);
  return status;
}

class LocalReader final : public RandomAccessFile {
 public:
  LocalReader(Descriptor fd, uint64_t size, std::string path)
      : fd_(std::move(fd)), size_(size), path_(std::move(path)) {}

  uint64_t size() const override { return size_; }

  void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const override {
    uint64_t wanted = 0;
    for (const MutableByteSpan part : parts) wanted += part.size();
    TransferResult result;
    if (offset <= kMaxOffset && wanted <= kMaxOffset - offset) {  // else past the end of any file
      result = transfer_fully(parts, offset, [&](const iovec* window, int count, off_t at) {
        return ::preadv(fd_.get(), window, count, at);
      });
    }
    if (result.error != 0) throw os_error(result.error, "read " + std::string(what), path_);
    if (result.bytes != wanted) {
      throw Error(ErrorCode::kCorruptData, std::string(what) + ": the file ends too early",
                  {.file = path_,
                   .offset = offset,
                   .wanted = std::to_string(wanted) + " bytes",
                   .found = std::to_string(result.bytes) + " bytes"});
    }
  }

 private:
  Descriptor fd_;
  uint64_t size_;
  std::string path_;
};

class LocalWriter final : public WritableFile {
 public:
  LocalWriter(Descriptor fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  void write_gather(uint64_t offset, std::span<const ByteSpan> parts) override {
    uint64_t wanted = 0;
    for (const ByteSpan part : parts) wanted += part.size();
    if (offset > kMaxOffset || wanted > kMaxOffset - offset) throw os_error(EFBIG, "write", path_);
    const TransferResult result = transfer_fully(parts, offset, [&](const iovec* window, int count, off_t at) {
      return ::pwritev(fd_.get(), window, count, at);
    });
    // A write that moves nothing and reports nothing would be retried for ever.
    if (result.bytes != wanted) throw os_error(result.error != 0 ? result.error : EIO, "write", path_);
  }

  void write_back(uint64_t offset, uint64_t length) override {
    sync_range(offset, length, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  }
  void start_write_back(uint64_t offset, uint64_t length) override {
    sync_range(offset, length, SYNC_FILE_RANGE_WRITE);
  }

  void sync() override {
    if (resumed([&] { return ::fsync(fd_.get()); }) != 0) throw os_error(errno, "sync", path_);
  }

  void close() override {
    const int fd = fd_.release();
    // After EINTR the descriptor is gone all the same; closing it again could hit another thread's file.
    if (fd != -1 && ::close(fd) != 0 && errno != EINTR) throw os_error(errno, "close", path_);
  }

 private:
  void sync_range(uint64_t offset, uint64_t length, unsigned flags) {
    const int result = resumed(
        [&] { return ::sync_file_range(fd_.get(), static_cast<off_t>(offset), static_cast<off_t>(length), flags); });
    if (result == 0 || errno == EINVAL || errno == ESPIPE || errno == ENOSYS || errno == ENOTSUP) return;
    throw os_error(errno, "write back", path_);
  }

  Descriptor fd_;
  std::string path_;
};

class LocalLock final : public FileLock {
 public:
  explicit LocalLock(Descriptor fd) : fd_(std::move(fd)) {}

 private:
  Descriptor fd_;
};

// O_NONBLOCK lets the open of a FIFO return at once; on regular files it means nothing.
constexpr int kOpenFlags = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;

std::unique_ptr<RandomAccessFile> reader_of(int opened, const std::string& path) {
  Descriptor fd(opened);
  if (opened == -1) {
    if (errno == ELOOP) throw wrong_kind(ErrorCode::kCorruptData, "open", path, kind_text(S_IFLNK));
    if (errno == ENXIO) throw wrong_kind(ErrorCode::kCorruptData, "open", path, kind_text(S_IFSOCK));
    throw os_error(errno, "open", path);
  }
  const struct stat status = status_of(opened, "open", path);
  if (!S_ISREG(status.st_mode)) throw wrong_kind(ErrorCode::kCorruptData, "open", path, kind_text(status.st_mode));
  return std::make_unique<LocalReader>(std::move(fd), static_cast<uint64_t>(status.st_size), path);
}

std::string or_working_directory(const std::string& path) { return path.empty() ? "." : path; }

// The directory that holds the last component of a path without slashes at its end.
std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  const size_t end = path.find_last_not_of('/', slash);
  return end == std::string::npos ? "/" : path.substr(0, end + 1);
}

class LocalFileSystem final : public FileSystem {
 public:
  std::unique_ptr<WritableFile> create(const std::string& path, CreateMode mode) override {
    const int flags = O_WRONLY | kOpenFlags |
                      (mode == CreateMode::kExclusive  ? O_CREAT | O_EXCL
                       : mode == CreateMode::kTruncate ? O_CREAT | O_TRUNC
                                                       : 0);
    Descriptor fd(resumed([&] { return ::open(path.c_str(), flags, 0666); }));
    if (fd.get() == -1) throw os_error(errno, "create", path);
    if (mode != CreateMode::kExclusive) {  // else it is new, and regular
      const struct stat status = status_of(fd.get(), "create", path);
      if (!S_ISREG(status.st_mode)) {
        throw wrong_kind(ErrorCode::kAlreadyExists, "create", path, kind_text(status.st_mode));
      }
    }
    return std::make_unique<LocalWriter>(std::move(fd), path);
  }

  std::unique_ptr<RandomAccessFile> open(const std::string& path) override {
    return reader_of(resumed([&] { return ::open(path.c_str(), O_RDONLY | kOpenFlags); }), path);
  }

  std::unique_ptr<RandomAccessFile> open_beneath(const std::string& directory,
                                                 const std::string& relative_path) override {
    const std::string path = join_path(directory, relative_path);
    // From one directory to the next by descriptor, so that nothing that happens to the names matters.
    const auto enter = [](int from, const std::string& name, int flags) {
      return Descriptor(
          resumed([&] { return ::openat(from, name.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC | flags); }));
    };
    Descriptor current = enter(AT_FDCWD, or_working_directory(directory), 0);
    if (current.get() == -1) throw os_error(errno, "open", directory);
    size_t begin = 0;
    for (size_t slash; (slash = relative_path.find('/', begin)) != std::string::npos; begin = slash + 1) {
      Descriptor next = enter(current.get(), relative_path.substr(begin, slash - begin), O_NOFOLLOW);
      if (next.get() == -1) {
        if (errno != ENOTDIR && errno != ELOOP) throw os_error(errno, "open", path);
        throw Error(ErrorCode::kCorruptData, "cannot open: the way to the file leads through something else",
                    {.file = path, .wanted = "a directory", .found = "a symbolic link or a file"});
      }
      current = std::move(next);
    }
    return reader_of(
        resumed([&] { return ::openat(current.get(), relative_path.c_str() + begin, O_RDONLY | kOpenFlags); }), path);
  }

  std::string real_path(const std::string& path) override {
    char* found = ::realpath(or_working_directory(path).c_str(), nullptr);
    if (found == nullptr) throw os_error(errno, "follow", path);
    std::string result = found;
    ::free(found);
    return result;
  }

  void rename(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) throw os_error(errno, "rename to " + to, from);
  }

  bool remove(const std::string& path) override {
    if (::unlink(path.c_str()) == 0) return true;
    if (errno == ENOENT) return false;
    throw os_error(errno, "remove", path);
  }

  bool remove_directory(const std::string& path) override {
    if (::rmdir(path.c_str()) == 0) return true;
    if (errno == ENOENT) return false;
    throw os_error(errno, "remove directory", path);
  }

  void create_directories(const std::string& path) override {
    const size_t last = path.find_last_not_of('/');
    if (last == std::string::npos) return;  // the working directory or the root
    const std::string name = path.substr(0, last + 1);
    int error = ::mkdir(name.c_str(), 0777) == 0 ? 0 : errno;
    if (error == ENOENT && parent_of(name) != name) {
      create_directories(parent_of(name));
      error = ::mkdir(name.c_str(), 0777) == 0 ? 0 : errno;
    }
    if (error == 0) {
      sync_directory(parent_of(name));
      return;
    }
    struct stat status;
    if (error != EEXIST || ::stat(name.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
      throw os_error(error, "create directory", name);
    }
    const Descriptor parent = open_directory(parent_of(name));
    if (parent.get() != -1) sync(parent, parent_of(name));
  }

  void sync_directory(const std::string& path) override {
    const Descriptor fd = open_directory(path);
    if (fd.get() == -1) throw os_error(errno, "sync directory", path);
    sync(fd, path);
  }

  std::vector<std::string> list(const std::string& path) override {
    struct Close {
      void operator()(DIR* stream) const { ::closedir(stream); }
    };
    std::unique_ptr<DIR, Close> stream;
    do {
      stream.reset(::opendir(or_working_directory(path).c_str()));
    } while (!stream && errno == EINTR);
    if (!stream) throw os_error(errno, "list", path);
    std::vector<std::string> names;
    for (;;) {
      errno = 0;
      const dirent* entry = ::readdir(stream.get());
      if (entry == nullptr) break;
      const std::string_view name = entry->d_name;
      if (name != "." && name != "..") names.emplace_back(name);
    }
    if (errno != 0) throw os_error(errno, "list", path);
    std::sort(names.begin(), names.end());
    return names;
  }

  std::optional<FileStatus> status(const std::string& path) override {
    struct stat status;
    if (::lstat(or_working_directory(path).c_str(), &status) != 0) {
      if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
      throw os_error(errno, "look at", path);
    }
    if (S_ISREG(status.st_mode)) return FileStatus{FileKind::kRegular, static_cast<uint64_t>(status.st_size)};
    if (S_ISDIR(status.st_mode)) return FileStatus{FileKind::kDirectory, 0};
    if (S_ISLNK(status.st_mode)) return FileStatus{FileKind::kSymlink, 0};
    return FileStatus{};
  }

  std::unique_ptr<FileLock> try_lock(const std::string& path, std::string_view holder) override {
    Descriptor fd(resumed([&] { return ::open(path.c_str(), O_RDWR | O_CREAT | kOpenFlags, 0666); }));
    if (fd.get() == -1) throw os_error(errno, "lock", path);
    const struct stat status = status_of(fd.get(), "lock", path);
    if (!S_ISREG(status.st_mode)) {
      throw wrong_kind(ErrorCode::kAlreadyExists, "lock", path, kind_text(status.st_mode));
    }
    if (resumed([&] { return ::flock(fd.get(), LOCK_EX | LOCK_NB); }) != 0) {
      if (errno == EWOULDBLOCK) return nullptr;
      const int error = errno;
      if (error != ENOLCK && error != ENOSYS && error != ENOTSUP) throw os_error(error, "lock", path);
      throw Error(ErrorCode::kUnsupported, os_error(error, "lock", path).message(), {.file = path});
    }
    if (resumed([&] { return ::ftruncate(fd.get(), 0); }) != 0) throw os_error(errno, "lock", path);
    const ByteSpan text = as_bytes(holder);
    const TransferResult written = transfer_fully(
        std::span(&text, 1), 0,
        [&](const iovec* window, int count, off_t at) { return ::pwritev(fd.get(), window, count, at); });
    if (written.error != 0) throw os_error(written.error, "lock", path);
    return std::make_unique<LocalLock>(std::move(fd));
  }

 private:
  static Descriptor open_directory(const std::string& path) {
    return Descriptor(
        resumed([&] { return ::open(or_working_directory(path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  }
  static void sync(const Descriptor& directory, const std::string& path) {
    if (resumed([&] { return ::fsync(directory.get()); }) != 0 && errno != EINVAL && errno != ENOTSUP) {
      throw os_error(errno, "sync directory", path);
    }
  }
};

}  // namespace

FileSystem& local_file_system() {
  static auto& file_system = *new LocalFileSystem;  // never destroyed: threads may use it while the process exits
  return file_system;
}

}  // namespace reshard
