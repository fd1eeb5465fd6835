// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Reading items that are stored with a stream transform: front to back, a few hundred KiB at a time, and never more than
// the catalogue's description of the tensor allows, whatever the stream says of itself.

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "reshard/format/extension.h"
#include "reshard/format/torch_archive.h"
#include "reshard/metadata/metadata.h"
#include "storage/direct_reader.h"

namespace reshard {

/// An open data file with its sums, for what reads of it longer than one call lasts.
class SharedFile {
 public:
  /// `sums` may be null. `counters` are borrowed.
  SharedFile(std::unique_ptr<RandomAccessFile> file, std::shared_ptr<const SidecarFile> sums, ReadCounters& counters)
      : file_(std::move(file)), sums_(std::move(sums)), counted_(*file_, sums_.get(), counters) {}
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  const CountedFile& counted() const { return counted_; }

 private:
  std::unique_ptr<RandomAccessFile> file_;
  std::shared_ptr<const SidecarFile> sums_;
  CountedFile counted_;
};

/// One item as it was before its transforms. For one thread.
class TransformedItem {
 public:
  /// `limit`: most bytes that it may have. The item lies within the file. Throws as
  /// ExtensionRegistry::from_descriptor_list() does.
  TransformedItem(std::shared_ptr<const SharedFile> file, StorageInfo place, const ExtensionRegistry& registry,
                  uint64_t limit);
  TransformedItem(TransformedItem&&) noexcept = default;

  const StorageInfo& place() const { return place_; }
  /// Bytes read so far.
  uint64_t position() const { return position_; }
  /// Fills the front of `out` with what comes next; fewer bytes only where the item ends. kCorruptData if it does not end
  /// within the limit, and as the transforms throw.
  size_t read(MutableByteSpan out);
  /// All that comes, which is read into memory that grows as it comes.
  Bytes read_rest();

 private:
  class Raw;
  std::shared_ptr<const SharedFile> file_;
  StorageInfo place_;
  uint64_t limit_;
  uint64_t position_ = 0;
  StreamTransformExtensions extensions_;                   // which the streams may borrow
  std::vector<std::unique_ptr<ByteInputStream>> streams_;  // each reads the one before
};

/// Runs `body` on the bytes of a decoded item: offsets in what it throws are no places in a file, and are told in words.
template <class Body>
decltype(auto) within_decoded_item(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    if (!error.context().offset) throw;
    ErrorContext context = error.context();
    const std::string at = std::to_string(*std::exchange(context.offset, std::nullopt));
    throw Error(error.code(), error.message() + " (at byte " + at + " of the decoded item)", std::move(context));
  }
}

/// Most bytes that the archive of a tensor part may have: its elements, and room for what is around them.
uint64_t largest_archive(uint64_t element_bytes);

/// The elements of a tensor item with transforms, front to back. Of the layout that this library and the current PyTorch
/// write; others have to be read whole.
class TransformedTensor {
 public:
  /// Reads up to the elements. Nothing if the item has another layout or holds another tensor. `frame` as for the
  /// tensor of the catalogue; `sum`: take the CRC-32 of the elements on the way.
  static std::optional<TransformedTensor> open(TransformedItem item, TensorArchiveFrame& frame, bool sum);

  const TransformedItem& item() const { return item_; }
  /// Of the elements: bytes read so far.
  uint64_t position() const { return item_.position() - payload_offset_; }
  /// The next elements; kCorruptData if there are fewer.
  void read(MutableByteSpan out);
  /// After the last element, with `sum`: true if what follows is the end of the archive around them, and nothing more.
  bool ends_well(TensorArchiveFrame& frame);

 private:
  TransformedTensor(TransformedItem item, uint64_t payload_offset, bool sum)
      : item_(std::move(item)), payload_offset_(payload_offset), sum_(sum) {}

  TransformedItem item_;
  uint64_t payload_offset_;
  bool sum_;
  uint32_t crc_ = 0;
};

/// Tensors that were read in part, so that a walk over a tensor block by block decodes it once. The oldest is forgotten
/// when there are too many: each may hold a window and a file. Thread-safe.
class PartlyRead {
 public:
  /// Takes out the one at `place` that has not come further than `position`.
  std::optional<TransformedTensor> take(const StorageInfo& place, uint64_t position);
  void put(TransformedTensor tensor);

 private:
  static constexpr size_t kMost = 16;
  std::mutex mutex_;
  std::list<TransformedTensor> tensors_;  // the oldest first
};

}  // namespace reshard
