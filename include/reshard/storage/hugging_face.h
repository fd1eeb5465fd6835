// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checkpoints of tensors in Hugging Face's safetensors format: what the Hub and `transformers` have, what PyTorch's
// HuggingFaceStorageWriter writes, and nothing but tensors. docs/format.md has the bytes.
//
// Both sides fit into save() and load() like any storage. Names of nested entries are joined by dots, as everywhere.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "reshard/core/dtype.h"
#include "reshard/io/file_system.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/storage.h"

namespace reshard {

/// The index of a checkpoint of several files.
inline constexpr const char* kSafetensorsIndexFileName = "model.safetensors.index.json";
/// This library's list of the files of a sharded save; PyTorch ignores it.
inline constexpr const char* kSafetensorsShardsFileName = "model.safetensors.shards.json";
/// Largest of both that is read: 1 GiB.
inline constexpr uint64_t kMaxSafetensorsIndexBytes = uint64_t{1} << 30;

/// Tensor -> number of the file that it goes into, from 1 to N.
using FqnToIndexMapping = std::map<std::string, int64_t>;

struct HuggingFaceWriterOptions {
  /// True: whole tensors in `model-<i>-of-<n>.safetensors` with an index, which every program that knows the format
  /// reads. All ranks write into the same files at once, each its parts, so that there is no second pass; the file
  /// system must be one that all ranks share and that keeps what different hosts write to different bytes of a file (in
  /// an object store: one rank, or kUnsupported).
  /// False: files of its own for each rank, with DCP_SHARDING_INFO, as PyTorch's HuggingFaceStorageWriter writes with
  /// save_distributed, and a list of them.
  bool consolidate = true;
  /// Empty: all tensors go into file 1. Otherwise every tensor needs a number; n is the largest one.
  FqnToIndexMapping fqn_to_index_mapping{};
  /// fsync data, index and directory. Without it a save is atomic but survives no power loss.
  bool sync_files = true;
};

/// Writes one checkpoint into a directory without safetensors files (kAlreadyExists: files of two checkpoints in one
/// directory cannot be told apart). Values that are no tensors are kInvalidArgument, dtypes that the format lacks
/// kUnsupported, each naming the key. Tied tensors are written under each of their names.
///
/// Consolidated files are, byte for byte, those that `safetensors.torch.save_file` writes of the same tensors, whatever
/// the number of ranks. Files have temporary names until all ranks are done. A consolidated save is committed by the
/// rename of its index, a sharded one by that of the last of its files, whose list is there before. What a crash before
/// leaves is not read for want of files.
class HuggingFaceStorageWriter final : public StorageWriter {
 public:
  /// `file_system` is borrowed; the directory is made if missing.
  explicit HuggingFaceStorageWriter(std::string directory, HuggingFaceWriterOptions options = {},
                                    FileSystem& file_system = local_file_system());
  ~HuggingFaceStorageWriter() override;
  std::string checkpoint_id() const override { return directory_; }
  void begin_save(const std::string& save_id) override;
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override;
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override;
  void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override;
  void abandon() noexcept override;

 private:
  struct Layout;

  std::string directory_;
  HuggingFaceWriterOptions options_;
  FileSystem& file_system_;
  std::string save_id_;
  std::unique_ptr<Layout> layout_;  // of a consolidated save, on the coordinator
  std::vector<std::string> made_;   // names of this save that abandon() has to remove
};

/// Writes all tensors of a checkpoint, whatever its storage, into a directory as a consolidated save of them does. One
/// process; memory does not grow with the tensors. Errors as for HuggingFaceStorageWriter, and what the reader throws;
/// nothing is left then.
void export_safetensors(StorageReader& reader, const std::string& output_directory,
                        const FqnToIndexMapping& fqn_to_index_mapping = {},
                        FileSystem& file_system = local_file_system(), const ProgressFn& progress = {});

/// The same for a directory of sharded safetensors files, this library's or PyTorch's.
void consolidate_safetensors_files(const std::string& input_directory, const std::string& output_directory,
                                   const FqnToIndexMapping& fqn_to_index_mapping = {},
                                   FileSystem& file_system = local_file_system());

struct HuggingFaceReaderOptions {
  /// Threads that a rank reads, and dequantizes, with, each other tensors.
  int thread_count = 1;
  /// Neighbouring ranges of a file closer than this many bytes are read in one call.
  uint32_t coalesce_gap = 0;
};

/// Reads a directory of safetensors files. Which of them are the checkpoint:
///
///   1. those that `model.safetensors.index.json` names; every tensor must be where it says
///   2. those that `model.safetensors.shards.json` names, all of which must be there
///   3. without these: `model.safetensors`
///   4. without that: every `*.safetensors`; names `model-<i>-of-<n>` must be complete
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

struct QuantizedHuggingFaceReaderOptions {
  /// Of what is loaded: float32, bfloat16 or float16 (else kInvalidArgument).
  DType target_dtype = DType::kFloat32;
  /// Rows and columns that share a scale in `_scale_inv`.
  int64_t block_size = 128;
  HuggingFaceReaderOptions files = {};
};

/// Loads quantized weights as what they stand for; in a directory as for HuggingFaceStorageReader, each quantized tensor
/// and its scales whole in a file (not the same one). Tensors without scales load as they are, the scales, too.
///
///   <name>, <name>_scale_inv             blocks of the last two dimensions (DeepSeek): eight-bit floats, or any float,
///                                        times the scale of their block; blocks at the edges may be cut
///   <name>_blocks, <name>_scales         MXFP4 (gpt-oss): uint8 [..., G, B] of two four-bit floats each, low half first,
///                                        and uint8 [..., G] powers of two; loads as <name>_blocks [..., G * B * 2]
///
/// The catalogue has the sizes and the dtype of what is loaded. Any part of a tensor can be wanted; of values and scales
/// only those that it needs are read. Computed in float32 and rounded once, to nearest even.
class QuantizedHuggingFaceStorageReader final : public StorageReader {
 public:
  explicit QuantizedHuggingFaceStorageReader(std::string directory, QuantizedHuggingFaceReaderOptions options = {},
                                             FileSystem& file_system = local_file_system());
  /// Also kUnsupported naming the key for scales that do not fit their tensor (is block_size right?), and for quantized
  /// tensors in several chunks.
  Metadata read_metadata() override;
  void set_up_storage_reader(const Metadata& metadata) override;
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) override;
  /// bytes_needed: of stored values and scales.
  ReadCounters counters() const;

 private:
  std::string directory_;
  QuantizedHuggingFaceReaderOptions options_;
  FileSystem& file_system_;
  HuggingFaceStorageReader plain_;
  const Metadata* metadata_ = nullptr;
  ReadCounters counters_;
};

}  // namespace reshard
