// SPDX-License-Identifier: BSD-3-Clause
// Hostile bytes. Every truncation and every changed byte of small files: the answer is a value or a named error, never anything else
// (worth most under -DRESHARD_SANITIZE=address,undefined). Then what damage does not hit upon: a few bytes that unfold to
// gigabytes, calls, numbers that are none.

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <random>

#include "format/catalogue_builder.h"
#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "support/expect_error.h"
#include "support/oracle.h"

namespace reshard {
namespace {

using Read = std::function<void(ByteSpan)>;

// Runs the reader on damaged copies. An exception other than Error, or an allocation out of proportion (bad_alloc, length_error), fails.
class Damage {
 public:
  explicit Damage(Read read) : read_(std::move(read)) {}

  void truncations(const Bytes& good) {
    for (size_t n = 0; n < good.size(); ++n) attempt(ByteSpan(good).first(n));
  }
  void changed_bytes(const Bytes& good, std::initializer_list<int> changes) {
    Bytes bad = good;
    for (size_t i = 0; i < bad.size(); ++i) {
      for (const int change : changes) {
        bad[i] ^= static_cast<std::byte>(change);
        attempt(bad);
        bad[i] = good[i];
      }
    }
  }
  // Several changes at once, with values that parsers stumble over, and pieces moved about.
  void random_changes(const Bytes& good, int rounds, uint32_t seed) {
    std::mt19937 random(seed);
    static constexpr uint8_t kNasty[] = {0x00, 0xFF, 0x7F, 0x80, 0x01, '(', '.', 't',
                                         'u',  'R',  'b',  0x81, 0x94, 'h', 'Q', 0x8a};
    for (int round = 0; round < rounds; ++round) {
      Bytes bad = good;
      for (auto edits = random() % 6 + 1; edits > 0; --edits) {
        const size_t at = random() % bad.size();
        switch (random() % 4) {
          case 0:
            bad[at] = static_cast<std::byte>(kNasty[random() % std::size(kNasty)]);
            break;
          case 1:
            bad[at] = static_cast<std::byte>(random());
            break;
          case 2:
            bad.erase(bad.begin() + static_cast<std::ptrdiff_t>(at));
            break;
          default: {
            const size_t from = random() % bad.size();
            const size_t n = std::min<size_t>({random() % 16 + 1, bad.size() - at, bad.size() - from});
            std::memmove(&bad[at], &bad[from], n);
          }
        }
        if (bad.empty()) bad.push_back({});
      }
      if (bad != good) attempt(bad);
    }
  }
  size_t read() const { return passed_; }
  size_t refused() const { return refused_; }

