// SPDX-License-Identifier: BSD-3-Clause
#include <gtest/gtest.h>

#include <map>

#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/oracle.h"
#include "support/random_tiling.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

std::map<std::string, std::string> digests_of(const std::string& directory, uint64_t block_bytes = 64 << 20) {
  std::map<std::string, std::string> digests;
  digest_tensors(
      directory, [&](const std::string& fqn, const Sha256Digest& digest) { digests[fqn] = to_hex(digest); },
      local_file_system(), block_bytes);
  return digests;
}

// Every tensor that any release of PyTorch saved: transposed, expanded, conjugated, of every dtype, in any chunks.
TEST(DigestTest, OfEveryGoldenCheckpointIsThatOfItsTensors) {
  size_t tensors = 0;
  for (const std::string& name : OracleCase::names()) {
    const OracleCase oracle(name);
    std::map<std::string, std::string> expected;
    for (const auto& item : oracle.expected().at("tensors").items()) {
      expected[item.key()] = to_hex(Sha256::of(oracle.tensor(item.key())));
    }
    tensors += expected.size();
    EXPECT_EQ(digests_of(oracle.directory().string()), expected) << name;
    EXPECT_EQ(digests_of(oracle.directory().string(), 24), expected) << name << " in blocks of 24 bytes";
  }
  EXPECT_GT(tensors, 400u);
}

TEST(DigestTest, DoesNotDependOnShardingOrBlocks) {
  TemporaryDirectory directory;
  Random random(7);
  const Dims shape{9, 7, 5};
  const auto whole = to_hex(Sha256::of(pattern_of("t", shape, whole_box(shape), 4)));
  for (int round = 0; round < 10; ++round) {
    std::vector<std::vector<Box>> boxes(2);
    for (const Box& box : random_tiling(random, shape)) boxes[static_cast<size_t>(random() % 2)].push_back(box);
    save_checkpoint(directory.path(), sharded<MemorySaveState>("t", shape, boxes));
    for (const uint64_t block : {1ull, 100ull, 1ull << 20}) {
      EXPECT_EQ(digests_of(directory.path(), block).at("t"), whole);
    }
  }
}

TEST(DigestTest, ThrowsAtATensorThatCannotBeReadWhole) {
  TemporaryDirectory directory;
  save_checkpoint(directory.path(), states<MemorySaveState>({{replica_entry("t", {100})}}));
  std::filesystem::resize_file(directory / "__0_0.distcp", 700);
  EXPECT_ERROR(ErrorCode::kCorruptData, "key t", digests_of(directory.path()));
}

}  // namespace
}  // namespace reshard
