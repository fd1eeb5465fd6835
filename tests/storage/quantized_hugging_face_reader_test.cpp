// SPDX-License-Identifier: BSD-3-Clause
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <map>

#include "storage/hugging_face_runs.h"
#include "storage/small_floats.h"
#include "support/expect_error.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

Bytes of_floats(const std::vector<float>& values, DType dtype = DType::kFloat32) {
  Bytes bytes(values.size() * static_cast<size_t>(element_size(dtype)));
  from_floats(values, dtype, bytes);
  return bytes;
}
Bytes of_bytes(const std::vector<int>& values) {
  Bytes bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}
std::vector<float> floats_of(ByteSpan bytes, DType dtype = DType::kFloat32) {
  std::vector<float> values(bytes.size() / static_cast<size_t>(element_size(dtype)));
  to_floats(bytes, dtype, values);
  return values;
}

// --- floats of few bits

std::vector<float> values_of(DType dtype, const std::vector<int>& bits) { return floats_of(of_bytes(bits), dtype); }

TEST(SmallFloatsTest, EightBits) {
  EXPECT_EQ(values_of(DType::kFloat8E4M3FN, {0x00, 0x01, 0x08, 0x38, 0x7E, 0xBC}),
            (std::vector<float>{0, 0x1p-9F, 0x1p-6F, 1, 448, -1.5}));
  EXPECT_EQ(values_of(DType::kFloat8E5M2, {0x01, 0x3C, 0x7B, 0x7C, 0xFC}),
            (std::vector<float>{0x1p-16F, 1, 57344, INFINITY, -INFINITY}));
  EXPECT_EQ(values_of(DType::kFloat8E4M3FNUZ, {0x01, 0x40, 0x7F, 0xC0}), (std::vector<float>{0x1p-10F, 1, 240, -1}));
  EXPECT_EQ(values_of(DType::kFloat8E5M2FNUZ, {0x01, 0x40, 0x7F, 0xC0}), (std::vector<float>{0x1p-17F, 1, 57344, -1}));
  EXPECT_EQ(values_of(DType::kFloat8E8M0FNU, {0, 127, 254}), (std::vector<float>{0x1p-127F, 1, 0x1p127F}));
  EXPECT_EQ(values_of(DType::kInt8, {0, 127, 255}), (std::vector<float>{0, 127, -1}));
  EXPECT_EQ(values_of(DType::kUInt8, {0, 255}), (std::vector<float>{0, 255}));
  EXPECT_TRUE(std::signbit(values_of(DType::kFloat8E4M3FN, {0x80})[0]));
  const std::vector<std::pair<DType, int>> nans = {{DType::kFloat8E4M3FN, 0x7F},   {DType::kFloat8E4M3FN, 0xFF},
                                                   {DType::kFloat8E5M2, 0x7D},     {DType::kFloat8E4M3FNUZ, 0x80},
                                                   {DType::kFloat8E5M2FNUZ, 0x80}, {DType::kFloat8E8M0FNU, 0xFF}};
  for (const auto& [dtype, bits] : nans) EXPECT_TRUE(std::isnan(values_of(dtype, {bits})[0])) << to_string(dtype);
}

TEST(SmallFloatsTest, FourBits) {
  std::vector<float> values;
  for (unsigned bits = 0; bits < 16; ++bits) values.push_back(float4_value(bits));
  EXPECT_EQ(values, (std::vector<float>{0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0F, -0.5, -1, -1.5, -2, -3, -4, -6}));
}

TEST(SmallFloatsTest, SixteenBitsComeBackAsTheyWere) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Bytes all(2 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) std::memcpy(all.data() + 2 * bits, &bits, 2);
    const std::vector<float> values = floats_of(all, dtype);
    const Bytes back = of_floats(values, dtype);
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i])) {
        EXPECT_TRUE(std::isnan(floats_of(ByteSpan(back).subspan(2 * i, 2), dtype)[0]));
      } else {
        ASSERT_EQ(std::memcmp(all.data() + 2 * i, back.data() + 2 * i, 2), 0) << i;
      }
    }
  }
}

