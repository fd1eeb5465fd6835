// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sidecar.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

void overwrite(const std::string& path, ByteSpan bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(as_text(bytes).data(), static_cast<std::streamsize>(bytes.size()));
}

/// A checkpoint of two ranks with a sharded tensor, a replica and a value.
class VerifyTest : public testing::Test {
 protected:
  void SetUp() override {
    std::vector<MemorySaveState> ranks;
    for (const auto& mine : split({6, 4}, 0, 2)) {
      ranks.push_back(MemorySaveState({tensor_entry("weight", {6, 4}, mine), replica_entry("bias", {5})}));
      ranks.back().add_value("step", value_archive("seven"));
    }
    save_id_ = save_checkpoint(directory_.path(), ranks).save_id;
  }
  std::string path(const std::string& name) const { return directory_ / name; }
  std::string sidecar(int rank) const { return path(sidecar_name(save_id_, rank)); }
  Bytes bytes(const std::string& name) const { return read_test_file(name); }
  VerifyReport verify() const { return verify_checkpoint(directory_.path()); }
  std::string problems() const {
    std::string text;
    try {
      for (const Error& problem : verify().problems) text += std::string(problem.what()) + "\n";
    } catch (const Error& error) {
      text = error.what();  // the catalogue cannot be read
    }
    return text;
  }
  static void put_byte(const std::string& name, uint64_t offset, std::byte byte) {
    std::fstream file(name, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(byte));
  }
  template <class Change>
  void change_metadata(const Change& change) {
    Metadata metadata = decode_metadata(bytes(path(".metadata")));
    change(metadata);
    overwrite(path(".metadata"), encode_metadata(metadata));
  }

  TemporaryDirectory directory_;
  std::string save_id_;
};

TEST_F(VerifyTest, FindsNothingWrongWithASave) {
  const VerifyReport report = verify();
  EXPECT_TRUE(report.problems.empty()) << problems();
  EXPECT_THAT(report.notes, ElementsAre());
  EXPECT_EQ(report.tensors, 2u);
  EXPECT_EQ(report.values, 1u);
  EXPECT_EQ(report.items, 4u);
  EXPECT_EQ(report.files, 2u);
}

TEST_F(VerifyTest, FindsNothingWrongWithPyTorchsCheckpoints) {
  for (const std::string& name : OracleCase::names()) {
    const VerifyReport report = verify_checkpoint(OracleCase(name).directory().string());
    EXPECT_TRUE(report.problems.empty()) << name << ": " << report.problems.front().what();
  }
}

TEST_F(VerifyTest, ReportsProgressItemByItem) {
  std::vector<uint64_t> done;
  const VerifyReport report = verify_checkpoint(directory_.path(), local_file_system(),
                                                [&](const Progress& progress) { done.push_back(progress.done); });
  ASSERT_EQ(done.size(), 4u);
  EXPECT_EQ(done.back(), report.bytes);
}

// Every byte of every file counts: there is none whose change does not matter, not even padding.
TEST_F(VerifyTest, FindsEveryChangedByteOfEveryFile) {
  for (const std::string& name : local_file_system().list(directory_.path())) {
    const Bytes good = bytes(path(name));
    for (size_t i = 0; i < good.size(); ++i) {
      for (const int change : {1 << (i % 8), 1 << ((i + 3) % 8), 0xFF, 0x20}) {
        put_byte(path(name), i, good[i] ^ static_cast<std::byte>(change));
        const std::string found = problems();
        if (found.empty()) ADD_FAILURE() << name << ": byte " << i << " of " << good.size() << " ^ " << change;
        // The file is named, and in a data file the block.
        if (found.find("file ") == std::string::npos) ADD_FAILURE() << name << ": byte " << i << ": " << found;
        if (name.starts_with("__") && found.find("offset ") == std::string::npos) ADD_FAILURE() << i << ": " << found;
      }
      put_byte(path(name), i, good[i]);
    }
    EXPECT_EQ(problems(), "");
  }
}

TEST_F(VerifyTest, NamesTheBlockOfAChangedByteInALargeFile) {
  const TemporaryDirectory directory;
  save_checkpoint(directory.path(), states<MemorySaveState>({{replica_entry("t", {3'000'000})}}));
  const std::string name = directory / "__0_0.distcp";
  const Bytes good = read_test_file(name);
  const uint64_t payload = TensorArchive(DType::kFloat32, {3'000'000}).payload_offset();
  const uint64_t tail = payload + 12'000'000;
  const std::vector<std::pair<uint64_t, uint64_t>> changes{{0, 0},
                                                           {payload - 1, 0},
                                                           {payload, payload},
                                                           {payload + 4095, payload},
                                                           {payload + 9'000'000, payload + 9'000'000 / 4096 * 4096},
                                                           {tail - 1, payload + 12'000'000 / 4096 * 4096},
                                                           {tail, tail},
                                                           {good.size() - 1, tail}};
  for (const auto& [at, block] : changes) {
    put_byte(name, at, good[at] ^ std::byte{4});
    const VerifyReport report = verify_checkpoint(directory.path());
    ASSERT_EQ(report.problems.size(), 1u) << at;
    EXPECT_EQ(report.problems[0].context().offset, block) << report.problems[0].what();
    EXPECT_EQ(report.problems[0].context().key, "t");
    EXPECT_EQ(report.problems[0].context().file, "__0_0.distcp");
    put_byte(name, at, good[at]);
  }
}

