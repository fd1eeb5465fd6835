// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints in a directory, in PyTorch's DCP layout: data files `__<rank>_<n>.distcp`, one torch.save archive an
// item, and `.metadata`, which exists once the checkpoint is committed. docs/format.md has the bytes,
// docs/durability.md the promise.

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "reshard/format/extension.h"
#include "reshard/io/file_system.h"
#include "reshard/storage/storage.h"

namespace reshard {

struct FileSystemWriterOptions {
  /// One file a rank and thread (PyTorch's default), or one file an item.
  bool single_file_per_rank = true;
  /// Threads, and files, a rank writes with.
  int thread_count = 1;
  /// fsync data, catalogue and directory. Without it a save is atomic but survives no power loss.
  bool sync_files = true;
  /// Allow a directory that holds a checkpoint; it stays whole until the new one commits. False: kAlreadyExists.
  bool overwrite = true;
  /// Payloads start at multiples of this many bytes in the item; items start at multiples of it in the file. 64 or
  /// 4096.
  uint32_t storage_alignment = 64;
  /// Stream transforms of every item, {std::make_shared<ZStandard>()} for compression. Where items lie is known only
  /// once they are written then, so votes carry the places. Equal on all ranks. PyTorch 2.4 and later read one; with more
  /// than one, PyTorch up to 2.14.1 cannot read back what it writes either.
  StreamTransformExtensions extensions{};
};

/// The catalogue's name in the directory.
inline constexpr const char* kMetadataFileName = ".metadata";
/// Largest catalogue that is read: 4 GiB.
inline constexpr uint64_t kMaxMetadataBytes = uint64_t{4} << 30;

class FileSystemWriter final : public StorageWriter {
 public:
  /// `file_system` is borrowed; the directory is made if missing.
  explicit FileSystemWriter(std::string directory, FileSystemWriterOptions options = {},
                            FileSystem& file_system = local_file_system());
  ~FileSystemWriter() override;
  std::string checkpoint_id() const override { return directory_; }
  const FileSystemWriterOptions& options() const { return options_; }
  FileSystem& file_system() const { return file_system_; }
  void begin_save(const std::string& save_id) override;
  bool places_are_final() const override { return options_.extensions.empty(); }
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override;
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override;
  std::optional<SidecarDigest> sidecar_digest() const override { return sidecar_digest_; }
  void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override;
  void abandon() noexcept override;

 private:
  bool holds_metadata(ByteSpan bytes) const noexcept;
  void remove_replaced(const Metadata& metadata, const std::string& save_id) noexcept;
  void remove_quietly(const std::string& name) noexcept;

  std::string directory_;
  FileSystemWriterOptions options_;
  FileSystem& file_system_;
  std::set<std::string> replaced_;    // files of the committed checkpoint, known to the coordinator
  std::vector<std::string> written_;  // files this rank made in this save
  std::optional<SidecarDigest> sidecar_digest_;
  int64_t first_file_number_ = 0;  // n of the first `__<rank>_<n>.distcp` of this save
};

struct FileSystemReaderOptions {
  /// Check all that is read. In a checkpoint of this library these are the blocks of 4 KiB that the wanted bytes lie in,
  /// which are read whole, by the sums of the sidecars; a missing or wrong sidecar is an error. In one of PyTorch's,
  /// every record that is read whole, by its zip CRC-32.
  bool verify_checksums = true;
  /// Threads that a rank reads with, each other items: worth it where a rank has more than one core to itself, and with
  /// object stores. The planner is called by all of them then; one large tensor is read by one.
  int thread_count = 1;
  /// Neighbouring ranges of a file closer than this many bytes are read in one call.
  uint32_t coalesce_gap = 0;
  /// What undoes the stream transforms that the catalogue names.
  ExtensionRegistry extension_registry{};
  /// Largest value, in bytes, that is read from an item with a stream transform: the catalogue says the size of tensors
  /// alone. A longer one is kCorruptData.
  uint64_t max_transformed_value_bytes = 256 << 20;
};

/// What a load moved. Exact, so that tests can gate on it.
struct ReadCounters {
  uint64_t bytes_needed = 0;    // elements wanted by the plan, in bytes
  uint64_t bytes_payload = 0;   // bytes of tensor payload read for them; of transformed items, as decoded
  uint64_t bytes_verify = 0;    // read only because they are in one block with wanted ones
  uint64_t bytes_read = 0;      // all bytes read from data files, headers and bytes_verify included
  uint64_t reads = 0;           // read calls
  uint64_t bytes_staged = 0;    // payload bytes copied to their destination from a buffer of more than 128 KiB
  uint64_t bytes_sidecars = 0;  // of sidecars
};

class PartlyRead;
class Sidecars;

/// An item without stream transforms costs the bytes that are wanted of it. One with transforms is decoded from its front
/// to the last wanted element, with memory that does not grow with it; loads by one reader go on where the last one ended.
/// (Layouts other than those of this library and of PyTorch 2.7 and later are decoded whole, into memory.)
class FileSystemReader final : public StorageReader {
 public:
  explicit FileSystemReader(std::string directory, FileSystemReaderOptions options = {},
                            FileSystem& file_system = local_file_system());
  ~FileSystemReader() override;
  Metadata read_metadata() override;
  void set_up_storage_reader(const Metadata& metadata) override;
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) override;
  const ReadCounters& counters() const { return counters_; }

 private:
  std::string directory_;
  FileSystemReaderOptions options_;
  FileSystem& file_system_;
  const Metadata* metadata_ = nullptr;
  std::unique_ptr<Sidecars> sidecars_;  // those read so far
  ReadCounters counters_;
  std::unique_ptr<PartlyRead> partly_read_;
};

}  // namespace reshard
