// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a safetensors file, as its index and as the sharding information in its header. What is understood is
// written anew and means the same.
#include "reshard/format/safetensors.h"

#include "fuzz/fuzz.h"

namespace reshard::fuzz {

namespace {

template <class Body>
void attempt(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    require(error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported,
            "a safetensors file is refused with kCorruptData or kUnsupported");
  }
}

/// `data_bytes`: what follows the header.
void round_trip(ByteSpan header_bytes, uint64_t data_bytes) {
  const uint64_t file_size = header_bytes.size() + data_bytes;
  SafetensorsHeader header =
      bounded(256, header_bytes, [&] { return decode_safetensors_header(header_bytes, file_size); });
  uint64_t end = 0;
  for (const SafetensorsTensor& tensor : header.tensors) {
    require(tensor.begin == end && tensor.end >= end, "tensors lie one behind the other");
    end = tensor.end;
  }
  require(end == data_bytes, "tensors fill the data");
  bool is_reserved = false;
  for (const SafetensorsTensor& tensor : header.tensors) is_reserved |= tensor.name == kSafetensorsMetadataName;
  require(!is_reserved, "no tensor has the reserved name");
  const Bytes same = encode_safetensors_header(header);
  require(decode_safetensors_header(same, same.size() + end) == header, "a header survives being written");
  require(lay_out_safetensors(header.tensors) == end, "tensors laid out anew take as many bytes");
  const Bytes sorted = encode_safetensors_header(header);
  require(decode_safetensors_header(sorted, sorted.size() + end).tensors.size() == header.tensors.size(),
          "a header laid out anew is a header");
}

}  // namespace

void target(ByteSpan input) {
  attempt([&] {
    const uint64_t begin = safetensors_data_begin(input, input.size());
    round_trip(input.first(static_cast<size_t>(begin)), input.size() - begin);
  });
  // The JSON alone, behind a length that fits, as long as its tensors say.
  attempt([&] {
    ByteWriter out;
    out.u64(input.size());
    out.bytes(input);
    for (const uint64_t data_bytes : {0, 1, 4, 8, 64}) {
      attempt([&] { round_trip(out.buffer(), data_bytes); });
    }
  });
  attempt([&] {
    const SafetensorsIndex index = bounded(256, input, [&] { return decode_safetensors_index(input); });
    require(decode_safetensors_index(encode_safetensors_index(index)) == index, "an index survives being written");
  });
  attempt([&] {
    const auto files = bounded(256, input, [&] { return decode_safetensors_shards(input); });
    require(decode_safetensors_shards(encode_safetensors_shards(files)) == files, "a list survives being written");
  });
  attempt([&] {
    const SafetensorsSharding sharding = bounded(256, input, [&] { return decode_sharding_info(as_text(input)); });
    require(decode_sharding_info(encode_sharding_info(sharding)) == sharding,
            "sharding information survives being written");
  });
}

}  // namespace reshard::fuzz
