// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The golden checkpoints of tests/data/oracle: their files and what they are expected to hold.

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "reshard/core/bytes.h"

namespace reshard {

inline Bytes read_test_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open " + path.string());
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const ByteSpan bytes = as_bytes(text);
  return {bytes.begin(), bytes.end()};
}

/// One golden checkpoint.
class OracleCase {
 public:
  /// `name`: "<release>/<case>".
  explicit OracleCase(const std::string& name)
      : directory_(std::filesystem::path(RESHARD_TEST_DATA) / "oracle" / name) {
    std::ifstream in(directory_ / "expected.json");
    expected_ = nlohmann::json::parse(in);
    safetensors_ = read_test_file(directory_ / "expected.safetensors");
    ByteReader header(safetensors_, "expected.safetensors");
    const auto length = header.u64();
    index_ = nlohmann::json::parse(as_text(header.bytes(length)));
    data_ = 8 + length;
  }

  /// All of them: "2.1.2/dtypes", ...
  static std::vector<std::string> names() {
    std::vector<std::string> names;
    for (const auto& release :
         std::filesystem::directory_iterator(std::filesystem::path(RESHARD_TEST_DATA) / "oracle")) {
      if (!release.is_directory()) continue;
      for (const auto& entry : std::filesystem::directory_iterator(release)) {
        names.push_back(release.path().filename().string() + "/" + entry.path().filename().string());
      }
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::filesystem::path& directory() const { return directory_; }
  std::string release() const { return directory_.parent_path().filename().string(); }
  const nlohmann::json& expected() const { return expected_; }
  Bytes file(const std::string& name) const { return read_test_file(directory_ / name); }

  /// Row-major bytes of a whole tensor.
  ByteSpan tensor(const std::string& fqn) const {
    const auto& range = index_.at(fqn).at("data_offsets");
    const auto begin = range[0].get<size_t>();
    return ByteSpan(safetensors_).subspan(data_ + begin, range[1].get<size_t>() - begin);
  }

 private:
  std::filesystem::path directory_;
  nlohmann::json expected_;
  nlohmann::json index_;
  Bytes safetensors_;
  size_t data_ = 0;
};

}  // namespace reshard
