// SPDX-License-Identifier: BSD-3-Clause
// What a caller can get wrong and what can have happened to the files, one case each: the code and the text that arrive from save and load.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/torch_archive.h"
#include "support/fault_file_system.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

void write_file(const std::string& path, ByteSpan bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
}

/// A checkpoint of one process: tensors "a" and "b" and a value "v" in __0_0.distcp.
class BadInputTest : public ::testing::Test {
 protected:
  BadInputTest() { save(saved_, FileSystemWriter(directory_.path())); }

  /// Loading must fail on this process with this code, and with all of these pieces in its text.
  void expect_load_error(ErrorCode code, const std::vector<std::string>& pieces, StateDict target,
                         const std::string& directory) {
    try {
      load(target, FileSystemReader(directory));
    } catch (const CheckpointError& error) {
      EXPECT_EQ(to_string(error.code()), to_string(code)) << error.what();
      EXPECT_EQ(error.failures().size(), 1u);
      EXPECT_EQ(error.failures().at(0).code, code);
      for (const std::string& piece : pieces) EXPECT_THAT(error.what(), HasSubstr(piece));
      return;
    }
    ADD_FAILURE() << "no error";
  }
  void expect_load_error(ErrorCode code, const std::vector<std::string>& pieces) {
    expect_load_error(code, pieces, StateDict{{"a", at::zeros({4, 2})}}, directory_.path());
  }
  void expect_save_error(ErrorCode code, const std::vector<std::string>& pieces, const StateDict& state,
                         FileSystem& files = local_file_system()) {
    try {
      save(state, FileSystemWriter(directory_.path(), {}, files));
    } catch (const CheckpointError& error) {
      EXPECT_EQ(to_string(error.code()), to_string(code)) << error.what();
      EXPECT_EQ(error.committed(), Committed::kNo);
      for (const std::string& piece : pieces) EXPECT_THAT(error.what(), HasSubstr(piece));
      expect_old_checkpoint();
      return;
    }
    ADD_FAILURE() << "no error";
  }
  void expect_old_checkpoint() {
    StateDict target{{"a", at::zeros({4, 2})}, {"b", at::zeros({3})}};
    load(target, FileSystemReader(directory_.path()));
    EXPECT_TRUE(target.at("a").as<at::Tensor>().equal(saved_.at("a").as<at::Tensor>()));
    EXPECT_TRUE(target.at("b").as<at::Tensor>().equal(saved_.at("b").as<at::Tensor>()));
  }
  StorageInfo place_of_a() const {
    const Metadata metadata = FileSystemReader(directory_.path()).read_metadata();
    return *metadata.storage_data.find({"a", Dims{0, 0}, {}});
  }

  TemporaryDirectory directory_;
  const std::string catalogue_ = directory_ / ".metadata";
  const std::string data_ = directory_ / "__0_0.distcp";
  const StateDict saved_{{"a", at::arange(8, at::kFloat).view({4, 2})}, {"b", at::ones({3})}, {"v", 1}};
};

TEST_F(BadInputTest, MissingDirectory) {
  const std::string nowhere = directory_ / "nowhere";
  expect_load_error(ErrorCode::kNotFound, {"there is no such checkpoint directory", "file " + nowhere},
                    StateDict{{"a", at::zeros({4, 2})}}, nowhere);
}

TEST_F(BadInputTest, DirectoryWithoutACatalogue) {
  fs::remove(catalogue_);
  expect_load_error(ErrorCode::kNotFound, {"holds no checkpoint", directory_.path()});
}

TEST_F(BadInputTest, TruncatedCatalogue) {
  fs::resize_file(catalogue_, fs::file_size(catalogue_) / 2);
  expect_load_error(ErrorCode::kCorruptData, {"pickle", "file " + catalogue_});
  fs::resize_file(catalogue_, 0);
  expect_load_error(ErrorCode::kCorruptData, {"pickle ends too early", "file " + catalogue_});
}

