// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The one seam to the operating system's files. Whatever the library reads or writes goes through a FileSystem, so that
// a test can count, fail or record every call by forwarding to the real one.
//
// Two promises are kept apart. *Atomic*: other processes see the old state or the new one, never a mixture. *Durable*:
// what was done survives a power loss. rename() is atomic and not durable; sync() and sync_directory() make durable.
//
// Errors. Every failure of the system is an Error with the path in its context, the operation and the system's text in
// its message, and the code kNotFound (ENOENT), kAlreadyExists (EEXIST) or kIo (all others). Paths are used as they
// are; relative ones start at the working directory. Interrupted calls are resumed and never seen.
//
// Threads. A FileSystem may be used from any number of threads. The file objects say for themselves.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/core/error.h"

namespace reshard {

/// A file open for reading. Thread-safe. Closes itself.
class RandomAccessFile {
 public:
  virtual ~RandomAccessFile() = default;
  /// Bytes in the file when it was opened.
  virtual uint64_t size() const = 0;
  /// How much one call should ask for where much is wanted: more is no faster. Of a local file not more than what the
  /// core's own cache keeps, for those who look at what they have read.
  virtual uint64_t preferred_read_bytes() const { return 128 << 10; }
  /// Fills the parts, one after the other, with the bytes that begin at `offset`: one system call where the system's
  /// limits allow. A file that ends before is kCorruptData with file, offset, wanted and found; `what` names the thing
  /// that is read in that message ("header of item model.weight"). The contents of the parts are unspecified after an
  /// error.
  virtual void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const = 0;
  /// The same for one part.
  void read_exactly(uint64_t offset, MutableByteSpan out, std::string_view what) const {
    read_scatter(offset, {&out, 1}, what);
  }
};

/// A file open for writing. Writes to disjoint ranges may run at the same time; sync and close may not run beside a
/// write. A file that is destroyed without close() is closed, and an error of that is lost; where
/// files are published when they are closed, it is not published.
class WritableFile {
 public:
  virtual ~WritableFile() = default;
  /// Writes the parts, one after the other, at `offset`: all of them, or an Error after which any of these bytes may
  /// have been written. Bytes never written below the end of the file read as zero. No limit on sizes or counts.
  virtual void write_gather(uint64_t offset, std::span<const ByteSpan> parts) = 0;
  /// Waits until the system has sent what was written to these bytes to the device, so that sync() has less left to wait
  /// for. Makes nothing durable. Does nothing where the file system cannot.
  virtual void write_back(uint64_t offset, uint64_t length) = 0;
  /// Asks for the same without waiting for it, so that the device works while more is written. Does nothing where the
  /// system knows no such thing.
  virtual void start_write_back(uint64_t offset, uint64_t length) = 0;
  /// Makes contents and size durable. After an error the file must be taken as lost: a second sync() may succeed
  /// wrongly.
  virtual void sync() = 0;
  /// Closes and reports errors that the system kept until then. Only the first call acts; nothing else may follow it.
  virtual void close() = 0;
  /// write_gather of one part.
  void write(uint64_t offset, ByteSpan bytes) { write_gather(offset, {&bytes, 1}); }
};

/// Holds what try_lock() locked until it is destroyed or its process ends, however it ends.
class FileLock {
 public:
  virtual ~FileLock() = default;
  /// False once another may have taken it: only of a store without locks, where its place is taken by a lease that is
  /// renewed, and that could not be renewed in time. Thread-safe.
  virtual bool is_held() const { return true; }
};

enum class FileKind : uint8_t { kRegular, kDirectory, kSymlink, kOther };

struct FileStatus {
  FileKind kind = FileKind::kOther;
  uint64_t size = 0;  // bytes, of a regular file; 0 otherwise
  friend bool operator==(const FileStatus&, const FileStatus&) = default;
};

/// What create() does where a file of that name exists.
enum class CreateMode : uint8_t {
  kExclusive,  // fails with kAlreadyExists
  kTruncate,   // empties it first
  kExisting,   // opens it as it is, and fails with kNotFound where there is none: a file that several processes write
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;

  /// Makes a regular file and opens it. A symlink at the last component is never followed. Neither the file's contents
  /// nor its name are durable before sync() and sync_directory().
  virtual std::unique_ptr<WritableFile> create(const std::string& path, CreateMode mode) = 0;

  /// Opens an existing regular file. Anything else (symlink, directory, FIFO, device) is kCorruptData at once: a FIFO
  /// without a writer does not make the call wait.
  virtual std::unique_ptr<RandomAccessFile> open(const std::string& path) = 0;

