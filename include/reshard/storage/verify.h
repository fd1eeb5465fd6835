// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Checks a checkpoint from end to end, and gives whole tensors a digest that does not depend on how they were sharded.
// Both read every byte that they speak of; neither loads a tensor whole, so memory does not grow with the checkpoint.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "reshard/core/hooks.h"
#include "reshard/format/sha256.h"
#include "reshard/io/file_system.h"
#include "reshard/storage/filesystem.h"

namespace reshard {

struct VerifyReport {
  /// What makes the checkpoint wrong or incomplete: every defect found, each naming key, file and offset as far as it
  /// has them. Empty: the checkpoint is whole.
  std::vector<Error> problems;
  /// Things to know that take nothing from the checkpoint: files that no catalogue names, checksums that the writer
  /// left out.
  std::vector<std::string> notes;
  uint64_t tensors = 0;
  uint64_t values = 0;
  uint64_t items = 0;  // chunks and values
  uint64_t files = 0;
  uint64_t bytes = 0;  // of all items
};

/// Checks the catalogue; that the chunks of every tensor tile it; every sidecar, where the save has them: present and the
/// one that the catalogue names; every block of every data file against its sum in the sidecar (what a changed byte
/// breaks is reported once, with file and offset of the block); then, in files without such a change, every item: that
/// its range lies in its file and overlaps no other, its zip headers, the CRC-32 of each record, that it is the tensor
/// of the catalogue; what has a stream transform, once that is undone. Of `options` only what concerns transforms counts.
/// Throws (kNotFound, kCorruptData, ...) only if the catalogue cannot be read. `progress` is called
/// after each item.
VerifyReport verify_checkpoint(const std::string& directory, FileSystem& file_system = local_file_system(),
                               const ProgressFn& progress = {}, const FileSystemReaderOptions& options = {});

/// The same of a file of torch.save: that it is one which TorchSaveReader reads, its zip headers, and the CRC-32 of each
/// record. Throws only if its state dict cannot be read.
VerifyReport verify_torch_save(const std::string& file, FileSystem& file_system = local_file_system());

/// The same of a directory of safetensors files, as far as that goes: headers, index, that all files are there and as long as they say, and
/// that the chunks of every tensor tile it. The format has no checksums; a note says so. Throws where HuggingFaceStorageReader does.
VerifyReport verify_safetensors(const std::string& directory, FileSystem& file_system = local_file_system());

/// Calls fn(fqn, SHA-256 of the row-major little-endian elements) for every tensor, in the order of the catalogue.
/// Lazily conjugated and negated elements count as resolved. Reads in blocks of about `block_bytes`. Throws at the
/// first key that cannot be read whole.
void digest_tensors(const std::string& directory,
                    const std::function<void(const std::string& fqn, const Sha256Digest&)>& fn,
                    FileSystem& file_system = local_file_system(), uint64_t block_bytes = 64 << 20);

class CheckpointReader;
/// The same of a checkpoint of any kind.
void digest_tensors(const CheckpointReader& checkpoint,
                    const std::function<void(const std::string& fqn, const Sha256Digest&)>& fn,
                    uint64_t block_bytes = 64 << 20);

}  // namespace reshard
