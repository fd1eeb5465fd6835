// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/dcp_metadata.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>

#include "format/catalogue_builder.h"
#include "format/metadata_scan.h"
#include "reshard/format/pickle.h"
#include "support/expect_error.h"
#include "support/oracle.h"

namespace reshard {
namespace {

using pickle::Entry;
using pickle::Tree;
using pickle::Value;

constexpr auto kCorrupt = ErrorCode::kCorruptData;
constexpr auto kUnsupported = ErrorCode::kUnsupported;

Metadata example() {
  Metadata m;
  TensorStorageMetadata weight{
      {DType::kFloat32, true, false, 0, "torch.strided"}, {8, 8}, {{{0, 0}, {4, 8}}, {{4, 0}, {4, 8}}}};
  TensorStorageMetadata scalar{{DType::kBFloat16, false, true, 2, ""}, {}, {{{}, {}}}};
  TensorStorageMetadata deep{
      {DType::kComplex32, false, false, 1, "torch.strided"}, {1, 2, 3, 4, 5}, {{{0, 0, 0, 0, 0}, {1, 2, 3, 4, 5}}}};
  m.state_dict_metadata.insert("model.weight", weight);
  m.state_dict_metadata.insert("scalar", scalar);
  m.state_dict_metadata.insert("deep", deep);
  m.state_dict_metadata.insert("step", BytesStorageMetadata{});
  m.planner_data.emplace();
  m.planner_data->insert("model.weight", {std::string("model"), std::string("weight")});
  m.planner_data->insert("step", {std::string("step"), int64_t{3}});
  m.storage_data.insert({"step", {}, {}}, {"__0_0.distcp", 0, 1261, {}});
  m.storage_data.insert({"model.weight", Dims{4, 0}, 1}, {"__1_0.distcp", uint64_t{1} << 40, 1705, {}});
  m.storage_data.insert({"model.weight", Dims{0, 0}, 0}, {"__0_0.distcp", 1261, 70000, {"stream.zstd/1"}});
  m.storage_data.insert({"scalar", Dims{}, {}}, {"__0_0.distcp", 100000, 1577, {}});
  m.storage_data.insert({"deep", Dims{0, 0, 0, 0, 0}, 7},
                        {"__0_0.distcp", 200000, 2000, {}});  // a wrong hint is only a hint
  m.storage_meta = StorageMeta{"/ckpt/a", "17393829-ce51-471d-b4d3-3223f2ae1c3a", "a load", {"m"}};
  m.version = kMetadataVersion;
  m.sidecars.emplace(2)[1].fill(std::byte{0xA5});
  return m;
}

TEST(EncodeMetadataTest, EverythingSurvivesARoundTrip) {
  const Metadata metadata = example();
  const Bytes bytes = encode_metadata(metadata);
  const Metadata back = decode_metadata(bytes);
  EXPECT_EQ(back, metadata);
  auto it = back.storage_data.begin();
  EXPECT_EQ(it->first.index, std::nullopt);  // hints take no part in comparison
  EXPECT_EQ((++it)->first.index, 1);
  EXPECT_EQ(encode_metadata(back), bytes);
}

TEST(EncodeMetadataTest, AnEmptyCatalogueSurvivesARoundTrip) {
  const Metadata empty;
  EXPECT_EQ(decode_metadata(encode_metadata(empty)), empty);
}

// "module.name" of every class and function that a stream names.
std::set<std::string> globals_of(ByteSpan stream) {
  const Tree tree = pickle::parse(stream);
  std::set<std::string> names;
  std::vector<Value> rest = {tree.root()};
  while (!rest.empty()) {
    const Value v = rest.back();
    rest.pop_back();
    if (v.kind() == pickle::Kind::kGlobal)
      names.insert(std::string(v.as_global().module) + "." + std::string(v.as_global().name));
    if (v.kind() == pickle::Kind::kTuple || v.kind() == pickle::Kind::kList)
      rest.insert(rest.end(), v.items().begin(), v.items().end());
    if (v.kind() == pickle::Kind::kDict) {
      for (const auto& [key, value] : v.entries()) rest.insert(rest.end(), {key, value});
    }
    if (v.kind() == pickle::Kind::kObject)
      rest.insert(rest.end(), {v.as_object().callable, v.as_object().args, v.as_object().state});
  }
  return names;
}

TEST(EncodeMetadataTest, NamesOnlyClassesThatEveryReleaseSince21Resolves) {
  const Bytes bytes = encode_metadata(example());
  // What torch 2.1 itself wrote, it resolves; later releases still read those files.
  std::set<std::string> known;
  for (const std::string& name : OracleCase::names()) {
    if (name.starts_with("2.1.2/")) known.merge(globals_of(OracleCase(name).file(".metadata")));
  }
  ASSERT_GT(known.size(), 10u);
  for (const std::string& name : globals_of(bytes)) {
    if (name.starts_with("torch.") && dtype_from_string(name.substr(6))) continue;  // the tensor's own
    EXPECT_TRUE(known.contains(name)) << name;
  }
  const std::string_view text = as_text(bytes);
  // One frame over the whole stream.
  EXPECT_EQ(text.substr(0, 3), "\x80\x04\x95");
  uint64_t frame;
  std::memcpy(&frame, bytes.data() + 3, 8);
  EXPECT_EQ(frame, bytes.size() - 11);
}

TEST(EncodeMetadataTest, ManyChunksCostFewBytesEach) {
  Metadata m;
  TensorStorageMetadata tensor{{}, {4000, 1000}, {}};
  for (int64_t i = 0; i < 1000; ++i) {
    tensor.chunks.push_back({{4 * i, 0}, {4, 1000}});
    m.storage_data.insert({"layers.0.attention.weight", Dims{4 * i, 0}, i},
                          {"__" + std::to_string(i) + "_0.distcp", 0, 17000, {}});
  }
  m.state_dict_metadata.insert("layers.0.attention.weight", tensor);
  const Bytes bytes = encode_metadata(m);
  EXPECT_LT(bytes.size(), 110u * 1000u);  // offsets are written once, for the chunk and its item
  EXPECT_EQ(decode_metadata(bytes), m);
}

TEST(EncodeMetadataTest, NumbersAreWrittenInOneTwoFourOrEightBytes) {
  using namespace std::string_literals;
  for (const auto& [number, form] : std::vector<std::pair<int64_t, std::string>>{{0, "K\0"s},
                                                                                 {255, "K\xFF"s},
                                                                                 {256, "M\0\x01"s},
                                                                                 {65535, "M\xFF\xFF"s},
                                                                                 {65536, "J\0\0\x01\0"s},
                                                                                 {0x7FFFFFFF, "J\xFF\xFF\xFF\x7F"s},
                                                                                 {0x80000000, "\x8A\x08\0\0\0\x80"s}}) {
    Metadata m;
    m.state_dict_metadata.insert("t", TensorStorageMetadata{{}, {7, number, 0}, {{{0, 0, 0}, {7, number, 0}}}});
    const Bytes bytes = encode_metadata(m);
    EXPECT_NE(as_text(bytes).find("K\x07"s + form), std::string_view::npos) << number;
    EXPECT_EQ(decode_metadata(bytes), m);
  }
}

TEST(EncodeMetadataTest, TextThatCouldNotBeReadBackIsRefused) {
  for (const char* bad : {"\xff", "a\xc3(", "\xed\xa0"}) {
    Metadata m = example();
    m.storage_data.find({"step", {}, {}})->relative_path = bad;
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "text is no UTF-8", encode_metadata(m));
  }
}

TEST(EncodeMetadataTest, TextOfEveryLengthIsReadBack) {
  Metadata m;
  m.planner_data.emplace();
  for (const size_t length : {0, 1, 254, 255, 256, 257, 1023, 1024, 1025, 70'000}) {
    const std::string name(length, 'n');
    m.planner_data->insert(name, {name, int64_t{1}});
  }
  EXPECT_EQ(decode_metadata(encode_metadata(m)), m);
}

TEST(EncodeMetadataTest, NumbersThatPythonWouldReadAsNegativeAreRefused) {
  Metadata m = example();
  m.storage_data.find({"step", {}, {}})->offset = uint64_t{1} << 63;
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "overflows", encode_metadata(m));
}

TEST(DecodeMetadataTest, WithoutOptionalPartsAsBefore24) {
  CatalogueBuilder b;
  const Metadata m = b.decode();
  EXPECT_FALSE(m.version);
  EXPECT_FALSE(m.storage_meta);
  EXPECT_FALSE(m.sidecars);
  EXPECT_EQ(std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("w")).chunks.size(), 2u);
  EXPECT_TRUE(std::holds_alternative<BytesStorageMetadata>(*m.state_dict_metadata.find("v")));
}

