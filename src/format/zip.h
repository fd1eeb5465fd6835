// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Zip archives as torch.save lays them out, and any other legal layout for reading: STORED records, zip64 where needed.
//
// A record as torch writes it: local header (30 bytes), name, optional zip64 block, a block 'FB' whose padding brings
// the content to a multiple of the alignment, content, data descriptor (none if the content is empty). Sizes and CRC-32
// stand only in the descriptor and in the central directory. The tail is always: directory, zip64 end record, its
// locator, end record.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/format/torch_archive.h"

namespace reshard::zip {

/// Where a record goes when its local header stands at `header`.
uint64_t payload_position(uint64_t header, size_t name_length, uint64_t size, uint32_t alignment);
/// Position after its data descriptor.
uint64_t end_position(uint64_t header, uint64_t payload, uint64_t size);

struct Record {
  std::string_view name;
  uint64_t header = 0;
  uint64_t payload = 0;
  uint64_t size = 0;
  uint32_t crc32 = 0;
};

/// Everything from record.header to record.payload.
void put_local_header(ByteWriter& out, const Record& record);
void put_descriptor(ByteWriter& out, const Record& record);
/// Bytes of the record's entry in the directory.
uint64_t directory_entry_size(const Record& record);
/// Directory at position `directory`, and all after it.
void put_tail(ByteWriter& out, std::span<const Record> records, uint64_t directory);
/// Bytes after the directory.
inline constexpr uint64_t kEndSize = 56 + 20 + 22;

/// One entry of a central directory, checked as far as it can be without its local header.
struct Entry {
  std::string name;         // without the archive's top folder
  std::string stored_name;  // with it
  uint64_t header = 0;
  uint64_t size = 0;
  uint64_t limit = 0;  // start of what follows in the item: the content ends here at the latest
  uint32_t crc32 = 0;
  uint16_t flags = 0;
};

/// Reads the directory of an item and the contents that are asked for, with few reads of the source. Borrows the
/// source. For one thread.
class Reader {
 public:
  explicit Reader(const ByteSource& source);

  const std::vector<Entry>& entries() const { return entries_; }
  /// Null if the item has no such record. `name` without the top folder.
  const Entry* find(std::string_view name) const;
  /// Throws kCorruptData if it has none.
  const Entry& get(std::string_view name) const;
  /// Position of the content; checks the local header.
  uint64_t payload(const Entry& entry);
  /// The content, if it is no longer than `max_size` and matches its CRC-32 (0: none was written).
  Bytes content(const Entry& entry, uint64_t max_size);
  /// Throws kCorruptData if the record should have a data descriptor that says what the directory says, and has not.
  /// `payload` = payload(entry).
  void check_descriptor(const Entry& entry, uint64_t payload);
  /// True if size and CRC-32 say that the content is `text`, without reading it.
  static bool is_known(const Entry& entry, std::string_view text);
  /// Loads a range with one read, so that what lies in it is at hand.
  void prefetch(uint64_t begin, uint64_t end);
  [[noreturn]] static void fail(const std::string& message, uint64_t offset);

 private:
  // Valid for some calls of it.
  ByteSpan view(uint64_t offset, uint64_t size);
  uint64_t find_end(uint64_t& window);
  void read_directory(uint64_t position, uint64_t size, uint64_t count);

  const ByteSource& source_;
  std::vector<std::pair<uint64_t, Bytes>> windows_;
  std::vector<Entry> entries_;
};

}  // namespace reshard::zip
