// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/sidecar.h"

#include <algorithm>
#include <limits>

namespace reshard {
namespace {

constexpr std::string_view kMagic = "RESHARD\x01";
constexpr std::string_view kPrefix = ".reshard-";
constexpr std::string_view kLibraryVersion = RESHARD_VERSION;

void require(bool ok, const std::string& message) {
  if (!ok) throw Error(ErrorCode::kCorruptData, "sidecar: " + message);
}

}  // namespace

Bytes encode_sidecar(const Sidecar& sidecar) {
  ByteWriter out;
  out.text(kMagic);
  out.string(kLibraryVersion);
  out.string(sidecar.save_id);
  out.varint(static_cast<uint64_t>(sidecar.rank));
  out.varint(static_cast<uint64_t>(sidecar.world_size));
  out.varint(sidecar.files.size());
  for (const SidecarFile& file : sidecar.files) {
    out.string(file.relative_path);
    out.varint(file.size);
  }
  out.varint(sidecar.items.size());
  for (const SidecarItem& item : sidecar.items) {
    out.varint(item.file);
    out.varint(item.offset);
    out.varint(item.length);
    out.varint(item.payload_offset);
    out.u32(item.crc32);
  }
  out.bytes(Sha256::of(out.buffer()));
  return out.take();
}

Sidecar decode_sidecar(ByteSpan file) {
  constexpr size_t kDigestSize = std::tuple_size_v<Sha256Digest>;
  require(file.size() >= kMagic.size() + kDigestSize, "too short");
  require(as_text(file.first(kMagic.size() - 1)) == kMagic.substr(0, kMagic.size() - 1), "no sidecar");
  if (as_text(file).substr(0, kMagic.size()) != kMagic) {
    throw Error(ErrorCode::kUnsupported, "sidecar: unknown layout",
                {.wanted = "1", .found = std::to_string(std::to_integer<int>(file[kMagic.size() - 1]))});
  }
  const ByteSpan body = file.first(file.size() - kDigestSize);
  require(std::ranges::equal(Sha256::of(body), file.last(kDigestSize)), "checksum differs: changed or cut off");

  ByteReader in(body, "sidecar");
  in.bytes(kMagic.size());
  Sidecar sidecar;
  sidecar.library_version = in.string();
  sidecar.save_id = in.string();
  const uint64_t rank = in.varint();
  const uint64_t world_size = in.varint();
  require(world_size <= std::numeric_limits<int32_t>::max() && rank < world_size, "rank is not below the world size");
  sidecar.rank = static_cast<int64_t>(rank);
  sidecar.world_size = static_cast<int64_t>(world_size);
  sidecar.files.resize(in.count(2));
  for (SidecarFile& entry : sidecar.files) {
    entry.relative_path = in.string();
    validate_relative_path(entry.relative_path, "");
    entry.size = in.varint();
  }
  sidecar.items.resize(in.count(8));
  for (SidecarItem& item : sidecar.items) {
    const uint64_t index = in.varint();
    require(index < sidecar.files.size(), "item of a file that is not listed");
    item.file = static_cast<uint32_t>(index);
    item.offset = in.varint();
    item.length = in.varint();
    item.payload_offset = in.varint();
    item.crc32 = in.u32();
    const uint64_t size = sidecar.files[index].size;
    require(item.offset <= size && item.length <= size - item.offset, "item leaves its file");
    require(item.payload_offset <= item.length, "payload leaves its item");
  }
  require(in.at_end(), "bytes left over");
  return sidecar;
}

std::string sidecar_name(const std::string& save_id, int64_t rank) {
  return std::string(kPrefix) + save_id + "-" + std::to_string(rank);
}

bool is_sidecar_name(const std::string& name) {
  if (!name.starts_with(kPrefix)) return false;
  const size_t dash = name.rfind('-');
  const bool has_id = dash > kPrefix.size() && dash != std::string::npos;
  return has_id && dash + 1 < name.size() &&
         std::all_of(name.begin() + static_cast<std::ptrdiff_t>(dash) + 1, name.end(),
                     [](char c) { return c >= '0' && c <= '9'; });
}

void ReceiptsDigest::add(const MetadataIndex& index, const StorageInfo& storage) {
  ByteWriter out;
  out.string(index.fqn);
  out.varint(index.offset ? index.offset->size() + 1 : 0);
  if (index.offset) {
    for (const int64_t v : *index.offset) out.i64(v);
  }
  out.string(storage.relative_path);
  out.u64(storage.offset);
  out.u64(storage.length);
  hash_.update(out.buffer());
}

Sha256Digest ReceiptsDigest::finish() { return hash_.finish(); }

}  // namespace reshard
