// SPDX-License-Identifier: BSD-3-Clause
// A program without LibTorch: makes a catalogue, encodes it, reads it back.

#include <cstdio>

#include "reshard/core/box.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sha256.h"

int main() {
  reshard::TensorStorageMetadata weight;
  weight.size = {4, 8};
  weight.chunks = {{{0, 0}, {2, 8}}, {{2, 0}, {2, 8}}};
  if (reshard::check_exact_tiling(weight.size, weight.chunks)) return 1;

  reshard::Metadata metadata;
  for (const reshard::Box& chunk : weight.chunks) {
    const uint64_t offset = static_cast<uint64_t>(chunk.offsets[0]) * 1024;
    metadata.storage_data.insert({"weight", chunk.offsets, {}}, {"__0_0.distcp", offset, 1024, {}});
  }
  metadata.state_dict_metadata["weight"] = weight;
  const reshard::Bytes file = reshard::encode_metadata(metadata);
  if (reshard::decode_metadata(file).state_dict_metadata != metadata.state_dict_metadata) return 1;
  std::printf("%s\n", reshard::to_hex(reshard::Sha256::of(file)).c_str());
  return 0;
}
