// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Agreement of the ranks of a group before something that only all of them can do: what one rank finds wrong is every rank's error, and
// nobody is left waiting in a collective.

#include <functional>
#include <memory>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/distributed/process_group.h"
#include "reshard/protocol/transport.h"

namespace reshard {

/// The talk of one operation, over the group's store. Made by all members in the same order of operations; null: this process alone.
class GroupRounds {
 public:
  explicit GroupRounds(ProcessGroup* group);

  /// Every rank runs `body`, rank 0 makes an answer of all results (in the order of ranks), and every rank gets that. If either throws
  /// anywhere, every rank throws one CheckpointError whose step is `step`; alone, a process just throws.
  Bytes round(const char* step, const std::function<Bytes()>& body,
              const std::function<Bytes(std::vector<Bytes>)>& answer);
  /// Goes on only if `body` throws on no rank.
  void agree(const char* step, const std::function<void()>& body);

 private:
  std::unique_ptr<Transport> transport_;
};

}  // namespace reshard
