// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/torch_archive.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "format/zip_builder.h"
#include "reshard/format/crc32.h"
#include "reshard/format/sha256.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

using pickle::Tree;
using pickle::Value;

constexpr auto kCorrupt = ErrorCode::kCorruptData;
constexpr auto kUnsupported = ErrorCode::kUnsupported;

Bytes whole_archive(const TensorArchive& archive, ByteSpan payload) {
  Bytes bytes = archive.head();
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  const Bytes tail = archive.tail(crc32(payload));
  bytes.insert(bytes.end(), tail.begin(), tail.end());
  return bytes;
}
Bytes pattern(size_t size) {
  Bytes bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 3);
  return bytes;
}

// Counts what a reader asks for.
class CountingSource final : public ByteSource {
 public:
  explicit CountingSource(ByteSpan data) : data_(data) {}
  uint64_t size() const override { return data_.size(); }
  void read(uint64_t offset, MutableByteSpan out) const override {
    ++reads;
    bytes += out.size();
    data_.read(offset, out);
  }
  mutable size_t reads = 0;
  mutable size_t bytes = 0;

 private:
  MemorySource data_;
};

// --- TensorArchive ---------------------------------------------------------------------------------------------------

TEST(TensorArchiveTest, OffsetsAreKnownBeforeAnyByteIsWritten) {
  for (const uint32_t alignment : {1u, 64u, 512u, 4096u, 32768u}) {
    for (const Dims& sizes : {Dims{}, Dims{0}, Dims{5}, Dims{4, 8}, Dims{2, 3, 4}, Dims{2, 0, 3, 1},
                              Dims{1, 2, 1, 2, 1, 2, 3}, Dims{300, 70000}}) {
      for (const DType dtype :
           {DType::kFloat32, DType::kBool, DType::kComplex128, DType::kFloat8E4M3FN, DType::kUInt64}) {
        const TensorArchive archive(dtype, sizes, {.alignment = alignment});
        ASSERT_EQ(archive.head().size(), archive.payload_offset());
        ASSERT_EQ(archive.payload_size(), static_cast<uint64_t>(volume(sizes) * element_size(dtype)));
        ASSERT_EQ(archive.payload_offset() + archive.payload_size() + archive.tail(1).size(), archive.length());
        ASSERT_EQ(archive.payload_offset() % alignment, 0u);
      }
    }
  }
}

TEST(TensorArchiveTest, LengthsAsTorchHasThem) {
  EXPECT_EQ(TensorArchive(DType::kFloat32, {4, 8}).length(), 1705u);
  EXPECT_EQ(TensorArchive(DType::kFloat32, {4, 8}).payload_offset(), 704u);
  EXPECT_EQ(TensorArchive(DType::kFloat32, {4}).length(), 1577u);
  EXPECT_EQ(TensorArchive(DType::kFloat32, {0}).length(), 1513u);
}

TEST(TensorArchiveTest, ReadsBackWhatItWrote) {
  for (const Dims& sizes : {Dims{}, Dims{0, 3}, Dims{4, 8}, Dims{2, 1, 3, 1, 2}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBool, DType::kBFloat16, DType::kComplex64,
                              DType::kFloat4E2M1FNx2, DType::kUInt16, DType::kBits16}) {
      for (const bool requires_grad : {false, true}) {
        const TensorArchive archive(dtype, sizes, {.alignment = 256, .requires_grad = requires_grad});
        const Bytes payload = pattern(archive.payload_size());
        const Bytes bytes = whole_archive(archive, payload);
        const TensorItem item = read_tensor_item(MemorySource(bytes));
        EXPECT_EQ(item.dtype, dtype);
        EXPECT_EQ(item.sizes, sizes);
        EXPECT_EQ(item.strides, contiguous_strides(sizes));
        EXPECT_EQ(item.payload_offset, archive.payload_offset());
        EXPECT_EQ(item.payload_size, archive.payload_size());
        EXPECT_EQ(item.crc32, crc32(payload));
        EXPECT_EQ(item.requires_grad, requires_grad);
        EXPECT_TRUE(item.is_dense());
        EXPECT_EQ(verify_archive(MemorySource(bytes)).records, 7u);
      }
    }
  }
}

