// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/verify.h"

namespace reshard {

void digest_tensors(const std::string& directory,
                    const std::function<void(const std::string& fqn, const Sha256Digest&)>& fn, FileSystem& file_system,
                    uint64_t block_bytes) {
  FileSystemReader reader(directory, {}, file_system);
  digest_tensors(CheckpointReader(reader), fn, block_bytes);
}

void digest_tensors(const CheckpointReader& checkpoint,
                    const std::function<void(const std::string& fqn, const Sha256Digest&)>& fn, uint64_t block_bytes) {
  Bytes buffer;
  for (const auto& [fqn, entry] : checkpoint.metadata().state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) continue;
    const int64_t size = element_size(tensor->properties.dtype);
    Sha256 hash;
    for (const Box& box :
         cut_into_blocks(whole_box(tensor->size), std::max<int64_t>(1, static_cast<int64_t>(block_bytes) / size))) {
      buffer.resize(static_cast<size_t>(volume(box.sizes) * size));
      checkpoint.read_box(fqn, box, buffer);
      hash.update(buffer);
    }
    fn(fqn, hash.finish());
  }
}

}  // namespace reshard