TEST(SmallFloatsTest, RoundsToNearestEven) {
  const auto half = [](float value) { return floats_of(of_floats({value}, DType::kFloat16), DType::kFloat16)[0]; };
  EXPECT_EQ(half(1 + 0x1p-11F), 1);
  EXPECT_EQ(half(1 + 0x1p-11F + 0x1p-20F), 1 + 0x1p-10F);
  EXPECT_EQ(half(1 + 3 * 0x1p-11F), 1 + 0x1p-9F);
  EXPECT_EQ(half(65519), 65504);
  EXPECT_EQ(half(-65520), -INFINITY);
  EXPECT_EQ(half(0x1p-25F), 0);
  EXPECT_EQ(half(3 * 0x1p-25F), 0x1p-23F);
  EXPECT_EQ(half(0x1p-14F - 0x1p-26F), 0x1p-14F);
  const auto brain = [](float value) { return floats_of(of_floats({value}, DType::kBFloat16), DType::kBFloat16)[0]; };
  EXPECT_EQ(brain(1 + 0x1p-8F), 1);
  EXPECT_EQ(brain(1 + 3 * 0x1p-8F), 1 + 0x1p-6F);
  EXPECT_EQ(brain(std::numeric_limits<float>::max()), INFINITY);
  EXPECT_TRUE(std::isnan(brain(std::bit_cast<float>(0x7F800001u))));
}

TEST(SmallFloatsTest, OtherDtypesAreRefused) {
  std::vector<float> one(1);
  EXPECT_FALSE(is_convertible_to_float(DType::kInt32));
  EXPECT_ERROR(ErrorCode::kUnsupported, "found int32", to_floats(Bytes(4), DType::kInt32, one));
  Bytes bytes(4);
  EXPECT_ERROR(ErrorCode::kUnsupported, "found float8_e5m2", from_floats(one, DType::kFloat8E5M2, bytes));
}

// --- files

struct Filled {
  SafetensorsTensor tensor;
  Bytes elements;
};

class QuantizedHuggingFaceReaderTest : public testing::Test {
 protected:
  void put(const std::string& name, const std::vector<Filled>& tensors) {
    SafetensorsHeader header;
    std::map<std::string, Bytes> elements;
    for (const Filled& filled : tensors) {
      header.tensors.push_back(filled.tensor);
      elements[filled.tensor.name] = filled.elements;
    }
    lay_out_safetensors(header.tensors);
    Bytes file = encode_safetensors_header(header);
    for (const SafetensorsTensor& tensor : header.tensors) {
      const Bytes& bytes = elements[tensor.name];
      ASSERT_EQ(bytes.size(), tensor.end - tensor.begin) << tensor.name;
      file.insert(file.end(), bytes.begin(), bytes.end());
    }
    write_bytes(directory_ / name, file);
  }
  static Filled filled(const std::string& name, DType dtype, const Dims& shape, Bytes elements) {
    return {{name, dtype, shape, 0, 0}, std::move(elements)};
  }

  /// Loads one box a rank; what the ranks got.
  std::vector<std::vector<float>> load(const std::string& fqn, const Dims& size, const std::vector<Box>& boxes,
                                       const QuantizedHuggingFaceReaderOptions& options) {
    std::vector<std::vector<Box>> of_ranks;
    for (const Box& box : boxes) of_ranks.push_back({box});
    auto ranks = sharded<MemoryLoadState>(fqn, size, of_ranks, options.target_dtype);
    counters_.resize(ranks.size());
    on_ranks(ranks.size(), [&](size_t rank, Transport& transport) {
      DefaultLoadPlanner planner;
      QuantizedHuggingFaceStorageReader reader(directory_.path(), options);
      Progress last;
      run_load(transport, ranks[rank], planner, reader, [&](const Progress& progress) { last = progress; });
      EXPECT_EQ(last.done, last.total);
      counters_[rank] = reader.counters();
    });
    std::vector<std::vector<float>> result;
    for (auto& rank : ranks) result.push_back(floats_of(rank.memory().buffer(0), options.target_dtype));
    return result;
  }
  std::vector<float> load_whole(const std::string& fqn, const Dims& size,
                                const QuantizedHuggingFaceReaderOptions& options) {
    return load(fqn, size, {whole_box(size)}, options)[0];
  }
  void expect_refused(const std::string& text, const QuantizedHuggingFaceReaderOptions& options = {}) {
    EXPECT_ERROR(ErrorCode::kUnsupported, text,
                 QuantizedHuggingFaceStorageReader(directory_.path(), options).read_metadata());
  }

  TemporaryDirectory directory_;
  std::vector<ReadCounters> counters_;
};

