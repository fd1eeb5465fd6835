// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The zip archive that torch.save writes: one item of a checkpoint. Tensors have a writer of their own, because
// everything around their bytes is a pure function of dtype and sizes, so that all offsets are known before any byte is
// written:
//
//   [ head(): data.pkl and small records ][ payload: the elements ][ tail(crc): descriptor, last records, zip directory
//   ] 0                                     payload_offset() length()
//
// Readers take the archives of torch 2.1 to 2.15 and other legal zip layouts, and believe nothing: every offset and
// length is checked against the item, and nothing of the stream inside is run. Errors: kCorruptData, or kUnsupported
// naming what is not read here; `offset` in their context counts from the start of the item. All functions are
// thread-safe.

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "reshard/core/box.h"
#include "reshard/core/bytes.h"
#include "reshard/core/dims.h"
#include "reshard/core/dtype.h"
#include "reshard/format/pickle.h"

namespace reshard {

/// The bytes of one item, wherever they are. Implementations throw on a read past the end.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual uint64_t size() const = 0;
  /// Fills `out` from byte `offset` of the item. Callers stay within size().
  virtual void read(uint64_t offset, MutableByteSpan out) const = 0;
};

/// An item in memory. Borrows it.
class MemorySource final : public ByteSource {
 public:
  explicit MemorySource(ByteSpan data) : data_(data) {}
  uint64_t size() const override { return data_.size(); }
  void read(uint64_t offset, MutableByteSpan out) const override;

 private:
  ByteSpan data_;
};

struct TensorItem;

// --- writing ---------------------------------------------------------------------------------------------------------

struct TensorArchiveOptions {
  /// Payloads start at multiples of this many bytes in the item; a power of two, 64 in torch.
  uint32_t alignment = 64;
  bool requires_grad = false;
};

/// The archive of one dense row-major tensor, byte for byte as torch 2.14.1 saves it. Cheap to construct (no
/// allocation): planning makes one for every item only to learn its length.
class TensorArchive {
 public:
  /// Throws kInvalidArgument for a negative size, a size that overflows, a quantized dtype or a bad alignment.
  TensorArchive(DType dtype, const Dims& sizes, TensorArchiveOptions options = {});

  uint64_t length() const { return length_; }
  uint64_t payload_offset() const { return records_[kData].payload; }
  uint64_t payload_size() const { return records_[kData].size; }
  /// Bytes [0, payload_offset()).
  Bytes head() const;
  /// Bytes from the end of the payload to length(). `crc` is the CRC-32 of the payload.
  Bytes tail(uint32_t crc) const;

 private:
  friend class TensorArchiveFrame;
  enum Index { kPickle, kFormatVersion, kAlignment, kByteOrder, kData, kVersion, kSerializationId, kRecordCount };
  struct Record {
    uint64_t header = 0;   // position of the local header
    uint64_t payload = 0;  // position of the content
    uint64_t size = 0;
  };
  Bytes small_content(int index) const;

  DType dtype_;
  Dims sizes_;
  TensorArchiveOptions options_;
  Record records_[kRecordCount];
  uint64_t directory_ = 0;
  uint64_t length_ = 0;
};

/// The bytes around the elements of every tensor of one dtype and shape. They differ in the CRC-32 alone, so they are
/// made once, and a tensor costs a copy of them. For one thread.
class TensorArchiveFrame {
 public:
  explicit TensorArchiveFrame(const TensorArchive& archive);
  const TensorArchive& archive() const { return archive_; }
  /// TensorArchive::head(), valid as long as this object.
  ByteSpan head() const { return head_; }
  /// TensorArchive::tail(crc), valid until the next call.
  ByteSpan tail(uint32_t crc);
  /// True if `found` is tail(crc), whatever the digits of the serialization id: each writer has its own.
  bool is_tail(ByteSpan found, uint32_t crc);
  /// What read_tensor_item() says of `item` (all of its bytes), if that is this frame around some elements, byte for
  /// byte but for the digits of the id; else nothing, and the item may still be such a tensor in another layout. Does not check the elements.
  std::optional<TensorItem> match(ByteSpan item);

 private:
  void put_crc(size_t at, uint32_t crc);

  TensorArchive archive_;
  Bytes head_;
  Bytes tail_;
  uint64_t hash_before_ = 0;  // of the contents before the elements
  uint32_t version_crc_ = 0;
  // Positions in tail_ of what depends on the CRC-32: its own two places, the id and the two places of the id's CRC-32.
  size_t data_crcs_[2] = {};
  size_t id_ = 0;
  size_t id_crcs_[2] = {};
};

