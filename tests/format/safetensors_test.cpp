// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/safetensors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "support/expect_error.h"

namespace reshard {
namespace {

constexpr const char* kOne = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";

Bytes front(std::string_view json) {
  ByteWriter out;
  out.u64(json.size());
  out.text(json);
  return out.take();
}
SafetensorsHeader decode(std::string_view json, uint64_t data_bytes) {
  const Bytes bytes = front(json);
  return decode_safetensors_header(bytes, bytes.size() + data_bytes);
}
std::string header_of(std::string_view members) { return "{" + std::string(members) + "}"; }

/// A file whose only tensor has these members beside what `kOne` has.
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

TEST(SafetensorsHeaderTest, HasTensorsInTheOrderOfTheirBytes) {
  const SafetensorsHeader header =
      decode(R"({"b":{"data_offsets":[8,14],"shape":[3,1],"dtype":"BF16"},"__metadata__":{"format":"pt"},)" +
                 std::string(kOne) + R"(,"c":{"dtype":"I64","shape":[],"data_offsets":[14,22]}} )",
             22);
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0], (SafetensorsTensor{"a", DType::kFloat32, {2}, 0, 8}));
  EXPECT_EQ(header.tensors[1], (SafetensorsTensor{"b", DType::kBFloat16, {3, 1}, 8, 14}));
  EXPECT_EQ(header.tensors[2], (SafetensorsTensor{"c", DType::kInt64, {}, 14, 22}));
  EXPECT_EQ(*header.metadata.find("format"), "pt");
}

TEST(SafetensorsHeaderTest, WithoutTensorsIsWhole) {
  EXPECT_TRUE(decode("{}", 0).tensors.empty());
  EXPECT_TRUE(decode(R"({"__metadata__":{}})", 0).tensors.empty());
  EXPECT_TRUE(decode(R"({"__metadata__":null})", 0).metadata.empty());
}

TEST(SafetensorsHeaderTest, TensorsWithoutElementsLieAnywhereBetweenOthers) {
  const SafetensorsHeader header =
      decode(header_of(std::string(kOne) + R"(,"z":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},)"
                                           R"("y":{"dtype":"F32","shape":[0],"data_offsets":[8,8]})"),
             8);
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0].name, "z");
  EXPECT_EQ(header.tensors[2].name, "y");
}

TEST(SafetensorsHeaderTest, MembersOfOtherNamesAreSkipped) {
  EXPECT_EQ(
      decode(R"({"a":{"x":[{"dtype":"Q","y":[[1.5]]}],"dtype":"F32","shape":[2],"data_offsets":[0,8],"z":null}})", 8)
          .tensors[0],
      (SafetensorsTensor{"a", DType::kFloat32, {2}, 0, 8}));
}

TEST(SafetensorsHeaderTest, EveryDtypeOfTheFormatThatTorchHasIsWrittenAndRead) {
  int shared = 0;
#define RESHARD_CHECK_DTYPE(id, name, bytes)                                              \
  if (safetensors_dtype_name(DType::id)) {                                                \
    ++shared;                                                                             \
    SafetensorsHeader header{{{"t", DType::id, {3, 2}, 0, 0}}};                           \
    const uint64_t size = lay_out_safetensors(header.tensors);                            \
    EXPECT_EQ(size, 6u * bytes);                                                          \
    const Bytes written = encode_safetensors_header(header);                              \
    EXPECT_EQ(decode_safetensors_header(written, written.size() + size), header) << name; \
  } else {                                                                                \
    std::vector<SafetensorsTensor> tensors = {{"t", DType::id, {1}, 0, 0}};               \
    EXPECT_ERROR(ErrorCode::kUnsupported, name, lay_out_safetensors(tensors));            \
  }
  RESHARD_FOR_EACH_DTYPE(RESHARD_CHECK_DTYPE)
#undef RESHARD_CHECK_DTYPE
  EXPECT_EQ(shared, 20);
}

TEST(SafetensorsHeaderTest, PairsOfFourBitFloatsAreValuesInTheFile) {
  EXPECT_EQ(decode(tensor(R"("F4")", "[2,8]", "[0,8]"), 8).tensors[0].shape, (Dims{2, 4}));
  SafetensorsHeader header{{{"t", DType::kFloat4E2M1FNx2, {2, 4}, 0, 0}}};
  EXPECT_EQ(lay_out_safetensors(header.tensors), 8u);
  EXPECT_NE(as_text(encode_safetensors_header(header)).find("[2,8]"), std::string_view::npos);
}

