// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "reshard/core/checked.h"

namespace reshard {
namespace {

using Json = nlohmann::ordered_json;

struct DTypeName {
  std::string_view name;
  DType dtype;
};
// Narrow ones first: the order in which files are laid out, backwards.
constexpr std::array<DTypeName, 20> kDTypeNames = {{
    {"BOOL", DType::kBool},
    {"F4", DType::kFloat4E2M1FNx2},
    {"U8", DType::kUInt8},
    {"I8", DType::kInt8},
    {"F8_E5M2", DType::kFloat8E5M2},
    {"F8_E4M3", DType::kFloat8E4M3FN},
    {"F8_E8M0", DType::kFloat8E8M0FNU},
    {"F8_E4M3FNUZ", DType::kFloat8E4M3FNUZ},
    {"F8_E5M2FNUZ", DType::kFloat8E5M2FNUZ},
    {"I16", DType::kInt16},
    {"U16", DType::kUInt16},
    {"F16", DType::kFloat16},
    {"BF16", DType::kBFloat16},
    {"I32", DType::kInt32},
    {"U32", DType::kUInt32},
    {"F32", DType::kFloat32},
    {"C64", DType::kComplex64},
    {"F64", DType::kFloat64},
    {"I64", DType::kInt64},
    {"U64", DType::kUInt64},
}};

// --- JSON
// ----------------------------------------------------------------------------------------------------------

/// Reads JSON as a stream of events, so that nothing is built that the text does not deserve. An event throws what is
/// wrong with it.
class JsonReader {
 public:
  virtual ~JsonReader() = default;

  void read(std::string_view text, const char* what) {
    what_ = what;
    // The parser takes a NUL for the end and skips a byte order mark; the format's own library takes neither.
    if (text.find('\0') != std::string_view::npos || text.starts_with("\xEF\xBB\xBF")) not_json(0);
    Json::sax_parse(text.begin(), text.end(), this);
  }

  // The parser's events.
  bool null() { return other("null"); }
  bool boolean(bool) { return other("a boolean"); }
  bool number_integer(Json::number_integer_t value) { return other(std::to_string(value)); }
  bool number_float(Json::number_float_t, const std::string& text) { return other(text); }
  bool binary(Json::binary_t&) { return other("binary"); }
  bool number_unsigned(Json::number_unsigned_t value) {
    on_number(value);
    return true;
  }
  bool string(std::string& text) {
    on_text(text);
    return true;
  }
  bool start_object(size_t) { return open(true); }
  bool start_array(size_t) { return open(false); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& text) {
    on_key(text);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const Json::exception&) { not_json(position); }

 protected:
  // What they mean where they occur. depth() counts the objects and lists that are open.
  virtual void on_key(std::string& key) = 0;
  virtual void on_text(std::string& text) = 0;
  virtual void on_number(uint64_t number) = 0;
  /// Of an object or list that is about to open.
  virtual void on_open(bool is_object) = 0;
  /// Of one that was closed.
  virtual void on_close() = 0;
  /// Anything else.
  virtual void on_other(const std::string& found) = 0;

  size_t depth() const { return depth_; }
  [[noreturn]] void fail(const std::string& wanted, std::string found, std::string key = {}) const {
    throw Error(ErrorCode::kCorruptData, std::string(what_) + " is not laid out as it must be",
                {.key = std::move(key), .wanted = wanted, .found = std::move(found)});
  }

 private:
  static constexpr size_t kMaxDepth = 16;

  [[noreturn]] void not_json(size_t position) const {
    throw Error(ErrorCode::kCorruptData, std::string(what_) + " is no valid JSON", {.offset = position});
  }
  bool other(const std::string& found) {
    on_other(found);
    return true;
  }
  bool open(bool is_object) {
    if (depth_ == kMaxDepth) fail("at most " + std::to_string(kMaxDepth) + " objects in each other", "more");
    on_open(is_object);
    ++depth_;
    return true;
  }
  bool close() {
    --depth_;
    on_close();
    return true;
  }