TEST_F(BadInputTest, ForeignCatalogue) {
  write_file(catalogue_, as_bytes("{\"metadata\": {\"total_size\": 12}}"));  // of another format
  expect_load_error(ErrorCode::kCorruptData, {"unknown opcode 123", "file " + catalogue_});
  write_file(catalogue_, pickle::write(pickle::Tree().dict({})));  // a pickle of something else
  expect_load_error(ErrorCode::kCorruptData, {"wanted Metadata, found dict", "file " + catalogue_});
  write_file(catalogue_, encode_value_archive(pickle::Tree::integer(1)));  // torch.save
  expect_load_error(ErrorCode::kUnsupported, {"opcode PERSID", "file " + catalogue_});
}

TEST_F(BadInputTest, MissingKey) {
  expect_load_error(ErrorCode::kNotFound, {"Missing key in checkpoint state_dict: extra."},
                    StateDict{{"a", at::zeros({4, 2})}, {"extra", at::zeros({1})}}, directory_.path());
}

TEST_F(BadInputTest, AnotherShape) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{2, 4}, {8}, {4, 3}, {}}) {
    expect_load_error(ErrorCode::kInvalidArgument, {"Size mismatch between saved [4, 2] and current: ", " for a"},
                      StateDict{{"a", at::zeros(shape)}}, directory_.path());
  }
}

TEST_F(BadInputTest, AnotherShapeIsLeftAloneWhereTheCallerAllowsIt) {
  const at::Tensor larger = at::full({4, 3}, 7);
  StateDict target{{"a", larger}, {"v", 0}};
  const LoadReport report = load(target, FileSystemReader(directory_.path()), {.allow_shape_mismatch = true});
  EXPECT_EQ(report.shape, std::vector<std::string>{"a: [4, 2] -> [4, 3]"});
  EXPECT_TRUE(larger.equal(at::full({4, 3}, 7)));
  EXPECT_EQ(target.at("v").as<int64_t>(), saved_.at("v").as<int64_t>());
}

TEST_F(BadInputTest, AnotherDtypeNamesBoth) {
  expect_load_error(ErrorCode::kInvalidArgument, {"dtype mismatch between saved float32 and current: bfloat16 for a"},
                    StateDict{{"a", at::zeros({4, 2}, at::kBFloat16)}}, directory_.path());
}

TEST_F(BadInputTest, AnotherDtypeIsCastWhereTheCallerAllowsIt) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kDouble, at::kLong, at::kByte, at::kComplexFloat}) {
    // A whole tensor that is not contiguous, and a shard.
    const at::Tensor whole = at::zeros({2, 4}, dtype).t();
    StateDict target{{"a", whole}};
    const LoadReport report = load(target, FileSystemReader(directory_.path()), {.allow_cast = true});
    EXPECT_EQ(report.cast, std::vector<std::string>{"a: float32 -> " + std::string(to_string(to_dtype(dtype)))});
    EXPECT_TRUE(whole.equal(saved_.at("a").as<at::Tensor>().to(dtype)));
    const at::Tensor rows = at::zeros({2, 2}, dtype);
    StateDict shard{{"a", ShardedTensor({4, 2}, dtype, {{{{1, 0}, {2, 2}}, rows}})}};
    load(shard, FileSystemReader(directory_.path()), {.allow_cast = true});
    EXPECT_TRUE(rows.equal(saved_.at("a").as<at::Tensor>().slice(0, 1, 3).to(dtype)));
  }
}

TEST_F(BadInputTest, TensorWhereAValueIsStoredAndTheOtherWayRound) {
  expect_load_error(ErrorCode::kInvalidArgument, {"key a", "wanted a value that is not a tensor, found a tensor"},
                    StateDict{{"a", 1}}, directory_.path());
  expect_load_error(ErrorCode::kInvalidArgument, {"key v", "wanted a tensor, found a value that is not a tensor"},
                    StateDict{{"v", at::zeros({1})}}, directory_.path());
}

TEST_F(BadInputTest, DataFileMissing) {
  fs::remove(data_);
  expect_load_error(ErrorCode::kNotFound, {"cannot open", "key a", "file " + data_});
}

TEST_F(BadInputTest, DataFileShort) {
  fs::resize_file(data_, place_of_a().offset + place_of_a().length - 1);
  expect_load_error(ErrorCode::kCorruptData, {"key a", "file __0_0.distcp"});
  fs::resize_file(data_, 0);
  expect_load_error(ErrorCode::kCorruptData, {"key a", "file __0_0.distcp"});
}