 private:
  void attempt(ByteSpan bytes) {
    const std::vector<std::byte> exact(bytes.begin(),
                                       bytes.end());  // its end is the allocation's end: reading past it is seen
    try {
      read_(exact);
      ++passed_;
    } catch (const Error& error) {
      ++refused_;
      const bool fits = error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported;
      EXPECT_TRUE(fits) << error.what();
    }
  }
  Read read_;
  size_t passed_ = 0;
  size_t refused_ = 0;
};

void read_tensor(ByteSpan bytes) {
  const TensorItem item = read_tensor_item(MemorySource(bytes));
  const Box all = whole_box(item.sizes);
  const ByteRange range = payload_range(item, all);
  const int64_t size = volume(item.sizes) * element_size(item.dtype);
  if (size > 1 << 20) return;  // an expanded shape: legal, and the caller compares it with the catalogue first
  Bytes dense(static_cast<size_t>(size));
  copy_region(item, bytes.subspan(item.payload_offset + range.begin, range.end - range.begin), all, dense);
}
void read_value(ByteSpan bytes) {
  const ValueArchive archive = decode_value_archive(MemorySource(bytes));
  if (archive.root().kind() == pickle::Kind::kTuple) {
    for (const auto& item : archive.root().items()) archive.as_tensor(item);
  }
  pickle::write(archive.root());
}

Bytes small_tensor() {
  const TensorArchive archive(DType::kInt16, {2, 3});
  Bytes bytes = archive.head();
  const Bytes payload(12, std::byte{5});
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  const Bytes tail = archive.tail(crc32(payload));
  bytes.insert(bytes.end(), tail.begin(), tail.end());
  return bytes;
}
Bytes small_value() {
  pickle::Tree tree;
  const Bytes payload(4, std::byte{1});
  const std::vector<ByteSpan> storages = {payload};
  const auto value =
      tree.tuple({make_tensor_value(tree, DType::kFloat32, {1}, 0), tree.dict({{tree.str("k"), tree.bytes(payload)}}),
                  tree.list({pickle::Tree::real(1)})});
  return encode_value_archive(value, storages, 1);
}

TEST(HostileMetadataTest, OfTorch) {
  for (const char* name : {"2.1.2/fsdp_linear_2", "2.14.1/fsdp_linear_2"}) {
    const Bytes good = OracleCase(name).file(".metadata");
    Damage damage([](ByteSpan bytes) { decode_metadata(bytes); });
    damage.truncations(good);
    EXPECT_EQ(damage.read(), 0u);
    damage.changed_bytes(good, {0x01, 0x80, 0xFF, 0x20});
    damage.random_changes(good, 20000, 1);
    EXPECT_GT(damage.refused(), good.size());
  }
}

TEST(HostileMetadataTest, OfOurOwn) {
  Metadata metadata = decode_metadata(OracleCase("2.14.1/nested").file(".metadata"));
  metadata.sidecars.emplace(1);
  const Bytes good = encode_metadata(metadata);
  // Its digest sees every change, whatever becomes of the pickle.
  Damage damage([](ByteSpan bytes) { decode_metadata(bytes); });
  damage.truncations(good);
  damage.changed_bytes(good, {0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF});
  damage.random_changes(good, 5000, 2);
  EXPECT_EQ(damage.read(), 0u);
  // Without it the parser stands alone.
  Damage unverified([](ByteSpan bytes) { decode_metadata(bytes, false); });
  unverified.changed_bytes(good, {0x01, 0xFF});
  unverified.random_changes(good, 5000, 2);
  EXPECT_GT(unverified.read(), 0u);
}

TEST(HostileItemTest, Tensors) {
  const Bytes good = small_tensor();
  Damage damage(read_tensor);
  damage.truncations(good);
  // Only bytes behind the end record may be missing, and there are none.
  EXPECT_EQ(damage.read(), 0u);
  damage.changed_bytes(good, {0x01, 0x80, 0xFF});
  damage.random_changes(good, 20000, 3);
}

TEST(HostileItemTest, Values) {
  const Bytes good = small_value();
  Damage damage(read_value);
  damage.truncations(good);
  EXPECT_EQ(damage.read(), 0u);
  damage.changed_bytes(good, {0x01, 0x80, 0xFF});
  damage.random_changes(good, 20000, 4);
}

TEST(HostileItemTest, VerifyOfDamagedItems) {
  Damage damage([](ByteSpan bytes) { verify_archive(MemorySource(bytes)); });
  const Bytes good = small_value();
  damage.truncations(good);
  EXPECT_EQ(damage.read(), 0u);
  damage.random_changes(good, 10000, 5);
}

TEST(HostilePickleTest, RandomOpcodes) {
  // Streams of valid opcodes in random order with short arguments reach deeper into the machine than damage does.
  std::mt19937 random(6);
  static constexpr std::string_view kOps =
      "(.012BCGJKMNQRTUX]abcehjqrstu})\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96";
  Damage damage([](ByteSpan bytes) {
    const pickle::Tree tree = pickle::parse(bytes);
    pickle::check_tree(tree.root());
    const Bytes again = pickle::write(tree.root());
    EXPECT_EQ(pickle::write(pickle::parse(again).root()).size(), again.size());
  });
  Bytes bytes;
  for (int round = 0; round < 200000; ++round) {
    bytes.clear();
    for (auto n = random() % 40; n > 0; --n) {
      const char op = random() % 3 == 0 ? "N])}(cKq\x94"[random() % 9] : kOps[random() % kOps.size()];
      bytes.push_back(static_cast<std::byte>(op));
      if (op == 'c') {
        for (const char c : std::string_view("m\nn\n")) bytes.push_back(static_cast<std::byte>(c));
      } else if (random() % 4 == 0) {
        bytes.push_back(static_cast<std::byte>(random() % 4));
      }
    }
    bytes.push_back(std::byte{'.'});
    damage.random_changes(bytes, 1, static_cast<uint32_t>(round));
  }
  EXPECT_GT(damage.read(), 100u);
}

// --- a few bytes that unfold ------------------------------------------------------------------------------------------
// A stream says a thing once and refers to it for two bytes a time. Each of these is under 200 KB and would take gigabytes.

constexpr const char* kUnfolds = "far more memory than the file";

void expect_unfolding_is_refused(const std::function<void(CatalogueBuilder&)>& edit) {
  CatalogueBuilder b;
  edit(b);
  const Bytes file = b.encode();
  EXPECT_LT(file.size(), 200'000u);
  EXPECT_ERROR(ErrorCode::kCorruptData, kUnfolds, decode_metadata(file));
  EXPECT_ERROR(ErrorCode::kCorruptData, kUnfolds, decode_metadata(in_protocol_4(file)));
}

TEST(UnfoldingCatalogueTest, ManyChunksUnderOneLongName) {
  // Each chunk is looked up under the name: this costs time, not memory.
  expect_unfolding_is_refused([](CatalogueBuilder& b) {
    const auto chunk = b.make(CatalogueBuilder::kModule, "ChunkStorageMetadata",
                              b.tree.dict({{b.tree.str("offsets"), b.dims({0})}, {b.tree.str("sizes"), b.dims({0})}}));
    const auto tensor = b.tensor().as_object().state.entries();
    const auto state = b.tree.dict(
        {tensor[0], tensor[1], {b.tree.str("chunks"), b.tree.list(std::vector<pickle::Value>(30'000, chunk))}});
    b.more_entries.push_back(
        {b.tree.str(std::string(60'000, 'n')), b.make(CatalogueBuilder::kModule, "TensorStorageMetadata", state)});
  });
}

TEST(UnfoldingCatalogueTest, OneLongLayout) {
  expect_unfolding_is_refused([](CatalogueBuilder& b) {
    b.layout = b.call("torch.serialization", "_get_layout", {b.tree.str(std::string(60'000, 'l'))});
    const auto entry = b.tensor();
    for (int i = 0; i < 5000; ++i) b.more_entries.push_back({b.tree.str("k" + std::to_string(i)), entry});
  });
}

TEST(UnfoldingCatalogueTest, OneLongModuleName) {
  expect_unfolding_is_refused([](CatalogueBuilder& b) {
    const auto modules = b.tree.list(std::vector<pickle::Value>(2000, b.tree.str(std::string(60'000, 'm'))));
    b.more_attributes = {{b.tree.str("storage_meta"), b.make(CatalogueBuilder::kModule, "StorageMeta",
                                                             b.tree.dict({{b.tree.str("modules"), modules}}))}};
  });
}

TEST(UnfoldingCatalogueTest, OneLongNameOfATransform) {
  expect_unfolding_is_refused([](CatalogueBuilder& b) {
    const auto names = b.tree.list(std::vector<pickle::Value>(16, b.tree.str(std::string(60'000, 't'))));
    b.first_info.push_back({b.tree.str("transform_descriptors"), names});
    const auto info = b.make(CatalogueBuilder::kFileModule, "_StorageInfo", b.tree.dict(b.first_info));
    for (int64_t i = 0; i < 500; ++i) b.more_storage.push_back({b.index("w", {{i + 100}}), info});
  });
}

TEST(UnfoldingCatalogueTest, LongNamesOfOurOwnAreReadBack) {
  Metadata metadata;
  TensorStorageMetadata tensor{{}, {1000}, {}};
  const std::string fqn(50'000, 'n');
  for (int64_t i = 0; i < 1000; ++i) {
    tensor.chunks.push_back({{i}, {1}});
    metadata.storage_data.insert({fqn, Dims{i}, i}, {std::string(1024, 'p'), static_cast<uint64_t>(i), 1, {}});
  }
  metadata.state_dict_metadata.insert(fqn, tensor);
  EXPECT_EQ(decode_metadata(encode_metadata(metadata)), metadata);
}

TEST(UnfoldingPickleTest, ClassesReferToTheirNames) {
  // 3000 classes of one long name: were each to hold a copy, 6 GB.
  std::string text = "\x80\x04(X";
  const uint32_t length = 1'000'000;
  text.append(reinterpret_cast<const char*>(&length), 4).append(length, 'n').append("\x94");
  for (int i = 0; i < 3000; ++i) text.append(std::string_view("h\0h\0\x93", 5));
  text += "t.";
  const pickle::Tree tree = pickle::parse(as_bytes(text));
  const auto items = tree.root().items();
  ASSERT_EQ(items.size(), 3001u);
  EXPECT_EQ(items[3000].as_global().name.data(), items[0].as_str().data());
  EXPECT_LT(pickle::describe(items[3000]).size(), 500u);  // in a message
}

// --- code -------------------------------------------------------------------------------------------------------------

TEST(HostilePickleTest, WhatWouldRunCodeIsRefusedByName) {
  const std::pair<const char*, const char*> functions[] = {{"os", "system"},
                                                           {"posix", "system"},
                                                           {"nt", "system"},
                                                           {"builtins", "eval"},
                                                           {"__builtin__", "eval"},
                                                           {"builtins", "exec"},
                                                           {"builtins", "open"},
                                                           {"builtins", "getattr"},
                                                           {"subprocess", "Popen"},
                                                           {"runpy", "run_path"},
                                                           {"importlib", "import_module"},
                                                           {"importlib.util", "spec_from_file_location"},
                                                           {"os.path", "join"},
                                                           {"builtins", "__import__"}};
  for (const auto& [module, name] : functions) {
    const std::string full = std::string(module) + "." + name;
    for (const auto made : {pickle::Object::Made::kReduce, pickle::Object::Made::kNewObj}) {
      CatalogueBuilder b;
      const auto call = b.call(module, name, {b.tree.str("true")}, made);
      const Bytes stream = pickle::write(call);
      EXPECT_ERROR(ErrorCode::kUnsupported, "calls " + full, pickle::parse(stream));
      // Where the catalogue does not look, too: PyTorch would run it.
      b.more_attributes = {{b.tree.str("more"), b.tree.list({call})}};
      EXPECT_ERROR(ErrorCode::kUnsupported, "calls " + full, b.decode());
      const Bytes archive = encode_value_archive(call);
      EXPECT_ERROR(ErrorCode::kUnsupported, "calls " + full, decode_value_archive(MemorySource(archive)));
      EXPECT_ERROR(ErrorCode::kUnsupported, "calls " + full, read_tensor_item(MemorySource(archive)));
    }
    std::string keywords = "\x80\x02";
    keywords.append("c").append(module).append("\n").append(name).append("\n)}\x92.");
    EXPECT_ERROR(ErrorCode::kUnsupported, "calls " + full, pickle::parse(as_bytes(keywords)));
  }
  // Naming is not calling, and builtins make harmless values.
  pickle::parse(as_bytes("cos\nsystem\n."));
  pickle::parse(as_bytes("cbuiltins\nset\n)R."));
}

TEST(HostilePickleTest, AnyCallInPlaceOfAValueOfTheCatalogueIsRefusedByName) {
  const auto refuse = [](const std::function<void(CatalogueBuilder&, const pickle::Value&)>& edit,
                         ErrorCode code = ErrorCode::kCorruptData) {
    CatalogueBuilder b;
    edit(b, b.call("their.module", "function", {b.tree.str("argument")}));
    EXPECT_ERROR(code, "found their.module.function", b.decode());
  };
  refuse([](auto& b, auto& call) { b.dtype = call; });
  refuse([](auto& b, auto& call) { b.layout = call; });
  refuse([](auto& b, auto& call) { b.memory_format_number = call; });
  refuse([](auto& b, auto& call) { b.size = call; });
  refuse([](auto& b, auto& call) { b.size = b.tree.tuple({call}); });
  refuse([](auto& b, auto& call) { replace(b.first_chunk, "offsets", call); });
  refuse([](auto& b, auto& call) { replace(b.first_chunk, "sizes", call); });
  refuse([](auto& b, auto& call) { replace(b.first_index, "fqn", call); });
  refuse([](auto& b, auto& call) { replace(b.first_index, "offset", call); });
  refuse([](auto& b, auto& call) { replace(b.first_index, "index", call); });
  refuse([](auto& b, auto& call) { replace(b.first_info, "relative_path", call); });
  refuse([](auto& b, auto& call) { replace(b.first_info, "offset", call); });
  refuse([](auto& b, auto& call) { replace(b.first_info, "length", call); });
  refuse([](auto& b, auto& call) { b.first_info.push_back({b.tree.str("transform_descriptors"), call}); });
  refuse([](auto& b, auto& call) { b.more_entries = {{call, b.tensor()}}; });
  refuse([](auto& b, auto& call) { b.more_storage = {{call, b.info("f", 0)}}; });
  refuse([](auto& b, auto& call) { b.more_storage = {{b.index("x", {}), call}}; });
  refuse([](auto& b, auto& call) { b.more_attributes = {{b.tree.str("version"), call}}; });
  refuse([](auto& b, auto& call) { b.more_attributes = {{b.tree.str("storage_meta"), call}}; });
  refuse([](auto& b, auto& call) { b.more_attributes = {{b.tree.str("reshard_sidecars"), call}}; });
  refuse([](auto& b, auto& call) { b.v_class = call; }, ErrorCode::kUnsupported);
}

TEST(HostileMetadataTest, NumbersThatAreNoIntegers) {
  const auto refuse = [](const char* found, const pickle::Value& number) {
    CatalogueBuilder b;
    const auto one = [&](auto&& edit) {
      CatalogueBuilder fresh;
      edit(fresh);
      EXPECT_ERROR(ErrorCode::kCorruptData, std::string("wanted int, found ") + found, fresh.decode());
    };
    one([&](auto& f) { f.size = f.tree.tuple({number}); });
    one([&](auto& f) { replace(f.first_chunk, "offsets", f.tree.tuple({number})); });
    one([&](auto& f) { replace(f.first_info, "offset", number); });
    one([&](auto& f) { replace(f.first_info, "length", number); });
    one([&](auto& f) { f.memory_format_number = number; });
  };
  refuse("float", pickle::Tree::real(std::numeric_limits<double>::quiet_NaN()));
  refuse("float", pickle::Tree::real(std::numeric_limits<double>::infinity()));
  refuse("float", pickle::Tree::real(4));
  refuse("bool", pickle::Tree::boolean(true));
  refuse("None", pickle::Tree::none());
  pickle::Tree tree;
  const std::array<std::byte, 9> huge{std::byte{}, std::byte{}, std::byte{}, std::byte{}, std::byte{},
                                      std::byte{}, std::byte{}, std::byte{}, std::byte{1}};
  refuse("long int", tree.big_integer(huge));
}

}  // namespace
}  // namespace reshard
