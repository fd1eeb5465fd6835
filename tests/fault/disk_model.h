// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Power loss from a trace: which states of the disk may be found after it, when the system had been told so much.
//
// Legal is what POSIX allows, which is more than any one file system does:
//   - what fsync() of a file has returned from is there: its bytes and its size, not its name
//   - what fsync() of a directory has returned from is there: the names made, moved and removed in it before
//   - any other change of a name is there or not, each by itself, whatever their order was; a rename is there whole or not
//   - of a file's bytes written since, each sector of 512 is there, or not (old bytes, zeros past the old end), by itself;
//     so is the new size
//   - after an fsync() that failed, what it should have made durable stays unsure for good, whatever a later one says
#include <fcntl.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fault/system_calls.h"
#include "support/memory_file_system.h"

namespace reshard {

/// One change that a system call made, or a sync.
struct DiskOp {
  enum Kind : uint8_t { kCreate, kWrite, kSyncFile, kSyncDirectory, kRename, kUnlink, kMkdir, kRmdir } kind;
  std::string path{};  // of names and directories
  std::string to{};
  size_t file = 0;  // number of the file, in order of their making
  uint64_t offset = 0;
  Bytes bytes{};
  bool failed = false;  // of a sync
};

/// Records what the library does below `root`. fsync is answered without a disk.
class DiskTrace final : public SystemCallHook {
 public:
  /// What is below `root` now is taken as durable.
  explicit DiskTrace(const std::string& root) : root_(root) {
    std::filesystem::create_directories(root);
    directories_.insert(root);
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
      if (entry.is_directory()) {
        directories_.insert(entry.path());
      } else {
        names_[entry.path()] = initial_.size();
        initial_.emplace_back(entry.path(), local_file_system().read_file(entry.path(), uint64_t{1} << 30));
      }
    }
    files_ = initial_.size();
  }

  /// The nth fsync from here on fails (0: none).
  void fail_sync(int nth) { failing_sync_ = nth; }
  /// From call number n on (from here) nothing has any effect, as for a process that was killed. 0: never.
  void die_at(int n) {
    calls_ = 0;
    dead_from_ = n;
  }
  bool died() const { return dead_from_ > 0 && calls_ >= dead_from_; }
  bool sync_failed() const { return failing_sync_ < 0; }

  SystemCallAction before(const SystemCallEvent& event) override {
    mutex_.lock();  // until after(): the order of the records is that of the effects
    ++calls_;
    if (died()) return {.error = EIO, .after_effect = event.call == SystemCall::kClose};
    if (event.call == SystemCall::kSync && failing_sync_ > 0 && --failing_sync_ == 0) {
      failing_sync_ = -1;
      return {.error = EIO};
    }
    return {.skip = event.call == SystemCall::kSync};
  }
  void after(const SystemCallEvent& event, long result, int) override {
    record(event, result);
    mutex_.unlock();
  }

  const std::vector<DiskOp>& ops() const { return ops_; }
  const std::vector<std::pair<std::string, Bytes>>& initial() const { return initial_; }
  const std::set<std::string>& initial_directories() const { return directories_; }

 private:
  void record(const SystemCallEvent& event, long result) {
    if (event.call == SystemCall::kSync) {
      const auto open = open_.find(event.fd);
      if (open == open_.end() || died()) return;
      ops_.push_back({.kind = open->second.is_directory ? DiskOp::kSyncDirectory : DiskOp::kSyncFile,
                      .path = open->second.path,
                      .file = open->second.file,
                      .failed = result != 0});
      return;
    }
    if (event.call == SystemCall::kClose) {
      open_.erase(event.fd);
      return;
    }
    if (result < 0 || died()) return;
    switch (event.call) {
      case SystemCall::kOpen: {
        Open open{.path = event.path, .is_directory = (event.flags & O_DIRECTORY) != 0, .file = 0};
        if ((event.flags & O_ACCMODE) != O_RDONLY) {
          const auto [name, is_new] = names_.try_emplace(event.path, files_);
          open.file = name->second;
          if (is_new) ops_.push_back({.kind = DiskOp::kCreate, .path = event.path, .file = files_++});
        } else if (!open.is_directory) {
          return;
        }
        open_[event.fd] = open;
        return;
      }
      case SystemCall::kWrite: {
        DiskOp op{
            .kind = DiskOp::kWrite, .file = open_.at(event.fd).file, .offset = static_cast<uint64_t>(event.offset)};
        for (int i = 0; i < event.count; ++i) {
          const auto* from = static_cast<const std::byte*>(event.parts[i].iov_base);
          op.bytes.insert(op.bytes.end(), from, from + event.parts[i].iov_len);
        }
        op.bytes.resize(static_cast<size_t>(result));
        ops_.push_back(std::move(op));
        return;
      }
      case SystemCall::kRename:
        ops_.push_back({.kind = DiskOp::kRename, .path = event.path, .to = event.to, .file = names_.at(event.path)});
        names_[event.to] = names_.at(event.path);
        names_.erase(event.path);
        return;
      case SystemCall::kUnlink:
        ops_.push_back({.kind = DiskOp::kUnlink, .path = event.path});
        names_.erase(event.path);
        return;
      case SystemCall::kMkdir:
        ops_.push_back({.kind = DiskOp::kMkdir, .path = event.path});
        return;
      case SystemCall::kRmdir:
        ops_.push_back({.kind = DiskOp::kRmdir, .path = event.path});
        return;
      default:
        return;
    }
  }