  const char* what_ = "";
  size_t depth_ = 0;
};

int64_t to_size(uint64_t number, const std::string& key) {
  if (number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return static_cast<int64_t>(number);
  throw Error(ErrorCode::kCorruptData, "size or offset of a tensor overflows",
              {.key = key, .found = std::to_string(number)});
}

Dims to_dims(std::span<const uint64_t> numbers, const std::string& key) {
  Dims dims(numbers.size(), 0);
  for (size_t i = 0; i < numbers.size(); ++i) dims[i] = to_size(numbers[i], key);
  return dims;
}

/// An object of objects whose members are read by name; a member of no known name is skipped.
class TableReader : public JsonReader {
 protected:
  enum class Kind : uint8_t { kText, kNumbers };
  struct Member {
    std::string_view name;
    Kind kind;
  };

  explicit TableReader(std::span<const Member> members) : members_(members) {}

  virtual void on_row(const std::string& row) = 0;
  virtual void on_row_end(const std::string& row) = 0;
  virtual void on_row_text(const std::string& row, size_t member, std::string& text) = 0;
  virtual void on_row_numbers(const std::string& row, size_t member, std::span<const uint64_t> numbers) = 0;
  /// For a row that is no table row (`__metadata__`): its members are texts.
  virtual bool is_texts(const std::string&) const { return false; }
  virtual void on_texts_member(std::string&, std::string&) {}

  void on_key(std::string& key) override {
    if (depth() == 1) {
      row_ = std::move(key);
    } else if (depth() == 2) {
      member_name_ = std::move(key);
      member_ = members_.size();
      for (size_t i = 0; i < members_.size(); ++i) {
        if (member_name_ == members_[i].name) member_ = i;
      }
    }
  }
  void on_open(bool is_object) override {
    switch (depth()) {
      case 0:
        if (!is_object) fail("an object", "a list");
        return;
      case 1:
        if (!is_object) fail("an object", "a list", row_);
        if (!is_texts(row_)) on_row(row_);
        return;
      case 2:
        if (is_texts(row_)) fail("texts", is_object ? "an object" : "a list", row_);
        if (is_known() && (is_object || members_[member_].kind != Kind::kNumbers)) {
          fail(wanted(), is_object ? "an object" : "a list", row_);
        }
        count_ = 0;
        return;
      default:
        if (is_known()) fail(wanted(), is_object ? "an object" : "a list", row_);
    }
  }
  void on_close() override {
    if (depth() == 1 && !is_texts(row_)) on_row_end(row_);
    if (depth() == 2 && is_known()) on_row_numbers(row_, member_, std::span(numbers_).first(count_));
    if (depth() == 2) member_ = members_.size();
  }
  void on_text(std::string& text) override {
    if (depth() == 2 && is_texts(row_)) return on_texts_member(member_name_, text);
    if (depth() == 2 && is_known() && members_[member_].kind == Kind::kText) return on_row_text(row_, member_, text);
    on_other("a text");
  }
  void on_number(uint64_t number) override {
    if (depth() != 3 || !is_known()) return on_other("a number");
    if (count_ == numbers_.size()) fail("at most " + std::to_string(kMaxTensorRank) + " numbers", "more", row_);
    numbers_[count_++] = number;
  }
  void on_other(const std::string& found) override {
    if (depth() == 0) fail("an object", found);
    if (depth() == 1 && is_texts(row_) && found == "null") return;  // none
    if (depth() == 1) fail("an object", found, row_);
    if (depth() == 2 && is_texts(row_)) fail("texts", found, row_);
    if (is_known()) fail(wanted(), found, row_);
  }

 private:
  bool is_known() const { return member_ < members_.size(); }
  std::string wanted() const {
    return std::string(members_[member_].name) +
           (members_[member_].kind == Kind::kText ? ": a text" : ": a list of whole numbers that are not negative");
  }

  std::span<const Member> members_;
  std::string row_;
  std::string member_name_;
  size_t member_ = std::numeric_limits<size_t>::max();  // index; none or unknown: at least members_.size()
  std::array<uint64_t, kMaxTensorRank> numbers_{};
  size_t count_ = 0;
};

[[noreturn]] void twice(const std::string& key, std::string_view member = {}) {
  throw Error(ErrorCode::kCorruptData,
              member.empty() ? "a key occurs twice" : "a member of a key occurs twice: " + std::string(member),
              {.key = key});
}
[[noreturn]] void lacks(const std::string& key, std::string_view member) {
  throw Error(ErrorCode::kCorruptData, "a member of a key is missing", {.key = key, .wanted = std::string(member)});
}

class HeaderReader final : public TableReader {
 public:
  HeaderReader() : TableReader(kMembers) {}
  SafetensorsHeader take() { return std::move(header_); }

 private:
  enum MemberIndex : size_t { kDType, kShape, kDataOffsets };
  static constexpr std::array<Member, 3> kMembers = {
      {{"dtype", Kind::kText}, {"shape", Kind::kNumbers}, {"data_offsets", Kind::kNumbers}}};

  bool is_texts(const std::string& row) const override { return row == kSafetensorsMetadataName; }
  void on_texts_member(std::string& name, std::string& text) override {
    if (!header_.metadata.insert(name, std::move(text))) twice(std::string(kSafetensorsMetadataName), name);
  }
  void on_row(const std::string&) override { seen_ = {}; }
  void on_row_text(const std::string& row, size_t member, std::string& text) override {
    see(row, member);
    const auto* known = std::ranges::find(kDTypeNames, text, &DTypeName::name);
    if (known == kDTypeNames.end()) {
      throw Error(ErrorCode::kUnsupported, "a tensor has a dtype that is not known here", {.key = row, .found = text});
    }
    tensor_.dtype = known->dtype;
  }
  void on_row_numbers(const std::string& row, size_t member, std::span<const uint64_t> numbers) override {
    see(row, member);
    if (member == kShape) {
      tensor_.shape = to_dims(numbers, row);
      return;
    }
    if (numbers.size() != 2) fail("data_offsets: two numbers", std::to_string(numbers.size()), row);
    tensor_.begin = numbers[0];
    tensor_.end = numbers[1];
  }
  void on_row_end(const std::string& row) override {
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (!seen_[i]) lacks(row, kMembers[i].name);
    }
    tensor_.name = row;
    header_.tensors.push_back(std::move(tensor_));
    tensor_ = {};
  }
  void see(const std::string& row, size_t member) {
    if (std::exchange(seen_[member], true)) twice(row, kMembers[member].name);
  }

  SafetensorsHeader header_;
  SafetensorsTensor tensor_;
  std::array<bool, kMembers.size()> seen_{};
};

class ShardingReader final : public TableReader {
 public:
  ShardingReader() : TableReader(kMembers) {}
  SafetensorsSharding take() { return std::move(sharding_); }

