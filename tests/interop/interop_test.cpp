// SPDX-License-Identifier: BSD-3-Clause
// PyTorch reads what this library writes, and this library reads what PyTorch writes, 1 to 4 ranks on either side.
#include <ATen/ops/arange.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/format/sha256.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

using nlohmann::json;

std::string sha256(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return to_hex(Sha256::of({static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()}));
}

/// Runs a script of this folder with PyTorch's Python; the ranks that it starts are its own.
void run_python(const std::string& arguments) {
  const std::string command =
      "env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u LOCAL_WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT -u "
      "RESHARD_MASTER_LISTEN_FD '" +
      std::string(RESHARD_PYTHON) + "' '" + RESHARD_INTEROP_DIR + "'/" + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  for (char buffer[4096]; const size_t n = fread(buffer, 1, sizeof buffer, pipe);) output.append(buffer, n);
  const int status = pclose(pipe);
  ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << command << "\n" << output;
}

/// Every dtype that PyTorch's checkpoints hold; the packed and quantized ones have no tensors that can be saved.
std::vector<at::ScalarType> all_dtypes() {
  using S = at::ScalarType;
  return {S::Float,
          S::Double,
          S::Half,
          S::BFloat16,
          S::Char,
          S::Short,
          S::Int,
          S::Long,
          S::Byte,
          S::UInt16,
          S::UInt32,
          S::UInt64,
          S::Bool,
          S::ComplexHalf,
          S::ComplexFloat,
          S::ComplexDouble,
          S::Float8_e4m3fn,
          S::Float8_e5m2,
          S::Float8_e4m3fnuz,
          S::Float8_e5m2fnuz,
          S::Float8_e8m0fnu,
          S::Float4_e2m1fn_x2,
          S::BComplex32};
}

/// A tensor whose bytes count up, equal on every rank.
at::Tensor pattern(at::IntArrayRef sizes, at::ScalarType dtype, int seed) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (int64_t n : sizes) bytes *= n;
  const at::Tensor raw = ((at::arange(bytes) * 7 + seed).remainder(dtype == at::kBool ? 2 : 251)).to(at::kByte);
  at::Tensor result = at::empty(sizes, dtype);
  std::memcpy(result.mutable_data_ptr(), raw.const_data_ptr(), static_cast<size_t>(bytes));
  return result;
}

at::Tensor narrow_to(at::Tensor tensor, const Box& box) {
  for (size_t d = 0; d < box.sizes.size(); ++d)
    tensor = tensor.narrow(static_cast<int64_t>(d), box.offsets[d], box.sizes[d]);
  return tensor;
}

ShardedTensor shard_of(const at::Tensor& whole, const std::vector<Box>& boxes) {
  std::vector<LocalShard> shards;
  for (const Box& box : boxes) shards.push_back({box, narrow_to(whole, box)});
  return ShardedTensor(to_dims(whole.sizes()), whole.scalar_type(), std::move(shards));
}

class Interop : public TorchDistributedTest {
 protected:
  void set_up_rank() override {
    TorchDistributedTest::set_up_rank();
    if (!std::filesystem::exists(RESHARD_PYTHON)) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  }

  /// Every dtype, whole and cut in all ways; PyTorch must find each tensor's bytes.
  void write_and_let_pytorch_read() {
    const auto world = process_group();
    const int n = world->size();
    json wanted;
    StateDict plain, rows, columns, flat, nested;
    int seed = 0;
    for (const at::ScalarType dtype : all_dtypes()) {
      const std::string name(to_string(to_dtype(dtype)));
      const at::Tensor whole = pattern({5, 3, 2}, dtype, ++seed);
      const Box box = whole_box({5, 3, 2});
      plain[name] = whole;
      rows[name] =
          shard_of(whole, {split_evenly(box, 0, n, rank())});  // 5 rows: uneven, and empty on the last of 4 ranks
      columns[name] = shard_of(whole, {split_evenly(box, 1, n, rank())});  // not contiguous in memory
      flat[name] = shard_of(whole, flat_range_to_boxes({5, 3, 2}, rank() * 30 / n, (rank() + 1) * 30 / n));
      for (const char* group : {"plain.", "rows.", "columns.", "flat."}) wanted[group + name] = sha256(whole);
    }
    const at::Tensor one = pattern({1, 4}, at::kFloat, 99);
    rows["tiny"] = shard_of(one, {split_evenly(whole_box({1, 4}), 0, n, rank())});
    wanted["rows.tiny"] = sha256(one);
    plain["scalar"] = pattern({}, at::kFloat, 5);
    wanted["plain.scalar"] = sha256(pattern({}, at::kFloat, 5));
    plain["empty"] = at::empty({0, 3});
    wanted["plain.empty"] = sha256(at::empty({0, 3}));
    plain["transposed"] = pattern({3, 4}, at::kFloat, 6).t();
    wanted["plain.transposed"] = sha256(pattern({3, 4}, at::kFloat, 6).t());
    const at::Tensor in_list = pattern({3}, at::kLong, 8);
    wanted["list.1.deep"] = sha256(in_list);

    const StateDict values{{"int", 7},
                           {"big", int64_t{1} << 40},
                           {"float", 0.1},
                           {"text", "h\xC3\xA9llo"},
                           {"none", None{}},
                           {"flag", true},
                           {"list", StateList{1, 2.5, "x"}},
                           {"tuple", StateTuple{{0.9, 0.999}}},
                           {"raw", ByteString{std::string("\x00\xFF", 2)}}};
    const StateDict state{{"plain", plain}, {"rows", rows},     {"columns", columns},
                          {"flat", flat},   {"values", values}, {"list", StateList{1, StateDict{{"deep", in_list}}}}};
    const std::string directory = (temp_dir() / "checkpoint").string();
    save(state, FileSystemWriter(directory));
    if (rank() == 0) {
      const std::string expected = (temp_dir() / "expected.json").string();
      std::ofstream(expected) << wanted.dump();
      run_python("judge.py whole '" + directory + "' --digest '" + expected + "'");
      run_python("judge.py values '" + directory + "'");
    }
    world->barrier();
  }

