// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/convert/open_checkpoint.h"

#include <algorithm>
#include <array>
#include <vector>

#include "reshard/storage/filesystem.h"
#include "reshard/storage/hugging_face.h"
#include "reshard/storage/torch_save_reader.h"

namespace reshard {
namespace {

// A zip archive, or the pickle that files of torch before 1.6 begin with: the reader refuses those by name.
constexpr std::array<std::string_view, 2> kTorchBeginnings{"PK\x03\x04", "\x80\x02\x8A\x0A"};

}  // namespace

std::string_view to_string(CheckpointKind kind) {
  switch (kind) {
    case CheckpointKind::kDcp:
      return "dcp";
    case CheckpointKind::kTorch:
      return "torch";
    case CheckpointKind::kSafetensors:
      return "safetensors";
  }
  return "unknown";
}

CheckpointKind detect_checkpoint_kind(const std::string& path, FileSystem& file_system) {
  // A link to a checkpoint is one: "path/." is what it leads to.
  auto status = file_system.status(path);
  if (status && status->kind == FileKind::kSymlink) {
    const auto target = file_system.status(path + "/.");
    if (target && target->kind == FileKind::kDirectory) status = target;
  }
  if (!status) throw Error(ErrorCode::kNotFound, "there is no such checkpoint", {.file = path});
  if (status->kind == FileKind::kDirectory) {
    const std::vector<std::string> names = file_system.list(path);
    const bool is_dcp = std::ranges::find(names, kMetadataFileName) != names.end();
    const bool has_safetensors = std::ranges::any_of(names, [](const std::string& name) {
      return name.ends_with(".safetensors") || name == kSafetensorsIndexFileName || name == kSafetensorsShardsFileName;
    });
    return has_safetensors && !is_dcp ? CheckpointKind::kSafetensors : CheckpointKind::kDcp;
  }
  return with_error_context({.file = path}, [&] {
    const auto file = file_system.open(path);
    std::array<std::byte, 4> head{};
    if (file->size() >= head.size()) file->read_exactly(0, head, "head of the file");
    if (std::ranges::find(kTorchBeginnings, as_text(head)) != kTorchBeginnings.end()) return CheckpointKind::kTorch;
    if (path.ends_with(".safetensors")) {
      throw Error(ErrorCode::kUnsupported, "safetensors files are read by their directory",
                  {.wanted = "the directory that the file is in"});
    }
    throw Error(ErrorCode::kUnsupported, "the file is no checkpoint of a kind that is known here",
                {.wanted = "a file of torch.save, or a directory"});
  });
}

std::unique_ptr<StorageReader> open_checkpoint(const std::string& path, const OpenCheckpointOptions& options,
                                               FileSystem& file_system) {
  switch (detect_checkpoint_kind(path, file_system)) {
    case CheckpointKind::kTorch:
      return std::make_unique<TorchSaveReader>(
          path, TorchSaveReaderOptions{.verify_checksums = options.verify_checksums}, file_system);
    case CheckpointKind::kSafetensors:
      return std::make_unique<HuggingFaceStorageReader>(path, HuggingFaceReaderOptions{}, file_system);
    case CheckpointKind::kDcp:
      break;
  }
  return std::make_unique<FileSystemReader>(path, FileSystemReaderOptions{.verify_checksums = options.verify_checksums},
                                            file_system);
}

}  // namespace reshard