  struct Open {
    std::string path;
    bool is_directory;
    size_t file;
  };
  const std::string root_;
  std::vector<std::pair<std::string, Bytes>> initial_;
  std::set<std::string> directories_;
  std::map<std::string, size_t> names_;
  size_t files_ = 0;
  std::map<int, Open> open_;
  std::vector<DiskOp> ops_;
  std::mutex mutex_;
  int calls_ = 0;
  int dead_from_ = 0;
  int failing_sync_ = 0;
};

/// The disk after the first ops of a trace. Goes forward only.
class DiskModel {
 public:
  explicit DiskModel(const DiskTrace& trace) : directories_(trace.initial_directories()) {
    for (const auto& [path, bytes] : trace.initial()) {
      first_names_[path] = files_.size();
      files_.push_back({bytes, bytes, {}});
    }
  }

  void apply(const DiskOp& op) {
    const auto change_name = [&] { changes_.push_back({op, parent_of(op.path), false, false}); };
    switch (op.kind) {
      case DiskOp::kCreate:
        files_.resize(std::max(files_.size(), op.file + 1));
        change_name();
        break;
      case DiskOp::kWrite: {
        File& file = files_.at(op.file);
        put(file.current, op);
        file.pending.push_back({op, false});
        break;
      }
      case DiskOp::kSyncFile: {
        File& file = files_.at(op.file);
        std::vector<Write> lost;
        for (Write& write : file.pending) {
          write.lost = write.lost || op.failed;
          if (write.lost) {
            lost.push_back(write);
          } else {
            put(file.durable, write.op);
          }
        }
        file.pending = std::move(lost);
        break;
      }
      case DiskOp::kSyncDirectory:
        for (Change& change : changes_) {
          if (change.directory != op.path || change.durable) continue;
          change.lost = change.lost || op.failed;
          change.durable = !change.lost;
        }
        break;
      case DiskOp::kRename:
      case DiskOp::kUnlink:
      case DiskOp::kMkdir:
      case DiskOp::kRmdir:
        change_name();
        break;
    }
  }

  /// Calls fn(files, directories) for every state of the disk after a power loss now; returns their number. All choices
  /// of the unsure names up to kAllNames of them; beyond, those that differ from none and from all by at most two, and
  /// all runs from the first or to the last. All files of unsure bytes at once lack them, have them all, or one of them
  /// is torn: only its size, all but one sector, all up to a sector (each sector, up to kSectors).
  template <class Fn>
  uint64_t each_state(const Fn& fn) const {
    std::vector<size_t> unsure;
    for (size_t i = 0; i < changes_.size(); ++i) {
      if (!changes_[i].durable) unsure.push_back(i);
    }
    uint64_t states = 0;
    each_choice(unsure, [&](const std::vector<bool>& chosen) { states += each_content(chosen, fn); });
    return states;
  }

 private:
  static constexpr size_t kAllNames = 10;
  static constexpr size_t kSectors = 8;
  static constexpr uint64_t kSectorBytes = 512;

  struct Write {
    DiskOp op;
    bool lost;
  };
  struct File {
    Bytes durable;
    Bytes current;
    std::vector<Write> pending;
  };
  struct Change {
    DiskOp op;
    std::string directory;
    bool durable;
    bool lost;
  };

  static std::string parent_of(const std::string& path) { return path.substr(0, path.rfind('/')); }
  static void put(Bytes& bytes, const DiskOp& write) {
    if (bytes.size() < write.offset + write.bytes.size()) bytes.resize(write.offset + write.bytes.size());
    std::copy(write.bytes.begin(), write.bytes.end(), bytes.begin() + static_cast<ptrdiff_t>(write.offset));
  }

