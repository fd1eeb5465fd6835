// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The names of safetensors files, as Hugging Face and PyTorch give them, and how they are opened.

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "reshard/io/file_system.h"

namespace reshard {

inline constexpr std::string_view kSafetensorsSuffix = ".safetensors";
inline constexpr const char* kSafetensorsFileName = "model.safetensors";

inline std::string five_digits(int64_t number) {
  std::array<char, 24> text;
  std::snprintf(text.data(), text.size(), "%05lld", static_cast<long long>(number));
  return text.data();
}

/// "model-00001-of-00002.safetensors".
inline std::string model_file_name(int64_t index, int64_t count) {
  return "model-" + five_digits(index) + "-of-" + five_digits(count) + std::string(kSafetensorsSuffix);
}
/// "shard-00001-model-00001-of-00002.safetensors".
inline std::string shard_file_name(int64_t shard, int64_t index, int64_t count) {
  return "shard-" + five_digits(shard) + "-" + model_file_name(index, count);
}

struct ModelFileName {
  int64_t index = 0;
  int64_t count = 0;
};
/// Of a name that model_file_name() makes; nothing for other names.
inline std::optional<ModelFileName> parse_model_file_name(std::string_view name) {
  constexpr std::string_view kPrefix = "model-";
  constexpr std::string_view kOf = "-of-";
  const size_t of = name.find(kOf);
  if (!name.starts_with(kPrefix) || !name.ends_with(kSafetensorsSuffix) || of == std::string_view::npos) {
    return std::nullopt;
  }
  const auto number = [](std::string_view text) -> int64_t {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc{} && end == text.data() + text.size() ? value : -1;
  };
  const ModelFileName parsed{
      number(name.substr(kPrefix.size(), of - kPrefix.size())),
      number(name.substr(of + kOf.size(), name.size() - of - kOf.size() - kSafetensorsSuffix.size()))};
  if (parsed.index < 1 || parsed.count < parsed.index || model_file_name(parsed.index, parsed.count) != name) {
    return std::nullopt;
  }
  return parsed;
}

/// Opens a file of a checkpoint, also one that is a symlink, as in the Hub's cache.
inline std::unique_ptr<RandomAccessFile> open_following(FileSystem& file_system, const std::string& directory,
                                                        const std::string& name) {
  return file_system.open(file_system.real_path(join_path(directory, name)));
}

}  // namespace reshard
