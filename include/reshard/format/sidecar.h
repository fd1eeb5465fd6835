// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The sidecar `.reshard-<save_id>-<rank>`: what a rank wrote in one save and the checksums of it, beside a DCP
// checkpoint. PyTorch ignores the file; `reshard verify` demands it where `.metadata` says that the save has sidecars.
//
// Layout, little-endian; varint = LEB128, text = varint length and UTF-8:
//   "RESHARD\x01"                     magic, the last byte is the layout's version
//   text library_version              of the writer
//   text save_id, varint rank, varint world_size
//   varint n; n times: text relative_path, varint size
//   varint n; n times: varint file, varint offset, varint length, varint payload_offset, u32 crc32
//   32 bytes                          SHA-256 of everything before

#include <cstdint>
#include <string>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/format/sha256.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

struct SidecarFile {
  std::string relative_path;
  uint64_t size = 0;
  friend bool operator==(const SidecarFile&, const SidecarFile&) = default;
};

/// One item: bytes [offset, offset + length) of files[file].
struct SidecarItem {
  uint32_t file = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t payload_offset = 0;  // of the tensor's elements, in the item; 0 for a value
  uint32_t crc32 = 0;           // of the whole item: headers, which carry no sum of their own, too
  friend bool operator==(const SidecarItem&, const SidecarItem&) = default;
};

struct Sidecar {
  std::string library_version;  // filled by decode; encode writes this library's own
  std::string save_id;
  int64_t rank = 0;
  int64_t world_size = 1;
  std::vector<SidecarFile> files;
  std::vector<SidecarItem> items;
  friend bool operator==(const Sidecar&, const Sidecar&) = default;
};

Bytes encode_sidecar(const Sidecar& sidecar);
/// Throws kCorruptData for anything but a whole, unchanged sidecar of a known layout; item ranges lie inside their
/// files.
Sidecar decode_sidecar(ByteSpan file);

/// ".reshard-<save_id>-<rank>".
std::string sidecar_name(const std::string& save_id, int64_t rank);
/// True for a name that sidecar_name() makes, of any save.
bool is_sidecar_name(const std::string& name);

/// Digest of a list of places: what a rank's vote says about what it wrote, and what the coordinator expects of it.
/// Order counts.
class ReceiptsDigest {
 public:
  void add(const MetadataIndex& index, const StorageInfo& storage);
  Sha256Digest finish();

 private:
  Sha256 hash_;
};

}  // namespace reshard
