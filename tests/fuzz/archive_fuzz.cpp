// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as an item of a checkpoint: read as a tensor, as a value, and verified. What is understood is written anew
// and means the same.
#include <algorithm>

#include "fuzz/fuzz.h"
#include "reshard/format/crc32.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"

namespace reshard::fuzz {

namespace {

template <class Body>
void attempt(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported,
            "an archive is refused with kCorruptData or kUnsupported");
  }
}

void read_tensor(ByteSpan input) {
  const TensorItem item = bounded(256, input, [&] { return read_tensor_item(MemorySource(input)); });
  const Box all = whole_box(item.sizes);
  const ByteRange range = payload_range(item, all);
  const ByteSpan payload = input.subspan(item.payload_offset, item.payload_size);  // ends the program if it cannot
  require(range.begin <= range.end && range.end <= payload.size(), "the range of a tensor lies in its payload");
  const auto bytes = static_cast<size_t>(volume(item.sizes) * element_size(item.dtype));
  if (bytes > input.size()) return;  // expanded: the reader compares it with the catalogue before it allocates
  Bytes dense(bytes);
  copy_region(item, payload.subspan(range.begin, range.end - range.begin), all, dense);

  if (item.dtype >= DType::kQInt8 && item.dtype <= DType::kQUInt2x4) return;  // not written
  const TensorArchive archive(item.dtype, item.sizes, {.requires_grad = item.requires_grad});
  Bytes written = archive.head();
  written.insert(written.end(), dense.begin(), dense.end());
  const Bytes tail = archive.tail(crc32(dense));
  written.insert(written.end(), tail.begin(), tail.end());
  require(written.size() == archive.length(), "an archive has the length that was planned");
  verify_archive(MemorySource(written));
  const TensorItem back = read_tensor_item(MemorySource(written));
  require(back.dtype == item.dtype && back.sizes == item.sizes && back.requires_grad == item.requires_grad &&
              back.is_dense() && std::ranges::equal(ByteSpan(written).subspan(back.payload_offset, bytes), dense),
          "a tensor written anew is the same tensor");
}

void read_value(ByteSpan input) {
  const ValueArchive archive = bounded(256, input, [&] { return decode_value_archive(MemorySource(input)); });
  if (archive.root().kind() == pickle::Kind::kTuple || archive.root().kind() == pickle::Kind::kList) {
    for (const pickle::Value& item : archive.root().items()) attempt([&] { archive.as_tensor(item); });
  }
  attempt([&] { archive.as_tensor(archive.root()); });
  std::vector<ByteSpan> storages;
  for (int i = 0; const auto storage = archive.storage(std::to_string(i)); ++i) {
    storages.push_back(input.subspan(storage->offset, storage->size));
  }
  const Bytes pickled = pickle::write(archive.root());
  const Bytes written = encode_value_archive(archive.root(), storages);
  verify_archive(MemorySource(written));
  const ValueArchive back = decode_value_archive(MemorySource(written));
  require(pickle::write(back.root()) == pickled, "a value written anew is the same value");
  for (size_t i = 0; i < storages.size(); ++i) {
    const auto storage = back.storage(std::to_string(i));
    require(storage && std::ranges::equal(ByteSpan(written).subspan(storage->offset, storage->size), storages[i]),
            "a storage written anew is the same storage");
  }
}

}  // namespace

void target(ByteSpan input) {
  attempt([&] { read_tensor(input); });
  attempt([&] { read_value(input); });
  attempt([&] { bounded(256, input, [&] { return verify_archive(MemorySource(input)); }); });
}

}  // namespace reshard::fuzz
