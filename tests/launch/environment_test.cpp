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
    for (const char* name : {"RANK",
                             "WORLD_SIZE",
                             "LOCAL_RANK",
                             "LOCAL_WORLD_SIZE",
                             "MASTER_ADDR",
                             "MASTER_PORT",
                             "TORCHELASTIC_USE_AGENT_STORE",
                             kMasterListenFdVariable,
                             "RESHARD_TEST_GPU_COUNT",
                             "OMPI_COMM_WORLD_RANK",
                             "OMPI_COMM_WORLD_SIZE",
                             "OMPI_COMM_WORLD_LOCAL_RANK",
                             "OMPI_COMM_WORLD_LOCAL_SIZE",
                             "SLURM_PROCID",
                             "SLURM_STEP_NUM_TASKS",
                             "SLURM_LOCALID",
                             "SLURM_NODEID",
                             "SLURM_STEP_TASKS_PER_NODE",
                             "SLURM_STEP_NODELIST",
                             "SLURM_JOB_ID",
                             "SLURM_STEP_ID"}) {
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

TEST_F(EnvironmentTest, ReadsWhatSlurmSets) {
  const std::map<std::string, std::string> step = {{"SLURM_PROCID", "5"},
                                                   {"SLURM_STEP_NUM_TASKS", "7"},
                                                   {"SLURM_LOCALID", "1"},
                                                   {"SLURM_NODEID", "2"},
                                                   {"SLURM_STEP_TASKS_PER_NODE", "2(x3),1"},
                                                   {"SLURM_STEP_NODELIST", "gpu[07-09,12]-ib,m3"},
                                                   {"SLURM_JOB_ID", "1234"},
                                                   {"SLURM_STEP_ID", "3"}};
  set(step);
  const auto env = read_rank_environment();
  ASSERT_TRUE(env.has_value());
  EXPECT_EQ(env->rank, 5);
  EXPECT_EQ(env->world_size, 7);
  EXPECT_EQ(env->local_rank, 1);
  EXPECT_EQ(env->local_world_size, 2);
  EXPECT_EQ(env->master_addr, "gpu07-ib");
  EXPECT_EQ(env->master_port, 15000 + (1234 * 61 + 3) % 15000);
  EXPECT_FALSE(env->agent_store);
  for (const auto& [list, host] : std::map<std::string, std::string>{
           {"n1", "n1"}, {"n1,n2", "n1"}, {"n[1,3]", "n1"}, {"a-b[10-12]", "a-b10"}, {"r[1-2]n[5-6]", "r1n5"}}) {
    set({{"SLURM_STEP_NODELIST", list}});
    EXPECT_EQ(read_rank_environment()->master_addr, host) << list;
  }
  set({{"SLURM_NODEID", "3"}, {"SLURM_LOCALID", "0"}, {"SLURM_PROCID", "6"}});
  EXPECT_EQ(read_rank_environment()->local_world_size, 1);
  // What the user sets comes first, and torchrun's ranks before Slurm's.
  set({{"MASTER_ADDR", "here"}, {"MASTER_PORT", "29501"}});
  EXPECT_EQ(read_rank_environment()->master_addr, "here");
  EXPECT_EQ(read_rank_environment()->master_port, 29501);
  set({{"RANK", "1"}, {"WORLD_SIZE", "2"}});
  EXPECT_EQ(read_rank_environment()->rank, 1);

  for (const auto& [name, value] : std::map<std::string, std::string>{{"SLURM_PROCID", "7"},
                                                                      {"SLURM_STEP_NUM_TASKS", "none"},
                                                                      {"SLURM_LOCALID", "2"},
                                                                      {"SLURM_NODEID", "4"},
                                                                      {"SLURM_STEP_TASKS_PER_NODE", "2(x"},
                                                                      {"SLURM_STEP_NODELIST", ""},
                                                                      {"SLURM_JOB_ID", "x"},
                                                                      {"SLURM_STEP_ID", "-1"}}) {
    clear();
    set(step);
    set({{name, value}});
    EXPECT_THAT(error(), HasSubstr(name == "SLURM_NODEID" ? "SLURM_STEP_TASKS_PER_NODE" : name)) << value;
  }
  // A batch script has these without being a task of a step.
  clear();
  set({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "5"}});
  EXPECT_EQ(read_rank_environment(), std::nullopt);
  unsetenv("SLURM_NTASKS");
}

TEST_F(EnvironmentTest, ReadsWhatOpenMpiSets) {
  set({{"OMPI_COMM_WORLD_RANK", "3"},
       {"OMPI_COMM_WORLD_SIZE", "4"},
       {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
       {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
       {"MASTER_PORT", "29500"},
       {"SLURM_STEP_NUM_TASKS", "1"}});  // mpirun was started by Slurm
  const auto env = read_rank_environment();
  ASSERT_TRUE(env.has_value());
  EXPECT_EQ(env->rank, 3);
  EXPECT_EQ(env->world_size, 4);
  EXPECT_EQ(env->local_rank, 3);
  EXPECT_EQ(env->master_addr, "127.0.0.1");
  EXPECT_EQ(env->master_port, 29500);
  unsetenv("MASTER_PORT");
  EXPECT_THAT(error(), HasSubstr("MASTER_PORT"));
  set({{"MASTER_PORT", "29500"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}});
  EXPECT_THAT(error(), HasSubstr("MASTER_ADDR"));
  set({{"MASTER_ADDR", "n1"}});
  EXPECT_EQ(read_rank_environment()->master_addr, "n1");
  set({{"OMPI_COMM_WORLD_RANK", "4"}});
  EXPECT_THAT(error(), HasSubstr("OMPI_COMM_WORLD_RANK"));
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
