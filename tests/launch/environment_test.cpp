// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/environment.h"

#include <gmock/gmock.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <string>

#include "reshard/core/error.h"
#include "reshard/launch/gpu.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;

class EnvironmentTest : public ::testing::Test {
 protected:
  void SetUp() override { clear(); }
  void TearDown() override { clear(); }

  static void clear() {
    for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                             "TORCHELASTIC_USE_AGENT_STORE", kMasterListenFdVariable, "RESHARD_TEST_GPU_COUNT"}) {
      unsetenv(name);
    }
  }
  static void set(const std::map<std::string, std::string>& variables) {
    for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  }
  static void set_complete() {
    set({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}});
  }
  static std::string error() {
    try {
      read_rank_environment();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      return e.what();
    }
    return "no error";
  }
};

TEST_F(EnvironmentTest, NothingSetIsAProcessAlone) {
  EXPECT_EQ(read_rank_environment(), std::nullopt);
  set({{"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  EXPECT_EQ(read_rank_environment(), std::nullopt);
}

TEST_F(EnvironmentTest, ReadsWhatTorchrunSets) {
  set_complete();
  set({{"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  const auto env = read_rank_environment();
  ASSERT_TRUE(env.has_value());
  EXPECT_EQ(env->rank, 5);
  EXPECT_EQ(env->world_size, 8);
  EXPECT_EQ(env->local_rank, 1);
  EXPECT_EQ(env->local_world_size, 4);
  EXPECT_EQ(env->master_addr, "host");
  EXPECT_EQ(env->master_port, 29500);
  EXPECT_TRUE(env->agent_store);
  EXPECT_EQ(env->master_listen_fd, std::nullopt);
}

TEST_F(EnvironmentTest, WithoutLocalRanksEverybodyIsOnThisHost) {
  set_complete();
  EXPECT_EQ(read_rank_environment()->local_rank, 5);
  EXPECT_EQ(read_rank_environment()->local_world_size, 8);
  EXPECT_FALSE(read_rank_environment()->agent_store);
}

TEST_F(EnvironmentTest, NamesEachMissingVariable) {
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    set_complete();
    unsetenv(name);
    EXPECT_THAT(error(), HasSubstr("environment variable " + std::string(name)));
    EXPECT_THAT(error(), HasSubstr("not set"));
  }
}

TEST_F(EnvironmentTest, NamesEachWrongValue) {
  const std::map<std::string, std::vector<std::string>> wrong = {
      {"RANK", {"8", "-1", "two", "", "1.5", "99999999999999999999"}},
      {"WORLD_SIZE", {"0", "-8", "many", " 8", "5"}},
      {"LOCAL_RANK", {"8", "x"}},
      {"LOCAL_WORLD_SIZE", {"0", "9"}},
      {"MASTER_ADDR", {""}},
      {"MASTER_PORT", {"0", "65536", "port"}},
      {"TORCHELASTIC_USE_AGENT_STORE", {"perhaps"}},
      {kMasterListenFdVariable, {"-1", "x"}},
  };
  for (const auto& [name, values] : wrong) {
    for (const std::string& value : values) {
      clear();
      set_complete();
      set({{name, value}});
      // With 5 ranks it is rank 5 that is out of range.
      EXPECT_THAT(error(), HasSubstr("environment variable " + (value == "5" ? "RANK" : name)));
      EXPECT_THAT(error(), HasSubstr('"' + value + '"'));
    }
  }
}

TEST_F(EnvironmentTest, TakesAListeningSocketOnRankZeroOnly) {
  set_complete();
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_GE(fd, 0);
  set({{kMasterListenFdVariable, std::to_string(fd)}, {"RANK", "0"}});
  EXPECT_THAT(error(), HasSubstr("a listening socket"));  // not yet
  ASSERT_EQ(listen(fd, 1), 0);
  EXPECT_EQ(read_rank_environment()->master_listen_fd, fd);
  set({{"RANK", "1"}});
  EXPECT_THAT(error(), HasSubstr("on rank 0 only"));
  close(fd);
}

TEST_F(EnvironmentTest, GpuCountCanBeMadeUp) {
  set({{"RESHARD_TEST_GPU_COUNT", "3"}});
  EXPECT_EQ(nvidia_gpu_count(), 3);
  set({{"RESHARD_TEST_GPU_COUNT", "a few"}});
  EXPECT_THROW(nvidia_gpu_count(), Error);
  clear();
  EXPECT_GE(nvidia_gpu_count(), 0);
}

}  // namespace
}  // namespace reshard
