// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The names of a checkpoint's files. Sidecars have theirs in format/sidecar.h.

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "reshard/format/sidecar.h"
#include "reshard/storage/filesystem.h"

namespace reshard {

inline constexpr std::string_view kDataPrefix = "__";
inline constexpr std::string_view kDataSuffix = ".distcp";

struct DataFileName {
  int64_t rank = 0;
  int64_t number = 0;
};

inline std::string to_string(const DataFileName& name) {
  return std::string(kDataPrefix) + std::to_string(name.rank) + "_" + std::to_string(name.number) +
         std::string(kDataSuffix);
}

/// Of a name `__<rank>_<n>.distcp`; nothing for other names.
inline std::optional<DataFileName> parse_data_file_name(std::string_view name) {
  if (!name.starts_with(kDataPrefix) || !name.ends_with(kDataSuffix)) return std::nullopt;
  name.remove_prefix(kDataPrefix.size());
  name.remove_suffix(std::min(name.size(), kDataSuffix.size()));
  const size_t separator = name.find('_');
  if (separator == std::string_view::npos) return std::nullopt;
  const auto digits = [](std::string_view text) -> std::optional<int64_t> {
    constexpr size_t kMaxDigits = 15;
    int64_t value = 0;
    if (text.empty() || text.size() > kMaxDigits || text.front() == '-') return std::nullopt;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc{} && end == text.data() + text.size() ? std::optional(value) : std::nullopt;
  };
  const auto rank = digits(name.substr(0, separator));
  const auto number = digits(name.substr(separator + 1));
  if (!rank || !number) return std::nullopt;
  return DataFileName{*rank, *number};
}

/// True for the temporary files that a killed commit of ours or of PyTorch leaves behind.
inline bool is_temporary_metadata(std::string_view name) {
  return name == ".metadata.tmp" || name.starts_with(std::string(kMetadataFileName) + std::string(kTemporaryInfix));
}

/// True for a name that only a save gives to a file, but for the catalogue's.
inline bool is_checkpoint_file(const std::string& name) {
  return parse_data_file_name(name) || is_temporary_metadata(name) || is_sidecar_name(name);
}

}  // namespace reshard
