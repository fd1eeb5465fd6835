// SPDX-License-Identifier: BSD-3-Clause
#include <gtest/gtest.h>

#include "reshard/storage/filesystem.h"
#include "reshard/storage/verify.h"
#include "storage/hostile_checkpoints.h"
#include "support/expect_error.h"

namespace reshard {
namespace {

void load_alone(const std::string& directory) {
  FileSystemReader reader(directory);
  const Metadata metadata = reader.read_metadata();
  MemoryLoadState state(GoodCheckpoint::entries());
  DefaultLoadPlanner planner;
  reader.set_up_storage_reader(metadata);
  planner.set_up_planner(state, metadata, true);
  reader.read_data(planner.create_local_plan(), planner, {});
  EXPECT_EQ(state.first_difference(), "");
}

class HostileCheckpointTest : public testing::TestWithParam<HostileCheckpoint> {};

TEST_P(HostileCheckpointTest, IsRefused) {
  const HostileCheckpoint& hostile = GetParam();
  const GoodCheckpoint checkpoint;
  load_alone(checkpoint.path());
  ASSERT_TRUE(verify_checkpoint(checkpoint.path()).problems.empty());
  ASSERT_NO_FATAL_FAILURE(hostile.damage(checkpoint));

  if (hostile.seen_by == SeenBy::kCatalogue) {
    EXPECT_ERROR(hostile.code, hostile.text, FileSystemReader(checkpoint.path()).read_metadata());
    EXPECT_ERROR(hostile.code, hostile.text, verify_checkpoint(checkpoint.path()));
    return;
  }
  if (hostile.seen_by == SeenBy::kLoad) {
    EXPECT_ERROR(hostile.code, hostile.text, load_alone(checkpoint.path()));
  }
  std::string problems;
  bool found = false;
  for (const Error& problem : verify_checkpoint(checkpoint.path()).problems) {
    problems += std::string(problem.what()) + "\n";
    found |= problem.code() == hostile.code && std::string_view(problem.what()).find(hostile.text) != std::string::npos;
  }
  EXPECT_TRUE(found) << "wanted '" << hostile.text << "' in:\n" << problems;
}

INSTANTIATE_TEST_SUITE_P(All, HostileCheckpointTest, testing::ValuesIn(hostile_checkpoints()),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace reshard
