// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "reshard/planner/default_planner.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/verify.h"
#include "storage/box_planner.h"

namespace reshard {
void digest_tensors(const std::string& directory,
                    const std::function<void(const std::string& fqn, const Sha256Digest&)>& fn, FileSystem& file_system,
                    uint64_t block_bytes) {
  FileSystemReader reader(directory, {}, file_system);
  const Metadata metadata = reader.read_metadata();
  reader.set_up_storage_reader(metadata);
  Bytes buffer;
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) continue;
    const DType dtype = tensor->properties.dtype;
    const int64_t total = volume(tensor->size);
    const int64_t block = std::max<int64_t>(1, static_cast<int64_t>(block_bytes) / element_size(dtype));
    Sha256 hash;
    for (int64_t begin = 0; begin < total; begin += block) {
      for (const Box& box : flat_range_to_boxes(tensor->size, begin, std::min(begin + block, total))) {
        buffer.resize(static_cast<size_t>(volume(box.sizes) * element_size(dtype)));
        BoxPlanner planner(dtype, box, buffer);
        reader.read_data({create_read_items_for_chunk(fqn, *tensor, box)}, planner, {});
        hash.update(buffer);
      }
    }
    fn(fqn, hash.finish());
  }
}

}  // namespace reshard
