// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Reading with sidecars: which one speaks of a file, and reads that check the blocks they touch.

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>

#include "reshard/format/sidecar.h"
#include "reshard/io/file_system.h"

namespace reshard {

/// A data file whose reads are checked against the sums of its sidecar, if it has one. Thread-safe.
class CheckedFile {
 public:
  /// Borrows both; `sums` may be null. Throws kCorruptData if the file has another size than its sums speak of.
  CheckedFile(const RandomAccessFile& file, const SidecarFile* sums);
  uint64_t size() const { return file_.size(); }
  uint64_t preferred_read_bytes() const { return file_.preferred_read_bytes(); }
  bool is_checked() const { return blocks_.has_value(); }
  struct Read {
    uint64_t bytes = 0;
    uint64_t calls = 0;
  };
  /// RandomAccessFile::read_scatter, of whole blocks; returns what was read. Throws kCorruptData with the offset of the
  /// first block that does not match.
  Read read(uint64_t offset, std::span<const MutableByteSpan> parts, std::string_view what) const;
  /// Up to where a read that ends at `offset` reaches in truth.
  uint64_t block_end(uint64_t offset) const;

 private:
  class RunningSum;
  [[noreturn]] void name_changed_block(uint64_t begin, uint64_t end, std::string_view what) const;

  const RandomAccessFile& file_;
  std::optional<BlockMap> blocks_;
};

/// The sidecars of one checkpoint, each read when first asked for. Thread-safe.
class Sidecars {
 public:
  /// All are borrowed.
  Sidecars(const std::string& directory, FileSystem& file_system, const Metadata& metadata)
      : directory_(directory), file_system_(file_system), metadata_(metadata) {}

  using Files = std::unordered_map<std::string, SidecarFile>;
  /// The data files of a rank. Throws kNotFound for a missing sidecar, kCorruptData for one that is not the one of the
  /// catalogue.
  std::shared_ptr<const Files> of_rank(int64_t rank);
  /// The sums of a data file; null if the checkpoint has no sidecars. Throws as of_rank(), and kCorruptData if no
  /// sidecar speaks of the file.
  std::shared_ptr<const SidecarFile> of_file(const std::string& relative_path);
  uint64_t bytes_read() const { return bytes_read_; }

 private:
  const std::string& directory_;
  FileSystem& file_system_;
  const Metadata& metadata_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Files>> read_;
  uint64_t kept_bytes_ = 0;
  std::atomic<uint64_t> bytes_read_ = 0;
};

/// The rank whose sidecar speaks of a data file, if the checkpoint has one for it.
std::optional<int64_t> sidecar_rank(const Metadata& metadata, std::string_view relative_path);

}  // namespace reshard
