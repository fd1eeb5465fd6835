// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>
#include <utility>

#include "cli/commands.h"
#include "cli/inspect_map.h"
#include "cli/output.h"
#include "reshard/convert/open_checkpoint.h"

namespace reshard::cli {
namespace {

using Json = nlohmann::ordered_json;

struct FileSummary {
  std::string path;
  uint64_t items = 0;
  uint64_t bytes = 0;            // of those items
  std::optional<uint64_t> size;  // of the file; absent if it is missing
};

uint64_t tensor_bytes(const TensorStorageMetadata& tensor) {
  return static_cast<uint64_t>(volume(tensor.size)) * static_cast<uint64_t>(element_size(tensor.properties.dtype));
}

/// In order of first use. Asks for sizes, opens nothing.
std::vector<FileSummary> summarize_files(const Metadata& metadata, const std::string& path, CheckpointKind kind) {
  std::vector<FileSummary> files;
  std::unordered_map<std::string_view, size_t> index;
  for (const auto& [key, place] : metadata.storage_data) {
    const auto [it, inserted] = index.try_emplace(place.relative_path, files.size());
    if (inserted) {
      const auto status =
          file_system_at(path).status(kind == CheckpointKind::kTorch ? path : join_path(path, place.relative_path));
      files.push_back({place.relative_path, 0, 0,
                       status && status->kind == FileKind::kRegular ? std::optional(status->size) : std::nullopt});
    }
    ++files[it->second].items;
    files[it->second].bytes += place.length;
  }
  return files;
}

/// What the items with one list of stream transforms hold.
struct TransformSummary {
  uint64_t items = 0;
  uint64_t stored_bytes = 0;  // of all of them
  uint64_t tensor_bytes = 0;  // elements of the tensors among them, and
  uint64_t stored_tensor_bytes = 0;
  double ratio() const {
    return stored_tensor_bytes == 0 ? 1 : static_cast<double>(tensor_bytes) / static_cast<double>(stored_tensor_bytes);
  }
};

std::string join(const std::vector<std::string>& descriptors) {
  std::string joined;
  for (const std::string& descriptor : descriptors) joined += (joined.empty() ? "" : ", ") + descriptor;
  return joined;
}

/// By their descriptors. Nothing for other kinds of checkpoints, whose transforms are no streams.
std::map<std::string, TransformSummary> summarize_transforms(const Metadata& metadata, CheckpointKind kind) {
  std::map<std::string, TransformSummary> transforms;
  if (kind != CheckpointKind::kDcp) return transforms;
  std::set<std::pair<std::string_view, uint64_t>> seen;  // tied tensors share a place
  for (const auto& [index, place] : metadata.storage_data) {
    if (place.transform_descriptors.empty()) continue;
    if (!seen.emplace(place.relative_path, place.offset).second) continue;
    TransformSummary& summary = transforms[join(place.transform_descriptors)];
    ++summary.items;
    summary.stored_bytes += place.length;
    const auto* tensor = std::get_if<TensorStorageMetadata>(metadata.state_dict_metadata.find(index.fqn));
    if (tensor == nullptr) continue;
    for (const Box& chunk : tensor->chunks) {
      if (chunk.offsets != index.offset) continue;
      summary.tensor_bytes +=
          static_cast<uint64_t>(volume(chunk.sizes)) * static_cast<uint64_t>(element_size(tensor->properties.dtype));
      summary.stored_tensor_bytes += place.length;
    }
  }
  return transforms;
}

std::string saver_of(const Metadata& metadata, CheckpointKind kind) {
  if (kind == CheckpointKind::kTorch) return "torch.save";
  if (kind == CheckpointKind::kSafetensors) return "safetensors";
  return metadata.sidecars ? "reshard" : "PyTorch";
}

Json to_json(const Dims& dims) { return Json(std::vector<int64_t>(dims.begin(), dims.end())); }

Json place_to_json(const StorageInfo& place) {
  Json json{{"file", place.relative_path}, {"offset", place.offset}, {"length", place.length}};
  if (!place.transform_descriptors.empty()) json["transforms"] = place.transform_descriptors;
  return json;
}

void print_json(const Metadata& metadata, CheckpointKind kind, const std::vector<FileSummary>& files) {
  Json out;
  out["saved_by"] = saver_of(metadata, kind);
  const auto text = [](const std::optional<std::string>& value) { return value ? Json(*value) : Json(nullptr); };
  out["version"] = text(metadata.version);
  out["save_id"] = text(metadata.storage_meta ? metadata.storage_meta->save_id : std::nullopt);
  out["sidecars"] = metadata.sidecars ? Json(metadata.sidecars->size()) : Json(nullptr);
  if (const auto transforms = summarize_transforms(metadata, kind); !transforms.empty()) {
    Json& json = out["transforms"] = Json::object();
    for (const auto& [name, summary] : transforms) {
      json[name] = Json{{"items", summary.items},
                        {"stored_bytes", summary.stored_bytes},
                        {"tensor_bytes", summary.tensor_bytes},
                        {"ratio", summary.ratio()}};
    }
  }
  Json tensors = Json::object();
  Json values = Json::object();
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto place = [&](const MetadataIndex& index) {
      const StorageInfo* found = metadata.storage_data.find(index);
      return found != nullptr ? place_to_json(*found) : Json::object();
    };
    if (const auto* tensor = std::get_if<TensorStorageMetadata>(&entry)) {
      Json chunks = Json::array();
      for (const Box& chunk : tensor->chunks) {
        Json json{{"offsets", to_json(chunk.offsets)}, {"sizes", to_json(chunk.sizes)}};
        json.update(place({fqn, chunk.offsets, {}}));
        chunks.push_back(std::move(json));
      }
      tensors[fqn] = Json{{"dtype", std::string(to_string(tensor->properties.dtype))},
                          {"shape", to_json(tensor->size)},
                          {"bytes", tensor_bytes(*tensor)},
                          {"chunks", std::move(chunks)}};
    } else {
      values[fqn] = place({fqn, {}, {}});
    }
  }
  out["tensors"] = std::move(tensors);
  out["values"] = std::move(values);
  Json file_list = Json::object();
  for (const FileSummary& file : files) {
    file_list[file.path] =
        Json{{"size", file.size ? Json(*file.size) : Json(nullptr)}, {"items", file.items}, {"item_bytes", file.bytes}};
  }
  out["files"] = std::move(file_list);
  // Keys may be any bytes; what is not UTF-8 is replaced.
  const std::string dumped = out.dump(1, ' ', false, Json::error_handler_t::replace);
  std::fwrite(dumped.data(), 1, dumped.size(), stdout);
  std::fputc('\n', stdout);
}

/// Columns that UTF-8 text takes, all characters being one wide.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(std::ranges::count_if(text, [](char c) { return (c & 0xC0) != 0x80; }));
}