  template <class Fn>
  void each_choice(const std::vector<size_t>& unsure, const Fn& fn) const {
    const size_t n = unsure.size();
    std::vector<bool> chosen(changes_.size());
    for (size_t i = 0; i < changes_.size(); ++i) chosen[i] = changes_[i].durable;
    const auto with = [&](const auto& is_chosen) {
      for (size_t i = 0; i < n; ++i) chosen[unsure[i]] = is_chosen(i);
      fn(chosen);
    };
    if (n <= kAllNames) {
      for (uint64_t mask = 0; mask < (uint64_t{1} << n); ++mask) with([&](size_t i) { return (mask >> i & 1) != 0; });
      return;
    }
    for (const bool all : {false, true}) {
      with([&](size_t) { return all; });
      for (size_t a = 0; a < n; ++a) {
        for (size_t b = a; b < n; ++b) with([&](size_t i) { return (i == a || i == b) != all; });
        with([&](size_t i) { return (i <= a) != all; });
      }
    }
  }

  /// The contents that an unsure file may have.
  static std::vector<MemoryFileSystem::File> contents_of(const File& file) {
    std::vector<MemoryFileSystem::File> contents;
    const auto add = [&](Bytes bytes) { contents.push_back(std::make_shared<Bytes>(std::move(bytes))); };
    add(file.durable);
    add(file.current);
    Bytes grown = file.durable;
    grown.resize(std::max(file.durable.size(), file.current.size()));
    add(grown);
    const size_t sectors = (file.current.size() + kSectorBytes - 1) / kSectorBytes;
    for (size_t s = 0; s < std::min(sectors, kSectors); ++s) {
      const auto begin = static_cast<ptrdiff_t>(s * kSectorBytes);
      const auto end = static_cast<ptrdiff_t>(std::min((s + 1) * kSectorBytes, file.current.size()));
      Bytes torn = file.current;
      std::copy(grown.begin() + begin, grown.begin() + end, torn.begin() + begin);
      add(std::move(torn));
      Bytes prefix = grown;
      std::copy(file.current.begin(), file.current.begin() + end, prefix.begin());
      add(prefix);
      prefix.resize(static_cast<size_t>(end));
      add(std::move(prefix));
    }
    return contents;
  }

  template <class Fn>
  uint64_t each_content(const std::vector<bool>& chosen, const Fn& fn) const {
    std::map<std::string, size_t> names = first_names_;
    std::set<std::string> directories = directories_;
    for (size_t i = 0; i < changes_.size(); ++i) {
      if (!chosen[i]) continue;
      const DiskOp& op = changes_[i].op;
      switch (op.kind) {
        case DiskOp::kCreate:
          names[op.path] = op.file;
          break;
        case DiskOp::kRename:
          names.erase(op.path);
          names[op.to] = op.file;
          break;
        case DiskOp::kUnlink:
          names.erase(op.path);
          break;
        case DiskOp::kMkdir:
          directories.insert(op.path);
          break;
        case DiskOp::kRmdir:
          directories.erase(op.path);
          break;
        default:
          break;
      }
    }
    std::erase_if(names, [&](const auto& name) { return !directories.contains(parent_of(name.first)); });

    std::map<std::string, MemoryFileSystem::File> files;
    std::vector<std::pair<std::string, std::vector<MemoryFileSystem::File>>> unsure;
    for (const auto& [path, number] : names) {
      const File& file = files_.at(number);
      if (file.pending.empty()) {
        files[path] = std::make_shared<Bytes>(file.current);
      } else {
        unsure.emplace_back(path, contents_of(file));
      }
    }
    uint64_t states = 0;
    const auto report = [&] {
      ++states;
      fn(files, directories);
    };
    for (const size_t base : {0, 1}) {
      for (const auto& [path, contents] : unsure) files[path] = contents[base];
      report();
      if (unsure.empty()) break;
      for (const auto& [path, contents] : unsure) {
        for (size_t c = 0; c < contents.size(); ++c) {
          if (c == base) continue;
          files[path] = contents[c];
          report();
        }
        files[path] = contents[base];
      }
    }
    return states;
  }

  std::map<std::string, size_t> first_names_;
  std::set<std::string> directories_;
  std::vector<File> files_;
  std::vector<Change> changes_;
};

}  // namespace reshard