// PyTorch's test_dequantization.
TEST_F(QuantizedHuggingFaceReaderTest, ScalesInTheSameFileAndInAnother) {
  put("a.safetensors", {filled("a.weight", DType::kFloat32, {4, 4}, of_floats(std::vector<float>(16, 1))),
                        filled("a.weight_scale_inv", DType::kFloat32, {1, 1}, of_floats({2})),
                        filled("b.weight", DType::kFloat32, {4, 4}, of_floats(std::vector<float>(16, 3)))});
  put("b.safetensors", {filled("b.weight_scale_inv", DType::kFloat32, {1, 1}, of_floats({0.5}))});
  EXPECT_EQ(load_whole("a.weight", {4, 4}, {}), std::vector<float>(16, 2));
  EXPECT_EQ(load_whole("b.weight", {4, 4}, {}), std::vector<float>(16, 1.5));
}

// PyTorch's test_dtensor_slice_dequantization_block_alignment.
TEST_F(QuantizedHuggingFaceReaderTest, ASliceGetsTheScalesOfItsBlocks) {
  put("model.safetensors", {filled("w", DType::kFloat32, {8, 8}, of_floats(std::vector<float>(64, 2))),
                            filled("w_scale_inv", DType::kFloat32, {2, 2}, of_floats({1, 2, 3, 4}))});
  const auto slice = load("w", {8, 8}, {{{2, 1}, {4, 4}}}, {.block_size = 4})[0];
  EXPECT_EQ(slice, (std::vector<float>{2, 2, 2, 4, 2, 2, 2, 4, 6, 6, 6, 8, 6, 6, 6, 8}));
}

TEST_F(QuantizedHuggingFaceReaderTest, OnlyTheWantedValuesAndScalesAreRead) {
  put("model.safetensors", {filled("w", DType::kFloat8E4M3FN, {100, 60}, Bytes(6000, std::byte{0x38})),
                            filled("w_scale_inv", DType::kFloat32, {10, 6}, of_floats(std::vector<float>(60, 3)))});
  const auto slice = load("w", {100, 60}, {{{15, 5}, {20, 30}}}, {.block_size = 10})[0];
  EXPECT_EQ(slice, std::vector<float>(600, 3));
  // 20 rows of 30 bytes; scales of 3 x 4 blocks.
  EXPECT_EQ(counters_[0].bytes_read, 20u * 30 + 3 * 4 * 4);
  EXPECT_EQ(counters_[0].bytes_needed, counters_[0].bytes_read);
}

TEST_F(QuantizedHuggingFaceReaderTest, CutBlocksAndStacksOfMatrices) {
  // 2 matrices of 5 x 7 in blocks of 3: the scale of a value says where its block is.
  std::vector<float> scales;
  std::vector<float> wanted;
  for (int m = 0; m < 2; ++m) {
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 3; ++c) scales.push_back(static_cast<float>(100 * m + 10 * r + c + 1));
    }
  }
  for (int m = 0; m < 2; ++m) {
    for (int r = 0; r < 5; ++r) {
      for (int c = 0; c < 7; ++c) wanted.push_back(static_cast<float>(100 * m + 10 * (r / 3) + c / 3 + 1));
    }
  }
  put("model.safetensors", {filled("w", DType::kFloat8E4M3FN, {2, 5, 7}, Bytes(70, std::byte{0x38})),
                            filled("w_scale_inv", DType::kFloat32, {2, 2, 3}, of_floats(scales))});
  EXPECT_EQ(load_whole("w", {2, 5, 7}, {.block_size = 3}), wanted);
}

TEST_F(QuantizedHuggingFaceReaderTest, Mxfp4) {
  // 1 x 2 groups of 2 bytes; two rows.
  put("model.safetensors",
      {filled("x_blocks", DType::kUInt8, {2, 1, 2, 2}, of_bytes({0x21, 0x43, 0x65, 0x07, 0xA9, 0xCB, 0xED, 0x8F})),
       filled("x_scales", DType::kUInt8, {2, 1, 2}, of_bytes({127, 128, 126, 129}))});
  const std::vector<float> wanted = {0.5, 1, 1.5, 2, 6, 8, 12, 0, -0.25, -0.5, -0.75, -1, -12, -16, -24, -0.0F};
  EXPECT_EQ(load_whole("x_blocks", {2, 1, 8}, {}), wanted);
  EXPECT_EQ(load("x_blocks", {2, 1, 8}, {{{1, 0, 3}, {1, 1, 3}}}, {})[0], (std::vector<float>{-1, -12, -16}));
  EXPECT_EQ(counters_[0].bytes_read, 4u + 2);
  EXPECT_EQ(load("x_blocks", {2, 1, 8}, {{{0, 0, 5}, {2, 1, 2}}}, {.target_dtype = DType::kBFloat16})[0],
            (std::vector<float>{8, 12, -16, -24}));
  EXPECT_EQ(counters_[0].bytes_read, 4u + 2);
}

