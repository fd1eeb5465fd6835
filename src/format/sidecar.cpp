// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/sidecar.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "reshard/format/crc32.h"

namespace reshard {
namespace {

constexpr std::string_view kMagic = "RESHARD\x02";
constexpr std::string_view kPrefix = ".reshard-";
constexpr std::string_view kLibraryVersion = RESHARD_VERSION;
constexpr size_t kHashedBytes = 4 << 10;  // of receipts, in one call

void require(bool ok, const std::string& message) {
  if (!ok) throw Error(ErrorCode::kCorruptData, "sidecar: " + message);
}

/// Number of blocks of the parts between the cuts, if it is at most `limit`.
size_t block_count(const SidecarFile& file, uint64_t limit) {
  uint64_t count = 0;
  for (size_t part = 0; part <= file.cuts.size(); ++part) {
    const uint64_t begin = part == 0 ? 0 : file.cuts[part - 1];
    const uint64_t end = part == file.cuts.size() ? file.size : file.cuts[part];
    const uint64_t blocks = (end - begin) / kBlockBytes + ((end - begin) % kBlockBytes != 0);
    require(blocks <= limit - count, "fewer sums than blocks");
    count += blocks;
  }
  return static_cast<size_t>(count);
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
    out.varint(file.cuts.size());
    uint64_t before = 0;
    for (const uint64_t cut : file.cuts) out.varint(cut - std::exchange(before, cut));
    out.bytes(std::as_bytes(std::span(file.sums)));
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
                {.wanted = "2", .found = std::to_string(std::to_integer<int>(file[kMagic.size() - 1]))});
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
  sidecar.files.resize(in.count(4));
  for (SidecarFile& entry : sidecar.files) {
    entry.relative_path = in.string();
    validate_relative_path(entry.relative_path, "");
    entry.size = in.varint();
    entry.cuts.resize(in.count());
    uint64_t before = 0;
    for (uint64_t& cut : entry.cuts) {
      const uint64_t distance = in.varint();
      require(distance > 0 && distance < entry.size - before, "part is empty or leaves its file");
      cut = before += distance;
    }
    const size_t blocks = block_count(entry, in.remaining() / sizeof(uint32_t));
    entry.sums.resize(blocks);
    const ByteSpan sums = in.bytes(blocks * sizeof(uint32_t));
    if (blocks != 0) std::memcpy(entry.sums.data(), sums.data(), sums.size());
  }
  require(in.at_end(), "bytes left over");
  return sidecar;
}

SidecarDigest sidecar_digest(ByteSpan file) {
  SidecarDigest digest;
  std::ranges::copy(file.last(digest.size()), digest.begin());
  return digest;
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

void BlockSummer::add(ByteSpan bytes) {
  while (!bytes.empty()) {
    const uint64_t filled = (file_.size - part_begin_) % kBlockBytes;
    const ByteSpan piece = bytes.first(std::min<uint64_t>(bytes.size(), kBlockBytes - filled));
    crc_ = crc32(piece, crc_);
    file_.size += piece.size();
    if (filled + piece.size() == kBlockBytes) file_.sums.push_back(crc_);
    bytes = bytes.subspan(piece.size());
  }
}

uint32_t BlockSummer::cut() {
  if ((file_.size - part_begin_) % kBlockBytes != 0) file_.sums.push_back(crc_);
  file_.cuts.push_back(part_begin_ = file_.size);
  return std::exchange(crc_, 0);
}

SidecarFile BlockSummer::finish(std::string relative_path) {
  if ((file_.size - part_begin_) % kBlockBytes != 0) file_.sums.push_back(crc_);
  file_.relative_path = std::move(relative_path);
  return std::move(file_);
}

BlockMap::BlockMap(const SidecarFile& file) : file_(file) {
  first_sums_.reserve(file.cuts.size() + 1);
  size_t first = 0;
  uint64_t begin = 0;
  first_sums_.push_back(0);
  for (const uint64_t cut : file.cuts) {
    first += static_cast<size_t>((cut - begin + kBlockBytes - 1) / kBlockBytes);
    first_sums_.push_back(first);
    begin = cut;
  }
}

BlockMap::Block BlockMap::at(uint64_t offset) const {
  const auto next = std::ranges::upper_bound(file_.cuts, offset);
  const auto part = static_cast<size_t>(next - file_.cuts.begin());
  const uint64_t part_begin = part == 0 ? 0 : file_.cuts[part - 1];
  const auto number = static_cast<size_t>((offset - part_begin) / kBlockBytes);
  Block block;
  block.begin = part_begin + number * kBlockBytes;
  block.part_end = next == file_.cuts.end() ? file_.size : *next;
  block.end = std::min(block.begin + kBlockBytes, block.part_end);
  block.seed = number == 0 ? 0 : file_.sums[first_sums_[part] + number - 1];
  block.sum = file_.sums[first_sums_[part] + number];
  return block;
}

void ReceiptsDigest::add(const MetadataIndex& index, const StorageInfo& storage) {
  ByteWriter& out = entries_;
  out.string(index.fqn);
  out.varint(index.offset ? index.offset->size() + 1 : 0);
  if (index.offset) {
    for (const int64_t v : *index.offset) out.i64(v);
  }
  out.string(storage.relative_path);
  out.u64(storage.offset);
  out.u64(storage.length);
  for (const std::string& descriptor : storage.transform_descriptors) out.string(descriptor);
  if (out.size() >= kHashedBytes) hash_entries();
}

void ReceiptsDigest::hash_entries() {
  hash_.update(entries_.buffer());
  entries_.buffer().clear();
}

Sha256Digest ReceiptsDigest::finish() {
  hash_entries();
  return hash_.finish();
}

}  // namespace reshard
