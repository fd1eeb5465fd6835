// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/environment.h"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <string_view>

#include "reshard/core/error.h"

namespace reshard {
namespace {

[[noreturn]] void fail(const char* variable, const std::string& wanted) {
  const char* value = std::getenv(variable);
  throw Error(ErrorCode::kInvalidArgument, std::string("environment variable ") + variable,
              {.wanted = wanted, .found = value == nullptr ? "not set" : '"' + std::string(value) + '"'});
}

int number(const char* variable, int low, int high, const std::string& what, std::optional<int> otherwise = {}) {
  const char* value = std::getenv(variable);
  if (value == nullptr && otherwise) return *otherwise;
  const std::string wanted = what + " (" + std::to_string(low) + ".." + std::to_string(high) + ")";
  if (value == nullptr) fail(variable, wanted);
  const std::string_view text = value;
  int result = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), result);
  if (error != std::errc() || end != text.data() + text.size() || result < low || result > high) fail(variable, wanted);
  return result;
}

constexpr int kMaxRanks = 1 << 20;

bool is_set(const char* variable) { return std::getenv(variable) != nullptr; }

std::string text(const char* variable, const std::string& wanted) {
  const char* value = std::getenv(variable);
  if (value == nullptr || *value == '\0') fail(variable, wanted);
  return value;
}

/// "n[07-09,12]-ib,m3" -> "n07-ib".
std::string first_host(std::string_view list) {
  std::string host;
  bool in_brackets = false;
  bool skipping = false;  // the other numbers in brackets
  for (const char c : list) {
    if (c == '[') {
      in_brackets = true;
    } else if (c == ']') {
      in_brackets = skipping = false;
    } else if (in_brackets) {
      skipping = skipping || c == '-' || c == ',';
      if (!skipping) host += c;
    } else if (c == ',') {
      break;
    } else {
      host += c;
    }
  }
  return host;
}

/// Slurm's "2(x3),1": of node number `node`.
int tasks_on_node(const char* variable, int node) {
  const std::string wanted = "a list of numbers of tasks such as 2(x3),1";
  const std::string list = text(variable, wanted);
  const char* at = list.data();
  const char* const end = at + list.size();
  const auto take = [&] {
    int value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < 1 || value > kMaxRanks) fail(variable, wanted);
    at = next;
    return value;
  };
  while (true) {
    const int tasks = take();
    int nodes = 1;
    if (end - at > 2 && at[0] == '(' && at[1] == 'x') {
      at += 2;
      nodes = take();
      if (at == end || *at++ != ')') fail(variable, wanted);
    }
    if (node < nodes) return tasks;
    node -= nodes;
    if (at == end || *at++ != ',') fail(variable, wanted + ", with an entry for SLURM_NODEID");
  }
}

/// Not one that the system gives to outgoing connections (32768 and up).
uint16_t port_of_step(uint64_t job, uint64_t step) {
  constexpr uint64_t kFirst = 15000;
  constexpr uint64_t kPorts = 15000;
  return static_cast<uint16_t>(kFirst + (job * 61 + step) % kPorts);
}

RankEnvironment read_open_mpi() {
  RankEnvironment env;
  env.world_size = number("OMPI_COMM_WORLD_SIZE", 1, kMaxRanks, "the number of ranks");
  env.rank = number("OMPI_COMM_WORLD_RANK", 0, env.world_size - 1, "a rank below OMPI_COMM_WORLD_SIZE");
  env.local_world_size =
      number("OMPI_COMM_WORLD_LOCAL_SIZE", 1, env.world_size, "the number of ranks on this host", env.world_size);
  env.local_rank = number("OMPI_COMM_WORLD_LOCAL_RANK", 0, env.local_world_size - 1,
                          "a rank below OMPI_COMM_WORLD_LOCAL_SIZE", env.rank % env.local_world_size);
  env.master_addr = env.local_world_size == env.world_size && !is_set("MASTER_ADDR")
                        ? "127.0.0.1"
                        : text("MASTER_ADDR", "the host of rank 0, since mpirun does not say it");
  env.master_port =
      static_cast<uint16_t>(number("MASTER_PORT", 1, 65535, "a port that is free there, since mpirun has none"));
  return env;
}

