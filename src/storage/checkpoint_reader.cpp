// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/checkpoint_reader.h"

#include <algorithm>
#include <map>
#include <utility>

#include "reshard/planner/default_planner.h"

namespace reshard {
namespace {

// Different views of one place among which ties are looked for.
constexpr size_t kMostViews = 16;

/// Reads boxes of one tensor into one buffer, or one value; a load planner without a state dict.
class PiecePlanner final : public LoadPlanner {
 public:
  explicit PiecePlanner(Bytes& value) : value_(&value) {}
  PiecePlanner(DType dtype, const Box& box, MutableByteSpan out)
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
  void load_bytes(const ReadItem&, ByteSpan archive) override { value_->assign(archive.begin(), archive.end()); }

 private:
  DType dtype_ = DType::kUInt8;
  Dims strides_;
  MutableByteSpan out_;
  Bytes* value_ = nullptr;
  LoadReport report_;
};

/// The place of a chunk with elements, null if the catalogue has none.
const StorageInfo* place_of(const Metadata& metadata, const std::string& fqn, const Box& chunk) {
  return volume(chunk.sizes) == 0 ? nullptr : metadata.storage_data.find({fqn, chunk.offsets, {}});
}

/// True if two tensors are stored as one.
bool is_one_place(const Metadata& metadata, const std::string& a, const TensorStorageMetadata& tensor_a,
                  const std::string& b, const TensorStorageMetadata& tensor_b) {
  if (tensor_a.properties.dtype != tensor_b.properties.dtype || tensor_a.size != tensor_b.size ||
      tensor_a.chunks != tensor_b.chunks) {
    return false;
  }
  return std::ranges::all_of(tensor_a.chunks, [&](const Box& chunk) {
    const StorageInfo* place_a = place_of(metadata, a, chunk);
    const StorageInfo* place_b = place_of(metadata, b, chunk);
    return place_a != nullptr && place_b != nullptr && *place_a == *place_b;
  });
}

}  // namespace

CheckpointReader::CheckpointReader(StorageReader& reader) : reader_(reader), metadata_(reader.read_metadata()) {
  reader_.set_up_storage_reader(metadata_);
  // Tensors by where their first chunk begins.
  std::unordered_map<std::string, std::vector<std::pair<const std::string*, const TensorStorageMetadata*>>> first_at;
  for (const auto& [fqn, stored] : metadata_.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&stored);
    if (tensor == nullptr || tensor->chunks.empty()) continue;
    const StorageInfo* place = place_of(metadata_, fqn, tensor->chunks[0]);
    if (place == nullptr) continue;
    auto& others = first_at[place->relative_path + "@" + std::to_string(place->offset)];
    const auto it = std::ranges::find_if(others, [&, &fqn = fqn](const auto& other) {
      return is_one_place(metadata_, *other.first, *other.second, fqn, *tensor);
    });
    if (it != others.end()) {
      ties_[fqn] = *it->first;
    } else if (others.size() < kMostViews) {
      others.emplace_back(&fqn, tensor);
    }
  }
}

const StorageMetadata& CheckpointReader::entry(const std::string& fqn) const {
  const StorageMetadata* found = metadata_.state_dict_metadata.find(fqn);
  if (found == nullptr) throw Error(ErrorCode::kNotFound, "the checkpoint has no such key", {.key = fqn});
  return *found;
}

const TensorStorageMetadata& CheckpointReader::tensor(const std::string& fqn) const {
  const auto* found = std::get_if<TensorStorageMetadata>(&entry(fqn));
  if (found == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "the checkpoint holds another kind of thing under this key",
                {.key = fqn, .wanted = "a tensor", .found = "a value that is not a tensor"});
  }
  return *found;
}

void CheckpointReader::read_box(const std::string& fqn, const Box& box, MutableByteSpan out) const {
  const TensorStorageMetadata& stored = tensor(fqn);
  const LoadPlan plan{create_read_items_for_chunk(fqn, stored, box)};
  const auto wanted = static_cast<size_t>(volume(box.sizes) * element_size(stored.properties.dtype));
  if (out.size() != wanted) {
    throw Error(ErrorCode::kInvalidArgument, "memory for a box of a tensor",
                {.key = fqn, .wanted = std::to_string(wanted) + " bytes", .found = std::to_string(out.size())});
  }
  PiecePlanner planner(stored.properties.dtype, box, out);
  const std::lock_guard lock(mutex_);
  reader_.read_data(plan, planner, {});
}