TEST(SafetensorsHeaderTest, IsWrittenAsTheFormatsOwnLibraryDoes) {
  SafetensorsHeader header{{{"b", DType::kInt8, {}, 0, 0},
                            {"\xC3\xA9\"\\\n\x01", DType::kFloat32, {2}, 0, 0},
                            {"a", DType::kFloat32, {1, 3}, 0, 0},
                            {"u", DType::kUInt64, {0}, 0, 0}}};
  header.metadata.insert("format", "pt");
  EXPECT_EQ(lay_out_safetensors(header.tensors), 21u);
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"u":{"dtype":"U64","shape":[0],"data_offsets":[0,0]},)"
      R"("a":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]},)"
      "\"\xC3\xA9\\\"\\\\\\n\\u0001\":"
      R"({"dtype":"F32","shape":[2],"data_offsets":[12,20]},"b":{"dtype":"I8","shape":[],"data_offsets":[20,21]}})";
  const Bytes written = encode_safetensors_header(header);
  EXPECT_EQ(written.size() % 8, 0u);
  EXPECT_TRUE(as_text(written).substr(8).starts_with(json)) << as_text(written);
  EXPECT_EQ(decode_safetensors_header(written, written.size() + 21), header);
}

TEST(SafetensorsHeaderTest, WhatCannotBeWrittenIsRefused) {
  std::vector<SafetensorsTensor> tensors = {{"__metadata__", DType::kFloat32, {1}, 0, 0}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "another use for this name", lay_out_safetensors(tensors));
  tensors = {{"a", DType::kFloat32, {1}, 0, 0}, {"a", DType::kFloat32, {1}, 0, 0}};
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "have one name", lay_out_safetensors(tensors));
  for (const char* name : {"\xFF", "\xC3", "\xED\xA0\x80", "\xED\xBF\xBF", "\xC0\x80"}) {
    tensors = {{name, DType::kFloat32, {1}, 0, 0}};
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "no UTF-8", lay_out_safetensors(tensors));
  }
  tensors = {{"a", DType::kFloat32, {int64_t{1} << 40, int64_t{1} << 40}, 0, 0}};
  EXPECT_ERROR(ErrorCode::kCorruptData, "overflows", lay_out_safetensors(tensors));
  tensors = {{"a", DType::kInt8, {int64_t{1} << 62}, 0, 0},
             {"b", DType::kInt8, {int64_t{1} << 62}, 0, 0},
             {"c", DType::kInt8, {int64_t{1} << 62}, 0, 0},
             {"d", DType::kInt8, {int64_t{1} << 62}, 0, 0}};
  EXPECT_ERROR(ErrorCode::kCorruptData, "size of a safetensors file overflows", lay_out_safetensors(tensors));
  EXPECT_ERROR(ErrorCode::kUnsupported, "without dimensions",
               encode_safetensors_header({{{"a", DType::kFloat4E2M1FNx2, {}, 0, 1}}}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "too long: use more files",
               encode_safetensors_header({{{std::string(100'000'000, 'x'), DType::kInt8, {1}, 0, 1}}}));
  SafetensorsHeader header;
  header.metadata.insert("key", "\xFF");
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "no UTF-8", encode_safetensors_header(header));
}

// --- defects of a file

void expect_refused(std::string_view json, uint64_t data_bytes, std::string_view text,
                    ErrorCode code = ErrorCode::kCorruptData) {
  EXPECT_ERROR(code, text, decode(json, data_bytes)) << json;
}

TEST(SafetensorsDefectTest, FileShorterThanTheLengthOfItsHeader) {
  const Bytes bytes(7);
  for (size_t n = 0; n < 8; ++n) {
    EXPECT_ERROR(ErrorCode::kCorruptData, "too short",
                 safetensors_data_begin(ByteSpan(bytes).first(std::min<size_t>(n, 7)), n));
  }
}