RankEnvironment read_slurm() {
  RankEnvironment env;
  env.world_size = number("SLURM_STEP_NUM_TASKS", 1, kMaxRanks, "the number of tasks");
  env.rank = number("SLURM_PROCID", 0, env.world_size - 1, "a task below SLURM_STEP_NUM_TASKS");
  const int node = number("SLURM_NODEID", 0, kMaxRanks, "the number of this node", 0);
  env.local_world_size =
      is_set("SLURM_STEP_TASKS_PER_NODE") ? tasks_on_node("SLURM_STEP_TASKS_PER_NODE", node) : env.world_size;
  env.local_rank = number("SLURM_LOCALID", 0, env.local_world_size - 1, "a task of this node");
  env.master_addr = is_set("MASTER_ADDR") ? text("MASTER_ADDR", "the host that serves the store")
                                          : first_host(text("SLURM_STEP_NODELIST", "the nodes of this step"));
  if (is_set("MASTER_PORT")) {
    env.master_port = static_cast<uint16_t>(number("MASTER_PORT", 1, 65535, "the store's port"));
  } else {
    const int job = number("SLURM_JOB_ID", 0, INT_MAX, "the number of the job");
    env.master_port =
        port_of_step(static_cast<uint64_t>(job),
                     static_cast<uint64_t>(number("SLURM_STEP_ID", 0, INT_MAX, "the number of the step")));
  }
  return env;
}

}  // namespace

std::optional<RankEnvironment> read_rank_environment() {
  constexpr std::array kVariables = {"RANK",        "WORLD_SIZE",  "LOCAL_RANK",           "LOCAL_WORLD_SIZE",
                                     "MASTER_ADDR", "MASTER_PORT", kMasterListenFdVariable};
  if (!is_set("RANK") && !is_set("WORLD_SIZE")) {
    // mpirun first: within a job of Slurm's it has both.
    if (is_set("OMPI_COMM_WORLD_RANK")) return read_open_mpi();
    // Only a step has it: a batch script itself is no task.
    if (is_set("SLURM_STEP_NUM_TASKS")) return read_slurm();
  }
  if (std::ranges::none_of(kVariables, is_set)) return std::nullopt;

  RankEnvironment env;
  env.world_size = number("WORLD_SIZE", 1, kMaxRanks, "the number of ranks");
  env.rank = number("RANK", 0, env.world_size - 1, "a rank below WORLD_SIZE");
  env.local_world_size =
      number("LOCAL_WORLD_SIZE", 1, env.world_size, "the number of ranks on this host", env.world_size);
  env.local_rank = number("LOCAL_RANK", 0, env.local_world_size - 1, "a rank below LOCAL_WORLD_SIZE",
                          env.rank % env.local_world_size);
  const char* addr = std::getenv("MASTER_ADDR");
  if (addr == nullptr || *addr == '\0') fail("MASTER_ADDR", "the host that serves the store");
  env.master_addr = addr;
  env.master_port = static_cast<uint16_t>(number("MASTER_PORT", 1, 65535, "the store's port"));

  if (const char* agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE")) {
    const std::string_view value = agent;
    env.agent_store = value == "True" || value == "true" || value == "1";
    if (!env.agent_store && value != "False" && value != "false" && value != "0" && !value.empty()) {
      fail("TORCHELASTIC_USE_AGENT_STORE", "True or False");
    }
  }
  if (std::getenv(kMasterListenFdVariable) != nullptr) {
    const std::string wanted = "a listening socket, on rank 0 only";
    const int fd = number(kMasterListenFdVariable, 0, 1 << 30, "a listening socket");
    int listening = 0;
    socklen_t size = sizeof(listening);
    if (env.rank != 0 || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || listening == 0) {
      fail(kMasterListenFdVariable, wanted);
    }
    env.master_listen_fd = fd;
  }
  return env;
}

}  // namespace reshard
