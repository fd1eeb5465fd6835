// SPDX-License-Identifier: BSD-3-Clause
#include "cli/inspect_map.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <unordered_map>
#include <vector>

#include "cli/commands.h"

namespace reshard::cli {
namespace {

constexpr size_t kMostTensors = 1000;
constexpr size_t kMostFilesInLegend = 64;
constexpr int kLeft = 360;
constexpr int kWidth = 480;
constexpr int kLow = 14;
constexpr int kHigh = 120;
constexpr int kLine = 18;

/// Text in XML, which has neither control characters nor surrogates.
std::string escaped(std::string_view text) {
  std::string result;
  const std::string clean = printable(text);
  for (size_t i = 0; i < clean.size(); ++i) {
    const char c = clean[i];
    if (c == '&') {
      result += "&amp;";
    } else if (c == '<') {
      result += "&lt;";
    } else if (c == '>') {
      result += "&gt;";
    } else if (c == '"') {
      result += "&quot;";
    } else if (c == '\xED' && i + 2 < clean.size() && static_cast<unsigned char>(clean[i + 1]) >= 0xA0) {
      result += "?";
      i += 2;
    } else {
      result += c;
    }
  }
  return result;
}

std::string format(const char* pattern, auto... values) {
  char text[256];
  std::snprintf(text, sizeof(text), pattern, values...);
  return text;
}

/// Neighbours in number are far apart in hue.
std::string colour(size_t file) {
  constexpr double kGoldenAngle = 137.508;
  const double hue = static_cast<double>(file) * kGoldenAngle;
  return format("hsl(%.0f,60%%,%d%%)", hue - 360 * static_cast<int>(hue / 360), file % 2 == 0 ? 55 : 70);
}

class Map {
 public:
  explicit Map(const Metadata& metadata) : metadata_(metadata) {
    for (const auto& [index, place] : metadata.storage_data) {
      const auto [it, is_new] = files_.try_emplace(place.relative_path, files_.size());
      if (is_new) names_.push_back(place.relative_path);
    }
  }

  std::string draw() {
    legend();
    size_t drawn = 0;
    size_t left_out = 0;
    for (const auto& [fqn, entry] : metadata_.state_dict_metadata) {
      const auto* stored = std::get_if<TensorStorageMetadata>(&entry);
      if (stored == nullptr) continue;
      if (drawn == kMostTensors) {
        ++left_out;
      } else {
        tensor(fqn, *stored);
        ++drawn;
      }
    }
    if (left_out > 0) line(0, std::to_string(left_out) + " more tensors are not drawn");
    const int height = y_ + kLine;
    return format("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" ",
                  kLeft + kWidth + 20, height, kLeft + kWidth + 20, height) +
           "font-family=\"monospace\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n" +
           body_ + "</svg>\n";
  }

 private:
  void line(int x, const std::string& text) {
    body_ += format("<text x=\"%d\" y=\"%d\">", x + 10, y_ + 12) + escaped(text) + "</text>\n";
    y_ += kLine;
  }

  void legend() {
    std::vector<uint64_t> bytes(names_.size());
    for (const auto& [index, place] : metadata_.storage_data) bytes[files_.at(place.relative_path)] += place.length;
    for (size_t i = 0; i < std::min(names_.size(), kMostFilesInLegend); ++i) {
      body_ += format("<rect x=\"10\" y=\"%d\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", y_ + 2, colour(i).c_str());
      line(20, names_[i] + "  " + readable_bytes(bytes[i]));
    }
    if (names_.size() > kMostFilesInLegend) {
      line(20, "and " + std::to_string(names_.size() - kMostFilesInLegend) + " more files");
    }
    y_ += kLine / 2;
  }

  /// The two dimensions along which the chunks begin at the most places, in order.
  static std::pair<size_t, size_t> seen_along(const TensorStorageMetadata& tensor) {
    std::vector<std::pair<size_t, size_t>> cuts;  // places, dimension
    for (size_t d = 0; d < tensor.size.size(); ++d) {
      std::set<int64_t> starts;
      for (const Box& chunk : tensor.chunks) starts.insert(chunk.offsets[d]);
      cuts.emplace_back(starts.size(), d);
    }
    std::ranges::stable_sort(cuts, [](const auto& a, const auto& b) { return a.first > b.first; });
    const size_t first = cuts[0].second;
    const size_t second = cuts[1].second;
    return {std::min(first, second), std::max(first, second)};
  }

  void tensor(const std::string& fqn, const TensorStorageMetadata& tensor) {
    const size_t rank = tensor.size.size();
    const auto [rows, columns] = rank >= 2 ? seen_along(tensor) : std::pair<size_t, size_t>{0, 0};
    // A vector lies flat, cut from left to right; a matrix has its rows below each other.
    const auto along = [&](const Dims& dims, bool vertical, int64_t otherwise) {
      if (rank == 0 || (rank == 1 && vertical)) return otherwise;
      return dims[rank == 1 ? 0 : vertical ? rows : columns];
    };
    const auto height_of = static_cast<double>(along(tensor.size, true, 1));
    const auto width_of = static_cast<double>(along(tensor.size, false, 1));
    const int height = rank < 2 || width_of <= 0
                           ? kLow
                           : static_cast<int>(std::clamp(kWidth * height_of / width_of, double{kLow}, double{kHigh}));
    const int top = y_;
    line(0, shortened(fqn));
    line(10, std::string(to_string(tensor.properties.dtype)) + " " + to_string(tensor.size));
    for (const Box& chunk : tensor.chunks) {
      const StorageInfo* place = metadata_.storage_data.find({fqn, chunk.offsets, {}});
      if (place == nullptr || volume(chunk.sizes) == 0) continue;
      const auto scale = [](int64_t at, double whole, int pixels) { return static_cast<double>(at) / whole * pixels; };
      const double x = kLeft + scale(along(chunk.offsets, false, 0), width_of, kWidth);
      const double y = top + scale(along(chunk.offsets, true, 0), height_of, height);
      body_ += format(
          "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" stroke=\"white\" "
          "stroke-width=\"0.5\" fill=\"%s\">",
          x, y, scale(along(chunk.sizes, false, 1), width_of, kWidth),
          scale(along(chunk.sizes, true, 1), height_of, height), colour(files_.at(place->relative_path)).c_str());
      body_ +=
          "<title>" + escaped(fqn + " " + to_string(chunk) + " in " + place->relative_path.str()) + "</title></rect>\n";
    }
    y_ = std::max(y_, top + height + 4);
  }

  static std::string shortened(const std::string& name) {
    constexpr size_t kMost = 50;
    if (name.size() <= kMost) return name;
    size_t begin = name.size() - kMost;
    while (begin < name.size() && (name[begin] & 0xC0) == 0x80) ++begin;
    return "..." + name.substr(begin);
  }

  const Metadata& metadata_;
  std::unordered_map<std::string, size_t> files_;
  std::vector<std::string> names_;
  std::string body_;
  int y_ = 10;
};

}  // namespace

std::string map_of(const Metadata& metadata) { return Map(metadata).draw(); }

}  // namespace reshard::cli