  /// open() of a file below `directory` whose relative path comes from a source that is not trusted. No component of
  /// `relative_path` may be empty, "." or "..", or be a symlink; each is resolved inside the one before, so that it
  /// cannot leave the directory, also while others rename things in it. kCorruptData if it tries. `directory` itself is
  /// trusted and may be a symlink.
  virtual std::unique_ptr<RandomAccessFile> open_beneath(const std::string& directory,
                                                         const std::string& relative_path) = 0;

  /// The path without symlinks that leads to what `path` leads to, which must exist (kNotFound): for files that their
  /// owner keeps elsewhere, as the Hugging Face cache does.
  virtual std::string real_path(const std::string& path) = 0;

  /// Gives `from` the name `to`, replacing a file that has it. Atomic, not durable.
  virtual void rename(const std::string& from, const std::string& to) = 0;

  /// Removes a file or a symlink, not a directory. False if there was none. Not durable.
  virtual bool remove(const std::string& path) = 0;

  /// Removes an empty directory. False if there was none. Not durable.
  virtual bool remove_directory(const std::string& path) = 0;

  /// Makes the directory and the missing ones above it; no error if it exists (kAlreadyExists if that is no
  /// directory). The names of those that it made are durable when it returns, and so is that of the directory itself if
  /// it was there before: who made it may have been killed before it was durable. (A directory above that may not be
  /// opened is left alone.)
  virtual void create_directories(const std::string& path) = 0;

  /// Makes durable which names are in the directory: files made, renamed and removed before the call. Does nothing on
  /// file systems that cannot sync directories.
  virtual void sync_directory(const std::string& path) = 0;

  /// The names in a directory, sorted by bytes, without "." and "..". Names made or removed meanwhile may be among
  /// them.
  virtual std::vector<std::string> list(const std::string& path) = 0;

  /// What is at `path`, nothing if there is nothing. Does not follow a symlink at the last component.
  virtual std::optional<FileStatus> status(const std::string& path) = 0;

  /// Locks a file, made if missing, against every other process and every other FileLock, and makes it hold `holder`.
  /// Does not wait: null if another has it; the file says who. Never remove such a file. A process forked meanwhile
  /// shares the lock. It holds on one host, and between hosts where the file system's flock() does; a file system
  /// without locks is kUnsupported.
  virtual std::unique_ptr<FileLock> try_lock(const std::string& path, std::string_view holder) = 0;

  /// True of stores where rename() copies, and a file appears under its name, whole, durably and replacing what was there, when
  /// close() returns. A close() that throws kUnavailable may have done that or may yet do it; one that throws anything else
  /// never will. Other processes and crashes see nothing of a file before.
  virtual bool publishes_on_close() const { return false; }

  /// All bytes of a regular file (as open()). kCorruptData if there are more than `max_bytes`.
  Bytes read_file(const std::string& path, uint64_t max_bytes);
};

/// The operating system's files. Lives for ever.
FileSystem& local_file_system();

/// The Error for a failed system call: "cannot <operation>: No space left on device". For implementations and their
/// test doubles.
Error os_error(int error_number, std::string_view operation, const std::string& path);

/// directory + "/" + relative_path, which must stay below it (as validate_relative_path; kCorruptData). An empty
/// directory is the working directory.
std::string join_path(const std::string& directory, const std::string& relative_path);

/// Between the name and a random suffix in the names of replace_file_atomically's temporary files; only a killed
/// process leaves such a file behind.
inline constexpr std::string_view kTemporaryInfix = ".tmp-";

/// Makes `name` in `directory` hold `bytes`: writes a temporary file beside it, syncs and closes it, renames it over
/// `name`, syncs the directory; where files are published when they are closed, it writes `name` itself. At every moment, also after an error or a crash, readers find the whole old file (or
/// none, if there was none) or the whole new one. When it returns the new one is durable; `durable = false` leaves out
/// both syncs and then a power loss may cost either. Writers may run at the same time: one of them wins.
///
/// `replaced`, if given, tells how far it came, also when this throws: kNo before the rename was tried, kUnknown from
/// then on, kYes at the end; a publication that is known to have failed is kNo again. After an error the temporary file is removed if that is possible. Test points:
/// commit.before_write, commit.before_sync, commit.before_rename, commit.after_rename, commit.after_sync.
void replace_file_atomically(FileSystem& file_system, const std::string& directory, const std::string& name,
                             ByteSpan bytes, bool durable = true, Committed* replaced = nullptr);
/// The same with what `fill` writes into the temporary file, for contents that are not in memory. What it throws leaves
/// the old file as it is. It neither syncs nor closes.
void replace_file_atomically(FileSystem& file_system, const std::string& directory, const std::string& name,
                             const std::function<void(WritableFile&)>& fill, bool durable = true,
                             Committed* replaced = nullptr);

}  // namespace reshard