TEST(TensorArchiveFrameTest, SaysOfAnArchiveWhatParsingItSays) {
  for (const Dims& sizes : {Dims{}, Dims{0, 3}, Dims{4, 8}, Dims{2, 1, 3, 1, 2}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBool, DType::kFloat8E4M3FN}) {
      for (const bool requires_grad : {false, true}) {
        TensorArchiveFrame frame(TensorArchive(dtype, sizes, {.alignment = 64, .requires_grad = requires_grad}));
        for (const size_t shift : {0, 1}) {  // a frame is used again and again
          Bytes payload = pattern(frame.archive().payload_size() + shift);
          payload.erase(payload.begin(), payload.begin() + static_cast<ptrdiff_t>(shift));
          const Bytes bytes = whole_archive(frame.archive(), payload);
          const auto found = frame.match(bytes);
          ASSERT_TRUE(found) << to_string(dtype) << " " << to_string(sizes);
          const TensorItem parsed = read_tensor_item(MemorySource(bytes));
          EXPECT_EQ(found->dtype, parsed.dtype);
          EXPECT_EQ(found->sizes, parsed.sizes);
          EXPECT_EQ(found->strides, parsed.strides);
          EXPECT_EQ(found->storage_offset, parsed.storage_offset);
          EXPECT_EQ(found->payload_offset, parsed.payload_offset);
          EXPECT_EQ(found->payload_size, parsed.payload_size);
          EXPECT_EQ(found->crc32, parsed.crc32);
          EXPECT_EQ(found->requires_grad, parsed.requires_grad);
          EXPECT_EQ(found->conj, parsed.conj);
          EXPECT_EQ(found->neg, parsed.neg);
        }
      }
    }
  }
}

TEST(TensorArchiveFrameTest, KnowsNothingThatDiffersInOneByte) {
  TensorArchiveFrame frame(TensorArchive(DType::kFloat32, {4, 8}));
  const uint64_t begin = frame.archive().payload_offset();
  const uint64_t end = begin + frame.archive().payload_size();
  Bytes bytes = whole_archive(frame.archive(), pattern(frame.archive().payload_size()));
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] ^= std::byte{1};
    // What lies in the payload is for the CRC-32 to judge.
    EXPECT_EQ(frame.match(bytes).has_value(), i >= begin && i < end) << "byte " << i;
    bytes[i] ^= std::byte{1};
  }
  EXPECT_TRUE(frame.match(bytes));
  bytes.push_back({});
  EXPECT_FALSE(frame.match(bytes));
  EXPECT_FALSE(frame.match(ByteSpan(bytes).first(bytes.size() - 2)));
  EXPECT_FALSE(frame.match({}));
}

TEST(TensorArchiveTest, HeadersPast4GiBAreThoseOfTorch) {
  // SHA-256 of what torch 2.14.1 wrote before and after the elements of zeros(n, dtype=uint8). 2^32 - 2 bytes: only positions need 64 bits.
  struct Case {
    int64_t n;
    uint32_t crc;
    uint64_t length;
    const char* head;
    const char* tail;
  };
  for (const Case& c :
       {Case{0xFFFFFFFE, 0x0F6A7026, 4294968905, "ab8b9b8beec68953c009d2e729eed8715e93f61c8fec8cc602e3c5e09fc37825",
             "f39df01c365f5a7e04877297a8ce8fccad5e7aae2ae2dfcf08b30cf35a6abe16"},
        Case{0x100000010, 0xC9EFF1BD, 4294968925, "4a1289c80a94b8b4579578897af5667df4d606c49a0f3e977e0e906b844b21f5",
             "ff544dde4fad09ac2ca52fdbc71f17e92f86566032c6a2341b30c3b7a1fec9ad"}}) {
    const TensorArchive archive(DType::kUInt8, {c.n});
    EXPECT_EQ(archive.length(), c.length);
    EXPECT_EQ(to_hex(Sha256::of(archive.head())), c.head);
    EXPECT_EQ(to_hex(Sha256::of(archive.tail(c.crc))), c.tail);
  }
}

// An archive with a hole for a payload that would not fit into memory.
class SparseSource final : public ByteSource {
 public:
  explicit SparseSource(const TensorArchive& archive)
      : length_(archive.length()), head_(archive.head()), tail_(archive.tail(7)) {}
  uint64_t size() const override { return length_; }
  void read(uint64_t offset, MutableByteSpan out) const override {
    for (size_t i = 0; i < out.size(); ++i) {
      const uint64_t at = offset + i;
      out[i] = at < head_.size()              ? head_[at]
               : at >= length_ - tail_.size() ? tail_[at - (length_ - tail_.size())]
                                              : std::byte{0};
    }
  }