TEST(SafetensorsDefectTest, HeaderLongerThanTheLimitOrTheFile) {
  for (const uint64_t length : {uint64_t{100'000'001}, ~uint64_t{0}, ~uint64_t{0} - 8}) {
    ByteWriter out;
    out.u64(length);
    EXPECT_ERROR(ErrorCode::kCorruptData, "is too long", safetensors_data_begin(out.buffer(), ~uint64_t{0}));
  }
  ByteWriter out;
  out.u64(100'000'000);
  EXPECT_EQ(safetensors_data_begin(out.buffer(), 100'000'008), 100'000'008u);
  EXPECT_ERROR(ErrorCode::kCorruptData, "ends inside its safetensors header",
               safetensors_data_begin(out.buffer(), 100'000'007));
}

TEST(SafetensorsDefectTest, HeaderCutAnywhere) {
  const std::string json = header_of(kOne);
  for (size_t n = 0; n < json.size(); ++n) expect_refused(json.substr(0, n), 8, n == 0 ? "" : "no valid JSON");
  const Bytes whole = front(json);
  EXPECT_ERROR(ErrorCode::kCorruptData, "not whole",
               decode_safetensors_header(ByteSpan(whole).first(whole.size() - 1), whole.size() + 8));
}

TEST(SafetensorsDefectTest, HeaderThatIsNoJson) {
  expect_refused("", 0, "no valid JSON");
  expect_refused("{]", 0, "no valid JSON");
  expect_refused("{}{}", 0, "no valid JSON");
  expect_refused(header_of(kOne) + std::string(1, '\0'), 8, "no valid JSON");
  expect_refused("\xEF\xBB\xBF{}", 0, "no valid JSON");
  expect_refused("{/**/}", 0, "no valid JSON");
  expect_refused(R"({"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8, "no valid JSON");
  expect_refused("{\"\xFF\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no valid JSON");
}

TEST(SafetensorsDefectTest, HeaderThatIsNoObject) {
  for (const char* json : {"[]", "1", "\"a\"", "null", "true", "-1", "1.5"})
    expect_refused(json, 0, "wanted an object");
}

TEST(SafetensorsDefectTest, JsonDeeperThanAnyHeader) {
  std::string deep = R"({"a":{"x":)" + std::string(100'000, '[');
  expect_refused(deep, 0, "in each other");
}

TEST(SafetensorsDefectTest, TensorThatIsNoObject) {
  for (const char* value : {"[]", "1", "\"a\"", "null", "false"}) {
    expect_refused(std::string(R"({"a":)") + value + "}", 0, "key a");
  }
}

TEST(SafetensorsDefectTest, MemberMissing) {
  expect_refused(R"({"a":{"shape":[2],"data_offsets":[0,8]}})", 8, "wanted dtype");
  expect_refused(R"({"a":{"dtype":"F32","data_offsets":[0,8]}})", 8, "wanted shape");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2]}})", 8, "wanted data_offsets");
}

TEST(SafetensorsDefectTest, MemberOfAnotherKind) {
  for (const char* value : {"1", "[]", "{}", "null"}) expect_refused(tensor(value, "[2]", "[0,8]"), 8, "dtype");
  for (const char* value :
       {"2", "\"2\"", "{}", "null", "[2.0]", "[-2]", "[[2]]", "[\"2\"]", "[null]", "[{}]", "[18446744073709551616]"}) {
    expect_refused(tensor(R"("F32")", value, "[0,8]"), 8, "");
  }
  for (const char* value : {"8", "[]", "[8]", "[0,8,8]", "[-1,8]", "[0,8.0]", "{}"}) {
    expect_refused(tensor(R"("F32")", "[2]", value), 8, "");
  }
}

TEST(SafetensorsDefectTest, UnknownDtype) {
  for (const char* name : {"F6_E2M3", "F6_E3M2", "F128", "f32", "", "C128"}) {
    expect_refused(tensor('"' + std::string(name) + '"', "[2]", "[0,8]"), 8, name, ErrorCode::kUnsupported);
  }
}

TEST(SafetensorsDefectTest, FourBitFloatsThatAreNoPairs) {
  expect_refused(tensor(R"("F4")", "[2,1]", "[0,1]"), 1, "not even", ErrorCode::kUnsupported);
  expect_refused(tensor(R"("F4")", "[]", "[0,1]"), 1, "not even", ErrorCode::kUnsupported);
}