/// Rows with columns as wide as their widest cell; numbers (columns from `right` on) to the right.
void print_table(const std::vector<std::vector<std::string>>& rows, size_t right) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], width_of(row[c]));
  }
  std::string line;
  for (const auto& row : rows) {
    line.clear();
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string gap(widths[c] - width_of(row[c]), ' ');
      line += c == 0 ? "" : "  ";
      line += c >= right ? gap + row[c] : row[c] + gap;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::printf("%s\n", line.c_str());
  }
}

void print_text(const Metadata& metadata, CheckpointKind kind, const std::vector<FileSummary>& files,
                const InspectOptions& options) {
  size_t tensors = 0;
  uint64_t elements = 0;
  uint64_t file_bytes = 0;
  std::vector<std::vector<std::string>> rows{{"KEY", "DTYPE", "SHAPE", "CHUNKS", "BYTES"}};
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) {
      const StorageInfo* place = metadata.storage_data.find({fqn, {}, {}});
      rows.push_back({printable(fqn), "value", "", "", place != nullptr ? std::to_string(place->length) : ""});
      if (options.chunks && place != nullptr) {
        rows.push_back({"  " + printable(place->relative_path) + " @" + std::to_string(place->offset)});
      }
      continue;
    }
    ++tensors;
    elements += tensor_bytes(*tensor);
    rows.push_back({printable(fqn), std::string(to_string(tensor->properties.dtype)), to_string(tensor->size),
                    std::to_string(tensor->chunks.size()), std::to_string(tensor_bytes(*tensor))});
    if (!options.chunks) continue;
    for (const Box& chunk : tensor->chunks) {
      const StorageInfo* place = metadata.storage_data.find({fqn, chunk.offsets, {}});
      if (place == nullptr) continue;
      rows.push_back({"  " + printable(place->relative_path) + " @" + std::to_string(place->offset), "",
                      to_string(chunk), "", std::to_string(place->length)});
    }
  }
  std::vector<std::vector<std::string>> file_rows{{"FILE", "ITEMS", "SIZE"}};
  for (const FileSummary& file : files) {
    file_bytes += file.size.value_or(0);
    file_rows.push_back(
        {printable(file.path), std::to_string(file.items), file.size ? std::to_string(*file.size) : "missing"});
  }
  std::printf("%zu tensors (%s), %zu values, in %zu items and %zu files (%s), saved by %s\n", tensors,
              readable_bytes(elements).c_str(), metadata.state_dict_metadata.size() - tensors,
              metadata.storage_data.size(), files.size(), readable_bytes(file_bytes).c_str(),
              saver_of(metadata, kind).c_str());
  if (metadata.storage_meta && metadata.storage_meta->save_id) {
    std::printf("save id %s\n", printable(*metadata.storage_meta->save_id).c_str());
  }
  for (const auto& [name, summary] : summarize_transforms(metadata, kind)) {
    std::printf("%" PRIu64 " items through %s: tensors of %s in %s, ratio %.2f\n", summary.items,
                printable(name).c_str(), readable_bytes(summary.tensor_bytes).c_str(),
                readable_bytes(summary.stored_tensor_bytes).c_str(), summary.ratio());
  }
  std::printf("\n");
  print_table(rows, 3);
  std::printf("\n");
  print_table(file_rows, 1);
}

}  // namespace

std::string readable_bytes(uint64_t bytes) {
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f %s", value, kUnits[unit]);
  return text;
}

std::string printable(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      result += c;
    } else {
      char escaped[5];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", byte);
      result += escaped;
    }
  }
  return result;
}

int inspect(const InspectOptions& options) {
  const CheckpointKind kind = detect_checkpoint_kind(options.path, file_system_at(options.path));
  const Metadata metadata = open_checkpoint(options.path, {}, file_system_at(options.path))->read_metadata();
  if (!options.map.empty()) {
    check_file_destination(options.path, options.map, options.force);
    write_file_atomically(options.map, [&](const auto& sink) { sink(as_bytes(map_of(metadata))); });
    return 0;
  }
  const std::vector<FileSummary> files = summarize_files(metadata, options.path, kind);
  if (options.json) {
    print_json(metadata, kind, files);
  } else {
    print_text(metadata, kind, files, options);
  }
  return 0;
}

}  // namespace reshard::cli