TEST(DecodeMetadataTest, ClassNamesOf21AndTheStridesOf215) {
  CatalogueBuilder expected;
  CatalogueBuilder b;
  b.properties_module = CatalogueBuilder::kOldModule;
  b.memory_format_name = "MEM_FORMAT_ENCODING";
  EXPECT_EQ(b.decode(), expected.decode());
  for (const Value& strides : {Value{}, b.tree.tuple({Tree::integer(1)})}) {
    b.more_properties = {strides};
    EXPECT_EQ(b.decode(), expected.decode());
  }
}

TEST(DecodeMetadataTest, SizesMayBePlainTuplesAndHintsMayBeMissing) {
  CatalogueBuilder expected;
  CatalogueBuilder b;
  b.size = b.tree.tuple({Tree::integer(4)});
  drop(b.first_index, "index");
  EXPECT_EQ(b.decode(), expected.decode());
  replace(b.first_chunk, "sizes", b.tree.tuple({Tree::integer(2)}));
  EXPECT_EQ(b.decode(), expected.decode());
}

TEST(DecodeMetadataTest, UnknownAttributesAndForeignPlannersArePassedOver) {
  CatalogueBuilder b;
  b.more_attributes = {{b.tree.str("surprise"), b.call("their", "factory", {b.tree.str("true")})}};
  b.first_chunk.push_back({b.tree.str("extra"), Tree::integer(1)});
  b.first_info.push_back({b.tree.str("transform_descriptors"), Tree::none()});
  EXPECT_TRUE(b.decode().planner_data);
  for (const Value& foreign :
       {Tree::none(), Tree::integer(5), b.call("their.planner", "Data", {}),
        b.tree.dict({{b.tree.str("w"), b.tree.str("w")}}), b.tree.dict({{Tree::integer(1), b.tree.tuple({})}}),
        b.tree.dict({{b.tree.str("w"), b.tree.tuple({Tree::real(1)})}})}) {
    b.planner_data = foreign;
    EXPECT_FALSE(b.decode().planner_data);
  }
}

