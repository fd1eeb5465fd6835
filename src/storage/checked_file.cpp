// SPDX-License-Identifier: BSD-3-Clause
#include "storage/checked_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "core/stream_copy.h"
#include "reshard/format/crc32.h"
#include "storage/file_names.h"

namespace reshard {
namespace {

// A file that wants to be asked for no more at a time is read through a buffer that the core's own cache holds.
constexpr uint64_t kBufferBytes = 128 << 10;
// From so many bytes on, what is read will not stay in a cache; and the least that is worth a detour around it.
constexpr uint64_t kStreamedRead = 2 << 20;
constexpr size_t kStreamedPart = 2 << 10;
constexpr uint64_t kMaxSidecarBytes = uint64_t{4} << 30;
// Sidecars are kept for the files to come up to so many bytes. A load takes files rank by rank and needs one at a time.
constexpr uint64_t kKeptSidecarBytes = 256 << 20;

[[noreturn]] void differs(std::string_view what, uint64_t offset, uint32_t wanted, uint32_t found) {
  throw Error(ErrorCode::kCorruptData, "the stored bytes do not match their checksum: " + std::string(what),
              {.offset = offset, .wanted = std::to_string(wanted), .found = std::to_string(found)});
}

/// Copies `from` to the parts, one after the other.
void copy_to(std::span<const MutableByteSpan> parts, ByteSpan from, bool stream) {
  for (const MutableByteSpan& part : parts) {
    if (stream && part.size() >= kStreamedPart) {
      stream_copy(part.data(), from.data(), part.size());
    } else {
      std::memcpy(part.data(), from.data(), part.size());
    }
    from = from.subspan(part.size());
  }
}

}  // namespace

/// One running sum of blocks that are read one after the other: from the first one to the end of the run in its part, then
/// to the end of each next part.
class CheckedFile::RunningSum {
 public:
  /// Of the blocks from `first` to `end`. Borrows all.
  RunningSum(const CheckedFile& file, const BlockMap::Block& first, uint64_t end, std::string_view what)
      : file_(file),
        end_(end),
        what_(what),
        run_(first.begin),
        position_(first.begin),
        run_end_(std::min(first.part_end, end)),
        crc_(first.seed) {}

  /// Throws kCorruptData once a run has ended that does not match.
  void add(ByteSpan bytes) {
    while (!bytes.empty()) {
      const ByteSpan piece = bytes.first(static_cast<size_t>(std::min<uint64_t>(bytes.size(), run_end_ - position_)));
      crc_ = crc32(piece, crc_);
      position_ += piece.size();
      bytes = bytes.subspan(piece.size());
      if (position_ < run_end_) continue;
      if (crc_ != file_.blocks_->at(run_end_ - 1).sum) file_.name_changed_block(run_, run_end_, what_);
      if (position_ == end_) break;
      run_ = position_;
      run_end_ = std::min(file_.blocks_->at(position_).part_end, end_);
      crc_ = 0;
    }
  }