TEST_F(QuantizedHuggingFaceReaderTest, RandomBoxesAreThoseOfTheWhole) {
  Random random(3);
  for (int round = 0; round < 40; ++round) {
    const bool mxfp4 = round % 2 == 1;
    const int64_t block = random_between(random, 1, 5);
    const Dims stored = mxfp4 ? Dims{random_between(random, 1, 4), random_between(random, 1, 4),
                                     random_between(random, 1, 4), random_between(random, 1, 3)}
                              : Dims{random_between(random, 1, 12), random_between(random, 1, 12)};
    const Dims size = mxfp4 ? Dims{stored[0], stored[1], stored[2] * stored[3] * 2} : stored;
    const Dims scales = mxfp4 ? Dims{stored[0], stored[1], stored[2]}
                              : Dims{(stored[0] + block - 1) / block, (stored[1] + block - 1) / block};
    Bytes values(static_cast<size_t>(volume(stored)));
    for (std::byte& value : values) value = static_cast<std::byte>(random_between(random, 0, 0x7E));
    Bytes scale_bytes(static_cast<size_t>(volume(scales)));
    for (std::byte& value : scale_bytes) value = static_cast<std::byte>(random_between(random, 120, 134));
    const std::string fqn = mxfp4 ? "x_blocks" : "x";
    put("model.safetensors", {filled(fqn, mxfp4 ? DType::kUInt8 : DType::kFloat8E4M3FN, stored, values),
                              filled(mxfp4 ? "x_scales" : "x_scale_inv", mxfp4 ? DType::kUInt8 : DType::kFloat8E8M0FNU,
                                     scales, scale_bytes)});
    const QuantizedHuggingFaceReaderOptions options{.block_size = block};
    const std::vector<float> whole = load_whole(fqn, size, options);
    std::vector<Box> boxes;
    for (int rank = 0; rank < 3; ++rank) boxes.push_back(random_box(random, size));
    const auto parts = load(fqn, size, boxes, options);
    for (size_t rank = 0; rank < boxes.size(); ++rank) {
      std::vector<float> wanted;
      for_each_run(whole_box(size), boxes[rank], [&](int64_t at, int64_t, int64_t length) {
        wanted.insert(wanted.end(), whole.begin() + at, whole.begin() + at + length);
      });
      EXPECT_EQ(parts[rank], wanted) << to_string(boxes[rank]) << " of " << fqn << to_string(size);
    }
  }
}

TEST_F(QuantizedHuggingFaceReaderTest, TensorsOfSeveralPieces) {
  // More values than are dequantized at once.
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {3000, 1000}, Bytes(3'000'000, std::byte{0x38})),
       filled("w_scale_inv", DType::kBFloat16, {24, 8}, of_floats(std::vector<float>(192, 2), DType::kBFloat16))});
  EXPECT_EQ(load_whole("w", {3000, 1000}, {.target_dtype = DType::kFloat16}), std::vector<float>(3'000'000, 2));
}

TEST_F(QuantizedHuggingFaceReaderTest, OthersLoadAsTheyAre) {
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {2, 2}, of_bytes({0x38, 0x38, 0x38, 0x38})),
       filled("w_scale_inv", DType::kFloat32, {1, 1}, of_floats({2})),
       filled("bias", DType::kFloat32, {2}, of_floats({5, 6})),
       filled("y_blocks", DType::kFloat32, {1}, of_floats({7})),
       filled("y_scales", DType::kFloat32, {1}, of_floats({8})), filled("none", DType::kFloat8E4M3FN, {0, 2}, {}),
       filled("none_scale_inv", DType::kFloat32, {0, 1}, {})});
  auto ranks = states<MemoryLoadState>(
      {{replica_entry("w", {2, 2}), replica_entry("bias", {2}), replica_entry("w_scale_inv", {1, 1}),
        replica_entry("y_blocks", {1}), replica_entry("none", {0, 2})}});
  on_ranks(1, [&](size_t, Transport& transport) {
    DefaultLoadPlanner planner;
    QuantizedHuggingFaceStorageReader reader(directory_.path());
    run_load(transport, ranks[0], planner, reader);
    EXPECT_EQ(reader.counters().bytes_read, 4u + 4 + 8 + 4 + 4);
  });
  EXPECT_EQ(floats_of(ranks[0].memory().buffer(0)), std::vector<float>(4, 2));
  EXPECT_EQ(floats_of(ranks[0].memory().buffer(1)), (std::vector<float>{5, 6}));
  EXPECT_EQ(floats_of(ranks[0].memory().buffer(2)), std::vector<float>{2});
  EXPECT_EQ(floats_of(ranks[0].memory().buffer(3)), std::vector<float>{7});
}