TEST(DecodeMetadataTest, EverySpellingOfTheCheckpointPath) {
  const auto path = [](const std::function<Value(CatalogueBuilder&)>& id) {
    CatalogueBuilder b;
    b.more_attributes = {{b.tree.str("storage_meta"), b.make(CatalogueBuilder::kModule, "StorageMeta",
                                                             b.tree.dict({{b.tree.str("checkpoint_id"), id(b)},
                                                                          {b.tree.str("save_id"), b.tree.str("s")},
                                                                          {b.tree.str("load_id"), Tree::none()}}))}};
    const Metadata m = b.decode();
    EXPECT_EQ(m.storage_meta->save_id, "s");
    EXPECT_FALSE(m.storage_meta->load_id);
    return m.storage_meta->checkpoint_id;
  };
  EXPECT_EQ(path([](auto& b) { return b.tree.str("plain/text"); }), "plain/text");
  EXPECT_EQ(path([](auto& b) {
              return b.call("pathlib", "PosixPath", {b.tree.str("/"), b.tree.str("data"), b.tree.str("ck")});
            }),
            "/data/ck");
  EXPECT_EQ(path([](auto& b) {
              return b.call("pathlib", "PosixPath", {b.tree.str("ck"), b.tree.str("s1")});
            }),
            "ck/s1");
  EXPECT_EQ(path([](auto& b) { return b.call("pathlib", "PosixPath", {}); }), ".");
  EXPECT_EQ(path([](auto& b) { return b.call("pathlib._local", "PosixPath", {b.tree.str("/data/ck")}); }), "/data/ck");
  EXPECT_EQ(path([](auto& b) {
              return b.call("pathlib", "WindowsPath", {b.tree.str("C:"), b.tree.str("ck")});
            }),
            "C:/ck");
  EXPECT_EQ(path([](auto& b) { return b.call("their", "Path", {b.tree.str("x")}); }), std::nullopt);
  EXPECT_EQ(path([](auto&) { return Tree::none(); }), std::nullopt);
}

