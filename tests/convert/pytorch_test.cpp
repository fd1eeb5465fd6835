// SPDX-License-Identifier: BSD-3-Clause
// PyTorch judges what the format tools make, and makes what they read.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "reshard/convert/format_utils.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/torch_save_reader.h"
#include "support/expect_error.h"
#include "support/oracle.h"
#include "support/run_python.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

class FormatUtilsPyTorchTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  }
  TemporaryDirectory directory_;
};

TEST_F(FormatUtilsPyTorchTest, GoldenCheckpointsBecomeFilesThatTorchLoads) {
  std::string arguments = "pytorch.py from_dcp";
  int number = 0;
  for (const std::string& name : OracleCase::names()) {
    const std::string golden = OracleCase(name).directory().string();
    const std::string file = directory_ / (std::to_string(number++) + ".pt");
    dcp_to_torch_save(golden, file, {.block_bytes = 100, .sync_files = false});
    arguments += " '" + golden + "' '" + file + "'";
  }
  expect_python_succeeds(arguments);
}

TEST_F(FormatUtilsPyTorchTest, WhatTorchSavedBecomesACheckpointAndAFileAgain) {
  const std::string file = directory_ / "everything.pt";
  expect_python_succeeds("pytorch.py make '" + file + "'");
  torch_save_to_dcp(file, directory_ / "one", {.block_bytes = 1000});
  TorchSaveReader reader(file);
  write_dcp(CheckpointReader(reader), directory_ / "three", 3);
  dcp_to_torch_save(directory_ / "three", directory_ / "again.pt");
  TorchSaveReader again(directory_ / "again.pt");
  write_dcp(CheckpointReader(again), directory_ / "twice", 2);
  for (const char* name : {"one", "three", "twice"}) {
    expect_python_succeeds("pytorch.py from_torch '" + file + "' '" + directory_ / name + "'");
  }
  expect_python_succeeds("pytorch.py from_dcp '" + directory_ / "three" + "' '" + directory_ / "again.pt" + "'");
}

TEST_F(FormatUtilsPyTorchTest, OtherFilesThatTorchWritesAreReadOrRefusedByName) {
  expect_python_succeeds("pytorch.py kinds '" + directory_.path() + "'");
  const auto metadata = [&](const char* name) { return TorchSaveReader(directory_ / name).read_metadata(); };
  for (const char* name : {"protocol4.pt", "no_crc.pt", "aligned.pt"}) {
    TorchSaveReader reader(directory_ / name);
    const CheckpointReader checkpoint(reader);
    std::vector<float> values(6);
    checkpoint.read_box("w", whole_box({6}), std::as_writable_bytes(std::span(values)));
    EXPECT_THAT(values, testing::ElementsAre(0, 1, 2, 3, 4, 5)) << name;
  }
  EXPECT_ERROR(ErrorCode::kUnsupported, "the format of torch before 1.6", metadata("legacy.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "does not hold a state dict", metadata("tensor.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "_rebuild_sparse_tensor is not read; key a.s", metadata("sparse.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "_rebuild_qtensor is not read; key q", metadata("quantized.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "_rebuild_meta_tensor_no_storage is not read; key m", metadata("meta.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "_rebuild_nested_tensor is not read; key n", metadata("nested.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "found torch.nn.modules.linear.Linear", metadata("module.pt"));
  EXPECT_ERROR(ErrorCode::kUnsupported, "is compressed", metadata("script.pt"));
}

}  // namespace
}  // namespace reshard