 private:
  uint64_t length_;
  Bytes head_, tail_;
};

TEST(TensorArchiveTest, ReadsHeadersPast4GiB) {
  for (const int64_t n : {int64_t{0xFFFFFFFE}, int64_t{0xFFFFFFFF}, int64_t{0x100000010}, int64_t{1} << 40}) {
    const TensorArchive archive(DType::kInt8, {n});
    const TensorItem item = read_tensor_item(SparseSource(archive));
    EXPECT_EQ(item.sizes, Dims{n});
    EXPECT_EQ(item.payload_offset, archive.payload_offset());
    EXPECT_EQ(item.payload_size, static_cast<uint64_t>(n));
    EXPECT_EQ(item.crc32, 7u);
  }
}

// As CPython's pickler: one byte, two, four, then as many as the number needs.
TEST(TensorArchiveTest, SizesAreWrittenInTheShortestForm) {
  using namespace std::string_literals;
  const std::vector<std::pair<int64_t, std::string>> forms{{255, "K\xFF"s},
                                                           {256, "M\0\x01"s},
                                                           {65535, "M\xFF\xFF"s},
                                                           {65536, "J\0\0\x01\0"s},
                                                           {0x7FFFFFFF, "J\xFF\xFF\xFF\x7F"s},
                                                           {0x80000000, "\x8A\x05\0\0\0\x80\0"s},
                                                           {0x7FFFFFFFFF, "\x8A\x05\xFF\xFF\xFF\xFF\x7F"s},
                                                           {0x8000000000, "\x8A\x06\0\0\0\0\x80\0"s}};
  for (const auto& [size, form] : forms) {
    const TensorArchive archive(DType::kFloat32, {0, size});
    const Bytes file = whole_archive(archive, {});
    EXPECT_NE(as_text(file).find("K\0"s + form), std::string_view::npos) << size;
    EXPECT_EQ(read_tensor_item(MemorySource(file)).sizes, (Dims{0, size}));
  }
}

TEST(TensorArchiveTest, FewAndSmallReads) {
  const auto read = [](const TensorArchive& archive) {
    const Bytes bytes = whole_archive(archive, pattern(archive.payload_size()));
    CountingSource source(bytes);
    read_tensor_item(source);
    return std::pair(source.reads, source.bytes);
  };
  EXPECT_EQ(read(TensorArchive(DType::kFloat32, {16, 16})).first, 1u);  // 4 KiB in all: whole
  const auto [reads, bytes] = read(TensorArchive(DType::kFloat32, {100, 100}));
  EXPECT_EQ(reads, 2u);
  EXPECT_LE(bytes, 2048u);
  const auto [page_reads, page_bytes] = read(TensorArchive(DType::kFloat32, {100, 100}, {.alignment = 4096}));
  EXPECT_LE(page_reads, 4u);
  EXPECT_LE(page_bytes, 2048u);
}

TEST(TensorArchiveTest, WrongArgumentsAreRefused) {
  constexpr auto kInvalid = ErrorCode::kInvalidArgument;
  EXPECT_ERROR(kInvalid, "negative size", TensorArchive(DType::kFloat32, {2, -1}));
  EXPECT_ERROR(kInvalid, "overflows", TensorArchive(DType::kFloat32, {int64_t{1} << 40, int64_t{1} << 40}));
  EXPECT_ERROR(kInvalid, "overflows", TensorArchive(DType::kFloat64, {int64_t{1} << 61}));
  EXPECT_ERROR(kInvalid, "overflows", TensorArchive(DType::kFloat64, {0, int64_t{1} << 40, int64_t{1} << 40}));
  EXPECT_ERROR(kInvalid, "65 dimensions", TensorArchive(DType::kFloat64, Dims(65, 1)));
  EXPECT_ERROR(kInvalid, "quantized", TensorArchive(DType::kQInt8, {2}));
  EXPECT_ERROR(kInvalid, "power of two", TensorArchive(DType::kInt8, {2}, {.alignment = 48}));
  EXPECT_ERROR(kInvalid, "power of two", TensorArchive(DType::kInt8, {2}, {.alignment = 0}));
  EXPECT_ERROR(kInvalid, "power of two", TensorArchive(DType::kInt8, {2}, {.alignment = 65536}));
}

