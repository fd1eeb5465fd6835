// SPDX-License-Identifier: BSD-3-Clause
#include "format/zip.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <unordered_set>

#include "reshard/format/crc32.h"

namespace reshard::zip {
namespace {

constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kDescriptorSignature = 0x08074b50;
constexpr uint32_t kDirectorySignature = 0x02014b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kLocatorSignature = 0x07064b50;
constexpr uint32_t kEndSignature = 0x06054b50;

constexpr uint64_t kLocalSize = 30;
constexpr uint64_t kDirectorySize = 46;
constexpr uint64_t kEnd64Size = 56;
constexpr uint64_t kLocatorSize = 20;
constexpr uint64_t kEndRecordSize = 22;
constexpr uint64_t kMaxComment = 0xFFFF;

constexpr uint16_t kEncrypted = 0x0001;
constexpr uint16_t kHasDescriptor = 0x0008;
constexpr uint16_t kUtf8Names = 0x0800;

constexpr uint16_t kZip64Block = 0x0001;
constexpr uint16_t kPaddingBlock = 'F' | 'B' << 8;

// Largest directory that is read into memory.
constexpr uint64_t kMaxDirectory = 256 << 20;

constexpr bool needs_64(uint64_t v) { return v >= 0xFFFFFFFF; }
uint32_t clamp32(uint64_t v) { return needs_64(v) ? 0xFFFFFFFF : static_cast<uint32_t>(v); }

// Length of the zip64 block of a record: two sizes and the position, those that need it.
uint16_t zip64_length(uint64_t size, uint64_t header) {
  return static_cast<uint16_t>((needs_64(size) ? 16 : 0) + (needs_64(header) ? 8 : 0));
}
void put_zip64_block(ByteWriter& out, const Record& record, uint64_t stored_size) {
  const uint16_t length = zip64_length(record.size, record.header);
  if (length == 0) return;
  out.u16(kZip64Block);
  out.u16(length);
  if (needs_64(record.size)) {
    out.u64(record.size);
    out.u64(stored_size);
  }
  if (needs_64(record.header)) out.u64(record.header);
}
uint64_t zip64_block_size(uint64_t size, uint64_t header) {
  const uint16_t length = zip64_length(size, header);
  return length == 0 ? 0 : 4u + length;
}
bool has_long_descriptor(uint64_t size, uint64_t header) { return needs_64(size) || needs_64(header); }

template <class T>
T little(ByteSpan data, size_t at) {
  T v;
  std::memcpy(&v, data.data() + at, sizeof(T));
  return v;
}

}  // namespace

// --- writing ---------------------------------------------------------------------------------------------------------

uint64_t payload_position(uint64_t header, size_t name_length, uint64_t size, uint32_t alignment) {
  const uint64_t start = header + kLocalSize + name_length + zip64_block_size(size, header) + 4;
  return (start + alignment - 1) & ~uint64_t{alignment - 1};
}

uint64_t end_position(uint64_t header, uint64_t payload, uint64_t size) {
  if (size == 0) return payload;
  return payload + size + (has_long_descriptor(size, header) ? 24 : 16);
}

void put_local_header(ByteWriter& out, const Record& record) {
  const uint64_t extra = record.payload - record.header - kLocalSize - record.name.size();
  out.u32(kLocalSignature);
  out.u16(0);
  out.u16(record.size == 0 ? kUtf8Names : kUtf8Names | kHasDescriptor);
  for (int i = 0; i < 3; ++i) out.u16(0);  // method, time, date
  for (int i = 0; i < 3; ++i) out.u32(0);  // CRC-32 and sizes stand in the descriptor
  out.u16(static_cast<uint16_t>(record.name.size()));
  out.u16(static_cast<uint16_t>(extra));
  out.text(record.name);
  put_zip64_block(out, record, 0);  // torch leaves the second size to the directory
  const uint64_t padding = extra - zip64_block_size(record.size, record.header) - 4;
  out.u16(kPaddingBlock);
  out.u16(static_cast<uint16_t>(padding));
  out.buffer().resize(out.size() + padding, std::byte{'Z'});
}

void put_descriptor(ByteWriter& out, const Record& record) {
  if (record.size == 0) return;
  out.u32(kDescriptorSignature);
  out.u32(record.crc32);
  for (int i = 0; i < 2; ++i) {
    if (has_long_descriptor(record.size, record.header)) {
      out.u64(record.size);
    } else {
      out.u32(static_cast<uint32_t>(record.size));
    }
  }
}

uint64_t directory_entry_size(const Record& record) {
  return kDirectorySize + record.name.size() + zip64_block_size(record.size, record.header);
}

void put_tail(ByteWriter& out, std::span<const Record> records, uint64_t directory) {
  uint64_t size = 0;
  for (const Record& record : records) {
    size += directory_entry_size(record);
    out.u32(kDirectorySignature);
    out.u16(0);  // made by
    out.u16(0);  // version needed
    out.u16(record.size == 0 ? kUtf8Names : kUtf8Names | kHasDescriptor);
    for (int i = 0; i < 3; ++i) out.u16(0);  // method, time, date
    out.u32(record.crc32);
    out.u32(clamp32(record.size));
    out.u32(clamp32(record.size));
    out.u16(static_cast<uint16_t>(record.name.size()));
    out.u16(static_cast<uint16_t>(zip64_block_size(record.size, record.header)));
    for (int i = 0; i < 3; ++i) out.u16(0);  // comment length, disk, internal attributes
    out.u32(0);                              // external attributes
    out.u32(clamp32(record.header));
    out.text(record.name);
    put_zip64_block(out, record, record.size);
  }
  const uint64_t end64 = directory + size;
  out.u32(kEnd64Signature);
  out.u64(kEnd64Size - 12);
  out.u16(798);  // made by, as torch says
  out.u16(45);
  out.u32(0);
  out.u32(0);
  out.u64(records.size());
  out.u64(records.size());
  out.u64(size);
  out.u64(directory);
  out.u32(kLocatorSignature);
  out.u32(0);
  out.u64(end64);
  out.u32(1);
  out.u32(kEndSignature);
  out.u16(0);
  out.u16(0);
  const auto count = static_cast<uint16_t>(std::min<size_t>(records.size(), 0xFFFF));
  out.u16(count);
  out.u16(count);
  out.u32(clamp32(size));
  out.u32(clamp32(directory));
  out.u16(0);
}

// --- reading ---------------------------------------------------------------------------------------------------------

void Reader::fail(const std::string& message, uint64_t offset) {
  throw Error(ErrorCode::kCorruptData, "archive: " + message, {.offset = offset});
}

Reader::Reader(const ByteSource& source) : source_(source) {
  if (source.size() < kEndRecordSize) fail("too short for a zip archive", 0);
  uint64_t window = 0;
  const uint64_t end = find_end(window);
  const ByteSpan record = view(end, kEndRecordSize);
  uint64_t count = little<uint16_t>(record, 10);
  uint64_t size = little<uint32_t>(record, 12);
  uint64_t position = little<uint32_t>(record, 16);
  uint64_t directory_limit = end;
  const bool one_disk =
      little<uint16_t>(record, 4) == 0 && little<uint16_t>(record, 6) == 0 && little<uint16_t>(record, 8) == count;

  if (end >= kLocatorSize && little<uint32_t>(view(end - kLocatorSize, 4), 0) == kLocatorSignature) {
    const auto end64 = little<uint64_t>(view(end - kLocatorSize, kLocatorSize), 8);
    if (end < kLocatorSize + kEnd64Size || end64 > end - kLocatorSize - kEnd64Size)
      fail("zip64 end record is out of place", end);
    const ByteSpan record64 = view(end64, kEnd64Size);
    if (little<uint32_t>(record64, 0) != kEnd64Signature) fail("zip64 end record is not there", end64);
    const auto length = little<uint64_t>(record64, 4);
    if (length < kEnd64Size - 12 || length > end - kLocatorSize - end64 - 12)
      fail("zip64 end record has a wrong length", end64);
    const auto take = [&](uint64_t& value, uint64_t value64, uint64_t unset) {
      if (value != unset && value != value64) fail("the two end records disagree", end64);
      value = value64;
    };
    take(count, little<uint64_t>(record64, 32), 0xFFFF);
    take(size, little<uint64_t>(record64, 40), 0xFFFFFFFF);
    take(position, little<uint64_t>(record64, 48), 0xFFFFFFFF);
    if (little<uint64_t>(record64, 24) != count) fail("archive spans several disks", end64);
    directory_limit = end64;
  } else if (!one_disk) {
    fail("archive spans several disks", end);
  }
  if (position > directory_limit || size > directory_limit - position) fail("directory is out of place", end);
  if (count > size / kDirectorySize) fail("more records than the directory can hold", end);
  if (size > kMaxDirectory) fail("directory is too large", end);
  read_directory(position, size, count);
}

uint64_t Reader::find_end(uint64_t& window) {
  // The first try serves every archive of torch that holds one tensor; the last is as far back as a comment can push
  // the record.
  const uint64_t total = source_.size();
  for (const uint64_t reach : {uint64_t{1024}, uint64_t{4096}, kEndRecordSize + kMaxComment}) {
    window = total <= 4096 ? total : std::min(total, reach);
    const ByteSpan data = view(total - window, window);
    for (size_t at = window - kEndRecordSize + 1; at-- > 0;) {
      if (little<uint32_t>(data, at) != kEndSignature) continue;
      if (little<uint16_t>(data, at + 20) > window - kEndRecordSize - at) continue;
      return total - window + at;
    }
    if (window == total) break;
  }
  fail("no end record: not a zip archive, or cut off", total);
}

void Reader::read_directory(uint64_t position, uint64_t size, uint64_t count) {
  const ByteSpan directory = view(position, size);
  entries_.reserve(count);
  std::string folder;
  size_t at = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t here = position + at;
    if (directory.size() - at < kDirectorySize) fail("directory ends too early", here);
    const ByteSpan fixed = directory.subspan(at, kDirectorySize);
    if (little<uint32_t>(fixed, 0) != kDirectorySignature) fail("directory entry is not there", here);
    const size_t name_length = little<uint16_t>(fixed, 28);
    const size_t extra_length = little<uint16_t>(fixed, 30);
    const size_t comment_length = little<uint16_t>(fixed, 32);
    if (name_length + extra_length + comment_length > directory.size() - at - kDirectorySize)
      fail("directory entry is cut off", here);

    Entry entry;
    entry.stored_name = as_text(directory.subspan(at + kDirectorySize, name_length));
    entry.flags = little<uint16_t>(fixed, 8);
    entry.crc32 = little<uint32_t>(fixed, 16);
    const auto method = little<uint16_t>(fixed, 10);
    if ((entry.flags & kEncrypted) != 0)
      throw Error(ErrorCode::kUnsupported, "archive: record " + entry.stored_name + " is encrypted", {.offset = here});
    if (method != 0) {
      throw Error(ErrorCode::kUnsupported, "archive: record " + entry.stored_name + " is compressed",
                  {.offset = here, .wanted = "method 0 (stored)", .found = "method " + std::to_string(method)});
    }
    uint64_t stored_size = little<uint32_t>(fixed, 20);
    entry.size = little<uint32_t>(fixed, 24);
    entry.header = little<uint32_t>(fixed, 42);

    ByteSpan extra = directory.subspan(at + kDirectorySize + name_length, extra_length);
    bool found_64 = false;
    while (extra.size() >= 4) {
      const auto id = little<uint16_t>(extra, 0);
      const size_t length = little<uint16_t>(extra, 2);
      if (length > extra.size() - 4) fail("extra block is cut off", here);
      if (id == kZip64Block && !found_64) {
        found_64 = true;
        ByteReader values(extra.subspan(4, length), "zip64 block");
        if (entry.size == 0xFFFFFFFF) entry.size = values.u64();
        if (stored_size == 0xFFFFFFFF) stored_size = values.u64();
        if (entry.header == 0xFFFFFFFF) entry.header = values.u64();
      }
      extra = extra.subspan(4 + length);
    }
    if (stored_size != entry.size) fail("record " + entry.stored_name + " has two sizes", here);
    if (entry.header > position || entry.size > position - entry.header)
      fail("record " + entry.stored_name + " is out of place", here);

    const size_t slash = entry.stored_name.find('/');
    if (i == 0) {
      if (slash == std::string::npos) fail("record " + entry.stored_name + " has no top folder", here);
      folder = entry.stored_name.substr(0, slash + 1);
    }
    if (entry.stored_name.starts_with(folder)) entry.name = entry.stored_name.substr(folder.size());
    entries_.push_back(std::move(entry));
    at += kDirectorySize + name_length + extra_length + comment_length;
  }

