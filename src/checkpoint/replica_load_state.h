// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A load for a group of ranks that want the same: the first one reads, the others get from it what it has read.

#include <exception>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "checkpoint/load_state.h"
#include "reshard/core/bytes.h"
#include "reshard/distributed/process_group.h"
#include "reshard/planner/planner.h"

namespace reshard {

/// What the planner sees: the whole state on the first rank of the group, nothing on the others. Borrows both.
class ReplicaLoadState final : public LoadState {
 public:
  /// Compares the states of the group (a collective). Ranks that differ throw when they are asked for entries, which is
  /// when errors of a rank become those of all.
  ReplicaLoadState(StateDict& state, ProcessGroup& replicas);

  const std::vector<StateEntry>& entries(FlattenRule rule) const override;
  MutableTensorView tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region, DType dtype) override {
    return target_.tensor(rule, entry, chunk, region, dtype);
  }
  void commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                     const MutableTensorView& view) override;
  void load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) override;

  /// After a load that succeeded everywhere: sends what was read, with its report (a collective).
  void distribute(LoadReport& report);

 private:
  StateDictLoadState target_;
  ProcessGroup& replicas_;
  std::exception_ptr error_;
  // What the first rank has read.
  FlattenRule rule_ = FlattenRule::kCurrent;
  std::mutex mutex_;
  std::set<size_t> tensors_;
  std::vector<std::pair<size_t, Bytes>> archives_;
};

}  // namespace reshard
