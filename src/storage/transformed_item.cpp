// SPDX-License-Identifier: BSD-3-Clause
#include "storage/transformed_item.h"

#include <algorithm>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"

namespace reshard {
namespace {

// Records, their names and padding, the pickle of one tensor.
constexpr uint64_t kArchiveOverhead = 64 << 10;
constexpr size_t kFirstBytes = 64 << 10;

}  // namespace

/// The stored bytes of an item.
class TransformedItem::Raw final : public ByteInputStream {
 public:
  Raw(const CountedFile& file, const StorageInfo& place)
      : file_(file), at_(place.offset), end_(place.offset + place.length) {}
  size_t read(MutableByteSpan out) override {
    uint64_t end = end_;
    if (out.size() < end_ - at_) {
      end = at_ + out.size();
      // No block is read twice.
      if (out.size() > 2 * kBlockBytes) end = file_.block_end(end - kBlockBytes);
    }
    const auto size = static_cast<size_t>(end - at_);
    if (size != 0) file_.read(at_, out.first(size), "transformed bytes of an item");
    at_ = end;
    return size;
  }

 private:
  const CountedFile& file_;
  uint64_t at_;
  const uint64_t end_;
};

TransformedItem::TransformedItem(std::shared_ptr<const SharedFile> file, StorageInfo place,
                                 const ExtensionRegistry& registry, uint64_t limit)
    : file_(std::move(file)),
      place_(std::move(place)),
      limit_(limit),
      extensions_(registry.from_descriptor_list(place_.transform_descriptors)) {
  streams_.push_back(std::make_unique<Raw>(file_->counted(), place_));
  for (size_t i = extensions_.size(); i-- > 0;) {
    streams_.push_back(extensions_[i]->transform_from(*streams_.back()));
  }
}

size_t TransformedItem::read(MutableByteSpan out) {
  size_t done = 0;
  while (done < out.size()) {
    const size_t size = streams_.back()->read(out.subspan(done));
    if (size == 0) break;
    done += size;
    position_ += size;
    if (position_ > limit_) {
      throw Error(ErrorCode::kCorruptData, "the item decodes to more bytes than it can have",
                  {.wanted = "at most " + std::to_string(limit_) + " bytes", .found = "more"});
    }
  }
  return done;
}

Bytes TransformedItem::read_rest() {
  Bytes bytes;
  for (size_t done = 0;;) {
    bytes.resize(std::max(kFirstBytes, 2 * done));
    const size_t size = read(MutableByteSpan(bytes).subspan(done));
    done += size;
    if (done == bytes.size()) continue;
    bytes.resize(done);
    return bytes;
  }
}

uint64_t largest_archive(uint64_t element_bytes) {
  return checked_add(element_bytes, kArchiveOverhead, "size of an item");
}

std::optional<TransformedTensor> TransformedTensor::open(TransformedItem item, TensorArchiveFrame& frame, bool sum) {
  const ByteSpan wanted = frame.head();
  Bytes head(wanted.size());
  if (item.read(head) != head.size() || !std::ranges::equal(head, wanted)) return std::nullopt;
  return TransformedTensor(std::move(item), wanted.size(), sum);
}

void TransformedTensor::read(MutableByteSpan out) {
  if (item_.read(out) != out.size()) {
    throw Error(ErrorCode::kCorruptData, "the item ends within the elements",
                {.found = std::to_string(position()) + " bytes of elements"});
  }
  if (sum_) crc_ = crc32(out, crc_);
}

bool TransformedTensor::ends_well(TensorArchiveFrame& frame) {
  Bytes rest(frame.tail(crc_).size() + 1);
  rest.resize(item_.read(rest));
  return frame.is_tail(rest, crc_);
}

std::optional<TransformedTensor> PartlyRead::take(const StorageInfo& place, uint64_t position) {
  const std::lock_guard lock(mutex_);
  const auto it = std::ranges::find_if(tensors_, [&](const TransformedTensor& tensor) {
    return tensor.item().place() == place && tensor.position() <= position;
  });
  if (it == tensors_.end()) return std::nullopt;
  TransformedTensor tensor = std::move(*it);
  tensors_.erase(it);
  return tensor;
}

void PartlyRead::put(TransformedTensor tensor) {
  const std::lock_guard lock(mutex_);
  if (tensors_.size() == kMost) tensors_.pop_front();
  tensors_.push_back(std::move(tensor));
}

}  // namespace reshard
