// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// FaultFileSystem: forwards to another FileSystem and, on the way, records every call, counts calls and bytes by kind,
// and fails the calls that a test has chosen. A sweep over "the Nth call fails" for every N is the usual use:
//
//   FaultFileSystem clean;                       // once without faults, to learn how many calls there are
//   body(clean);
//   for (uint64_t n = 1; n <= clean.calls(); ++n) {
//     FaultFileSystem faulty;
//     faulty.inject({.nth = n, .error = ENOSPC});
//     ... body(faulty) throws; check what is left ...
//   }

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "reshard/io/file_system.h"

namespace reshard {

enum class FileCall : uint8_t {
  kCreate,
  kOpen,  // open and open_beneath
  kRead,
  kWrite,
  kWriteBack,
  kStartWriteBack,
  kSync,
  kClose,
  kRename,
  kRemove,
  kCreateDirectories,
  kSyncDirectory,
  kList,
  kStatus,
  kRemoveDirectory,
  kLock,
  kRealPath,
};
inline constexpr size_t kFileCallKinds = 17;

inline std::string_view to_string(FileCall call) {
  constexpr std::array<std::string_view, kFileCallKinds> kNames = {
      "create", "open",   "read",   "write",  "write_back", "start_write_back",
      "sync",   "close",  "rename", "remove", "mkdirs",     "sync_directory",
      "list",   "status", "rmdir",  "lock",   "real_path"};
  return kNames.at(static_cast<size_t>(call));
}

/// One call, recorded before it is made or failed.
struct FileCallRecord {
  FileCall call = FileCall::kOpen;
  std::string path{};   // of the file or directory; for a rename the old name
  std::string to{};     // the new name of a rename
  uint64_t offset = 0;  // of reads, writes and writes back
  uint64_t bytes = 0;   // of the same
};

/// "write a/b [0, 12)".
inline std::string to_string(const FileCallRecord& record) {
  std::string text = std::string(to_string(record.call)) + " " + record.path;
  if (!record.to.empty()) text += " -> " + record.to;
  if (record.call == FileCall::kRead || record.call == FileCall::kWrite || record.call == FileCall::kWriteBack ||
      record.call == FileCall::kStartWriteBack) {
    text += " [" + std::to_string(record.offset) + ", " + std::to_string(record.offset + record.bytes) + ")";
  }
  return text;
}

/// A call that shall fail.
struct FileFault {
  /// Only calls of this kind are counted; unset: every call.
  std::optional<FileCall> call{};
  /// The first that fails, counted from 1 since inject().
  uint64_t nth = 1;
  /// errno of the failure.
  int error = EIO;
  /// It throws std::bad_alloc instead.
  bool out_of_memory = false;
  /// All later calls of the kind fail, too, as on a full or dead disk.
  bool forever = false;
  /// The call does its work and is reported as failed, as when a server's answer is lost.
  bool after_effect = false;
  /// A failing write stores this many of its bytes first.
  uint64_t torn_bytes = 0;
};

/// Thread-safe. Files may outlive it.
class FaultFileSystem final : public FileSystem {
 public:
  explicit FaultFileSystem(FileSystem& real = local_file_system()) : real_(real) {}

  /// Adds a fault; several may wait at the same time.
  void inject(const FileFault& fault) { state_->inject(fault); }

  /// Calls made so far, failed ones included: all, or those of one kind.
  uint64_t calls() const { return trace().size(); }
  uint64_t calls(FileCall call) const {
    return sum(call, [](const FileCallRecord&) { return uint64_t{1}; });
  }
  /// Bytes asked for by the reads or writes so far.
  uint64_t bytes(FileCall call) const {
    return sum(call, [](const FileCallRecord& record) { return record.bytes; });
  }
  /// Every call so far, in order.
  std::vector<FileCallRecord> trace() const { return state_->trace(); }

  std::unique_ptr<WritableFile> create(const std::string& path, CreateMode mode) override {
    return state_->run({.call = FileCall::kCreate, .path = path}, [&]() -> std::unique_ptr<WritableFile> {
      return std::make_unique<Writer>(state_, real_.create(path, mode), path);
    });
  }
  std::unique_ptr<RandomAccessFile> open(const std::string& path) override {
    return state_->run({.call = FileCall::kOpen, .path = path}, [&]() -> std::unique_ptr<RandomAccessFile> {
      return std::make_unique<Reader>(state_, real_.open(path), path);
    });
  }
  std::unique_ptr<RandomAccessFile> open_beneath(const std::string& directory,
                                                 const std::string& relative_path) override {
    const std::string path = directory + "/" + relative_path;
    return state_->run({.call = FileCall::kOpen, .path = path}, [&]() -> std::unique_ptr<RandomAccessFile> {
      return std::make_unique<Reader>(state_, real_.open_beneath(directory, relative_path), path);
    });
  }
  std::string real_path(const std::string& path) override {
    return state_->run({.call = FileCall::kRealPath, .path = path}, [&] { return real_.real_path(path); });
  }
  void rename(const std::string& from, const std::string& to) override {
    state_->run({.call = FileCall::kRename, .path = from, .to = to}, [&] { real_.rename(from, to); });
  }
  bool remove(const std::string& path) override {
    return state_->run({.call = FileCall::kRemove, .path = path}, [&] { return real_.remove(path); });
  }
  void create_directories(const std::string& path) override {
    state_->run({.call = FileCall::kCreateDirectories, .path = path}, [&] { real_.create_directories(path); });
  }
  void sync_directory(const std::string& path) override {
    state_->run({.call = FileCall::kSyncDirectory, .path = path}, [&] { real_.sync_directory(path); });
  }
  std::vector<std::string> list(const std::string& path) override {
    return state_->run({.call = FileCall::kList, .path = path}, [&] { return real_.list(path); });
  }
  std::optional<FileStatus> status(const std::string& path) override {
    return state_->run({.call = FileCall::kStatus, .path = path}, [&] { return real_.status(path); });
  }
  bool remove_directory(const std::string& path) override {
    return state_->run({.call = FileCall::kRemoveDirectory, .path = path},
                       [&] { return real_.remove_directory(path); });
  }
  std::unique_ptr<FileLock> try_lock(const std::string& path, std::string_view holder) override {
    return state_->run({.call = FileCall::kLock, .path = path}, [&] { return real_.try_lock(path, holder); });
  }
  bool publishes_on_close() const override { return real_.publishes_on_close(); }