/// Writes the archive of any value, front to back, as torch.save does: the value itself when this is made, then one
/// storage after the other, each in pieces of any size. So a file of any size is written with little memory. For one
/// thread.
class TorchArchiveWriter {
 public:
  /// Gets all bytes of the archive, in order.
  using Sink = std::function<void(ByteSpan)>;
  TorchArchiveWriter(const pickle::Value& value, Sink sink, uint32_t alignment = 64);

  /// Begins the record data/<key>: the storage that tensors inside the value call `key`. Exactly `size` bytes follow.
  void begin_storage(std::string_view key, uint64_t size);
  void write(ByteSpan bytes);
  /// Ends the archive; nothing may follow. kInternal, as above, where a storage has not got all of its bytes.
  void finish();

 private:
  struct Written {
    std::string name;  // below the top folder
    uint64_t header = 0;
    uint64_t payload = 0;
    uint64_t size = 0;
    uint32_t crc32 = 0;
  };
  void begin(std::string name, uint64_t size);
  void end();
  void put(std::string name, ByteSpan content);
  void emit(ByteSpan bytes);

  Sink sink_;
  uint32_t alignment_;
  std::vector<Written> records_;
  bool open_ = false;      // the last record is not complete
  uint64_t left_ = 0;      // bytes of it that are still to come
  uint64_t position_ = 0;  // of the archive
  uint64_t contents_ = 0;  // hash of what the records hold
};

/// The archive of any other value, as torch.save writes it. `storages` are the contents of data/0, data/1, ...: the
/// storages that tensors inside the value refer to (make_tensor_value).
Bytes encode_value_archive(const pickle::Value& value, std::span<const ByteSpan> storages = {},
                           uint32_t alignment = 64);

/// The value that torch.save makes of a dense row-major tensor whose elements are storage number `storage`.
pickle::Value make_tensor_value(pickle::Tree& tree, DType dtype, const Dims& sizes, size_t storage,
                                bool requires_grad = false);

// --- reading ---------------------------------------------------------------------------------------------------------

/// What an archive says of a tensor. Strides and storage offset count elements; the ranges they reach lie within the
/// payload (checked).
struct TensorItem {
  DType dtype = DType::kFloat32;
  Dims sizes;
  Dims strides;  // >= 0; 0 for an expanded dimension
  int64_t storage_offset = 0;
  uint64_t payload_offset = 0;    // of the storage's first byte, in the item
  uint64_t payload_size = 0;      // bytes of the storage
  std::optional<uint32_t> crc32;  // of the whole storage; absent where the writer left it out
  bool conj = false;              // elements are stored unconjugated
  bool neg = false;               // elements are stored unnegated
  bool requires_grad = false;
  /// True if the tensor's elements are exactly its row-major bytes, starting at storage_offset.
  bool is_dense() const;
};

/// Reads the description of a tensor item, not its payload: one read for an item of up to 4 KiB, else one of 1 KiB at
/// the end and one at the start, except in unusual layouts.
TensorItem read_tensor_item(const ByteSource& item);

/// A value read from an archive. Moving it keeps the values valid.
class ValueArchive {
 public:
  /// A record data/<key> of the archive.
  struct Storage {
    uint64_t offset = 0;  // in the item
    uint64_t size = 0;
    uint32_t crc32 = 0;  // 0: left out by the writer
  };

  /// The object saved. check_tree() has passed: it may be descended recursively.
  const pickle::Value& root() const { return tree_.root(); }
  /// Where the pickle of the object lies in the item.
  const Storage& pickled() const { return pickled_; }
  /// The tensor that `value` rebuilds; nothing if it is no tensor. Throws kUnsupported for sparse, quantized and nested
  /// ones.
  std::optional<TensorItem> as_tensor(const pickle::Value& value) const;
  /// Nothing if there is no such record.
  std::optional<Storage> storage(std::string_view key) const;

 private:
  friend ValueArchive decode_value_archive(const ByteSource&);
  pickle::Tree tree_;
  Storage pickled_;
  std::map<std::string, Storage, std::less<>> storages_;
};
ValueArchive decode_value_archive(const ByteSource& item);

/// What verify_archive() went through.
struct ArchiveSummary {
  size_t records = 0;
  size_t without_crc = 0;  // records whose CRC-32 the writer left out (0)
  uint64_t bytes = 0;      // contents read
};
/// Reads the whole item: directory, every local header and data descriptor, and the CRC-32 of every record. Throws
/// kCorruptData at the first that differs.
ArchiveSummary verify_archive(const ByteSource& item);

}  // namespace reshard
