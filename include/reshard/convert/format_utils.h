// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// From one kind of checkpoint to another, as torch.distributed.checkpoint.format_utils does it, but streaming: no tensor
// is ever in memory whole, in a process of its own and without LibTorch. What is written is written atomically: on an error
// nothing new is left and what was there before is as it was.
//
//   dcp_to_torch_save("checkpoint", "model.pt");      // python: torch.load("model.pt", weights_only=True)
//   torch_save_to_dcp("model.pt", "checkpoint");      // python: torch.distributed.checkpoint.load(state, checkpoint_id=...)
//
// Loading a torch.save file into sharded ranks needs no conversion: storage/torch_save_reader.h.

#include <cstdint>
#include <string>

#include "reshard/convert/open_checkpoint.h"
#include "reshard/core/hooks.h"
#include "reshard/io/file_system.h"
#include "reshard/protocol/protocol.h"
#include "reshard/storage/checkpoint_reader.h"

namespace reshard {

struct ConvertOptions {
  /// Tensors go through memory in blocks of at most this many bytes; about three of them are there at a time. Values that are
  /// no tensors are held whole.
  uint64_t block_bytes = 64 << 20;
  /// What is there may be replaced, as PyTorch does. False: kAlreadyExists.
  bool overwrite = true;
  /// Durable when the call returns.
  bool sync_files = true;
  /// Functions that are given a path check a directory without sidecars (one of PyTorch's) from end to end before they
  /// write: it has no sums of the blocks that a conversion reads, and what is broken in it must not come out with fresh
  /// checksums. Reads it once more.
  bool verify_source = true;
  /// Called from time to time with the step ("verify", "write") and the bytes or items so far, from one thread at a time.
  /// What it throws ends the conversion.
  ProgressFn progress = {};
};

/// Writes a checkpoint of any kind as one file that torch.load(..., weights_only=True) reads: a nested dict, equal to what
/// PyTorch's dcp_to_torch_save gives, in which tied tensors still share their storage. Values that only Python knows are
/// passed on as they are. Throws what reading throws, kUnsupported for nesting deeper than 500, kAlreadyExists.
void write_torch_save(const CheckpointReader& checkpoint, const std::string& file, const ConvertOptions& options = {},
                      FileSystem& file_system = local_file_system());

/// Writes a checkpoint of any kind into a directory, as `ranks` (1 to 4096) ranks would have saved it that hold each tensor
/// split along its first dimension. A tensor part of more than block_bytes is several chunks. Throws CheckpointError.
SaveResult write_dcp(const CheckpointReader& checkpoint, const std::string& directory, int ranks = 1,
                     const ConvertOptions& options = {}, FileSystem& file_system = local_file_system());

/// Writes the checkpoint at `source`, of any kind, as one of kind `to`; `ranks` as in write_dcp(). kSafetensors is export_safetensors(): values that
/// are no tensors are kInvalidArgument naming the key, a directory with safetensors files is kAlreadyExists, whatever the options.
void convert_checkpoint(const std::string& source, const std::string& destination, CheckpointKind to, int ranks = 1,
                        const ConvertOptions& options = {}, FileSystem& file_system = local_file_system());

/// convert_checkpoint() under PyTorch's names.
void dcp_to_torch_save(const std::string& dcp_checkpoint_dir, const std::string& torch_save_path,
                       const ConvertOptions& options = {}, FileSystem& file_system = local_file_system());
void torch_save_to_dcp(const std::string& torch_save_path, const std::string& dcp_checkpoint_dir,
                       const ConvertOptions& options = {}, FileSystem& file_system = local_file_system());

}  // namespace reshard