TEST(SafetensorsDefectTest, KeyOrMemberTwice) {
  expect_refused(header_of(std::string(kOne) + "," + kOne), 8, "a key occurs twice");
  expect_refused(header_of(std::string(kOne) + R"(,"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]})"), 16,
                 "a key occurs twice");
  expect_refused(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8, "twice: dtype");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}})", 8, "twice: shape");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"data_offsets":[0,8]}})", 8,
                 "twice: data_offsets");
  expect_refused(R"({"__metadata__":{"x":"1","x":"2"}})", 0, "twice: x");
}

TEST(SafetensorsDefectTest, MetadataThatIsNotTextToText) {
  for (const char* value : {"[]", "1", "\"a\"", "true", R"({"x":1})", R"({"x":null})", R"({"x":{}})", R"({"x":["a"]})",
                            R"({"dtype":1})", R"({"shape":[1]})"}) {
    expect_refused(std::string(R"({"__metadata__":)") + value + "}", 0, "__metadata__");
  }
}

TEST(SafetensorsDefectTest, HoleOverlapAndBackwardRange) {
  const auto two = [](const char* offsets) {
    return header_of(std::string(kOne) + R"(,"b":{"dtype":"F32","shape":[2],"data_offsets":)" + offsets + "}");
  };
  EXPECT_EQ(decode(two("[8,16]"), 16).tensors.size(), 2u);
  expect_refused(two("[12,20]"), 20, "hole");
  expect_refused(two("[4,12]"), 12, "hole");
  expect_refused(two("[0,8]"), 8, "hole");
  expect_refused(two("[8,0]"), 8, "hole");
  expect_refused(tensor(R"("F32")", "[2]", "[4,12]"), 12, "hole");
  expect_refused(tensor(R"("F32")", "[2]", "[0,18446744073709551615]"), 8, "size of its dtype and shape");
}

TEST(SafetensorsDefectTest, RangeOfAnotherSizeThanTheShape) {
  expect_refused(tensor(R"("F32")", "[3]", "[0,8]"), 8, "wanted 12 bytes, found 8");
  expect_refused(tensor(R"("F16")", "[2]", "[0,8]"), 8, "wanted 4 bytes");
  expect_refused(tensor(R"("F32")", "[0]", "[0,8]"), 8, "wanted 0 bytes");
  expect_refused(tensor(R"("F32")", "[]", "[0,8]"), 8, "wanted 4 bytes");
}

TEST(SafetensorsDefectTest, SizesThatOverflow) {
  expect_refused(tensor(R"("F32")", "[4294967296,4294967296]", "[0,0]"), 0, "overflows");
  expect_refused(tensor(R"("F64")", "[4611686018427387904]", "[0,0]"), 0, "overflows");
  expect_refused(tensor(R"("F32")", "[0,9223372036854775808]", "[0,0]"), 0, "overflows");
  std::string many = "[1";
  for (int i = 0; i < 64; ++i) many += ",1";
  expect_refused(tensor(R"("F32")", many + "]", "[0,4]"), 4, "at most 64 numbers");
}

TEST(SafetensorsDefectTest, DataLongerOrShorterThanItsTensors) {
  expect_refused(header_of(kOne), 7, "longer or shorter");
  expect_refused(header_of(kOne), 9, "longer or shorter");
  expect_refused("{}", 1, "longer or shorter");
}

// --- the texts beside it

TEST(SafetensorsIndexTest, IsWrittenAndRead) {
  const SafetensorsIndex index{.total_size = 200, .weight_map = {{"a", "f1"}, {"b.\"c\"", "f2"}}};
  const Bytes written = encode_safetensors_index(index);
  EXPECT_EQ(as_text(written),
            "{\n  \"metadata\": {\n    \"total_size\": 200\n  },\n  \"weight_map\": {\n    \"a\": \"f1\",\n    "
            "\"b.\\\"c\\\"\": \"f2\"\n  }\n}\n");
  EXPECT_EQ(decode_safetensors_index(written), index);
  EXPECT_EQ(decode_safetensors_index(encode_safetensors_index({})), SafetensorsIndex());
}

TEST(SafetensorsIndexTest, OtherMembersAreSkipped) {
  const SafetensorsIndex index = decode_safetensors_index(as_bytes(
      R"({"x":[{"weight_map":1}],"metadata":{"total_size":1.5e3,"y":{"total_size":7}},"weight_map":{"a":"f"}})"));
  EXPECT_EQ(index, (SafetensorsIndex{.total_size = 0, .weight_map = {{"a", "f"}}}));
}

