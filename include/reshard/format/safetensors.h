// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Hugging Face safetensors: the header at the front of a file, and the JSON texts that go with it.
//
//   8 bytes              n, the length of the header, little-endian
//   n bytes              the header: a JSON object of name -> {dtype, shape, data_offsets}, and `__metadata__`
//   data area            the elements, dense, row-major, little-endian, without holes
//
// All decoders throw kCorruptData for anything else, kUnsupported for what is well formed and has no place here (dtypes
// without a counterpart), with the key where there is one. They take memory in proportion to their input. Pure and
// thread-safe.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/core/dims.h"
#include "reshard/core/dtype.h"
#include "reshard/core/ordered_map.h"

namespace reshard {

/// Longest header that is read or written, as in the format's own library.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;
/// Of the length in front of the header.
inline constexpr size_t kSafetensorsPrefixBytes = 8;
/// The name in a header that is no tensor.
inline constexpr std::string_view kSafetensorsMetadataName = "__metadata__";

/// The format's name of a dtype ("BF16"); nothing for dtypes that it does not have.
std::optional<std::string_view> safetensors_dtype_name(DType dtype);

struct SafetensorsTensor {
  std::string name;
  DType dtype = DType::kFloat32;
  Dims shape;  // as PyTorch has it: F4 counts pairs in the last dimension, one byte each
  uint64_t begin = 0;
  uint64_t end = 0;  // bytes [begin, end) of the data area
  friend bool operator==(const SafetensorsTensor&, const SafetensorsTensor&) = default;
};

struct SafetensorsHeader {
  std::vector<SafetensorsTensor> tensors;           // in the order of their bytes
  OrderedMap<std::string, std::string> metadata{};  // `__metadata__`
  friend bool operator==(const SafetensorsHeader&, const SafetensorsHeader&) = default;
};

/// Bytes in front of the data area, from the first kSafetensorsPrefixBytes bytes of a file (or fewer, if it has fewer).
uint64_t safetensors_data_begin(ByteSpan prefix, uint64_t file_size);

/// `bytes` are the safetensors_data_begin() first bytes of a file of `file_size`. Tensors fill the data area exactly.
SafetensorsHeader decode_safetensors_header(ByteSpan bytes, uint64_t file_size);

/// Fills begin and end and sorts as the format's own library does when it writes: by dtype, wide ones first, then by
/// name. kInvalidArgument for a name that is used twice, reserved or no UTF-8; kUnsupported for a dtype without a name.
/// Returns the size of the data area.
uint64_t lay_out_safetensors(std::vector<SafetensorsTensor>& tensors);

/// Everything in front of the data area, padded to 8 bytes; the bytes that the format's own library writes for the same
/// layout. Tensors are as lay_out_safetensors() makes them. kInvalidArgument if that is longer than allowed.
Bytes encode_safetensors_header(const SafetensorsHeader& header);

/// `model.safetensors.index.json`: which file each tensor is in.
struct SafetensorsIndex {
  uint64_t total_size = 0;                        // bytes of all tensors; 0 if the file does not say it
  std::map<std::string, std::string> weight_map;  // tensor -> file
  friend bool operator==(const SafetensorsIndex&, const SafetensorsIndex&) = default;
};
SafetensorsIndex decode_safetensors_index(ByteSpan bytes);
Bytes encode_safetensors_index(const SafetensorsIndex& index);

/// `model.safetensors.shards.json`, this library's own: the files of a sharded save.
std::vector<std::string> decode_safetensors_shards(ByteSpan bytes);
Bytes encode_safetensors_shards(const std::vector<std::string>& files);

/// Where in its whole tensor a stored part lies.
struct SafetensorsShard {
  Dims offsets;
  /// Of the whole tensor; PyTorch does not write it, and ignores it.
  std::optional<Dims> size;
  friend bool operator==(const SafetensorsShard&, const SafetensorsShard&) = default;
};
/// The key of `__metadata__` that holds it in files of sharded tensors, as PyTorch's HuggingFaceStorageWriter has it.
inline constexpr std::string_view kShardingInfoKey = "DCP_SHARDING_INFO";
using SafetensorsSharding = std::map<std::string, SafetensorsShard>;
SafetensorsSharding decode_sharding_info(std::string_view text);
std::string encode_sharding_info(const SafetensorsSharding& sharding);

}  // namespace reshard
