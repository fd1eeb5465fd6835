// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/testing/torch_distributed_test.h"

#include <c10/util/signal_handler.h>

#include <exception>

#include "reshard/launch/environment.h"

namespace reshard {

std::shared_ptr<ProcessGroup> TorchDistributedTest::process_group() {
  if (auto joined = try_default_process_group()) return joined;
  return init_process_group({.backend = backend(), .timeout = options().deadline});
}

void TorchDistributedTest::set_up_rank() {
  testing_detail::remove_stack_printer();  // this one prints every thread
  c10::FatalSignalHandler::getInstance().setPrintStackTracesOnFatalSignal(true);
}

void TorchDistributedTest::tear_down_rank() {
  const auto group = try_default_process_group();
  if (!group) return;
  const auto env = read_rank_environment();
  const bool served_by_rank_0 = env && !env->agent_store;
  try {
    if (served_by_rank_0 && rank() != 0) {
      group->store()->set("testing/left/" + std::to_string(rank()), std::vector<uint8_t>{1});
    } else if (served_by_rank_0 && !HasFatalFailure()) {
      // Rank 0 leaves last; but when it left its body early, peers may wait for it.
      std::vector<std::string> keys;
      for (int r = 1; r < world_size(); ++r) {
        if (!options().expected.contains(r)) keys.push_back("testing/left/" + std::to_string(r));
      }
      group->store()->wait(keys, options().deadline);
    }
  } catch (const std::exception&) {  // a peer that did not come this far tells its own story
  }
  // After a failure the end of the process closes the connections soonest. Without a parent other cases may follow in this
  // process, and closing them here is what tells peers.
  if (!HasFailure() || !testing_detail::has_parent()) destroy_process_group();
}

}  // namespace reshard