 private:
  static constexpr std::array<Member, 2> kMembers = {{{"saved_offsets", Kind::kNumbers}, {"size", Kind::kNumbers}}};

  void on_row(const std::string& row) override {
    if (!sharding_.try_emplace(row).second) twice(row);
    has_offsets_ = false;
  }
  void on_row_text(const std::string&, size_t, std::string&) override {}
  void on_row_numbers(const std::string& row, size_t member, std::span<const uint64_t> numbers) override {
    SafetensorsShard& shard = sharding_[row];
    if (member == 0 ? std::exchange(has_offsets_, true) : shard.size.has_value()) twice(row, kMembers[member].name);
    if (member == 0) {
      shard.offsets = to_dims(numbers, row);
    } else {
      shard.size = to_dims(numbers, row);
    }
  }
  void on_row_end(const std::string& row) override {
    if (!has_offsets_) lacks(row, kMembers[0].name);
  }

  SafetensorsSharding sharding_;
  bool has_offsets_ = false;
};

class IndexReader final : public JsonReader {
 public:
  SafetensorsIndex take() {
    if (!has_map_) lacks({}, kWeightMap);
    return std::move(index_);
  }

 private:
  static constexpr std::string_view kWeightMap = "weight_map";

  void on_key(std::string& key) override {
    if (depth() <= 2) keys_[depth() - 1] = std::move(key);
  }
  void on_open(bool is_object) override {
    if (depth() == 0 && !is_object) fail("an object", "a list");
    if (depth() == 1 && keys_[0] == kWeightMap) {
      if (!is_object) fail("weight_map: an object", "a list");
      if (std::exchange(has_map_, true)) twice(keys_[0]);
    } else if (in_map()) {
      on_other(is_object ? "an object" : "a list");
    }
  }
  void on_close() override {}
  void on_text(std::string& text) override {
    if (depth() != 2 || keys_[0] != kWeightMap) return on_other("a text");
    if (!index_.weight_map.try_emplace(keys_[1], std::move(text)).second) twice(keys_[1]);
  }
  void on_number(uint64_t number) override {
    if (depth() == 2 && keys_[0] == "metadata" && keys_[1] == "total_size") {
      index_.total_size = number;
    } else {
      on_other("a number");
    }
  }
  void on_other(const std::string& found) override {
    if (depth() == 0) fail("an object", found);
    if (depth() == 1 && keys_[0] == kWeightMap) fail("weight_map: an object", found);
    if (in_map()) fail("the name of a file", found, keys_[1]);
  }
  bool in_map() const { return depth() == 2 && keys_[0] == kWeightMap; }

