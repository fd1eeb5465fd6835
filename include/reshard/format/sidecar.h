// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The sidecar `.reshard-<save_id>-<rank>`: checksums of all data files that a rank wrote in one save, beside a DCP
// checkpoint. PyTorch ignores the file; `.metadata` holds the digest of each rank's sidecar.
//
// A file is cut into parts: before and after every tensor payload of a block or more. Each part is divided into blocks
// of 4 KiB that start at its begin, so that in a payload block 0 starts at the first element; the last block of a part
// may be short. What is kept for a block is the CRC-32 of its part up to the end of the block. So the sum of a
// part that is one payload is the CRC-32 of its zip record, made in the same pass; a block is checked by going on from
// the sum before it, and a run of blocks by one pass over its bytes. 4 KiB, because files are read from disks and page
// caches in pages of that size: to read whole blocks costs little that is not read anyway. The sums take a thousandth
// of the data.
//
// Layout, little-endian; varint = LEB128, text = varint length and UTF-8:
//   "RESHARD\x02"                     magic, the last byte is the layout's version
//   text library_version              of the writer
//   text save_id, varint rank, varint world_size
//   varint n; n times:                a data file
//     text relative_path, varint size
//     varint m; m varints             where its parts but the first begin, each as the distance to the one before
//     u32 for each block              in order
//   32 bytes                          SHA-256 of everything before

#include <cstdint>
#include <string>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/format/sha256.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

inline constexpr uint64_t kBlockBytes = 4096;

/// The sums of one data file.
struct SidecarFile {
  std::string relative_path;
  uint64_t size = 0;
  std::vector<uint64_t> cuts;  // where parts begin, ascending; not 0, less than size
  std::vector<uint32_t> sums;  // a block
  friend bool operator==(const SidecarFile&, const SidecarFile&) = default;
};

struct Sidecar {
  std::string library_version;  // filled by decode; encode writes this library's own
  std::string save_id;
  int64_t rank = 0;
  int64_t world_size = 1;
  std::vector<SidecarFile> files;
  friend bool operator==(const Sidecar&, const Sidecar&) = default;
};

Bytes encode_sidecar(const Sidecar& sidecar);
/// Throws kCorruptData for anything but a whole, unchanged sidecar of a known layout; cuts and the number of sums fit
/// the sizes.
Sidecar decode_sidecar(ByteSpan file);
/// What `.metadata` keeps of an encoded sidecar: the SHA-256 at its end.
SidecarDigest sidecar_digest(ByteSpan file);

/// ".reshard-<save_id>-<rank>".
std::string sidecar_name(const std::string& save_id, int64_t rank);
/// True for a name that sidecar_name() makes, of any save.
bool is_sidecar_name(const std::string& name);

/// Makes the sums of a file while it is written, front to back.
class BlockSummer {
 public:
  void add(ByteSpan bytes);
  /// Ends a part here and begins the next. Returns the CRC-32 of the part that ended. Parts are not empty.
  uint32_t cut();
  /// Size, cuts and sums of all that was added. Called once, at the end.
  SidecarFile finish(std::string relative_path);

 private:
  SidecarFile file_;
  uint64_t part_begin_ = 0;
  uint32_t crc_ = 0;  // of the part so far
};

/// Finds the blocks of a file. Borrows the sums.
class BlockMap {
 public:
  explicit BlockMap(const SidecarFile& file);

  struct Block {
    uint64_t begin = 0;
    uint64_t end = 0;
    uint64_t part_end = 0;
    uint32_t seed = 0;  // CRC-32 of the part before the block
    uint32_t sum = 0;   // and up to its end
  };
  /// The block that holds the byte at `offset`, which lies in the file.
  Block at(uint64_t offset) const;

 private:
  const SidecarFile& file_;
  std::vector<size_t> first_sums_;  // of each part
};

/// Digest of a list of places: what a rank's vote says about what it wrote, and what the coordinator expects of it.
/// Order counts.
class ReceiptsDigest {
 public:
  void add(const MetadataIndex& index, const StorageInfo& storage);
  Sha256Digest finish();

 private:
  void hash_entries();

  Sha256 hash_;
  ByteWriter entries_;  // not hashed yet: they are short, and a call of the hash is not
};

}  // namespace reshard