// --- refusals

TEST_F(QuantizedHuggingFaceReaderTest, SeveralThreadsReadWhatOneReads) {
  constexpr int kTensors = 20;
  std::vector<Filled> tensors;
  std::vector<StateEntry> entries;
  for (int i = 0; i < kTensors; ++i) {
    const std::string name = "w" + std::to_string(i);
    tensors.push_back(filled(name, DType::kFloat32, {8, 8}, of_floats(std::vector<float>(64, static_cast<float>(i)))));
    tensors.push_back(filled(name + "_scale_inv", DType::kFloat32, {2, 2}, of_floats({1, 2, 3, 4})));
    entries.push_back(tensor_entry(name, {8, 8}, {whole_box({8, 8})}));
  }
  put("model.safetensors", tensors);
  std::vector<uint64_t> read;
  for (const int threads : {1, 3}) {
    MemoryLoadState state(entries);
    DefaultLoadPlanner planner;
    QuantizedHuggingFaceStorageReader reader(directory_.path(), {.block_size = 4, .files = {.thread_count = threads}});
    Progress last;
    run_load(*solo_transport(), state, planner, reader, [&](const Progress& progress) { last = progress; });
    EXPECT_EQ(last.done, last.total);
    for (size_t i = 0; i < kTensors; ++i) {
      const std::vector<float> values = floats_of(state.memory().buffer(i), DType::kFloat32);
      const auto value = static_cast<float>(i);
      EXPECT_EQ(values.front(), value);
      EXPECT_EQ(values.back(), 4 * value);
    }
    read.push_back(reader.counters().bytes_read);
  }
  EXPECT_EQ(read[0], read[1]);
}

TEST_F(QuantizedHuggingFaceReaderTest, OptionsThatMakeNoSense) {
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "block_size",
               QuantizedHuggingFaceStorageReader(directory_.path(), {.block_size = 0}));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "found int8",
               QuantizedHuggingFaceStorageReader(directory_.path(), {.target_dtype = DType::kInt8}));
}

TEST_F(QuantizedHuggingFaceReaderTest, ScalesThatDoNotFit) {
  put("model.safetensors", {filled("w", DType::kFloat8E4M3FN, {4, 4}, Bytes(16)),
                            filled("w_scale_inv", DType::kFloat32, {2, 2}, Bytes(16))});
  expect_refused("key w_scale_inv; wanted [1, 1], found [2, 2]");
  EXPECT_EQ(load_whole("w", {4, 4}, {.block_size = 2}), std::vector<float>(16, 0));
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {4, 4}, Bytes(16)), filled("w_scale_inv", DType::kFloat32, {}, Bytes(4))});
  expect_refused("is block_size right?");
  put("model.safetensors",
      {filled("x_blocks", DType::kUInt8, {4, 2, 2}, Bytes(16)), filled("x_scales", DType::kUInt8, {4, 1}, Bytes(4))});
  expect_refused("key x_scales; wanted [4, 2], found [4, 1]");
}

TEST_F(QuantizedHuggingFaceReaderTest, TensorsThatCannotBeDequantized) {
  put("model.safetensors",
      {filled("w", DType::kInt32, {2, 2}, Bytes(16)), filled("w_scale_inv", DType::kFloat32, {1, 1}, Bytes(4))});
  expect_refused("key w; found int32");
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {2, 2}, Bytes(4)), filled("w_scale_inv", DType::kFloat64, {1, 1}, Bytes(8))});
  expect_refused("key w_scale_inv; found float64");
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {4}, Bytes(4)), filled("w_scale_inv", DType::kFloat32, {1}, Bytes(4))});
  expect_refused("less than two dimensions");
  put("model.safetensors",
      {filled("x_blocks", DType::kUInt8, {4, 2, 0}, {}), filled("x_scales", DType::kUInt8, {4, 2}, Bytes(8))});
  expect_refused("groups without values");
}

