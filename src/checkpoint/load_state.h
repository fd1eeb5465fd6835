// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A StateDict as planners see it when it is loaded into.

#include <c10/core/Stream.h>

#include <array>
#include <optional>
#include <vector>

#include "reshard/planner/state.h"
#include "reshard/state_dict/flatten.h"

namespace reshard {

/// Borrows `state` for its lifetime and writes into its tensors.
class StateDictLoadState final : public LoadState {
 public:
  explicit StateDictLoadState(StateDict& state) : state_(state) {}
  const std::vector<StateEntry>& entries(FlattenRule rule) const override { return flat(rule).entries; }
  MutableTensorView tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region, DType dtype) override;
  void commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                     const MutableTensorView& view) override;
  void load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) override;
  /// Where a chunk of a tensor entry goes.
  const at::Tensor& chunk_tensor(FlattenRule rule, size_t entry, size_t chunk) const;

 private:
  struct Flat {
    std::vector<FlatItem<StateValue>> items;
    std::vector<StateEntry> entries;
    std::vector<c10::Stream> streams;  // current ones of the thread that plans, one a device
  };
  const Flat& flat(FlattenRule rule) const;

  StateDict& state_;
  mutable std::array<std::optional<Flat>, 2> flat_;
};

}  // namespace reshard