  /// PyTorch writes on `writers` ranks; every rank here loads everything whole, and its own rows.
  void let_pytorch_write_and_read(int writers) {
    const auto world = process_group();
    const std::string directory = (temp_dir() / "checkpoint").string();
    const std::string expected_file = (temp_dir() / "expected.json").string();
    if (rank() == 0)
      run_python("write.py '" + directory + "' --ranks " + std::to_string(writers) + " --expected '" + expected_file +
                 "'");
    world->barrier();
    const json expected = json::parse(std::ifstream(expected_file));
    ASSERT_GT(expected.at("tensors").size(), 40u);

    FileSystemReader catalogue(directory);
    const Metadata metadata = catalogue.read_metadata();
    StateDict wholes, parts;
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
      const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
      if (tensor == nullptr) {
        wholes[fqn] = None{};
        continue;
      }
      const at::IntArrayRef sizes(tensor->size.data(), tensor->size.size());
      const at::ScalarType dtype = to_scalar_type(tensor->properties.dtype);
      wholes[fqn] = at::empty(sizes, dtype);
      if (sizes.empty()) continue;
      const Box mine = split_evenly(whole_box(tensor->size), 0, world->size(), rank());
      parts[fqn] = ShardedTensor(tensor->size, dtype,
                                 {{mine, at::empty(at::IntArrayRef(mine.sizes.data(), mine.sizes.size()), dtype)}});
    }
    load(wholes, FileSystemReader(directory));
    load(parts, FileSystemReader(directory));
    for (const auto& [fqn, digest] : expected.at("tensors").items()) {
      EXPECT_EQ(sha256(wholes.at(fqn).as<at::Tensor>()), digest.get<std::string>()) << fqn;
    }
    for (const auto& [fqn, part] : parts.items()) {
      const LocalShard& shard = part.as<ShardedTensor>().shards()[0];
      EXPECT_EQ(sha256(shard.tensor), sha256(narrow_to(wholes.at(fqn).as<at::Tensor>(), shard.box))) << fqn;
    }
    EXPECT_EQ(wholes.at("values.int").as<int64_t>(), 7);
    EXPECT_EQ(wholes.at("values.big").as<int64_t>(), int64_t{1} << 40);
    EXPECT_EQ(wholes.at("values.float").as<double>(), 0.1);
    EXPECT_EQ(wholes.at("values.text").as<std::string>(), "h\xC3\xA9llo");
    EXPECT_TRUE(wholes.at("values.none").is<None>());
    EXPECT_TRUE(wholes.at("values.flag").as<bool>());
    EXPECT_EQ(wholes.at("values.list").as<StateList>()[1].as<double>(), 2.5);
    EXPECT_EQ(wholes.at("nested.1.deep.n").as<int64_t>(), 5);
    world->barrier();
  }
};

constexpr auto kDeadline = std::chrono::seconds(180);

RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatOneRankWrites, .ranks = 1, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatTwoRanksWrite, .ranks = 2, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatThreeRanksWrite, .ranks = 3, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatFourRanksWrite, .ranks = 4, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}

RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, FourRanksReadWhatPyTorchWritesOnOne, .ranks = 4,
                           .deadline = kDeadline) {
  let_pytorch_write_and_read(1);
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, ThreeRanksReadWhatPyTorchWritesOnTwo, .ranks = 3,
                           .deadline = kDeadline) {
  let_pytorch_write_and_read(2);
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, TwoRanksReadWhatPyTorchWritesOnThree, .ranks = 2,
                           .deadline = kDeadline) {
  let_pytorch_write_and_read(3);
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, OneRankReadsWhatPyTorchWritesOnFour, .ranks = 1,
                           .deadline = kDeadline) {
  let_pytorch_write_and_read(4);
}

}  // namespace
}  // namespace reshard
