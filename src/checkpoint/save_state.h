// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A StateDict as planners see it when it is saved.

#include <vector>

#include "reshard/planner/state.h"
#include "reshard/state_dict/flatten.h"

namespace reshard {

/// Borrows `state` for its lifetime. Flattening and serializing happen once, at the first call of entries(), so that
/// what they throw is an error of planning, which every rank learns of.
class StateDictSaveState final : public SaveState {
 public:
  explicit StateDictSaveState(const StateDict& state) : state_(state) {}
  const std::vector<StateEntry>& entries() const override;
  TensorView tensor(size_t entry, size_t chunk) const override;
  ByteSpan bytes(size_t entry) const override { return archives_[entry]; }

 private:
  const StateDict& state_;
  mutable bool flat_ = false;
  mutable std::vector<FlatItem<const StateValue>> items_;
  mutable std::vector<StateEntry> entries_;
  mutable std::vector<Bytes> archives_;  // empty for tensors
};

/// The entry of a tensor value: properties, size and this rank's boxes. Throws kUnsupported naming the key for tensors
/// that are not dense (sparse, quantized, meta).
TensorEntry make_tensor_entry(const std::string& fqn, const StateValue& value);

}  // namespace reshard