TEST_F(VerifyTest, FindsEveryTruncationOfADataFile) {
  const Bytes good = bytes(path("__1_0.distcp"));
  for (size_t size = 0; size < good.size(); size += 13) {
    overwrite(path("__1_0.distcp"), ByteSpan(good).first(size));
    EXPECT_THAT(problems(), HasSubstr("__1_0.distcp")) << size;
  }
}

TEST_F(VerifyTest, NamesAMissingFile) {
  std::filesystem::remove(path("__1_0.distcp"));
  EXPECT_THAT(problems(), HasSubstr("__1_0.distcp"));
}

TEST_F(VerifyTest, NamesAMissingSidecar) {
  std::filesystem::remove(sidecar(1));
  EXPECT_THAT(problems(),
              HasSubstr("the sidecar with the checksums of rank 1 is missing; file " + sidecar_name(save_id_, 1)));
}

TEST_F(VerifyTest, NamesASidecarOfAnotherSave) {
  Sidecar other = decode_sidecar(bytes(sidecar(1)));
  other.save_id = "another-save";
  overwrite(sidecar(1), encode_sidecar(other));
  EXPECT_THAT(problems(), HasSubstr("the sidecar is of another save or rank"));
  EXPECT_THAT(problems(), HasSubstr("found save another-save, rank 1 of 2"));
  overwrite(sidecar(1), bytes(sidecar(0)));
  EXPECT_THAT(problems(), HasSubstr("rank 0 of 2"));
}

// Whole in itself, of the right save and rank, and still not the one that this save wrote.
TEST_F(VerifyTest, NamesASidecarThatTheCatalogueDoesNotSpeakOf) {
  Sidecar stale = decode_sidecar(bytes(sidecar(0)));
  stale.files.at(0).sums.at(0) ^= 1;
  overwrite(sidecar(0), encode_sidecar(stale));
  EXPECT_THAT(problems(),
              HasSubstr("the sidecar is not the one that this save wrote; file " + sidecar_name(save_id_, 0)));
}

TEST_F(VerifyTest, NamesFilesThatSidecarAndCatalogueDoNotShare) {
  const auto forge = [&](const std::function<void(Sidecar&)>& change) {
    Sidecar sidecar_1 = decode_sidecar(bytes(sidecar(1)));
    change(sidecar_1);
    const Bytes forged = encode_sidecar(sidecar_1);
    overwrite(sidecar(1), forged);
    change_metadata([&](Metadata& metadata) { metadata.sidecars->at(1) = sidecar_digest(forged); });
  };
  forge([](Sidecar& sidecar) { sidecar.files.push_back({"__1_5.distcp", 0, {}, {}}); });
  EXPECT_THAT(problems(), HasSubstr("speaks of a file that is not of that rank's save; file __1_5.distcp"));
  forge([](Sidecar& sidecar) { sidecar.files = {sidecar.files[0], sidecar.files[0]}; });
  EXPECT_THAT(problems(), HasSubstr("lists a file twice"));
  forge([](Sidecar& sidecar) { sidecar.files = {}; });
  EXPECT_THAT(problems(), HasSubstr("no sidecar speaks of this file; file __1_0.distcp"));
}

TEST_F(VerifyTest, NamesWhatIsWrongWithTheChunks) {
  change_metadata([](Metadata& metadata) {
    auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("weight"));
    tensor.size = {8, 4};
  });
  EXPECT_THAT(problems(), HasSubstr("no chunk covers [6, 0]"));
  EXPECT_THAT(problems(), HasSubstr("weight"));
}

TEST_F(VerifyTest, NamesATensorThatIsNotTheOneOfTheCatalogue) {
  change_metadata([](Metadata& metadata) {
    std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find("weight")).properties.dtype = DType::kInt32;
  });
  EXPECT_THAT(problems(), HasSubstr("the stored tensor is not the one of the catalogue"));
  EXPECT_THAT(problems(), HasSubstr("wanted int32 [3, 4], found float32 [3, 4]"));
}

TEST_F(VerifyTest, NamesItemsThatOverlap) {
  change_metadata([](Metadata& metadata) {
    StorageInfo weight = *metadata.storage_data.find({"weight", Dims{0, 0}, {}});
    weight.offset += 8;  // the very same place would be that of a tied tensor
    *metadata.storage_data.find({"bias", Dims{0}, {}}) = weight;
  });
  EXPECT_THAT(problems(), HasSubstr("the item overlaps the one before"));
}

TEST_F(VerifyTest, NotesFilesThatAreNotPartOfTheCheckpoint) {
  overwrite(path("notes.txt"), {});
  overwrite(path(sidecar_name("0a0a0a0a-0000-4000-8000-000000000000", 0)), {});
  const VerifyReport report = verify();
  EXPECT_TRUE(report.problems.empty());
  EXPECT_THAT(report.notes, ElementsAre(HasSubstr("sidecar of another save"), "notes.txt: not part of the checkpoint"));
}

// PyTorch keeps our attributes when it rewrites nothing, but a catalogue that it makes has none of them.
TEST_F(VerifyTest, TellsADirectoryThatPyTorchSavedOver) {
  change_metadata([](Metadata& metadata) { metadata.sidecars.reset(); });
  const VerifyReport report = verify();
  EXPECT_TRUE(report.problems.empty());
  EXPECT_THAT(report.notes, ElementsAre(HasSubstr("that PyTorch saved over"), HasSubstr("that PyTorch saved over")));
}

TEST_F(VerifyTest, ThrowsWhereThereIsNoCatalogue) {
  std::filesystem::remove(path(".metadata"));
  EXPECT_ERROR(ErrorCode::kNotFound, "holds no checkpoint", verify());
}

}  // namespace
}  // namespace reshard
