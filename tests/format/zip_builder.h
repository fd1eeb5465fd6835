// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Zip archives made field by field, to have every legal layout and every broken one that torch would not write.

#include <functional>
#include <string>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/format/crc32.h"

namespace reshard {

struct ZipRecord {
  std::string name;
  Bytes content;
  // What the two headers say; null keeps the truth.
  std::function<void(Bytes& local)> edit_local = nullptr;      // fixed part, 30 bytes
  std::function<void(Bytes& entry)> edit_directory = nullptr;  // fixed part, 46 bytes
  std::string local_name = {};                                 // empty: name
  Bytes local_extra = {};
  Bytes directory_extra = {};
};

template <class T>
void poke(Bytes& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

/// Plain zip32: sizes and CRC-32 in the local headers, no descriptors, no zip64 records.
inline Bytes build_zip(const std::vector<ZipRecord>& records, const std::function<void(Bytes& end)>& edit_end = nullptr,
                       const std::string& comment = "") {
  ByteWriter out, directory;
  for (const ZipRecord& record : records) {
    const auto header = static_cast<uint32_t>(out.size());
    const auto size = static_cast<uint32_t>(record.content.size());
    const std::string& local_name = record.local_name.empty() ? record.name : record.local_name;
    Bytes local(30);
    poke<uint32_t>(local, 0, 0x04034b50);
    poke<uint32_t>(local, 14, crc32(record.content));
    poke<uint32_t>(local, 18, size);
    poke<uint32_t>(local, 22, size);
    poke<uint16_t>(local, 26, static_cast<uint16_t>(local_name.size()));
    poke<uint16_t>(local, 28, static_cast<uint16_t>(record.local_extra.size()));
    if (record.edit_local) record.edit_local(local);
    out.bytes(local);
    out.text(local_name);
    out.bytes(record.local_extra);
    out.bytes(record.content);
    Bytes entry(46);
    poke<uint32_t>(entry, 0, 0x02014b50);
    poke<uint32_t>(entry, 16, crc32(record.content));
    poke<uint32_t>(entry, 20, size);
    poke<uint32_t>(entry, 24, size);
    poke<uint16_t>(entry, 28, static_cast<uint16_t>(record.name.size()));
    poke<uint16_t>(entry, 30, static_cast<uint16_t>(record.directory_extra.size()));
    poke<uint32_t>(entry, 42, header);
    if (record.edit_directory) record.edit_directory(entry);
    directory.bytes(entry);
    directory.text(record.name);
    directory.bytes(record.directory_extra);
  }
  const auto position = static_cast<uint32_t>(out.size());
  out.bytes(directory.buffer());
  Bytes end(22);
  poke<uint32_t>(end, 0, 0x06054b50);
  poke<uint16_t>(end, 8, static_cast<uint16_t>(records.size()));
  poke<uint16_t>(end, 10, static_cast<uint16_t>(records.size()));
  poke<uint32_t>(end, 12, static_cast<uint32_t>(directory.size()));
  poke<uint32_t>(end, 16, position);
  poke<uint16_t>(end, 20, static_cast<uint16_t>(comment.size()));
  if (edit_end) edit_end(end);
  out.bytes(end);
  out.text(comment);
  return out.take();
}

inline Bytes bytes_of(std::string_view text) {
  const ByteSpan bytes = as_bytes(text);
  return {bytes.begin(), bytes.end()};
}

}  // namespace reshard