TEST_F(BadInputTest, DataThatDoesNotMatchItsChecksum) {
  Bytes bytes = read_test_file(data_);
  bytes.at(place_of_a().offset + TensorArchive(DType::kFloat32, {4, 2}).payload_offset()) ^= std::byte{1};
  write_file(data_, bytes);
  expect_load_error(ErrorCode::kCorruptData,
                    {"the stored bytes do not match their checksum", "key a", "file __0_0.distcp"});
}

TEST_F(BadInputTest, PathThatLeavesTheDirectory) {
  const std::string outside = directory_.path() + "-outside";
  fs::copy_file(data_, outside);
  const std::string up = "../" + fs::path(outside).filename().string();
  for (const auto& [path, why] : {std::pair{up, "leaves the checkpoint's directory"}, {outside, "is absolute"}}) {
    Metadata metadata = decode_metadata(read_test_file(catalogue_));
    const Bytes good = read_test_file(catalogue_);
    metadata.storage_data.find({"a", Dims{0, 0}, {}})->relative_path = path;
    write_file(catalogue_, encode_metadata(metadata));
    expect_load_error(ErrorCode::kCorruptData, {why, "key a", path, "file " + catalogue_});
    write_file(catalogue_, good);
  }
  fs::remove(outside);
}

TEST_F(BadInputTest, TextThatIsNoText) {
  // Python's str is Unicode; what is not could never be loaded again.
  expect_save_error(ErrorCode::kInvalidArgument, {"no UTF-8", "save it as bytes", "key v"},
                    StateDict{{"v", std::string("\xff\xfe")}});
  expect_save_error(ErrorCode::kInvalidArgument, {"no UTF-8", "key v"},
                    StateDict{{"v", StateTuple{{StateDict{{"\xff", 1}}}}}});
  expect_save_error(ErrorCode::kInvalidArgument, {"the name of a value is no UTF-8"}, StateDict{{"\xff", 1}});
}

TEST_F(BadInputTest, TensorsWithoutDenseElements) {
  const at::Tensor sparse = at::ones({2, 2}).to_sparse();
  const at::Tensor meta = at::empty({2}, at::TensorOptions(at::kMeta));
  for (const auto& [tensor, what] : {std::pair{sparse, "a sparse tensor"},
                                     {meta, "a tensor on the meta device"},
                                     {at::Tensor(), "an undefined tensor"}}) {
    const std::vector<std::string> pieces{"cannot save or load ", what, "key t"};
    expect_save_error(ErrorCode::kUnsupported, pieces, StateDict{{"t", tensor}});
    expect_save_error(ErrorCode::kUnsupported, pieces, StateDict{{"t", StateTuple{{1, tensor}}}});
  }
}

TEST_F(BadInputTest, ShardsThatNobodySupplies) {
  const ShardedTensor hole({4, 2}, at::kFloat,
                           {{{{0, 0}, {1, 2}}, at::ones({1, 2})}, {{{3, 0}, {1, 2}}, at::ones({1, 2})}});
  expect_save_error(ErrorCode::kInvalidArgument, {"no rank supplies the part of a tensor at [1, 0]", "key h"},
                    StateDict{{"h", hole}, {"a", at::zeros({4, 2})}});
  expect_save_error(ErrorCode::kInvalidArgument, {"no rank supplies any part of a tensor", "key h"},
                    StateDict{{"h", ShardedTensor({4, 2}, at::kFloat, {})}, {"a", at::zeros({4, 2})}});
}

TEST_F(BadInputTest, FullDisk) {
  StateDict other{{"a", at::full({4, 2}, 7.0)}, {"b", at::full({3}, 7.0)}};
  FaultFileSystem clean;
  const TemporaryDirectory elsewhere;
  save(other, FileSystemWriter(elsewhere.path(), {}, clean));
  ASSERT_GT(clean.calls(FileCall::kWrite), 2u);  // data, sidecar, catalogue
  for (uint64_t nth = 1; nth <= clean.calls(FileCall::kWrite); ++nth) {
    FaultFileSystem full;
    full.inject({.call = FileCall::kWrite, .nth = nth, .error = ENOSPC, .forever = true});
    expect_save_error(ErrorCode::kIo, {"No space left on device", directory_.path()}, other, full);
  }
}

}  // namespace
}  // namespace reshard
