// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/convert/format_utils.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "reshard/convert/open_checkpoint.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/torch_save_reader.h"
#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"
#include "support/torch_files.h"

namespace reshard {
namespace {

using pickle::Tree;
using pickle::Value;
using testing::ElementsAre;
using testing::IsEmpty;

std::map<std::string, std::string> digests(StorageReader& reader) {
  std::map<std::string, std::string> result;
  digest_tensors(CheckpointReader(reader),
                 [&](const std::string& fqn, const Sha256Digest& sum) { result[fqn] = to_hex(sum); });
  return result;
}
std::vector<std::string> names_in(const std::string& directory) { return local_file_system().list(directory); }

class FormatUtilsTest : public testing::Test {
 protected:
  /// A file with views, a tie, a tuple of tensors and values.
  void write_file(const std::string& path) {
    TorchFile file;
    const size_t s = file.storage(counting(60));
    const Value shared = file.view(s, 0, {10, 6}, {6, 1});
    file.write(
        path,
        file.dict({{"model", file.ordered_dict({{"w", shared},
                                                {"t", file.view(s, 0, {6, 10}, {1, 6})},
                                                {"tied", shared},
                                                {"empty", file.tensor(DType::kInt64, {0, 2}, {})}})},
                   {"pair", file.tree.tuple({file.tensor(DType::kFloat32, {3}, counting(3, 100)), Tree::real(0.5)})},
                   {"layers", file.tree.list({file.dict({{"x", Tree::integer(1)}}), shared})},
                   {"step", Tree::integer(7)}}));
  }
  TemporaryDirectory directory_;
};

TEST_F(FormatUtilsTest, ThereAndBackAgain) {
  write_file(directory_ / "a.pt");
  TorchSaveReader original(directory_ / "a.pt");
  const auto wanted = digests(original);
  ASSERT_EQ(wanted.size(), 5u);
  for (const int ranks : {1, 2, 7}) {
    for (const uint64_t block : {uint64_t{1}, uint64_t{48}, uint64_t{64} << 20}) {
      const TemporaryDirectory out;
      const ConvertOptions options{.block_bytes = block, .sync_files = false};
      TorchSaveReader reader(directory_ / "a.pt");
      const SaveResult saved = write_dcp(CheckpointReader(reader), out / "dcp", ranks, options);
      EXPECT_GE(saved.items, 5u);
      EXPECT_THAT(verify_checkpoint(out / "dcp").problems, IsEmpty());
      FileSystemReader dcp(out / "dcp");
      EXPECT_EQ(digests(dcp), wanted);
      EXPECT_EQ(CheckpointReader(dcp).tied_to("layers.1"), "model.w");
      dcp_to_torch_save(out / "dcp", out / "b.pt", options);
      TorchSaveReader back(out / "b.pt");
      EXPECT_EQ(digests(back), wanted);
      const CheckpointReader checkpoint(back);
      EXPECT_EQ(checkpoint.tied_to("layers.1"), "model.w");
      EXPECT_EQ(checkpoint.tied_to("model.t"), "model.t");
      EXPECT_EQ(checkpoint.metadata().planner_data, original.read_metadata().planner_data);
      const Bytes pair = checkpoint.read_value("pair");
      const ValueArchive archive = decode_value_archive(MemorySource(pair));
      const auto item = archive.as_tensor(archive.root().items()[0]);
      const Bytes elements = counting(3, 100);
      EXPECT_TRUE(std::ranges::equal(ByteSpan(pair).subspan(item->payload_offset, item->payload_size), elements));
    }
  }
}

TEST_F(FormatUtilsTest, ARankHasItsRowsInItsFile) {
  write_file(directory_ / "a.pt");
  TorchSaveReader reader(directory_ / "a.pt");
  write_dcp(CheckpointReader(reader), directory_ / "dcp", 4);
  const Metadata metadata = FileSystemReader(directory_ / "dcp").read_metadata();
  EXPECT_THAT(std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("model.w")).chunks,
              ElementsAre(Box{{0, 0}, {3, 6}}, Box{{3, 0}, {3, 6}}, Box{{6, 0}, {3, 6}}, Box{{9, 0}, {1, 6}}));
  EXPECT_EQ(metadata.storage_data.find({"model.w", Dims{6, 0}, {}})->relative_path, "__2_0.distcp");
  EXPECT_EQ(metadata.sidecars->size(), 4u);
}

TEST_F(FormatUtilsTest, ZipsOfGoldenCheckpointsVerify) {
  for (const char* name : {"nested", "dtypes", "fsdp_uneven_3", "dtensor2d_4", "replicated_2"}) {
    for (const char* release : {"2.1.2", "2.14.1"}) {
      const std::string golden = std::string(RESHARD_TEST_DATA) + "/oracle/" + release + "/" + name;
      const std::string file = directory_ / "golden.pt";
      dcp_to_torch_save(golden, file);
      const Bytes bytes = local_file_system().read_file(file, uint64_t{1} << 30);
      EXPECT_EQ(verify_archive(MemorySource(bytes)).without_crc, 0u);
      const ValueArchive archive = decode_value_archive(MemorySource(bytes));
      for (int i = 0; const auto storage = archive.storage(std::to_string(i)); ++i) EXPECT_EQ(storage->offset % 64, 0u);
      FileSystemReader from(golden);
      TorchSaveReader to(file);
      EXPECT_EQ(digests(to), digests(from)) << golden;
    }
  }
}

TEST_F(FormatUtilsTest, TheKindIsThatOfTheContent) {
  write_file(directory_ / "a.bin");
  torch_save_to_dcp(directory_ / "a.bin", directory_ / "dcp.pt");
  EXPECT_EQ(detect_checkpoint_kind(directory_ / "a.bin"), CheckpointKind::kTorch);
  EXPECT_EQ(detect_checkpoint_kind(directory_ / "dcp.pt"), CheckpointKind::kDcp);
  const auto a = open_checkpoint(directory_ / "a.bin");
  const auto b = open_checkpoint(directory_ / "dcp.pt");
  EXPECT_EQ(digests(*a), digests(*b));
  std::filesystem::create_symlink("dcp.pt", directory_ / "link");
  EXPECT_EQ(detect_checkpoint_kind(directory_ / "link"), CheckpointKind::kDcp);
  EXPECT_ERROR(ErrorCode::kNotFound, "there is no such checkpoint", detect_checkpoint_kind(directory_ / "nothing"));
  std::ofstream(directory_ / "text") << "hello";
  std::ofstream(directory_ / "empty");
  for (const char* name : {"text", "empty"}) {
    EXPECT_ERROR(ErrorCode::kUnsupported, "no checkpoint of a kind that is known here",
                 open_checkpoint(directory_ / name));
  }
}

TEST_F(FormatUtilsTest, WhatIsThereIsReplacedOnlyIfAllowed) {
  write_file(directory_ / "a.pt");
  torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp");
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "overwriting is off",
               torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp", {.overwrite = false}));
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "overwriting is off",
               dcp_to_torch_save(directory_ / "dcp", directory_ / "a.pt", {.overwrite = false}));
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "only a file is replaced by a file",
               dcp_to_torch_save(directory_ / "dcp", directory_ / "dcp"));
  EXPECT_ERROR(ErrorCode::kAlreadyExists, "", torch_save_to_dcp(directory_ / "a.pt", directory_ / "a.pt"));
  torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp");
  dcp_to_torch_save(directory_ / "dcp", directory_ / "a.pt");
  TorchSaveReader reader(directory_ / "a.pt");
  EXPECT_EQ(digests(reader).size(), 5u);
}