  SafetensorsIndex index_;
  std::array<std::string, 2> keys_;
  bool has_map_ = false;
};

class ShardListReader final : public JsonReader {
 public:
  std::vector<std::string> take() {
    if (!has_files_) lacks({}, kFiles);
    return std::move(files_);
  }

 private:
  static constexpr std::string_view kFiles = "files";

  void on_key(std::string& key) override {
    if (depth() == 1) key_ = std::move(key);
  }
  void on_open(bool is_object) override {
    if (depth() == 0 && !is_object) fail("an object", "a list");
    if (depth() == 1 && key_ == kFiles) {
      if (is_object) fail("files: a list", "an object");
      if (std::exchange(has_files_, true)) twice(key_);
    } else if (depth() == 2) {
      on_other(is_object ? "an object" : "a list");
    }
  }
  void on_close() override {}
  void on_text(std::string& text) override {
    if (depth() != 2 || key_ != kFiles) return on_other("a text");
    files_.push_back(std::move(text));
  }
  void on_number(uint64_t) override { on_other("a number"); }
  void on_other(const std::string& found) override {
    if (depth() == 0) fail("an object", found);
    if (depth() <= 2 && key_ == kFiles) fail("files: a list of names", found);
  }

  std::vector<std::string> files_;
  std::string key_;
  bool has_files_ = false;
};

/// Bytes that the dtype and shape of a tensor take.
uint64_t size_of(const SafetensorsTensor& tensor) {
  return static_cast<uint64_t>(checked_mul(volume(tensor.shape), element_size(tensor.dtype), "size of a tensor"));
}

/// As JSON.
std::string json_text(std::string_view text) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    throw Error(ErrorCode::kInvalidArgument, "a name or text for a safetensors file is no UTF-8",
                {.key = std::string(text)});
  }
}

/// F4 has two values in each byte: the header counts values, PyTorch counts bytes.
void values_to_pairs(SafetensorsTensor& tensor) {
  if (tensor.dtype != DType::kFloat4E2M1FNx2) return;
  if (tensor.shape.empty() || tensor.shape[tensor.shape.size() - 1] % 2 != 0) {
    throw Error(ErrorCode::kUnsupported, "an F4 tensor whose last dimension is not even has no counterpart",
                {.key = tensor.name, .found = to_string(tensor.shape)});
  }
  tensor.shape[tensor.shape.size() - 1] /= 2;
}

}  // namespace

std::optional<std::string_view> safetensors_dtype_name(DType dtype) {
  const auto* known = std::ranges::find(kDTypeNames, dtype, &DTypeName::dtype);
  return known == kDTypeNames.end() ? std::nullopt : std::optional(known->name);
}

