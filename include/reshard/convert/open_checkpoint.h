// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Which kind of checkpoint lies at a path, and its reader. The one place to tell of a further kind.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "reshard/io/file_system.h"
#include "reshard/storage/storage.h"

namespace reshard {

enum class CheckpointKind : uint8_t {
  kDcp,          // a directory with `.metadata` (storage/filesystem.h)
  kTorch,        // a file of torch.save (storage/torch_save_reader.h)
  kSafetensors,  // a directory of safetensors files (storage/hugging_face.h)
};
/// "dcp", "torch", "safetensors".
std::string_view to_string(CheckpointKind kind);

/// By what is there, not by its name: a directory with safetensors files and without `.metadata` is kSafetensors; any other is kDcp, also one
/// that holds no checkpoint (its reader says what is missing); a file is kTorch if it begins as one. Throws kNotFound for nothing, kUnsupported for a file of another kind.
CheckpointKind detect_checkpoint_kind(const std::string& path, FileSystem& file_system = local_file_system());

struct OpenCheckpointOptions {
  /// As in FileSystemReaderOptions and TorchSaveReaderOptions. Safetensors files have no checksums.
  bool verify_checksums = true;
};

/// The reader for what lies at `path`. Throws as detect_checkpoint_kind().
std::unique_ptr<StorageReader> open_checkpoint(const std::string& path, const OpenCheckpointOptions& options = {},
                                               FileSystem& file_system = local_file_system());

}  // namespace reshard