 private:
  class State {
   public:
    void inject(const FileFault& fault) {
      const std::lock_guard lock(mutex_);
      faults_.push_back(fault);
    }
    std::vector<FileCallRecord> trace() const {
      const std::lock_guard lock(mutex_);
      return trace_;
    }
    /// Records the call; the fault that it shall suffer, if any.
    std::optional<FileFault> enter(const FileCallRecord& record) {
      const std::lock_guard lock(mutex_);
      trace_.push_back(record);
      std::optional<FileFault> hit;
      for (FileFault& fault : faults_) {
        if (fault.nth == 0 || (fault.call && *fault.call != record.call)) continue;  // nth 0: spent
        if (fault.nth > 1) {
          --fault.nth;
          continue;
        }
        if (!hit) hit = fault;
        if (!fault.forever) fault.nth = 0;
      }
      return hit;
    }
    template <class Work>
    std::invoke_result_t<Work&> run(const FileCallRecord& record, Work&& work) {
      const auto fault = enter(record);
      if (!fault) return work();
      // A close that fails closes all the same.
      if (fault->after_effect || record.call == FileCall::kClose) static_cast<void>(work());
      fail(*fault, record);
    }
    [[noreturn]] static void fail(const FileFault& fault, const FileCallRecord& record) {
      if (fault.out_of_memory) throw std::bad_alloc();
      throw os_error(fault.error, std::string(to_string(record.call)) + " (injected)", record.path);
    }

   private:
    mutable std::mutex mutex_;
    std::vector<FileFault> faults_;
    std::vector<FileCallRecord> trace_;
  };

  class Reader final : public RandomAccessFile {
   public:
    Reader(std::shared_ptr<State> state, std::unique_ptr<RandomAccessFile> real, std::string path)
        : state_(std::move(state)), real_(std::move(real)), path_(std::move(path)) {}
    uint64_t size() const override { return real_->size(); }
    void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const override {
      FileCallRecord record{.call = FileCall::kRead, .path = path_, .offset = offset};
      for (const MutableByteSpan part : parts) record.bytes += part.size();
      state_->run(record, [&] { real_->read_scatter(offset, parts, what); });
    }

   private:
    std::shared_ptr<State> state_;
    std::unique_ptr<RandomAccessFile> real_;
    std::string path_;
  };

  class Writer final : public WritableFile {
   public:
    Writer(std::shared_ptr<State> state, std::unique_ptr<WritableFile> real, std::string path)
        : state_(std::move(state)), real_(std::move(real)), path_(std::move(path)) {}
    void write_gather(uint64_t offset, std::span<const ByteSpan> parts) override {
      FileCallRecord record{.call = FileCall::kWrite, .path = path_, .offset = offset};
      for (const ByteSpan part : parts) record.bytes += part.size();
      const auto fault = state_->enter(record);
      if (!fault) return real_->write_gather(offset, parts);
      uint64_t left = fault->after_effect ? record.bytes : fault->torn_bytes;
      for (const ByteSpan part : parts) {
        const size_t n = static_cast<size_t>(std::min<uint64_t>(left, part.size()));
        if (n != 0) real_->write(offset, part.first(n));
        offset += n;
        left -= n;
      }
      State::fail(*fault, record);
    }
    void write_back(uint64_t offset, uint64_t length) override {
      state_->run({.call = FileCall::kWriteBack, .path = path_, .offset = offset, .bytes = length},
                  [&] { real_->write_back(offset, length); });
    }
    void start_write_back(uint64_t offset, uint64_t length) override {
      state_->run({.call = FileCall::kStartWriteBack, .path = path_, .offset = offset, .bytes = length},
                  [&] { real_->start_write_back(offset, length); });
    }
    void sync() override {
      state_->run({.call = FileCall::kSync, .path = path_}, [&] { real_->sync(); });
    }
    void close() override {
      state_->run({.call = FileCall::kClose, .path = path_}, [&] { real_->close(); });
    }

   private:
    std::shared_ptr<State> state_;
    std::unique_ptr<WritableFile> real_;
    std::string path_;
  };

  template <class Measure>
  uint64_t sum(FileCall call, Measure measure) const {
    uint64_t total = 0;
    for (const FileCallRecord& record : trace()) {
      if (record.call == call) total += measure(record);
    }
    return total;
  }

  FileSystem& real_;
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace reshard
