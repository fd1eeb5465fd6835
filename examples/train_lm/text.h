// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The training text, and which part of it each step sees: a function of seed, step and global batch only, never of the
// number of ranks.

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "reshard/core/error.h"

/// Bytes of the given files, one after the other; directories stand for the texts and sources of this project in them.
inline std::string read_text(const std::vector<std::string>& paths) {
  std::vector<std::filesystem::path> files;
  for (const std::string& path : paths) {
    if (!std::filesystem::is_directory(path)) {
      files.emplace_back(path);
      continue;
    }
    for (const char* part : {"docs", "include", "src", "README.md"}) {
      const auto below = std::filesystem::path(path) / part;
      if (std::filesystem::is_regular_file(below)) files.push_back(below);
      if (!std::filesystem::is_directory(below)) continue;
      for (const auto& entry : std::filesystem::recursive_directory_iterator(below)) {
        if (entry.is_regular_file()) files.push_back(entry.path());
      }
    }
  }
  std::sort(files.begin(), files.end());  // the file system's own order differs between machines
  std::string text;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw reshard::Error(reshard::ErrorCode::kNotFound, "cannot read a text", {.file = file.string()});
    text.append(std::istreambuf_iterator<char>(in), {});
  }
  return text;
}

/// splitmix64: a well mixed function of its argument.
inline uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// Samples [first, last) of a step's global batch: int64 [last - first, context + 1]; inputs are all but the last
/// column, targets all but the first.
inline at::Tensor batch_of(const std::string& text, uint64_t seed, int64_t step, int64_t first, int64_t last,
                           int64_t context) {
  if (text.size() <= static_cast<size_t>(context) + 1) {
    throw reshard::Error(reshard::ErrorCode::kInvalidArgument, "the text is shorter than one sample",
                         {.wanted = std::to_string(context + 2) + " bytes", .found = std::to_string(text.size())});
  }
  at::Tensor batch = at::empty({last - first, context + 1}, at::kLong);
  auto* out = batch.mutable_data_ptr<int64_t>();
  for (int64_t i = first; i < last; ++i) {
    const uint64_t where = mix(mix(mix(seed) ^ static_cast<uint64_t>(step)) ^ static_cast<uint64_t>(i));
    const char* from = text.data() + where % (text.size() - static_cast<size_t>(context) - 1);
    for (int64_t k = 0; k <= context; ++k) *out++ = static_cast<unsigned char>(from[k]);
  }
  return batch;
}
