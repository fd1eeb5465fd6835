// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A torch.save file as a checkpoint: reshard::load and the tools read it as they read a directory. Every rank reads only the
// bytes that it needs, straight from the file, so nothing is broadcast and no rank holds the file in memory; this is what
// PyTorch's BroadcastingTorchSaveReader with DynamicMetaLoadPlanner is for.
//
//   reshard::load(state, reshard::TorchSaveReader("model.pt"));       // any number of ranks, any sharding of the target
//
// The pickle in the file is read as data and never run.

#include <memory>
#include <string>

#include "reshard/io/file_system.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/storage.h"

namespace reshard {

struct TorchSaveReaderOptions {
  /// Check a storage by its CRC-32 where all of it is read from front to back, as tools do. Parts of tensors cannot be
  /// checked: the file has no sums of blocks.
  bool verify_checksums = true;
};

/// Of a file that torch.save wrote (torch 1.6 or later) with a dict of tensors and values, nested as one likes. Names are
/// those that PyTorch gives to the same state dict in a checkpoint (format/torch_file.h); tensors may be views with any
/// strides, share storages, and be lazily conjugated or negated. A storage_data entry of a tensor is where its storage lies
/// in the file.
class TorchSaveReader final : public StorageReader {
 public:
  /// `file_system` is borrowed. Opens the file on first use.
  explicit TorchSaveReader(std::string file, TorchSaveReaderOptions options = {},
                           FileSystem& file_system = local_file_system());
  ~TorchSaveReader() override;
  /// Throws kNotFound where there is no file, kUnsupported for files of torch before 1.6, compressed ones (TorchScript), and what
  /// flatten_archive() refuses, kCorruptData for broken ones.
  Metadata read_metadata() override;
  /// Throws kFailedPrecondition if the file is not the one that `metadata` was read from.
  void set_up_storage_reader(const Metadata& metadata) override;
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext& context) override;
  /// What read_data() read since set_up_storage_reader().
  const ReadCounters& counters() const { return counters_; }

 private:
  struct Contents;
  const Contents& contents();

  std::string file_;
  TorchSaveReaderOptions options_;
  FileSystem& file_system_;
  std::unique_ptr<Contents> contents_;
  ReadCounters counters_;
};

}  // namespace reshard
