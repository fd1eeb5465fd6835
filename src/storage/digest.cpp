// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "reshard/planner/default_planner.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/verify.h"

namespace reshard {
namespace {

/// Reads boxes of tensors into one buffer; a load planner without a state dict.
class BoxPlanner final : public LoadPlanner {
 public:
  BoxPlanner(DType dtype, const Box& box, MutableByteSpan out)
      : dtype_(dtype), strides_(contiguous_strides(box.sizes)), out_(out) {}
  void set_up_planner(LoadState&, const Metadata&, bool) override {}
  LoadPlan create_local_plan() override { return {}; }
  const LoadReport& report() const override { return report_; }
  MutableTensorView resolve_tensor(const ReadItem& item) override {
    int64_t first = 0;
    for (size_t d = 0; d < strides_.size(); ++d) first += item.dest_offsets[d] * strides_[d];
    return {out_.data() + first * element_size(dtype_), dtype_, item.lengths, strides_, nullptr};
  }
  void commit_tensor(const ReadItem&, const MutableTensorView&) override {}
  void load_bytes(const ReadItem&, ByteSpan) override {}

 private:
  DType dtype_;
  Dims strides_;
  MutableByteSpan out_;
  LoadReport report_;
};

}  // namespace

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
