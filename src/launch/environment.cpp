// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/environment.h"

#include <sys/socket.h>

#include <array>
#include <charconv>
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

}  // namespace

std::optional<RankEnvironment> read_rank_environment() {
  constexpr std::array kVariables = {"RANK",        "WORLD_SIZE",  "LOCAL_RANK",           "LOCAL_WORLD_SIZE",
                                     "MASTER_ADDR", "MASTER_PORT", kMasterListenFdVariable};
  bool any = false;
  for (const char* variable : kVariables) any = any || std::getenv(variable) != nullptr;
  if (!any) return std::nullopt;

  constexpr int kMaxRanks = 1 << 20;
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