// --- values ----------------------------------------------------------------------------------------------------------

TEST(ValueArchiveTest, AnIntTakes1261BytesAsInTorch) {
  const Bytes bytes = encode_value_archive(Tree::integer(3));
  EXPECT_EQ(bytes.size(), 1261u);
  const ValueArchive archive = decode_value_archive(MemorySource(bytes));
  EXPECT_EQ(archive.root().as_int(), 3);
  EXPECT_EQ(verify_archive(MemorySource(bytes)).records, 6u);
}

TEST(ValueArchiveTest, TensorsInsideValuesFindTheirStorages) {
  Tree tree;
  const Bytes first = pattern(12), second = pattern(6), empty;
  const Value value = tree.tuple({make_tensor_value(tree, DType::kFloat32, {3}, 0),
                                  make_tensor_value(tree, DType::kUInt16, {1, 3}, 1, true),
                                  make_tensor_value(tree, DType::kBool, {0}, 2), tree.str("text")});
  const std::vector<ByteSpan> storages = {first, second, empty};
  const Bytes bytes = encode_value_archive(value, storages);
  const ValueArchive archive = decode_value_archive(MemorySource(bytes));
  const auto items = archive.root().items();
  const auto a = archive.as_tensor(items[0]);
  const auto b = archive.as_tensor(items[1]);
  const auto c = archive.as_tensor(items[2]);
  ASSERT_TRUE(a && b && c);
  EXPECT_TRUE(std::ranges::equal(ByteSpan(bytes).subspan(a->payload_offset, a->payload_size), first));
  EXPECT_TRUE(std::ranges::equal(ByteSpan(bytes).subspan(b->payload_offset, b->payload_size), second));
  EXPECT_EQ(b->dtype, DType::kUInt16);
  EXPECT_TRUE(b->requires_grad);
  EXPECT_EQ(c->payload_size, 0u);
  EXPECT_EQ(c->crc32, 0u);
  EXPECT_FALSE(archive.as_tensor(items[3]));
  EXPECT_FALSE(archive.as_tensor(archive.root()));
}

TEST(ValueArchiveTest, ATensorItemIsNoOtherValueAndTheOtherWayRound) {
  const Bytes value = encode_value_archive(Tree::integer(3));
  EXPECT_ERROR(kCorrupt, "wanted a tensor, found int", read_tensor_item(MemorySource(value)));
  Tree tree;
  pickle::Object call;
  call.callable = tree.global("their", "Class");
  call.args = tree.tuple({});
  const Bytes object = encode_value_archive(tree.object(call));
  EXPECT_ERROR(kCorrupt, "found their.Class", read_tensor_item(MemorySource(object)));
}

TEST(ValueArchiveTest, CyclicValuesAreRefused) {
  const Bytes archive =
      build_zip({{"a/data.pkl", bytes_of({"\x80\x02]q\0h\0a.", 10})}, {"a/version", bytes_of("3\n")}});
  EXPECT_ERROR(kUnsupported, "cycle", decode_value_archive(MemorySource(archive)));
}

// --- data.pkl of hostile tensors -------------------------------------------------------------------------------------

// A tensor's parts, each replaceable; written into an archive with one storage.
class TensorBuilder {
 public:
  std::string module = "torch._utils", function = "_rebuild_tensor_v2";
  Value storage_type, key, location, count, offset, sizes, strides, requires_grad, hooks;
  std::vector<Value> more;
  Bytes payload = pattern(24);
  std::string record = "data/0";

  TensorBuilder() {
    storage_type = tree.global("torch", "FloatStorage");
    key = tree.str("0");
    location = tree.str("cpu");
    count = Tree::integer(6);
    offset = Tree::integer(0);
    sizes = ints({2, 3});
    strides = ints({3, 1});
    requires_grad = Tree::boolean(false);
  }
  Value ints(const std::vector<int64_t>& values) {
    std::vector<Value> items;
    for (const int64_t v : values) items.push_back(Tree::integer(v));
    return tree.tuple(items);
  }
  Bytes build() {
    std::vector<Value> args = {tree.persistent(tree.tuple({tree.str("storage"), storage_type, key, location, count})),
                               offset,
                               sizes,
                               strides,
                               requires_grad,
                               hooks};
    args.insert(args.end(), more.begin(), more.end());
    pickle::Object call;
    call.callable = tree.global(module, function);
    call.args = tree.tuple(args);
    return build_zip(
        {{"a/data.pkl", pickle::write(tree.object(call))}, {"a/" + record, payload}, {"a/version", bytes_of("3\n")}});
  }
  TensorItem read() {
    const Bytes bytes = build();
    return read_tensor_item(MemorySource(bytes));
  }
  Tree tree;
};

