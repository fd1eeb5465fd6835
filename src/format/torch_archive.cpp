// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/torch_archive.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <unordered_set>

#include "format/pickle_opcodes.h"
#include "format/zip.h"
#include "reshard/core/checked.h"
#include "reshard/format/crc32.h"

namespace reshard {
namespace {

using pickle::describe;
using pickle::Kind;
using pickle::Op;
using pickle::Value;

constexpr std::string_view kFolder = "archive/";
constexpr std::string_view kDataFolder = "data/";
constexpr uint64_t kMaxTensorPickle = 16 << 20;
constexpr uint64_t kMaxValuePickle = 256 << 20;
constexpr uint64_t kMaxSmallRecord = 64;
constexpr size_t kPrefetch = 4096;
constexpr std::string_view kVersionText = "3\n";
constexpr std::string_view kByteOrderText = "little";

// Storage classes of the dtypes that torch pickles with _rebuild_tensor_v2; all others use UntypedStorage and v3.
struct StorageClass {
  DType dtype;
  std::string_view name;
};
constexpr StorageClass kStorageClasses[] = {
    {DType::kFloat32, "FloatStorage"},
    {DType::kFloat64, "DoubleStorage"},
    {DType::kFloat16, "HalfStorage"},
    {DType::kBFloat16, "BFloat16Storage"},
    {DType::kInt8, "CharStorage"},
    {DType::kInt16, "ShortStorage"},
    {DType::kInt32, "IntStorage"},
    {DType::kInt64, "LongStorage"},
    {DType::kUInt8, "ByteStorage"},
    {DType::kBool, "BoolStorage"},
    {DType::kComplex64, "ComplexFloatStorage"},
    {DType::kComplex128, "ComplexDoubleStorage"},
};
std::string_view storage_class(DType dtype) {
  const auto* it = std::ranges::find(kStorageClasses, dtype, &StorageClass::dtype);
  return it == std::end(kStorageClasses) ? std::string_view{} : it->name;
}
bool is_quantized(DType dtype) {
  return dtype == DType::kQInt8 || dtype == DType::kQUInt8 || dtype == DType::kQInt32 || dtype == DType::kQUInt4x2 ||
         dtype == DType::kQUInt2x4;
}

// --- data.pkl of a tensor --------------------------------------------------------------------------------------------

// Counts instead of writing.
class SizeSink {
 public:
  void u8(uint8_t) { size_ += 1; }
  void u16(uint16_t) { size_ += 2; }
  void u32(uint32_t) { size_ += 4; }
  void bytes(ByteSpan b) { size_ += b.size(); }
  void text(std::string_view s) { size_ += s.size(); }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

// The stream that torch.save makes of a dense tensor; the memo is written as CPython does and never read.
template <class Sink>
class TensorPickle {
 public:
  explicit TensorPickle(Sink& out) : out_(out) {}

