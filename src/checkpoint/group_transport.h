// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What the ranks of one save or load talk over.

#include <chrono>
#include <memory>
#include <optional>

#include "reshard/distributed/store_transport.h"
#include "reshard/protocol/thread_transport.h"

namespace reshard {

/// Messages over the group's store, or none where this process is alone. Null: the default group.
inline std::unique_ptr<Transport> make_transport(std::shared_ptr<ProcessGroup> group,
                                                 std::optional<std::chrono::milliseconds> silence) {
  if (!group) group = try_default_process_group();
  if (!group || (group->is_member() && group->size() == 1)) return solo_transport();
  return std::make_unique<StoreTransport>(*group, silence.value_or(group->timeout()));
}

/// The deadline on silence that it has.
inline std::chrono::milliseconds silence_of(std::shared_ptr<ProcessGroup> group,
                                            std::optional<std::chrono::milliseconds> silence) {
  if (!group) group = try_default_process_group();
  return silence.value_or(group ? group->timeout() : ProcessGroupOptions().timeout);
}

}  // namespace reshard