TEST(DecodeMetadataTest, LayoutsAndFormatsAreKept) {
  CatalogueBuilder b;
  b.layout = b.call("torch.serialization", "_get_layout", {b.tree.str("torch.sparse_coo")});
  b.memory_format_number = Tree::integer(1);
  b.dtype = b.tree.global("torch", "float8_e4m3fn");
  const Metadata m = b.decode();
  const auto& properties = std::get<TensorStorageMetadata>(*m.state_dict_metadata.find("w")).properties;
  EXPECT_EQ(properties.layout, "torch.sparse_coo");
  EXPECT_EQ(properties.memory_format, 1);
  EXPECT_EQ(properties.dtype, DType::kFloat8E4M3FN);
}

TEST(DecodeMetadataTest, BrokenPartsAreNamed) {
  const auto refuse = [](ErrorCode code, const char* text, const std::function<void(CatalogueBuilder&)>& edit) {
    CatalogueBuilder b;
    edit(b);
    EXPECT_ERROR(code, text, b.decode());
    EXPECT_ERROR(code, text, decode_metadata(b.encode_in_protocol_4()));
  };
  refuse(kUnsupported, "entry of an unknown class; key v; found their.Class",
         [](auto& b) { b.v_class = b.make("their", "Class", {}); });
  refuse(kUnsupported, "found int", [](auto& b) { b.v_class = Tree::integer(1); });
  refuse(kUnsupported, "unknown dtype; key w; found torch.float3",
         [](auto& b) { b.dtype = b.tree.global("torch", "float3"); });
  refuse(kUnsupported, "unknown dtype", [](auto& b) { b.dtype = b.tree.global("numpy", "float32"); });
  refuse(kCorrupt, "5 or 6 fields", [](auto& b) { b.more_properties = {Tree::none(), Tree::none()}; });
  for (const int64_t number : {-1, 3})
    refuse(kCorrupt, "memory format", [&](auto& b) { b.memory_format_number = Tree::integer(number); });
  refuse(kCorrupt, "wanted int, found bool", [](auto& b) { b.memory_format_number = Tree::boolean(false); });
  refuse(kCorrupt, "wanted _get_layout, found their.layout",
         [](auto& b) { b.layout = b.call("their", "layout", {b.tree.str("torch.strided")}); });
  refuse(kCorrupt, "wanted torch.Size, found list", [](auto& b) { b.size = b.tree.list({Tree::integer(4)}); });
  refuse(kCorrupt, "wanted Size, found their.Size",
         [](auto& b) { b.size = b.call("their", "Size", {b.tree.tuple({})}); });
  refuse(kCorrupt, "wanted int, found bool", [](auto& b) { b.size = b.tree.tuple({Tree::boolean(true)}); });
  refuse(kCorrupt, "too many dimensions", [](auto& b) { b.size = b.dims(std::vector<int64_t>(65, 1)); });
  refuse(kCorrupt, "negative size", [](auto& b) { b.size = b.dims({-4}); });
  refuse(kCorrupt, "overflows", [](auto& b) { b.size = b.dims({int64_t{1} << 62}); });
  refuse(kCorrupt, "outside its tensor; key w", [](auto& b) { replace(b.first_chunk, "offsets", b.dims({3})); });
  refuse(kCorrupt, "outside its tensor", [](auto& b) { replace(b.first_chunk, "offsets", b.dims({0, 0})); });
  refuse(kCorrupt, "outside its tensor", [](auto& b) { replace(b.first_chunk, "sizes", b.dims({INT64_MAX})); });
  refuse(kCorrupt, "attribute sizes is not there; key w", [](auto& b) { drop(b.first_chunk, "sizes"); });
  refuse(kCorrupt, "attribute fqn is not there", [](auto& b) { drop(b.first_index, "fqn"); });
  refuse(kCorrupt, "wanted str, found int", [](auto& b) { replace(b.first_index, "fqn", Tree::integer(1)); });
  refuse(kCorrupt, "nothing is stored for w [0]", [](auto& b) {
    replace(b.first_index, "fqn", b.tree.str("v")), replace(b.first_index, "offset", b.dims({5}));
  });
  refuse(kCorrupt, "attribute relative_path is not there; key w", [](auto& b) { drop(b.first_info, "relative_path"); });
  refuse(kCorrupt, "negative offset or length; key w",
         [](auto& b) { replace(b.first_info, "offset", Tree::integer(-1)); });
  refuse(kCorrupt, "negative offset or length",
         [](auto& b) { replace(b.first_info, "length", Tree::integer(INT64_MIN)); });
  refuse(kCorrupt, "overflows", [](auto& b) { replace(b.first_info, "offset", Tree::integer(INT64_MAX)); });
  refuse(kCorrupt, "too many transforms", [](auto& b) {
    b.first_info.push_back({b.tree.str("transform_descriptors"), b.tree.list(std::vector<Value>(17, b.tree.str("x")))});
  });
  refuse(kCorrupt, "key is there twice; key w", [](auto& b) { b.more_entries = {{b.tree.str("w"), b.tensor()}}; });
  refuse(kCorrupt, "item is there twice; key w", [](auto& b) {
    b.more_storage = {{b.index("w", {{2}}), b.info("other", 0)}};
  });
  refuse(kCorrupt, "not in the catalogue", [](auto& b) {
    b.more_storage = {{b.index("ghost", {{2}}), b.info("other", 0)}};
  });
  for (const char* wrong : {"None", "int", "str", "dict"}) {
    refuse(kCorrupt, "metadata: chunks", [&](auto& b) {
      const Value chunks = wrong == std::string("None")  ? Tree::none()
                           : wrong == std::string("int") ? Tree::integer(0)
                           : wrong == std::string("str") ? b.tree.str("chunks")
                                                         : b.tree.dict({});
      std::vector<Entry> state;
      for (const Entry& entry : b.tensor().as_object().state.entries()) state.push_back(entry);
      replace(state, "chunks", chunks);
      b.more_entries = {
          {b.tree.str("x"), b.make(CatalogueBuilder::kModule, "TensorStorageMetadata", b.tree.dict(state))}};
    });
  }
  for (const Value& wrong : {Tree::integer(1), Tree::boolean(true)}) {
    refuse(kCorrupt, "digests of the sidecars", [&](auto& b) {
      b.more_attributes = {{b.tree.str("reshard_sidecars"), wrong}};
    });
  }
  refuse(kCorrupt, "digests of the sidecars", [](auto& b) {
    b.more_attributes = {{b.tree.str("reshard_sidecars"), b.tree.bytes(as_bytes("of no whole number"))}};
  });
  // A catalogue of this library has its digest.
  refuse(kCorrupt, "has no digest", [](auto& b) {
    b.more_attributes = {{b.tree.str("reshard_sidecars"), b.tree.bytes({})}};
  });
  for (const char* path : {"", "/etc/passwd", "../up", "a/../../b", "a//b", "a\\b"}) {
    refuse(kCorrupt, "path of a data file", [&](auto& b) { replace(b.first_info, "relative_path", b.tree.str(path)); });
  }
  refuse(kCorrupt, "NUL", [&](auto& b) { replace(b.first_info, "relative_path", b.tree.str({"a\0b", 3})); });
}