TEST(TensorItemTest, PlainZip32WithoutTheSmallRecordsIsRead) {
  TensorBuilder b;
  const TensorItem item = b.read();
  EXPECT_EQ(item.sizes, (Dims{2, 3}));
  EXPECT_EQ(item.payload_size, 24u);
  EXPECT_TRUE(item.is_dense());
  const Bytes bytes = b.build();
  EXPECT_TRUE(std::ranges::equal(ByteSpan(bytes).subspan(item.payload_offset, 24), b.payload));
}

TEST(TensorItemTest, ViewsAreDescribedAsTheyLie) {
  TensorBuilder b;
  b.sizes = b.ints({3, 2});
  b.strides = b.ints({1, 3});
  EXPECT_FALSE(b.read().is_dense());
  b.sizes = b.ints({4, 3});
  b.strides = b.ints({0, 1});
  b.offset = Tree::integer(3);
  const TensorItem expanded = b.read();
  EXPECT_EQ(expanded.strides, (Dims{0, 1}));
  EXPECT_EQ(expanded.storage_offset, 3);
  b.sizes = b.ints({1, 3});
  b.strides = b.ints({77, 1});  // of a dimension with one element: never used
  EXPECT_TRUE(b.read().is_dense());
}

TEST(TensorItemTest, FlagsAndParametersAreRead) {
  TensorBuilder b;
  b.storage_type = b.tree.global("torch", "ComplexFloatStorage");
  b.count = Tree::integer(3);
  b.sizes = b.ints({3});
  b.strides = b.ints({1});
  b.more = {b.tree.dict({{b.tree.str("conj"), Tree::boolean(true)}, {b.tree.str("neg"), Tree::boolean(false)}})};
  const TensorItem item = b.read();
  EXPECT_TRUE(item.conj);
  EXPECT_FALSE(item.neg);
  EXPECT_FALSE(item.is_dense());
  b.more = {b.tree.dict({{b.tree.str("secret"), Tree::boolean(true)}})};
  EXPECT_ERROR(kUnsupported, "unknown flag secret", b.read());

  Tree tree;
  pickle::Object parameter;
  parameter.callable = tree.global("torch._utils", "_rebuild_parameter");
  parameter.args = tree.tuple({make_tensor_value(tree, DType::kInt8, {3}, 0), Tree::boolean(true), Tree::none()});
  const Value inner = tree.object(parameter);
  const Bytes payload = pattern(3);
  const std::vector<ByteSpan> storages = {payload};
  const Bytes good = encode_value_archive(inner, storages);
  EXPECT_TRUE(read_tensor_item(MemorySource(good)).requires_grad);
  parameter.args = tree.tuple({inner, Tree::boolean(true), Tree::none()});
  const Bytes bad = encode_value_archive(tree.object(parameter), storages);
  EXPECT_ERROR(kCorrupt, "parameter of a parameter", read_tensor_item(MemorySource(bad)));
}

TEST(TensorItemTest, BadGeometryIsRefused) {
  const auto refuse = [](const char* text, const std::function<void(TensorBuilder&)>& edit) {
    TensorBuilder b;
    edit(b);
    EXPECT_ERROR(kCorrupt, text, b.read());
  };
  refuse("negative sizes", [](auto& b) { b.sizes = b.ints({2, -3}); });
  refuse("negative strides", [](auto& b) { b.strides = b.ints({3, -1}); });
  refuse("negative storage offset", [](auto& b) { b.offset = Tree::integer(-1); });
  refuse("as many strides as sizes", [](auto& b) { b.strides = b.ints({1}); });
  refuse("strides reach past the storage", [](auto& b) { b.strides = b.ints({4, 1}); });
  refuse("strides reach past the storage", [](auto& b) { b.offset = Tree::integer(1); });
  refuse("overflows", [](auto& b) { b.sizes = b.ints({int64_t{1} << 62, int64_t{1} << 62}); });
  refuse("overflows", [](auto& b) { b.sizes = b.ints({int64_t{1} << 62}), b.strides = b.ints({0}); });
  refuse("overflows", [](auto& b) { b.strides = b.ints({int64_t{1} << 62, int64_t{1} << 62}); });
  refuse("too many dimensions", [](auto& b) { b.sizes = b.strides = b.ints(std::vector<int64_t>(65, 1)); });
  refuse("wanted int", [](auto& b) { b.sizes = b.tree.tuple({Tree::boolean(true), Tree::integer(3)}); });
  refuse("no tuple", [](auto& b) { b.sizes = b.tree.list({Tree::integer(6)}); });
  refuse("wanted bool", [](auto& b) { b.requires_grad = Tree::integer(0); });
}

