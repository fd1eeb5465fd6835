// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A FileSystem in memory, made of a given state of a disk. For one thread at a time.

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "reshard/io/file_system.h"

namespace reshard {

class MemoryFileSystem final : public FileSystem {
 public:
  using File = std::shared_ptr<Bytes>;

  /// Paths as they will be asked for. Files are not copied until they are written to, which nothing does but a create.
  MemoryFileSystem(std::map<std::string, File> files, std::set<std::string> directories)
      : files_(std::move(files)), directories_(std::move(directories)) {}

  std::unique_ptr<WritableFile> create(const std::string& path, CreateMode mode) override {
    if (!directories_.contains(parent_of(path))) throw os_error(ENOENT, "create", path);
    if (mode == CreateMode::kExclusive && files_.contains(path)) throw os_error(EEXIST, "create", path);
    if (mode == CreateMode::kExisting) {
      const auto found = files_.find(path);
      if (found == files_.end()) throw os_error(ENOENT, "open for writing", path);
      return std::make_unique<Writer>(found->second);
    }
    return std::make_unique<Writer>(files_[path] = std::make_shared<Bytes>());
  }
  std::unique_ptr<RandomAccessFile> open(const std::string& path) override {
    const auto found = files_.find(path);
    if (found == files_.end()) throw os_error(ENOENT, "open", path);
    return std::make_unique<Reader>(found->second, path);
  }
  std::unique_ptr<RandomAccessFile> open_beneath(const std::string& directory,
                                                 const std::string& relative_path) override {
    return open(join_path(directory, relative_path));
  }
  std::string real_path(const std::string& path) override { return path; }
  void rename(const std::string& from, const std::string& to) override {
    const auto found = files_.find(from);
    if (found == files_.end()) throw os_error(ENOENT, "rename", from);
    const File file = found->second;
    files_.erase(found);
    files_[to] = file;
  }
  bool remove(const std::string& path) override { return files_.erase(path) > 0; }
  bool remove_directory(const std::string& path) override {
    if (!list(path).empty()) throw os_error(ENOTEMPTY, "remove directory", path);
    return directories_.erase(path) > 0;
  }
  void create_directories(const std::string& path) override {
    for (std::string name = path; name.size() > 1 && directories_.insert(name).second;) name = parent_of(name);
  }
  void sync_directory(const std::string&) override {}
  std::vector<std::string> list(const std::string& path) override {
    if (!directories_.contains(path)) throw os_error(ENOENT, "list", path);
    std::set<std::string> names;
    const auto add = [&](const std::string& entry) {
      if (parent_of(entry) == path) names.insert(entry.substr(path.size() + 1));
    };
    for (const auto& [name, file] : files_) add(name);
    for (const std::string& name : directories_) add(name);
    return {names.begin(), names.end()};
  }
  std::optional<FileStatus> status(const std::string& path) override {
    if (directories_.contains(path)) return FileStatus{FileKind::kDirectory, 0};
    const auto found = files_.find(path);
    if (found == files_.end()) return std::nullopt;
    return FileStatus{FileKind::kRegular, found->second->size()};
  }
  std::unique_ptr<FileLock> try_lock(const std::string& path, std::string_view holder) override {
    if (!locks_.insert(path).second) return nullptr;
    create(path, CreateMode::kTruncate)->write(0, as_bytes(holder));
    return std::make_unique<Lock>(locks_, path);
  }

 private:
  class Lock final : public FileLock {
   public:
    Lock(std::set<std::string>& locks, std::string path) : locks_(locks), path_(std::move(path)) {}
    ~Lock() override { locks_.erase(path_); }

   private:
    std::set<std::string>& locks_;
    const std::string path_;
  };

  static std::string parent_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

  class Reader final : public RandomAccessFile {
   public:
    Reader(File file, std::string path) : file_(std::move(file)), path_(std::move(path)) {}
    uint64_t size() const override { return file_->size(); }
    void read_scatter(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const override {
      for (const MutableByteSpan part : parts) {
        if (offset > file_->size() || part.size() > file_->size() - offset) {
          throw Error(ErrorCode::kCorruptData, std::string(what) + ": the file ends too early", {.file = path_});
        }
        std::copy_n(file_->begin() + static_cast<ptrdiff_t>(offset), part.size(), part.begin());
        offset += part.size();
      }
    }

   private:
    File file_;
    std::string path_;
  };
  class Writer final : public WritableFile {
   public:
    explicit Writer(File file) : file_(std::move(file)) {}
    void write_gather(uint64_t offset, std::span<const ByteSpan> parts) override {
      for (const ByteSpan part : parts) {
        if (file_->size() < offset + part.size()) file_->resize(offset + part.size());
        std::copy(part.begin(), part.end(), file_->begin() + static_cast<ptrdiff_t>(offset));
        offset += part.size();
      }
    }
    void write_back(uint64_t, uint64_t) override {}
    void start_write_back(uint64_t, uint64_t) override {}
    void sync() override {}
    void close() override {}

   private:
    File file_;
  };

  std::map<std::string, File> files_;
  std::set<std::string> directories_;
  std::set<std::string> locks_;
};

}  // namespace reshard