// The catalogue comes from rank 0, and may be of another directory or version.
TEST_F(QuantizedHuggingFaceReaderTest, CataloguesThatDoNotSayHow) {
  put("model.safetensors", {filled("w", DType::kFloat32, {8, 8}, of_floats(std::vector<float>(64, 2))),
                            filled("w_scale_inv", DType::kFloat32, {2, 2}, of_floats({1, 2, 3, 4}))});
  const auto expect = [&](ErrorCode code, const std::string& text, const std::function<void(Metadata&)>& change) {
    QuantizedHuggingFaceStorageReader reader(directory_.path(), {.block_size = 4});
    Metadata metadata = reader.read_metadata();
    MemoryLoadState state({replica_entry("w", {8, 8})});
    DefaultLoadPlanner planner;
    planner.set_up_planner(state, metadata, true);
    const LoadPlan plan = planner.create_local_plan();
    EXPECT_ERROR(ErrorCode::kFailedPrecondition, "before set_up_storage_reader", reader.read_data(plan, planner, {}));
    change(metadata);
    reader.set_up_storage_reader(metadata);
    EXPECT_ERROR(code, text, reader.read_data(plan, planner, {}));
  };
  const auto with_size = [](const std::string& fqn, const Dims& size) {
    return [=](Metadata& metadata) {
      auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find(fqn));
      tensor.size = size;
      tensor.chunks = {whole_box(size)};
    };
  };
  const char* unknown = "does not say how a tensor is quantized; key w";
  expect(ErrorCode::kCorruptData, unknown, [](Metadata& metadata) {
    metadata.storage_data.find({"w", Dims{0, 0}, {}})->transform_descriptors = {"reshard.dequantize.block/no_dtype"};
  });
  expect(ErrorCode::kCorruptData, unknown, with_size("w_scale_inv", {4}));
  expect(ErrorCode::kCorruptData, unknown, with_size("w_scale_inv", {2, 1}));
  expect(ErrorCode::kInternal, "outside its stored chunk; key w", with_size("w", {4, 4}));
  expect(ErrorCode::kCorruptData, "the catalogue lacks a tensor; key w_scale_inv",
         [](Metadata& metadata) { *metadata.state_dict_metadata.find("w_scale_inv") = BytesStorageMetadata{}; });
  expect(ErrorCode::kUnsupported, "in several chunks; key w_scale_inv", [](Metadata& metadata) {
    auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("w_scale_inv"));
    tensor.chunks.push_back(tensor.chunks[0]);
  });
}

TEST_F(QuantizedHuggingFaceReaderTest, TensorsInSeveralChunks) {
  for (const int64_t row : {0, 2}) {
    write_bytes(directory_ / ("shard" + std::to_string(row) + ".safetensors"),
                safetensors_file({{"w", DType::kFloat8E4M3FN, {2, 2}, 0, 0}}, {{"w", {{row, 0}, Dims{4, 2}}}}));
  }
  put("scales.safetensors", {filled("w_scale_inv", DType::kFloat32, {1, 1}, Bytes(4))});
  expect_refused("stored in several chunks");
}

TEST_F(QuantizedHuggingFaceReaderTest, ThePlainReaderDoesNotTakeItsCatalogue) {
  put("model.safetensors",
      {filled("w", DType::kFloat8E4M3FN, {2, 2}, Bytes(4)), filled("w_scale_inv", DType::kFloat32, {1, 1}, Bytes(4))});
  const Metadata metadata = QuantizedHuggingFaceStorageReader(directory_.path()).read_metadata();
  HuggingFaceStorageReader plain(directory_.path());
  plain.set_up_storage_reader(metadata);
  MemoryLoadState state({replica_entry("w", {2, 2})});
  DefaultLoadPlanner planner;
  planner.set_up_planner(state, metadata, true);
  EXPECT_ERROR(ErrorCode::kUnsupported, "reshard.dequantize.block/float8_e4m3fn",
               plain.read_data(planner.create_local_plan(), planner, {.save_id = {}, .progress = {}}));
}

}  // namespace
}  // namespace reshard