TEST(SafetensorsIndexTest, DefectsAreNamed) {
  const auto refuse = [](const char* json, const char* text) {
    EXPECT_ERROR(ErrorCode::kCorruptData, text, decode_safetensors_index(as_bytes(json))) << json;
  };
  refuse("", "no valid JSON");
  refuse(R"({"weight_map":{"a":"f"})", "no valid JSON");
  refuse("[]", "wanted an object");
  refuse("{}", "wanted weight_map");
  refuse(R"({"weight_map":[]})", "weight_map: an object");
  refuse(R"({"weight_map":null})", "weight_map: an object");
  refuse(R"({"weight_map":{"a":1}})", "the name of a file");
  refuse(R"({"weight_map":{"a":["f"]}})", "the name of a file");
  refuse(R"({"weight_map":{"a":"f","a":"f"}})", "a key occurs twice");
  refuse(R"({"weight_map":{},"weight_map":{}})", "a key occurs twice");
}

TEST(SafetensorsShardsTest, AreWrittenAndRead) {
  const std::vector<std::string> files = {"b", "a"};
  EXPECT_EQ(as_text(encode_safetensors_shards(files)), "{\n  \"files\": [\n    \"b\",\n    \"a\"\n  ]\n}\n");
  EXPECT_EQ(decode_safetensors_shards(encode_safetensors_shards(files)), files);
  EXPECT_EQ(decode_safetensors_shards(as_bytes(R"({"x":{"files":1},"y":[1,"z",[]],"files":[],"z":1})")),
            std::vector<std::string>());
}

TEST(SafetensorsShardsTest, DefectsAreNamed) {
  const auto refuse = [](const char* json, const char* text) {
    EXPECT_ERROR(ErrorCode::kCorruptData, text, decode_safetensors_shards(as_bytes(json))) << json;
  };
  refuse("", "no valid JSON");
  refuse("[]", "wanted an object");
  refuse("{}", "wanted files");
  refuse(R"({"files":{}})", "files: a list");
  refuse(R"({"files":"a"})", "files: a list");
  refuse(R"({"files":[1]})", "files: a list");
  refuse(R"({"files":[["a"]]})", "files: a list");
  refuse(R"({"files":[],"files":[]})", "a key occurs twice");
}

TEST(SafetensorsShardingTest, IsWrittenAndRead) {
  const SafetensorsSharding sharding = {{"a", {{2, 0}, Dims{4, 8}}}, {"b", {{}, std::nullopt}}};
  EXPECT_EQ(encode_sharding_info(sharding), R"({"a":{"saved_offsets":[2,0],"size":[4,8]},"b":{"saved_offsets":[]}})");
  EXPECT_EQ(decode_sharding_info(encode_sharding_info(sharding)), sharding);
  EXPECT_EQ(decode_sharding_info(R"({"a": {"saved_offsets": [0, 1], "other": {"size": 1}}})"),
            (SafetensorsSharding{{"a", {{0, 1}, std::nullopt}}}));
}

TEST(SafetensorsShardingTest, DefectsAreNamed) {
  const auto refuse = [](const char* json, const char* text) {
    EXPECT_ERROR(ErrorCode::kCorruptData, text, decode_sharding_info(json)) << json;
  };
  refuse("", "no valid JSON");
  refuse("[]", "wanted an object");
  refuse(R"({"a":[]})", "key a");
  refuse(R"({"a":{}})", "wanted saved_offsets");
  refuse(R"({"a":{"saved_offsets":"0"}})", "a list of whole numbers");
  refuse(R"({"a":{"saved_offsets":[-1]}})", "a list of whole numbers");
  refuse(R"({"a":{"saved_offsets":[9223372036854775808]}})", "overflows");
  refuse(R"({"a":{"saved_offsets":[0],"saved_offsets":[0]}})", "twice: saved_offsets");
  refuse(R"({"a":{"saved_offsets":[0],"size":[1],"size":[1]}})", "twice: size");
  refuse(R"({"a":{"saved_offsets":[0]},"a":{"saved_offsets":[0]}})", "a key occurs twice");
}

}  // namespace
}  // namespace reshard