// What is not readable is found before a byte is written; nothing new is left when the progress function throws half-way.
TEST_F(FormatUtilsTest, NothingIsLeftOfAConversionThatFails) {
  write_file(directory_ / "a.pt");
  torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp");
  const auto before = names_in(directory_.path());
  const auto stop = [](const Progress& progress) {
    if (progress.done > 100) throw Error(ErrorCode::kFailedPrecondition, "stopped");
  };
  const ConvertOptions stopped{.block_bytes = 64, .progress = stop};
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "stopped",
               dcp_to_torch_save(directory_ / "dcp", directory_ / "b.pt", stopped));
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "stopped",
               torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp2", stopped));
  TorchSaveReader reader(directory_ / "a.pt");
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "stopped",
               write_dcp(CheckpointReader(reader), directory_ / "dcp3", 3, stopped));
  EXPECT_EQ(names_in(directory_.path()), before);
  // What was there before is as it was.
  const auto files = names_in(directory_ / "dcp");
  EXPECT_ERROR(ErrorCode::kFailedPrecondition, "stopped",
               torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp", stopped));
  EXPECT_EQ(names_in(directory_ / "dcp"), files);
  EXPECT_THAT(verify_checkpoint(directory_ / "dcp").problems, IsEmpty());
  // An element that is broken in the source.
  Bytes bytes = read_test_file(directory_ / "dcp/__0_0.distcp");
  const Metadata metadata = FileSystemReader(directory_ / "dcp").read_metadata();
  bytes.at(metadata.storage_data.find({"model.w", Dims{0, 0}, {}})->offset + 750) ^= std::byte{1};
  std::ofstream(directory_ / "dcp/__0_0.distcp", std::ios::binary) << as_text(bytes);
  EXPECT_ERROR(ErrorCode::kCorruptData, "checksum", dcp_to_torch_save(directory_ / "dcp", directory_ / "b.pt"));
  FileSystemReader broken(directory_ / "dcp");
  EXPECT_ERROR(ErrorCode::kCorruptData, "checksum", write_dcp(CheckpointReader(broken), directory_ / "dcp4", 2));
  EXPECT_EQ(names_in(directory_.path()), before);
}