  void write(DType dtype, const Dims& sizes, bool requires_grad) {
    const std::string_view storage = storage_class(dtype);
    const bool typed = !storage.empty();
    const int64_t elements = volume(sizes);
    op(Op::kProto);
    out_.u8(2);
    global("torch._utils", typed ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
    op(Op::kMark);
    op(Op::kMark);
    str("storage");
    global(typed ? "torch" : "torch.storage", typed ? storage : "UntypedStorage");
    str("0");
    str("cpu");
    integer(typed ? elements : elements * element_size(dtype));
    op(Op::kTuple);
    memoize();
    op(Op::kBinPersId);
    integer(0);
    tuple(sizes.size(), [&](size_t i) { integer(sizes[i]); });
    int64_t stride = 1;  // of the first dimension, then divided down: no allocation for strides
    for (size_t i = 1; i < sizes.size(); ++i) stride *= std::max<int64_t>(sizes[i], 1);
    tuple(sizes.size(), [&](size_t i) {
      if (i > 0) stride /= std::max<int64_t>(sizes[i], 1);
      integer(stride);
    });
    op(requires_grad ? Op::kNewTrue : Op::kNewFalse);
    global("collections", "OrderedDict");
    op(Op::kEmptyTuple);
    op(Op::kReduce);
    memoize();
    if (!typed) global("torch", to_string(dtype));
    op(Op::kTuple);
    memoize();
    op(Op::kReduce);
    memoize();
    op(Op::kStop);
  }

 private:
  void op(Op v) { out_.u8(static_cast<uint8_t>(v)); }
  void memoize() {
    op(Op::kBinPut);
    out_.u8(memo_++);
  }
  void str(std::string_view text) {
    op(Op::kBinUnicode);
    out_.u32(static_cast<uint32_t>(text.size()));
    out_.text(text);
    memoize();
  }
  void global(std::string_view module, std::string_view name) {
    op(Op::kGlobal);
    out_.text(module);
    out_.u8('\n');
    out_.text(name);
    out_.u8('\n');
    memoize();
  }
  void integer(int64_t v) {  // never negative
    if (v <= 0xFF) {
      op(Op::kBinInt1);
      out_.u8(static_cast<uint8_t>(v));
    } else if (v <= 0xFFFF) {
      op(Op::kBinInt2);
      out_.u16(static_cast<uint16_t>(v));
    } else if (v <= 0x7FFFFFFF) {
      op(Op::kBinInt);
      out_.u32(static_cast<uint32_t>(v));
    } else {
      size_t n = 4;
      while (n < 8 && (v >> (8 * n - 1)) != 0) ++n;
      op(Op::kLong1);
      out_.u8(static_cast<uint8_t>(n));
      out_.bytes(std::as_bytes(std::span(&v, 1)).first(n));
    }
  }
  template <class Item>
  void tuple(size_t n, Item&& item) {
    if (n == 0) return op(Op::kEmptyTuple);
    if (n > 3) op(Op::kMark);
    for (size_t i = 0; i < n; ++i) item(i);
    op(n > 3 ? Op::kTuple : static_cast<Op>(static_cast<size_t>(Op::kTuple1) + n - 1));
    memoize();
  }

  Sink& out_;
  uint8_t memo_ = 0;
};

// --- .data/serialization_id ------------------------------------------------------------------------------------------

constexpr size_t kSerializationIdSize = 40;

uint64_t hash_combine(uint64_t seed, uint64_t value) {
  return seed ^ (value + 0x9e3779b9ull + (seed << 6) + (seed >> 2));
}

// torch's hash of the names of the records: over std::hash, in the order of its unordered_set. Nothing checks it; with
// the standard library that torch's wheels are built with it comes out the same.
uint64_t hash_names(std::span<const std::string> names) {
  std::unordered_set<std::string> set;
  for (const std::string& name : names) set.insert(name);
  uint64_t hash = 0;
  for (const std::string& name : set) hash = hash_combine(hash, std::hash<std::string>{}(name));
  return hash;
}

// Two numbers of 20 digits.
std::string serialization_id(uint64_t names, uint64_t contents) {
  std::string text(kSerializationIdSize, '0');
  for (size_t end = 20; uint64_t part : {names, contents}) {
    for (size_t at = end; part != 0; part /= 10) text[--at] = static_cast<char>('0' + part % 10);
    end += 20;
  }
  return text;
}

std::string full_name(std::string_view name) { return std::string(kFolder).append(name); }

void check_alignment(uint32_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > 1 << 15) {
    throw Error(ErrorCode::kInvalidArgument, "alignment of an archive",
                {.wanted = "a power of two up to 32768", .found = std::to_string(alignment)});
  }
}

constexpr std::array<std::string_view, 7> kTensorRecords = {
    "archive/data.pkl", "archive/.format_version", "archive/.storage_alignment",    "archive/byteorder",
    "archive/data/0",   "archive/version",         "archive/.data/serialization_id"};

}  // namespace

void MemorySource::read(uint64_t offset, MutableByteSpan out) const {
  if (offset > data_.size() || out.size() > data_.size() - offset) {
    throw Error(ErrorCode::kCorruptData, "item ends too early",
                {.offset = offset,
                 .wanted = std::to_string(out.size()) + " bytes",
                 .found = std::to_string(data_.size()) + " in all"});
  }
  if (!out.empty()) std::memcpy(out.data(), data_.data() + offset, out.size());
}

// --- TensorArchive ---------------------------------------------------------------------------------------------------

TensorArchive::TensorArchive(DType dtype, const Dims& sizes, TensorArchiveOptions options)
    : dtype_(dtype), sizes_(sizes), options_(options) {
  check_alignment(options.alignment);
  if (is_quantized(dtype))
    throw Error(ErrorCode::kInvalidArgument, "quantized tensors cannot be saved: " + std::string(to_string(dtype)));
  if (sizes.size() > kMaxTensorRank)
    throw Error(ErrorCode::kInvalidArgument, "tensor of " + std::to_string(sizes.size()) + " dimensions");
  uint64_t payload_size = 0;
  try {
    payload_size = static_cast<uint64_t>(checked_mul(volume(sizes), element_size(dtype), "tensor size"));
    contiguous_strides(sizes);
  } catch (const Error& error) {
    throw Error(ErrorCode::kInvalidArgument, error.message());
  }
  SizeSink pickle;
  TensorPickle(pickle).write(dtype, sizes, options.requires_grad);

  const uint64_t alignment_digits = std::to_string(options.alignment).size();
  const uint64_t content_sizes[kRecordCount] = {
      pickle.size(),       1, alignment_digits, kByteOrderText.size(), payload_size, kVersionText.size(),
      kSerializationIdSize};
  uint64_t position = 0;
  for (int i = 0; i < kRecordCount; ++i) {
    Record& record = records_[i];
    record.header = position;
    record.size = content_sizes[i];
    record.payload =
        zip::payload_position(position, kTensorRecords[static_cast<size_t>(i)].size(), record.size, options.alignment);
    position = zip::end_position(position, record.payload, record.size);
  }
  directory_ = position;
  for (int i = 0; i < kRecordCount; ++i) {
    position += zip::directory_entry_size(
        {kTensorRecords[static_cast<size_t>(i)], records_[i].header, records_[i].payload, records_[i].size, 0});
  }
  length_ = position + zip::kEndSize;
}

Bytes TensorArchive::small_content(int index) const {
  ByteWriter out;
  switch (index) {
    case kPickle:
      TensorPickle(out).write(dtype_, sizes_, options_.requires_grad);
      break;
    case kFormatVersion:
      out.text("1");
      break;
    case kAlignment:
      out.text(std::to_string(options_.alignment));
      break;
    case kByteOrder:
      out.text(kByteOrderText);
      break;
    case kVersion:
      out.text(kVersionText);
      break;
    default:
      break;
  }
  return out.take();
}

Bytes TensorArchive::head() const {
  ByteWriter out;
  out.buffer().reserve(payload_offset());
  for (int i = kPickle; i < kData; ++i) {
    const Bytes content = small_content(i);
    const zip::Record record{kTensorRecords[static_cast<size_t>(i)], records_[i].header, records_[i].payload,
                             records_[i].size, crc32(content)};
    zip::put_local_header(out, record);
    out.bytes(content);
    zip::put_descriptor(out, record);
  }
  zip::put_local_header(
      out, {kTensorRecords[kData], records_[kData].header, records_[kData].payload, records_[kData].size, 0});
  return out.take();
}

Bytes TensorArchive::tail(uint32_t crc) const {
  TensorArchiveFrame frame(*this);
  const ByteSpan tail = frame.tail(crc);
  return {tail.begin(), tail.end()};
}

TensorArchiveFrame::TensorArchiveFrame(const TensorArchive& archive) : archive_(archive), head_(archive.head()) {
  using A = TensorArchive;
  std::vector<zip::Record> records;
  for (int i = 0; i < A::kRecordCount; ++i) {
    const A::Record& r = archive_.records_[i];
    records.push_back({kTensorRecords[static_cast<size_t>(i)], r.header, r.payload, r.size, 0});
    if (i != A::kData && i != A::kSerializationId) records.back().crc32 = crc32(archive_.small_content(i));
    if (i < A::kData) hash_before_ = hash_combine(hash_before_, records.back().crc32);
  }
  version_crc_ = records[A::kVersion].crc32;

  ByteWriter out;
  out.buffer().reserve(static_cast<size_t>(archive_.length() - archive_.payload_offset() - archive_.payload_size()));
  // A data descriptor begins with its signature, an entry of the directory has 16 bytes before the CRC-32.
  data_crcs_[0] = out.size() + 4;
  zip::put_descriptor(out, records[A::kData]);
  zip::put_local_header(out, records[A::kVersion]);
  out.text(kVersionText);
  zip::put_descriptor(out, records[A::kVersion]);
  zip::put_local_header(out, records[A::kSerializationId]);
  id_ = out.size();
  out.buffer().resize(id_ + kSerializationIdSize);
  id_crcs_[0] = out.size() + 4;
  zip::put_descriptor(out, records[A::kSerializationId]);
  uint64_t entry = out.size();
  zip::put_tail(out, records, archive_.directory_);
  for (int i = 0; i < A::kRecordCount; ++i) {
    if (i == A::kData) data_crcs_[1] = static_cast<size_t>(entry) + 16;
    if (i == A::kSerializationId) id_crcs_[1] = static_cast<size_t>(entry) + 16;
    entry += zip::directory_entry_size(records[static_cast<size_t>(i)]);
  }
  tail_ = out.take();
}

ByteSpan TensorArchiveFrame::tail(uint32_t crc) {
  static const uint64_t names_hash = [] {
    std::vector<std::string> names;
    for (int i = TensorArchive::kPickle; i < TensorArchive::kSerializationId; ++i)
      names.emplace_back(kTensorRecords[static_cast<size_t>(i)].substr(kFolder.size()));
    return hash_names(names);
  }();
  const bool empty = archive_.payload_size() == 0;  // has no descriptor, and is not in the hash
  uint64_t contents_hash = hash_before_;
  if (!empty) contents_hash = hash_combine(contents_hash, crc);
  contents_hash = hash_combine(contents_hash, version_crc_);
  const std::string id = serialization_id(names_hash, contents_hash);
  const uint32_t id_crc = crc32(as_bytes(id));
  std::memcpy(tail_.data() + id_, id.data(), id.size());
  if (!empty) put_crc(data_crcs_[0], crc);
  put_crc(data_crcs_[1], crc);
  for (const size_t at : id_crcs_) put_crc(at, id_crc);
  return tail_;
}

void TensorArchiveFrame::put_crc(size_t at, uint32_t crc) { std::memcpy(tail_.data() + at, &crc, sizeof(crc)); }

bool TensorArchiveFrame::is_tail(ByteSpan found, uint32_t crc) {
  if (found.size() != tail(crc).size()) return false;
  const ByteSpan id = found.subspan(id_, kSerializationIdSize);
  std::ranges::copy(id, tail_.begin() + static_cast<ptrdiff_t>(id_));
  for (const size_t at : id_crcs_) put_crc(at, crc32(id));
  return std::ranges::equal(found, tail_);
}

std::optional<TensorItem> TensorArchiveFrame::match(ByteSpan item) {
  const auto payload = static_cast<size_t>(archive_.payload_offset());
  const auto size = static_cast<size_t>(archive_.payload_size());
  if (item.size() != archive_.length() || std::memcmp(item.data(), head_.data(), payload) != 0) return std::nullopt;
  const ByteSpan after = item.subspan(payload + size);
  uint32_t crc = 0;
  if (size != 0) std::memcpy(&crc, after.data() + data_crcs_[0], sizeof(crc));
  if (!is_tail(after, crc)) return std::nullopt;
  TensorItem found;
  found.dtype = archive_.dtype_;
  found.sizes = archive_.sizes_;
  found.strides = contiguous_strides(archive_.sizes_);
  found.payload_offset = payload;
  found.payload_size = size;
  found.requires_grad = archive_.options_.requires_grad;
  if (crc != 0 || size == 0) found.crc32 = crc;
  return found;
}

// --- values ----------------------------------------------------------------------------------------------------------

TorchArchiveWriter::TorchArchiveWriter(const Value& value, Sink sink, uint32_t alignment)
    : sink_(std::move(sink)), alignment_(alignment) {
  check_alignment(alignment);
  put("data.pkl", pickle::write(value));
  put(".format_version", as_bytes("1"));
  put(".storage_alignment", as_bytes(std::to_string(alignment)));
  put("byteorder", as_bytes(kByteOrderText));
}

void TorchArchiveWriter::emit(ByteSpan bytes) {
  sink_(bytes);
  position_ += bytes.size();
}

void TorchArchiveWriter::begin(std::string name, uint64_t size) {
  if (open_) throw Error(ErrorCode::kInternal, "archive: record " + records_.back().name + " is not complete");
  const std::string stored_name = full_name(name);
  Written& record = records_.emplace_back(Written{
      std::move(name), position_, zip::payload_position(position_, stored_name.size(), size, alignment_), size});
  ByteWriter header;
  zip::put_local_header(header, {stored_name, record.header, record.payload, record.size, 0});
  emit(header.buffer());
  left_ = size;
  open_ = true;
  if (left_ == 0) end();
}

void TorchArchiveWriter::write(ByteSpan bytes) {
  if (bytes.empty()) return;
  if (!open_ || bytes.size() > left_) throw Error(ErrorCode::kInternal, "archive: more bytes than the record has");
  Written& record = records_.back();
  record.crc32 = reshard::crc32(bytes, record.crc32);
  emit(bytes);
  left_ -= bytes.size();
  if (left_ == 0) end();
}

void TorchArchiveWriter::end() {
  const Written& record = records_.back();
  ByteWriter descriptor;
  zip::put_descriptor(descriptor, {record.name, record.header, record.payload, record.size, record.crc32});
  emit(descriptor.buffer());
  if (record.size != 0) contents_ = hash_combine(contents_, record.crc32);
  open_ = false;
}

void TorchArchiveWriter::put(std::string name, ByteSpan content) {
  begin(std::move(name), content.size());
  write(content);
}

void TorchArchiveWriter::begin_storage(std::string_view key, uint64_t size) {
  begin(std::string(kDataFolder).append(key), size);
}

void TorchArchiveWriter::finish() {
  put("version", as_bytes(kVersionText));
  std::vector<std::string> names;
  names.reserve(records_.size());
  for (const Written& record : records_) names.push_back(record.name);
  put(".data/serialization_id", as_bytes(serialization_id(hash_names(names), contents_)));
  std::vector<std::string> stored_names;
  stored_names.reserve(records_.size());
  std::vector<zip::Record> directory;
  directory.reserve(records_.size());
  for (const Written& record : records_) {
    directory.push_back(
        {stored_names.emplace_back(full_name(record.name)), record.header, record.payload, record.size, record.crc32});
  }
  ByteWriter tail;
  zip::put_tail(tail, directory, position_);
  emit(tail.buffer());
}

Bytes encode_value_archive(const Value& value, std::span<const ByteSpan> storages, uint32_t alignment) {
  Bytes out;
  TorchArchiveWriter writer(
      value, [&](ByteSpan bytes) { out.insert(out.end(), bytes.begin(), bytes.end()); }, alignment);
  for (size_t i = 0; i < storages.size(); ++i) {
    writer.begin_storage(std::to_string(i), storages[i].size());
    writer.write(storages[i]);
  }
  writer.finish();
  return out;
}

Value make_tensor_value(pickle::Tree& tree, DType dtype, const Dims& sizes, size_t storage, bool requires_grad) {
  if (is_quantized(dtype))
    throw Error(ErrorCode::kInvalidArgument, "quantized tensors cannot be saved: " + std::string(to_string(dtype)));
  const std::string_view typed = storage_class(dtype);
  const int64_t elements = volume(sizes);
  const auto ints = [&](const Dims& dims) {
    std::vector<Value> values;
    for (const int64_t v : dims) values.push_back(tree.integer(v));
    return tree.tuple(values);
  };
  const Value storage_type =
      typed.empty() ? tree.global("torch.storage", "UntypedStorage") : tree.global("torch", typed);
  const Value id =
      tree.tuple({tree.str("storage"), storage_type, tree.str(std::to_string(storage)), tree.str("cpu"),
                  tree.integer(typed.empty() ? checked_mul(elements, element_size(dtype), "tensor size") : elements)});
  pickle::Object hooks;
  hooks.callable = tree.global("collections", "OrderedDict");
  hooks.args = tree.tuple({});
  std::vector<Value> args = {
      tree.persistent(id),         tree.integer(0),   ints(sizes), ints(contiguous_strides(sizes)),
      tree.boolean(requires_grad), tree.object(hooks)};
  if (typed.empty()) args.push_back(tree.global("torch", to_string(dtype)));
  pickle::Object rebuild;
  rebuild.callable = tree.global("torch._utils", typed.empty() ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  rebuild.args = tree.tuple(args);
  return tree.object(rebuild);
}

// --- reading ---------------------------------------------------------------------------------------------------------

bool TensorItem::is_dense() const {
  if (conj || neg) return false;
  if (volume(sizes) == 0) return true;
  int64_t expected = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];  // the number of elements was checked when the item was read
  }
  return true;
}

namespace {

[[noreturn]] void corrupt(const std::string& message, std::string wanted = {}, std::string found = {}) {
  throw Error(ErrorCode::kCorruptData, "tensor: " + message, {.wanted = std::move(wanted), .found = std::move(found)});
}
[[noreturn]] void unsupported(const std::string& message) {
  throw Error(ErrorCode::kUnsupported, "tensor: " + message);
}

Dims dims_of(const Value& value, const char* what) {
  const auto items = value.items();
  if (value.kind() != Kind::kTuple) corrupt(std::string(what) + " are no tuple");
  if (items.size() > kMaxTensorRank)
    corrupt("too many dimensions", "at most " + std::to_string(kMaxTensorRank), std::to_string(items.size()));
  Dims dims(items.size(), 0);
  for (size_t i = 0; i < items.size(); ++i) {
    dims[i] = items[i].as_int();
    if (dims[i] < 0) corrupt(std::string("negative ") + what, {}, std::to_string(dims[i]));
  }
  return dims;
}

// Finds the bytes of a storage: (name of the record, bytes wanted) to (position in the item, CRC-32). Throws if it is
// not there or not that long.
struct StoredBytes {
  uint64_t offset = 0;
  uint32_t crc32 = 0;
};
using FindStorage = std::function<StoredBytes(const std::string& key, uint64_t size)>;

// The tensor that `value` rebuilds; nothing if it rebuilds none.
std::optional<TensorItem> tensor_from_value(const Value& value, const FindStorage& find_storage) {
  if (value.kind() != Kind::kObject) return std::nullopt;
  const pickle::Object& object = value.as_object();
  if (object.callable.kind() != Kind::kGlobal || object.made != pickle::Object::Made::kReduce) return std::nullopt;
  const pickle::Global& function = object.callable.as_global();
  const auto args = object.args.items();
  if (object.callable.is_global("torch._utils", "_rebuild_parameter")) {
    if (args.size() != 3 || args[0].kind() != Kind::kObject) corrupt("arguments of " + describe(object.callable));
    if (args[0].as_object().callable.is_global("torch._utils", "_rebuild_parameter"))
      corrupt("a parameter of a parameter");
    auto item = tensor_from_value(args[0], find_storage);
    if (item) item->requires_grad = args[1].as_bool();
    return item;
  }
  const bool v2 = object.callable.is_global("torch._utils", "_rebuild_tensor_v2");
  const bool v3 = object.callable.is_global("torch._utils", "_rebuild_tensor_v3");
  if (!v2 && !v3) {
    if ((function.module == "torch._utils" || function.module == "torch._tensor") &&
        function.name.starts_with("_rebuild"))
      unsupported(describe(object.callable) + " is not read");
    return std::nullopt;
  }
  const size_t fixed = v2 ? 6 : 7;
  if (args.size() != fixed && args.size() != fixed + 1)
    corrupt("number of arguments of " + describe(object.callable), std::to_string(fixed), std::to_string(args.size()));

  TensorItem item;
  const auto id = args[0].persistent_id().items();
  if (id.size() != 5 || id[0].as_str() != "storage") corrupt("persistent id is no storage");
  const pickle::Global& storage_type = id[1].as_global();
  if (v3) {
    const pickle::Global& dtype = args[6].as_global();
    const auto known = dtype.module == "torch" ? dtype_from_string(dtype.name) : std::nullopt;
    if (!known) unsupported("unknown dtype " + describe(args[6]));
    item.dtype = *known;
    if (storage_type.name != "UntypedStorage")
      corrupt("storage class", "UntypedStorage", std::string(storage_type.name));
  } else {
    const auto* known = std::ranges::find(kStorageClasses, storage_type.name, &StorageClass::name);
    if (known == std::end(kStorageClasses)) unsupported("unknown storage class " + describe(id[1]));
    item.dtype = known->dtype;
  }
  const int64_t width = element_size(item.dtype);

  const int64_t count = id[4].as_int();
  if (count < 0) corrupt("negative storage size");
  item.payload_size = static_cast<uint64_t>(v3 ? count : checked_mul(count, width, "storage size"));
  const int64_t elements = static_cast<int64_t>(item.payload_size) / width;

  item.storage_offset = args[1].as_int();
  item.sizes = dims_of(args[2], "sizes");
  item.strides = dims_of(args[3], "strides");
  item.requires_grad = args[4].as_bool();
  if (item.sizes.size() != item.strides.size())
    corrupt("as many strides as sizes", std::to_string(item.sizes.size()), std::to_string(item.strides.size()));
  if (item.storage_offset < 0) corrupt("negative storage offset");
  checked_mul(volume(item.sizes), width, "tensor size");
  if (volume(item.sizes) > 0) {
    int64_t last = item.storage_offset;
    for (size_t i = 0; i < item.sizes.size(); ++i) {
      last = checked_add(last, checked_mul(item.sizes[i] - 1, item.strides[i], "stride"), "reach of the strides");
    }
    if (last >= elements)
      corrupt("strides reach past the storage", "less than " + std::to_string(elements), std::to_string(last));
  }
  if (args.size() == fixed + 1 && !args[fixed].is_none()) {
    for (const auto& [key, flag] : args[fixed].entries()) {
      const std::string_view name = key.as_str();
      if (name != "conj" && name != "neg") unsupported("unknown flag " + std::string(name));
      (name == "conj" ? item.conj : item.neg) = flag.as_bool();
    }
  }

  const std::string_view key = id[2].as_str();
  const bool plain_key = !key.empty() && key.size() <= 255 &&
                         std::ranges::all_of(key, [](char c) { return c > ' ' && c != '/' && c != '\\' && c != 0x7F; });
  if (!plain_key) corrupt("storage key is no plain name");
  const StoredBytes stored = find_storage(std::string(key), item.payload_size);
  item.payload_offset = stored.offset;
  if (stored.crc32 != 0 || item.payload_size == 0) item.crc32 = stored.crc32;
  return item;
}

[[noreturn]] void wrong_storage_size(const std::string& key, uint64_t wanted, uint64_t found) {
  corrupt("record data/" + key + " has another size than its tensor", std::to_string(wanted), std::to_string(found));
}

// version and byteorder: what torch insists on, without a read where the directory's CRC-32 already tells.
void check_small_records(zip::Reader& archive) {
  const zip::Entry* version = archive.find("version");
  if (version == nullptr) version = &archive.get(".data/version");
  if (!zip::Reader::is_known(*version, kVersionText)) {
    const Bytes content = archive.content(*version, kMaxSmallRecord);
    std::string_view text = as_text(content);
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.remove_suffix(1);
    const bool known = (text.size() == 1 && text[0] >= '1' && text[0] <= '9') || text == "10";
    if (!known)
      throw Error(ErrorCode::kUnsupported, "archive: unknown version",
                  {.wanted = "1 to 10", .found = std::string(text.substr(0, 20))});
  }
  const zip::Entry* order = archive.find("byteorder");
  if (order == nullptr || zip::Reader::is_known(*order, kByteOrderText)) return;
  const Bytes content = archive.content(*order, kMaxSmallRecord);
  if (as_text(content) != kByteOrderText) {
    throw Error(ErrorCode::kUnsupported, "archive: byte order",
                {.wanted = std::string(kByteOrderText), .found = std::string(as_text(content).substr(0, 20))});
  }
}

}  // namespace

TensorItem read_tensor_item(const ByteSource& source) {
  zip::Reader archive(source);
  const zip::Entry& pickled = archive.get("data.pkl");
  if (const zip::Entry* data = archive.find("data/0"); data != nullptr && data->header > pickled.header) {
    // From the one local header to the other, in one read where that is short.
    const uint64_t end = data->header + 30 + data->stored_name.size();
    if (end - pickled.header <= kPrefetch) archive.prefetch(pickled.header, end);
  }
  const Bytes stream = archive.content(pickled, kMaxTensorPickle);
  const pickle::Tree tree = pickle::parse(stream);
  auto item = tensor_from_value(tree.root(), [&](const std::string& key, uint64_t size) -> StoredBytes {
    const zip::Entry& data = archive.get("data/" + key);
    if (data.size != size) wrong_storage_size(key, size, data.size);
    return {archive.payload(data), data.crc32};
  });
  if (!item) {
    const Value& root = tree.root();
    corrupt("item holds another value", "a tensor", describe(root));
  }
  check_small_records(archive);
  return *item;
}

std::optional<ValueArchive::Storage> ValueArchive::storage(std::string_view key) const {
  const auto it = storages_.find(key);
  return it == storages_.end() ? std::nullopt : std::optional(it->second);
}

std::optional<TensorItem> ValueArchive::as_tensor(const Value& value) const {
  return tensor_from_value(value, [&](const std::string& key, uint64_t size) -> StoredBytes {
    const auto stored = storage(key);
    if (!stored) corrupt("no record data/" + key);
    if (stored->size != size) wrong_storage_size(key, size, stored->size);
    return {stored->offset, stored->crc32};
  });
}

ValueArchive decode_value_archive(const ByteSource& source) {
  zip::Reader archive(source);
  ValueArchive result;
  const zip::Entry& pickled = archive.get("data.pkl");
  result.tree_ = pickle::parse(archive.content(pickled, kMaxValuePickle));
  result.pickled_ = {archive.payload(pickled), pickled.size, pickled.crc32};
  pickle::check_tree(result.root());
  check_small_records(archive);
  for (const zip::Entry& entry : archive.entries()) {
    if (entry.name.starts_with(kDataFolder))
      result.storages_[entry.name.substr(kDataFolder.size())] = {archive.payload(entry), entry.size, entry.crc32};
  }
  return result;
}

ArchiveSummary verify_archive(const ByteSource& source) {
  zip::Reader archive(source);
  ArchiveSummary summary;
  Bytes buffer;
  for (const zip::Entry& entry : archive.entries()) {
    const uint64_t payload = archive.payload(entry);
    uint32_t crc = 0;
    for (uint64_t done = 0; done < entry.size;) {
      buffer.resize(std::min<uint64_t>(entry.size - done, 1 << 20));
      source.read(payload + done, buffer);
      crc = crc32(buffer, crc);
      done += buffer.size();
    }
    ++summary.records;
    summary.bytes += entry.size;
    if (entry.crc32 == 0 && entry.size != 0) {
      ++summary.without_crc;
    } else if (crc != entry.crc32) {
      throw Error(ErrorCode::kCorruptData,
                  "archive: record " + entry.stored_name + " has another CRC-32 than the directory says",
                  {.offset = payload, .wanted = std::to_string(entry.crc32), .found = std::to_string(crc)});
    }
    archive.check_descriptor(entry, payload);
  }
  return summary;
}

}  // namespace reshard