Bytes CheckpointReader::read_value(const std::string& fqn) const {
  if (!std::holds_alternative<BytesStorageMetadata>(entry(fqn))) {
    throw Error(ErrorCode::kInvalidArgument, "the checkpoint holds another kind of thing under this key",
                {.key = fqn, .wanted = "a value that is not a tensor", .found = "a tensor"});
  }
  ReadItem item;
  item.is_bytes = true;
  item.dest_index.fqn = fqn;
  item.storage_index.fqn = fqn;
  Bytes value;
  PiecePlanner planner(value);
  const std::lock_guard lock(mutex_);
  reader_.read_data({{std::move(item)}}, planner, {});
  return value;
}

const std::string& CheckpointReader::tied_to(const std::string& fqn) const {
  const auto it = ties_.find(fqn);
  return it == ties_.end() ? fqn : it->second;
}

std::vector<Box> cut_into_blocks(const Box& box, int64_t max_elements) {
  if (max_elements < 1) throw Error(ErrorCode::kInvalidArgument, "blocks of less than one element");
  std::vector<Box> blocks;
  const auto cut = [&](const auto& self, const Box& part, size_t dim) -> void {
    const int64_t elements = volume(part.sizes);
    if (elements <= max_elements) return blocks.push_back(part);
    // Not empty, so some dimension from `dim` on is larger than 1.
    while (part.sizes[dim] == 1) ++dim;
    const int64_t rows = std::max<int64_t>(1, max_elements / (elements / part.sizes[dim]));
    for (int64_t row = 0; row < part.sizes[dim]; row += rows) {
      Box block = part;
      block.offsets[dim] += row;
      block.sizes[dim] = std::min(rows, part.sizes[dim] - row);
      self(self, block, dim);
    }
  };
  cut(cut, box, 0);
  return blocks;
}

CheckpointSaveState::CheckpointSaveState(const CheckpointReader& checkpoint, const CheckpointSaveStateOptions& options)
    : checkpoint_(checkpoint) {
  if (options.world_size < 1 || options.rank < 0 || options.rank >= options.world_size) {
    throw Error(ErrorCode::kInvalidArgument, "rank of a state to be saved",
                {.wanted = "0 to " + std::to_string(options.world_size - 1), .found = std::to_string(options.rank)});
  }
  const Metadata& metadata = checkpoint.metadata();
  std::map<std::string, size_t, std::less<>> tensors;
  for (const auto& [fqn, stored] : metadata.state_dict_metadata) {
    StateEntry entry{fqn, {fqn}, {}};
    if (metadata.planner_data) {
      if (const ObjectPath* path = metadata.planner_data->find(fqn)) entry.path = *path;
    }
    const auto* tensor = std::get_if<TensorStorageMetadata>(&stored);
    if (tensor == nullptr) {
      if (options.rank != 0) continue;
      Bytes value = checkpoint.read_value(fqn);
      entry.value = BytesEntry{value.size()};
      values_[entries_.size()] = std::move(value);
      entries_.push_back(std::move(entry));
      continue;
    }
    TensorEntry mine{.properties = tensor->properties, .size = tensor->size, .chunks = {}, .sharded = true};
    const int64_t elements = static_cast<int64_t>(options.block_bytes) / element_size(tensor->properties.dtype);
    Box part = whole_box(tensor->size);
    if (part.sizes.empty() || volume(part.sizes) == 0) {
      if (options.rank != 0) continue;  // cannot be split
    } else {
      part = split_evenly(part, 0, options.world_size, options.rank);
    }
    mine.chunks = cut_into_blocks(part, std::max<int64_t>(1, elements));
    if (const auto first = tensors.find(checkpoint.tied_to(fqn)); first != tensors.end()) mine.tied_to = first->second;
    tensors[fqn] = entries_.size();
    entry.value = std::move(mine);
    entries_.push_back(std::move(entry));
  }
}

TensorView CheckpointSaveState::tensor(size_t entry, size_t chunk) const {
  const auto& tensor = std::get<TensorEntry>(entries_.at(entry).value);
  const Box& box = tensor.chunks.at(chunk);
  const DType dtype = tensor.properties.dtype;
  auto buffer = std::make_shared<Bytes>(static_cast<size_t>(volume(box.sizes) * element_size(dtype)));
  checkpoint_.read_box(entries_[entry].fqn, box, *buffer);
  const std::byte* data = buffer->data();
  return {data, dtype, box.sizes, contiguous_strides(box.sizes), std::move(buffer)};
}

}  // namespace reshard