TEST(TensorItemTest, EmptyTensorsMayHaveAnyStride) {
  TensorBuilder b;
  b.sizes = b.ints({0, int64_t{1} << 62, int64_t{1} << 62});
  b.strides = b.ints({1, int64_t{1} << 62, 5});
  EXPECT_TRUE(b.read().is_dense());
}

TEST(TensorItemTest, BadStoragesAreRefused) {
  const auto refuse = [](ErrorCode code, const char* text, const std::function<void(TensorBuilder&)>& edit) {
    TensorBuilder b;
    edit(b);
    EXPECT_ERROR(code, text, b.read());
  };
  refuse(kCorrupt, "another size than its tensor; wanted 28, found 24", [](auto& b) { b.count = Tree::integer(7); });
  refuse(kCorrupt, "negative storage size", [](auto& b) { b.count = Tree::integer(-6); });
  refuse(kCorrupt, "overflows", [](auto& b) { b.count = Tree::integer(int64_t{1} << 62); });
  refuse(kCorrupt, "no record data/1", [](auto& b) { b.key = b.tree.str("1"); });
  for (const char* key : {"", "../0", "a/b", "a\\b", "a\nb", "a b"}) {
    refuse(kCorrupt, "no plain name", [&](auto& b) { b.key = b.tree.str(key), b.record = std::string("data/") + key; });
  }
  for (const size_t length : {size_t{255}, size_t{256}}) {
    TensorBuilder b;
    const std::string key(length, 'k');
    b.key = b.tree.str(key), b.record = "data/" + key;
    if (length == 255) {
      EXPECT_EQ(b.read().sizes, (Dims{2, 3}));
    } else {
      EXPECT_ERROR(kCorrupt, "no plain name", b.read());
    }
  }
  refuse(kUnsupported, "unknown storage class torch.NotAStorage",
         [](auto& b) { b.storage_type = b.tree.global("torch", "NotAStorage"); });
  refuse(kCorrupt, "wanted global", [](auto& b) { b.storage_type = b.tree.str("FloatStorage"); });
  refuse(kCorrupt, "number of arguments", [](auto& b) { b.more = {Tree::none(), Tree::none()}; });
  refuse(kUnsupported, "_rebuild_sparse_tensor", [](auto& b) { b.function = "_rebuild_sparse_tensor"; });
  for (const char* name : {"_rebuild_qtensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage",
                           "_rebuild_device_tensor_from_numpy", "_rebuild_wrapper_subclass"}) {
    refuse(kUnsupported, name, [&](auto& b) { b.function = name; });
  }
  refuse(kUnsupported, "torch._tensor._rebuild_from_type_v2",
         [](auto& b) { b.module = "torch._tensor", b.function = "_rebuild_from_type_v2"; });
  refuse(kUnsupported, "unknown dtype torch.float3",
         [](auto& b) { b.function = "_rebuild_tensor_v3", b.more = {b.tree.global("torch", "float3")}; });
  refuse(kCorrupt, "wanted UntypedStorage",
         [](auto& b) { b.function = "_rebuild_tensor_v3", b.more = {b.tree.global("torch", "uint16")}; });
}

// --- the archive around it -------------------------------------------------------------------------------------------

std::vector<ZipRecord> good_records() {
  return {{"a/data.pkl", pickle::write(Tree::integer(1))},
          {"a/version", bytes_of("3\n")},
          {"a/byteorder", bytes_of("little")}};
}
ValueArchive decode(const Bytes& bytes) { return decode_value_archive(MemorySource(bytes)); }