TEST(DecodeMetadataTest, OtherPicklesAreNoCatalogue) {
  Tree tree;
  EXPECT_ERROR(kCorrupt, "wanted Metadata, found dict", decode_metadata(pickle::write(tree.dict({}))));
  EXPECT_ERROR(kCorrupt, "wanted Metadata, found None", decode_metadata(pickle::write(Tree::none())));
  EXPECT_ERROR(kCorrupt, "ends too early", decode_metadata({}));
  CatalogueBuilder b;
  EXPECT_ERROR(kCorrupt, "attribute state_dict_metadata is not there",
               decode_metadata(pickle::write(b.make(CatalogueBuilder::kModule, "Metadata", {}))));
  EXPECT_ERROR(
      kCorrupt, "no storage_data",
      decode_metadata(pickle::write(b.make(CatalogueBuilder::kModule, "Metadata",
                                           b.tree.dict({{b.tree.str("state_dict_metadata"), b.tree.dict({})}})))));
}

TEST(DecodeMetadataTest, SharedPartsCannotUnfoldIntoGigabytes) {
  // Each stream is some hundred kilobytes and would take hundreds of megabytes if every reference became a copy.
  const auto refuse = [](const std::function<void(CatalogueBuilder&)>& edit) {
    CatalogueBuilder b;
    edit(b);
    EXPECT_ERROR(kCorrupt, "far more memory than the file", b.decode());
    EXPECT_ERROR(kCorrupt, "far more memory than the file", decode_metadata(b.encode_in_protocol_4()));
  };
  const std::string long_text(100'000, 'x');
  refuse([](auto& b) {  // chunks
    b.more_chunks.assign(
        100'000, b.make(CatalogueBuilder::kModule, "ChunkStorageMetadata",
                        b.tree.dict({{b.tree.str("offsets"), b.dims({4})}, {b.tree.str("sizes"), b.dims({0})}})));
    const Value tensor = b.tensor();
    for (int i = 0; i < 100; ++i) b.more_entries.push_back({b.tree.str("w" + std::to_string(i)), tensor});
  });
  refuse([&](auto& b) {  // keys of items
    const Value fqn = b.tree.str(long_text);
    for (int i = 0; i < 2000; ++i) {
      const Value index = b.make(CatalogueBuilder::kModule, "MetadataIndex",
                                 b.tree.dict({{b.tree.str("fqn"), fqn}, {b.tree.str("offset"), b.dims({i})}}));
      b.more_storage.push_back({index, b.info("file", 0)});
    }
  });
  refuse([&](auto& b) {  // paths of files
    const Value path = b.tree.str(long_text);
    for (int i = 0; i < 2000; ++i) {
      const Value info = b.make(CatalogueBuilder::kFileModule, "_StorageInfo",
                                b.tree.dict({{b.tree.str("relative_path"), path},
                                             {b.tree.str("offset"), Tree::integer(0)},
                                             {b.tree.str("length"), Tree::integer(0)}}));
      b.more_storage.push_back({b.index("w", {{i + 10}}), info});
    }
  });
  refuse([](auto& b) {  // paths of keys
    const Value path = b.tree.tuple(std::vector<Value>(100'000, b.tree.str("p")));
    std::vector<Entry> paths;
    for (int i = 0; i < 100; ++i) paths.push_back({b.tree.str("w" + std::to_string(i)), path});
    b.planner_data = b.tree.dict(paths);
  });
  refuse([&](auto& b) {  // the checkpoint's path
    const Value id = b.call("pathlib", "PosixPath", std::vector<Value>(2000, b.tree.str(long_text)));
    b.more_attributes = {{b.tree.str("storage_meta"), b.make(CatalogueBuilder::kModule, "StorageMeta",
                                                             b.tree.dict({{b.tree.str("checkpoint_id"), id}}))}};
  });
  refuse([](auto& b) {  // attributes, which every chunk would be searched for
    for (int i = 0; i < 10'000; ++i) b.first_chunk.push_back({Tree::integer(i), Tree::none()});
    b.more_chunks.assign(10'000, b.make(CatalogueBuilder::kModule, "ChunkStorageMetadata", b.tree.dict(b.first_chunk)));
  });
}

TEST(DecodeMetadataTest, LongNamesOfManyChunksAreNoAttack) {
  Metadata m;
  const std::string name(4000, 'n');
  TensorStorageMetadata tensor{{}, {20'000}, {}};
  for (int64_t i = 0; i < 20'000; ++i) {
    tensor.chunks.push_back({{i}, {1}});
    m.storage_data.insert({name, Dims{i}, i}, {"__0_0.distcp", static_cast<uint64_t>(1577 * i), 1577, {}});
  }
  m.state_dict_metadata.insert(name, tensor);
  const Bytes file = encode_metadata(m);
  EXPECT_EQ(decode_metadata(file), m);
  EXPECT_EQ(decode_metadata_tree(file).metadata, m);
}

TEST(DecodeMetadataTest, CyclesEndTheReading) {
  // chunks that hold their own tensor; a size that is its own argument
  CatalogueBuilder b;
  const Bytes stream = [] {
    std::string s = "\x80\x02";
    const auto global = [&](const std::string& module, const std::string& name) {
      s += "c" + module + "\n" + name + "\n";
    };
    const auto text = [&](std::string_view t) {
      s += "X";
      s += static_cast<char>(t.size());
      s.append(3, '\0').append(t);
    };
    global(CatalogueBuilder::kModule, "Metadata");
    s += ")\x81q";
    s += '\0';
    s += "}(";
    text("state_dict_metadata");
    s += "}(";
    text("w");
    s += "h";
    s += '\0';
    s += "u";
    text("storage_data");
    s += "}ub.";
    const ByteSpan span = as_bytes(s);
    return Bytes(span.begin(), span.end());
  }();
  EXPECT_ERROR(kUnsupported, "entry of an unknown class; key w; found torch.distributed.checkpoint.metadata.Metadata",
               decode_metadata(stream));
}

}  // namespace
}  // namespace reshard
