// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints of tensors in Hugging Face's safetensors format: what the Hub and `transformers` have, what PyTorch's
// HuggingFaceStorageWriter writes, and nothing but tensors. docs/format.md has the bytes.
//
// Both sides fit into save() and load() like any storage. Names of nested entries are joined by dots, as everywhere.

#include <cstdint>
#include <string>

#include "reshard/io/file_system.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/storage.h"

namespace reshard {

/// The index of a checkpoint of several files.
inline constexpr const char* kSafetensorsIndexFileName = "model.safetensors.index.json";
/// Largest index that is read: 1 GiB.
inline constexpr uint64_t kMaxSafetensorsIndexBytes = uint64_t{1} << 30;

struct HuggingFaceReaderOptions {
  /// Neighbouring ranges of a file closer than this many bytes are read in one call.
  uint32_t coalesce_gap = 0;
};

/// Reads a directory of safetensors files. Which of them are the checkpoint:
///
///   1. those that `model.safetensors.index.json` names; every tensor must be where it says
///   2. without an index: `model.safetensors`
///   3. without that: every `*.safetensors`; names `model-<i>-of-<n>` must be complete
///
/// A tensor is one chunk; in files with DCP_SHARDING_INFO (PyTorch's and this library's sharded ones) several files hold
/// chunks of one tensor. Only the bytes that the plan wants are read, after the headers, which the coordinator alone
/// reads. The format has no checksums. Symlinks are followed, because the Hub's cache is made of them.
class HuggingFaceStorageReader final : public StorageReader {
 public:
  /// `file_system` is borrowed.
  explicit HuggingFaceStorageReader(std::string directory, HuggingFaceReaderOptions options = {},
                                    FileSystem& file_system = local_file_system());
  /// kNotFound without safetensors files, or with some of them missing; kCorruptData naming the file for defects of
  /// files and for files that do not fit each other.
  Metadata read_metadata() override;
  void set_up_storage_reader(const Metadata& metadata) override;
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) override;
  const ReadCounters& counters() const { return counters_; }

 private:
  std::string directory_;
  HuggingFaceReaderOptions options_;
  FileSystem& file_system_;
  const Metadata* metadata_ = nullptr;
  ReadCounters counters_;
};

}  // namespace reshard