TEST(ArchiveTest, EveryVersionOfTorchAndItsOldNameAreRead) {
  for (const char* text : {"1", "3\n", "5\n", "5\r\n", "9", "10\n"}) {
    auto records = good_records();
    records[1].content = bytes_of(text);
    EXPECT_EQ(decode(build_zip(records)).root().as_int(), 1);
    records[1].name = "a/.data/version";
    EXPECT_EQ(decode(build_zip(records)).root().as_int(), 1);
  }
  for (const char* text : {"0", "11", "", "three"}) {
    auto records = good_records();
    records[1].content = bytes_of(text);
    EXPECT_ERROR(kUnsupported, "unknown version", decode(build_zip(records)));
  }
}

TEST(ArchiveTest, BigEndianIsRefusedByName) {
  auto records = good_records();
  records[2].content = bytes_of("big");
  EXPECT_ERROR(kUnsupported, "wanted little, found big", decode(build_zip(records)));
  records.pop_back();
  EXPECT_EQ(decode(build_zip(records)).root().as_int(), 1);
}

TEST(ArchiveTest, MissingRecordsAreNamed) {
  auto records = good_records();
  records.erase(records.begin() + 1);
  EXPECT_ERROR(kCorrupt, "no record .data/version", decode(build_zip(records)));
  records = good_records();
  records.erase(records.begin());
  EXPECT_ERROR(kCorrupt, "no record data.pkl", decode(build_zip(records)));
}

TEST(ArchiveTest, OversizedRecordsAreNotRead) {
  auto records = good_records();
  records[1].content = pattern(65);
  EXPECT_ERROR(kCorrupt, "wanted at most 64 bytes, found 65", decode(build_zip(records)));
  records = good_records();
  records[0].content.resize((16 << 20) + 1);  // the pickle of a tensor
  EXPECT_ERROR(kCorrupt, "record a/data.pkl is too large; ", read_tensor_item(MemorySource(build_zip(records))));
}

TEST(ArchiveTest, VerifyFindsEveryChangedByte) {
  const TensorArchive archive(DType::kInt16, {5});
  const Bytes good = whole_archive(archive, pattern(10));
  const ArchiveSummary summary = verify_archive(MemorySource(good));
  EXPECT_EQ(summary.records, 7u);
  EXPECT_EQ(summary.without_crc, 0u);
  // Contents, descriptors and signatures; padding and fields without meaning may change unseen.
  size_t unseen = 0;
  for (size_t i = 0; i < good.size(); ++i) {
    Bytes bad = good;
    bad[i] ^= std::byte{1};
    try {
      verify_archive(MemorySource(bad));
      ++unseen;
      EXPECT_FALSE(i >= archive.payload_offset() && i < archive.payload_offset() + archive.payload_size() + 16) << i;
    } catch (const Error& error) {
      EXPECT_TRUE(error.code() == kCorrupt || error.code() == kUnsupported) << error.what();
    }
  }
  EXPECT_LT(unseen, good.size() / 2);
}

TEST(ArchiveTest, VerifyReadsALongRecordPieceByPiece) {
  constexpr int64_t kBytes = (5 << 19) + 3;  // two and a half MiB
  const TensorArchive archive(DType::kUInt8, {kBytes});
  Bytes file = whole_archive(archive, pattern(kBytes));
  const ArchiveSummary summary = verify_archive(MemorySource(file));
  EXPECT_EQ(summary.records, 7u);
  EXPECT_GT(summary.bytes, static_cast<uint64_t>(kBytes));
  EXPECT_LT(summary.bytes, file.size());
  for (const int64_t at : {int64_t{0}, int64_t{1} << 20, int64_t{2} << 20, kBytes - 1}) {
    std::byte& changed = file[archive.payload_offset() + static_cast<uint64_t>(at)];
    changed ^= std::byte{4};
    EXPECT_ERROR(kCorrupt, "data/0 has another CRC-32", verify_archive(MemorySource(file)));
    changed ^= std::byte{4};
  }
}

TEST(ArchiveTest, AChecksumLeftOutIsReportedAndNotAnError) {
  auto records = good_records();
  records[0].edit_directory = [](Bytes& entry) { poke<uint32_t>(entry, 16, 0); };
  EXPECT_EQ(verify_archive(MemorySource(build_zip(records))).without_crc, 1u);
  records[0].edit_directory = [](Bytes& entry) { poke<uint32_t>(entry, 16, 1); };
  EXPECT_ERROR(kCorrupt, "record a/data.pkl has another CRC-32", verify_archive(MemorySource(build_zip(records))));
}

}  // namespace
}  // namespace reshard