  // Records must be apart, and no name twice, also not in another case, as PyTorch compares them.
  std::vector<size_t> order(entries_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::sort(order, {}, [&](size_t i) { return entries_[i].header; });
  std::unordered_set<std::string> names;
  for (size_t i = 0; i < order.size(); ++i) {
    Entry& entry = entries_[order[i]];
    entry.limit = i + 1 < order.size() ? entries_[order[i + 1]].header : position;
    if (entry.limit - entry.header < kLocalSize + entry.stored_name.size() + entry.size)
      fail("record " + entry.stored_name + " overlaps what follows it", entry.header);
    std::string folded = entry.stored_name;
    for (char& c : folded) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    if (!names.insert(std::move(folded)).second) fail("two records are named " + entry.stored_name, entry.header);
  }
}

const Entry* Reader::find(std::string_view name) const {
  const auto it = std::ranges::find(entries_, name, &Entry::name);
  return it == entries_.end() || name.empty() ? nullptr : &*it;
}

const Entry& Reader::get(std::string_view name) const {
  const Entry* entry = find(name);
  if (entry == nullptr) fail("no record " + std::string(name), source_.size());
  return *entry;
}

uint64_t Reader::payload(const Entry& entry) {
  // entry.limit leaves room for the fixed part, the name and the content.
  const ByteSpan header = view(entry.header, kLocalSize + entry.stored_name.size());
  if (little<uint32_t>(header, 0) != kLocalSignature)
    fail("record " + entry.stored_name + " has no local header", entry.header);
  const uint64_t name_length = little<uint16_t>(header, 26);
  const uint64_t extra_length = little<uint16_t>(header, 28);
  if (name_length != entry.stored_name.size() || as_text(header.subspan(kLocalSize)) != entry.stored_name) {
    fail("record " + entry.stored_name + " has another name in its local header", entry.header);
  }
  if ((little<uint16_t>(header, 6) & kEncrypted) != 0 || little<uint16_t>(header, 8) != 0) {
    fail("record " + entry.stored_name + " is stored otherwise than the directory says", entry.header);
  }
  const uint64_t position = entry.header + kLocalSize + name_length + extra_length;
  if (position > entry.limit || entry.size > entry.limit - position)
    fail("record " + entry.stored_name + " overlaps what follows it", entry.header);
  return position;
}

Bytes Reader::content(const Entry& entry, uint64_t max_size) {
  if (entry.size > max_size) {
    throw Error(ErrorCode::kCorruptData, "archive: record " + entry.stored_name + " is too large",
                {.offset = entry.header,
                 .wanted = "at most " + std::to_string(max_size) + " bytes",
                 .found = std::to_string(entry.size)});
  }
  const uint64_t at = payload(entry);
  const ByteSpan data = view(at, entry.size);
  // 0: the writer left it out. A changed stride would otherwise pass for a tensor of other values.
  if (entry.crc32 != 0 && crc32(data) != entry.crc32) {
    fail("record " + entry.stored_name + " does not match its CRC-32", at);
  }
  return {data.begin(), data.end()};
}

void Reader::check_descriptor(const Entry& entry, uint64_t payload) {
  if ((entry.flags & kHasDescriptor) == 0) return;
  const uint64_t at = payload + entry.size;
  // Signature (optional), CRC-32, then both sizes in 4 or 8 bytes each.
  const ByteSpan data = view(at, std::min<uint64_t>(entry.limit - at, 24));
  const size_t signature = data.size() >= 4 && little<uint32_t>(data, 0) == kDescriptorSignature ? 4 : 0;
  const bool has_32 = data.size() >= signature + 12 && little<uint32_t>(data, signature) == entry.crc32 &&
                      little<uint32_t>(data, signature + 4) == clamp32(entry.size) &&
                      little<uint32_t>(data, signature + 8) == clamp32(entry.size);
  const bool has_64 = data.size() >= signature + 20 && little<uint32_t>(data, signature) == entry.crc32 &&
                      little<uint64_t>(data, signature + 4) == entry.size &&
                      little<uint64_t>(data, signature + 12) == entry.size;
  if (!has_32 && !has_64)
    fail("record " + entry.stored_name + " has a data descriptor that differs from the directory", at);
}

bool Reader::is_known(const Entry& entry, std::string_view text) {
  return entry.size == text.size() && entry.crc32 == crc32(as_bytes(text));
}

void Reader::prefetch(uint64_t begin, uint64_t end) { view(begin, end - begin); }

ByteSpan Reader::view(uint64_t offset, uint64_t size) {
  if (offset > source_.size() || size > source_.size() - offset) fail("range leaves the item", offset);
  for (const auto& [begin, data] : windows_) {
    if (offset >= begin && size <= data.size() && offset - begin <= data.size() - size)
      return ByteSpan(data).subspan(offset - begin, size);
  }
  // The first ones are the archive's two ends. Of the others the oldest goes: the time that many records take is in
  // proportion to them.
  constexpr size_t kMaxWindows = 16;
  if (windows_.size() == kMaxWindows) windows_.erase(windows_.begin() + kMaxWindows / 2);
  Bytes data(size);
  source_.read(offset, data);
  return windows_.emplace_back(offset, std::move(data)).second;
}

}  // namespace reshard::zip