uint64_t safetensors_data_begin(ByteSpan prefix, uint64_t file_size) {
  if (prefix.size() < kSafetensorsPrefixBytes || file_size < kSafetensorsPrefixBytes) {
    throw Error(ErrorCode::kCorruptData, "the file is too short for a safetensors file",
                {.wanted = "at least " + std::to_string(kSafetensorsPrefixBytes) + " bytes",
                 .found = std::to_string(std::min<uint64_t>(prefix.size(), file_size))});
  }
  const uint64_t length = ByteReader(prefix).u64();
  if (length > kMaxSafetensorsHeaderBytes) {
    throw Error(ErrorCode::kCorruptData, "the header of the safetensors file is too long",
                {.offset = 0,
                 .wanted = "at most " + std::to_string(kMaxSafetensorsHeaderBytes) + " bytes",
                 .found = std::to_string(length)});
  }
  if (length > file_size - kSafetensorsPrefixBytes) {
    throw Error(ErrorCode::kCorruptData, "the file ends inside its safetensors header",
                {.offset = 0,
                 .wanted = std::to_string(length) + " bytes",
                 .found = std::to_string(file_size - kSafetensorsPrefixBytes)});
  }
  return kSafetensorsPrefixBytes + length;
}

SafetensorsHeader decode_safetensors_header(ByteSpan bytes, uint64_t file_size) {
  const uint64_t data_begin = safetensors_data_begin(bytes, file_size);
  if (bytes.size() != data_begin) {
    throw Error(ErrorCode::kCorruptData, "the safetensors header is not whole",
                {.wanted = std::to_string(data_begin) + " bytes", .found = std::to_string(bytes.size())});
  }
  HeaderReader reader;
  reader.read(as_text(bytes.subspan(kSafetensorsPrefixBytes)), "the safetensors header");
  SafetensorsHeader header = reader.take();

  std::unordered_set<std::string_view> names;
  names.reserve(header.tensors.size());
  for (const SafetensorsTensor& tensor : header.tensors) {
    if (!names.insert(tensor.name).second) twice(tensor.name);
  }
  std::ranges::sort(header.tensors, [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t end = 0;
  for (SafetensorsTensor& tensor : header.tensors) {
    values_to_pairs(tensor);
    if (tensor.begin != end || tensor.end < tensor.begin) {
      throw Error(ErrorCode::kCorruptData, "tensors leave a hole in the data of the safetensors file, or overlap",
                  {.key = tensor.name,
                   .wanted = "to begin at " + std::to_string(end),
                   .found = "[" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + ")"});
    }
    const uint64_t size =
        with_error_context([&] { return ErrorContext{.key = tensor.name}; }, [&] { return size_of(tensor); });
    if (tensor.end - tensor.begin != size) {
      throw Error(ErrorCode::kCorruptData, "the data of a tensor does not have the size of its dtype and shape",
                  {.key = tensor.name,
                   .wanted = std::to_string(size) + " bytes",
                   .found = std::to_string(tensor.end - tensor.begin)});
    }
    end = tensor.end;
  }
  if (file_size - data_begin != end) {
    throw Error(ErrorCode::kCorruptData, "the data of the safetensors file is longer or shorter than its tensors",
                {.offset = data_begin,
                 .wanted = std::to_string(end) + " bytes",
                 .found = std::to_string(file_size - data_begin)});
  }
  return header;
}

uint64_t lay_out_safetensors(std::vector<SafetensorsTensor>& tensors) {
  const auto order = [](DType dtype) {
    return std::ranges::find(kDTypeNames, dtype, &DTypeName::dtype) - kDTypeNames.begin();
  };
  std::unordered_set<std::string_view> names;
  for (const SafetensorsTensor& tensor : tensors) {
    const ErrorContext context{.key = tensor.name};
    if (!safetensors_dtype_name(tensor.dtype)) {
      throw Error(ErrorCode::kUnsupported, "safetensors files have no such dtype",
                  {.key = tensor.name, .found = std::string(to_string(tensor.dtype))});
    }
    if (tensor.name == kSafetensorsMetadataName) {
      throw Error(ErrorCode::kInvalidArgument, "safetensors files have another use for this name", context);
    }
    static_cast<void>(json_text(tensor.name));
    if (!names.insert(tensor.name).second) {
      throw Error(ErrorCode::kInvalidArgument, "two tensors of a safetensors file have one name", context);
    }
  }
  std::ranges::sort(tensors, [&](const SafetensorsTensor& a, const SafetensorsTensor& b) {
    const auto order_a = order(a.dtype);
    const auto order_b = order(b.dtype);
    return order_a != order_b ? order_a > order_b : a.name < b.name;
  });
  uint64_t end = 0;
  for (SafetensorsTensor& tensor : tensors) {
    tensor.begin = end;
    end = tensor.end = checked_add(end, size_of(tensor), "size of a safetensors file");
  }
  return end;
}

Bytes encode_safetensors_header(const SafetensorsHeader& header) {
  // Text of one tensor after the other: a tree of a million tensors would take many times the header.
  std::string text = "{";
  const auto begin = [&](std::string_view key) {
    if (text.size() > 1) text += ',';
    text += json_text(key) + ":";
  };
  if (!header.metadata.empty()) {
    begin(kSafetensorsMetadataName);
    text += '{';
    const char* comma = "";
    for (const auto& [key, value] : header.metadata) {
      text += std::exchange(comma, ",") + json_text(key) + ":" + json_text(value);
    }
    text += '}';
  }
  for (const SafetensorsTensor& tensor : header.tensors) {
    begin(tensor.name);
    Dims shape = tensor.shape;
    if (tensor.dtype == DType::kFloat4E2M1FNx2) {
      if (shape.empty()) {
        throw Error(ErrorCode::kUnsupported, "safetensors files have no F4 tensor without dimensions",
                    {.key = tensor.name});
      }
      shape[shape.size() - 1] = checked_mul(shape[shape.size() - 1], int64_t{2}, "size of a tensor");
    }
    Json entry = Json::object();
    entry["dtype"] = *safetensors_dtype_name(tensor.dtype);
    entry["shape"] = std::vector<int64_t>(shape.begin(), shape.end());
    entry["data_offsets"] = {tensor.begin, tensor.end};
    text += entry.dump();
  }
  text += '}';
  constexpr size_t kAlignment = 8;
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  if (text.size() > kMaxSafetensorsHeaderBytes) {
    throw Error(ErrorCode::kInvalidArgument, "the header of a safetensors file would be too long: use more files",
                {.wanted = "at most " + std::to_string(kMaxSafetensorsHeaderBytes) + " bytes",
                 .found = std::to_string(text.size())});
  }
  ByteWriter out;
  out.u64(text.size());
  out.text(text);
  return out.take();
}

SafetensorsIndex decode_safetensors_index(ByteSpan bytes) {
  IndexReader reader;
  reader.read(as_text(bytes), "the index of safetensors files");
  return reader.take();
}

Bytes encode_safetensors_index(const SafetensorsIndex& index) {
  Json json = Json::object();
  json["metadata"]["total_size"] = index.total_size;
  json["weight_map"] = Json::object();
  Json::object_t map;
  for (const auto& [name, file] : index.weight_map) map.push_back({name, file});
  json["weight_map"] = std::move(map);
  const std::string text = json.dump(2) + "\n";
  const ByteSpan out = as_bytes(text);
  return {out.begin(), out.end()};
}

std::vector<std::string> decode_safetensors_shards(ByteSpan bytes) {
  ShardListReader reader;
  reader.read(as_text(bytes), "the list of safetensors shards");
  return reader.take();
}

Bytes encode_safetensors_shards(const std::vector<std::string>& files) {
  Json json = Json::object();
  json["files"] = files;
  const std::string text = json.dump(2) + "\n";
  const ByteSpan out = as_bytes(text);
  return {out.begin(), out.end()};
}

SafetensorsSharding decode_sharding_info(std::string_view text) {
  ShardingReader reader;
  reader.read(text, "DCP_SHARDING_INFO");
  return reader.take();
}

std::string encode_sharding_info(const SafetensorsSharding& sharding) {
  std::string text = "{";
  for (const auto& [name, shard] : sharding) {
    if (text.size() > 1) text += ',';
    Json entry = Json::object();
    entry["saved_offsets"] = std::vector<int64_t>(shard.offsets.begin(), shard.offsets.end());
    if (shard.size) entry["size"] = std::vector<int64_t>(shard.size->begin(), shard.size->end());
    text += json_text(name) + ":" + entry.dump();
  }
  return text + "}";
}

}  // namespace reshard