 private:
  const CheckedFile& file_;
  const uint64_t end_;
  const std::string_view what_;
  uint64_t run_;
  uint64_t position_;
  uint64_t run_end_;
  uint32_t crc_;
};

CheckedFile::CheckedFile(const RandomAccessFile& file, const SidecarFile* sums) : file_(file) {
  if (sums == nullptr) return;
  if (sums->size != file.size()) {
    throw Error(ErrorCode::kCorruptData, "the file's size is not the one of its sidecar",
                {.offset = std::min(sums->size, file.size()),
                 .wanted = std::to_string(sums->size) + " bytes",
                 .found = std::to_string(file.size()) + " bytes"});
  }
  blocks_.emplace(*sums);
}

uint64_t CheckedFile::block_end(uint64_t offset) const {
  return blocks_ && offset > 0 ? blocks_->at(offset - 1).end : offset;
}

CheckedFile::Read CheckedFile::read(uint64_t offset, std::span<const MutableByteSpan> parts,
                                    std::string_view what) const {
  uint64_t wanted = 0;
  for (const MutableByteSpan& part : parts) wanted += part.size();
  if (wanted == 0) return {};
  const bool checked = blocks_ && offset <= size() && wanted <= size() - offset;
  const uint64_t most = file_.preferred_read_bytes();
  const bool buffered = most <= kBufferBytes && (checked || wanted >= kStreamedRead);
  if (!checked && !buffered) {
    file_.read_scatter(offset, parts, what);
    return {wanted, 1};
  }
  const BlockMap::Block first = checked ? blocks_->at(offset) : BlockMap::Block{.begin = offset};
  const uint64_t end = checked ? block_end(offset + wanted) : offset + wanted;
  std::array<std::byte, kBlockBytes> before;
  std::array<std::byte, kBlockBytes> after;
  std::vector<MutableByteSpan> whole;
  whole.reserve(parts.size() + 2);
  if (offset > first.begin) whole.push_back(MutableByteSpan(before).first(static_cast<size_t>(offset - first.begin)));
  whole.insert(whole.end(), parts.begin(), parts.end());
  if (end > offset + wanted) whole.push_back(MutableByteSpan(after).first(static_cast<size_t>(end - offset - wanted)));

  // What a call has read is summed, and taken to its place, while the core's own cache has it: that is quicker than to
  // have the system copy it to its place, by way of the caches, and to fetch it from there.
  std::optional<RunningSum> sum;
  if (checked) sum.emplace(*this, first, end, what);
  Read done;
  std::array<std::byte, kBufferBytes> buffer;
  std::vector<MutableByteSpan> call;
  uint64_t in_call = 0;
  const auto read_call = [&] {
    const uint64_t at = first.begin + done.bytes;
    if (buffered) {
      const auto read = MutableByteSpan(buffer).first(static_cast<size_t>(in_call));
      file_.read_exactly(at, read, what);
      if (sum) sum->add(read);
      copy_to(call, read, wanted >= kStreamedRead);
    } else {
      file_.read_scatter(at, call, what);
      for (const MutableByteSpan& bytes : call) sum->add(bytes);
    }
    ++done.calls;
    done.bytes += in_call;
    call.clear();
    in_call = 0;
  };
  for (MutableByteSpan part : whole) {
    while (!part.empty()) {
      if (in_call == most) read_call();
      call.push_back(part.first(static_cast<size_t>(std::min<uint64_t>(part.size(), most - in_call))));
      in_call += call.back().size();
      part = part.subspan(call.back().size());
    }
  }
  read_call();
  return done;
}

/// Reads the run again, block by block.
void CheckedFile::name_changed_block(uint64_t begin, uint64_t end, std::string_view what) const {
  for (uint64_t at = begin; at < end;) {
    const BlockMap::Block block = blocks_->at(at);
    std::array<std::byte, kBlockBytes> bytes;
    const auto part = MutableByteSpan(bytes).first(static_cast<size_t>(block.end - block.begin));
    file_.read_exactly(block.begin, part, what);
    const uint32_t found = crc32(part, block.seed);
    if (found != block.sum) differs(what, block.begin, block.sum, found);
    at = block.end;
  }
  throw Error(ErrorCode::kCorruptData,
              "the bytes read did not match their checksum, but do when read again: " + std::string(what),
              {.offset = begin});
}

std::optional<int64_t> sidecar_rank(const Metadata& metadata, std::string_view relative_path) {
  const auto name = parse_data_file_name(relative_path);
  if (!metadata.sidecars || !name || name->rank >= static_cast<int64_t>(metadata.sidecars->size())) return std::nullopt;
  return name->rank;
}

std::shared_ptr<const Sidecars::Files> Sidecars::of_rank(int64_t rank) {
  const std::lock_guard lock(mutex_);
  if (const auto it = read_.find(rank); it != read_.end()) return it->second;
  if (!metadata_.storage_meta || !metadata_.storage_meta->save_id) {
    throw Error(ErrorCode::kCorruptData, "the catalogue has sidecars but does not name its save",
                {.file = ".metadata"});
  }
  const std::string& save_id = *metadata_.storage_meta->save_id;
  const std::string name = sidecar_name(save_id, rank);
  return with_error_context({.file = name}, [&] {
    const std::string path = join_path(directory_, name);
    if (!file_system_.status(path)) {
      throw Error(ErrorCode::kNotFound,
                  "the sidecar with the checksums of rank " + std::to_string(rank) + " is missing");
    }
    const Bytes bytes = file_system_.read_file(path, kMaxSidecarBytes);
    bytes_read_ += bytes.size();
    Sidecar sidecar = decode_sidecar(bytes);
    const auto world_size = static_cast<int64_t>(metadata_.sidecars->size());
    if (sidecar.save_id != save_id || sidecar.rank != rank || sidecar.world_size != world_size) {
      const auto who = [](const std::string& id, int64_t r, int64_t n) {
        return "save " + id + ", rank " + std::to_string(r) + " of " + std::to_string(n);
      };
      throw Error(
          ErrorCode::kCorruptData, "the sidecar is of another save or rank",
          {.wanted = who(save_id, rank, world_size), .found = who(sidecar.save_id, sidecar.rank, sidecar.world_size)});
    }
    const SidecarDigest& wanted = metadata_.sidecars->at(static_cast<size_t>(rank));
    if (const SidecarDigest found = sidecar_digest(bytes); found != wanted) {
      throw Error(ErrorCode::kCorruptData, "the sidecar is not the one that this save wrote",
                  {.wanted = "SHA-256 " + to_hex(wanted), .found = to_hex(found)});
    }
    if (kept_bytes_ + bytes.size() > kKeptSidecarBytes) {
      read_.clear();
      kept_bytes_ = 0;
    }
    kept_bytes_ += bytes.size();
    const auto files = std::make_shared<Files>();
    for (SidecarFile& file : sidecar.files) {
      std::string path_in_checkpoint = file.relative_path;
      if (!files->try_emplace(path_in_checkpoint, std::move(file)).second) {
        throw Error(ErrorCode::kCorruptData, "the sidecar lists a file twice", {.found = path_in_checkpoint});
      }
    }
    return read_[rank] = files;
  });
}

std::shared_ptr<const SidecarFile> Sidecars::of_file(const std::string& relative_path) {
  if (!metadata_.sidecars) return nullptr;
  if (const auto rank = sidecar_rank(metadata_, relative_path)) {
    const std::shared_ptr<const Files> files = of_rank(*rank);
    if (const auto it = files->find(relative_path); it != files->end()) return {files, &it->second};
  }
  throw Error(ErrorCode::kCorruptData, "no sidecar speaks of this file", {.file = relative_path});
}

}  // namespace reshard