// PyTorch's checkpoints have a sum for each record and none for its parts: a conversion in parts would give a broken element
// fresh checksums.
TEST_F(FormatUtilsTest, ABrokenElementOfPyTorchsIsNotPassedOn) {
  const std::string broken = directory_ / "broken";
  std::filesystem::copy(std::string(RESHARD_TEST_DATA) + "/oracle/2.14.1/fsdp_linear_2", broken);
  const Metadata metadata = FileSystemReader(broken).read_metadata();
  const StorageInfo place = *metadata.storage_data.find({"model.weight", Dims{4, 0}, {}});
  Bytes bytes = read_test_file(broken + "/" + place.relative_path.str());
  bytes.at(place.offset + 704) ^= std::byte{1};
  std::ofstream(broken + "/" + place.relative_path.str(), std::ios::binary) << as_text(bytes);
  const ConvertOptions parts{.block_bytes = 16};
  EXPECT_ERROR(ErrorCode::kCorruptData, "CRC-32", dcp_to_torch_save(broken, directory_ / "a.pt", parts));
  EXPECT_ERROR(ErrorCode::kCorruptData, "CRC-32",
               convert_checkpoint(broken, directory_ / "dcp", CheckpointKind::kDcp, 3, parts));
  EXPECT_THAT(names_in(directory_.path()), ElementsAre("broken"));
  dcp_to_torch_save(broken, directory_ / "a.pt", {.block_bytes = 16, .verify_source = false});
}

TEST_F(FormatUtilsTest, EveryCallThatFailsLeavesTheOldFile) {
  write_file(directory_ / "a.pt");
  torch_save_to_dcp(directory_ / "a.pt", directory_ / "dcp");
  dcp_to_torch_save(directory_ / "dcp", directory_ / "out.pt");
  const Bytes old = read_test_file(directory_ / "out.pt");
  const auto names = names_in(directory_.path());
  size_t failures = 0;
  for (uint64_t call = 1;; ++call) {
    FaultFileSystem faulty;
    faulty.inject({.nth = call});
    try {
      dcp_to_torch_save(directory_ / "dcp", directory_ / "out.pt", {.block_bytes = 64}, faulty);
      break;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo) << error.what();
      ++failures;
    }
    EXPECT_EQ(read_test_file(directory_ / "out.pt"), old);
  }
  EXPECT_GT(failures, 20u);
  EXPECT_EQ(names_in(directory_.path()), names);
}

TEST_F(FormatUtilsTest, NumbersOfRanksThatMakeNoSense) {
  write_file(directory_ / "a.pt");
  TorchSaveReader reader(directory_ / "a.pt");
  const CheckpointReader checkpoint(reader);
  for (const int ranks : {0, -1, 4097}) {
    EXPECT_ERROR(ErrorCode::kInvalidArgument, "number of ranks", write_dcp(checkpoint, directory_ / "dcp", ranks));
  }
}

}  // namespace
}  // namespace reshard
