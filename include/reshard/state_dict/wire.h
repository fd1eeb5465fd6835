// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A state dict as one message and a row of tensors, for those who send it between ranks. The message holds everything but the
// elements of tensors that have dimensions. It lives as long as a call: both ends run the same version of this library.

#include <functional>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// The message. Appends the tensors whose elements are not in it to `tensors`, one for each place in memory: names that are tied share a
/// slot. Tensors without dimensions travel inside the message. Throws kUnsupported naming the key for a tensor without dense elements.
Bytes encode_state_dict(const StateDict& state, std::vector<at::Tensor>& tensors);

/// The counterpart. `make` gives the tensor of each slot, in the order of `tensors`; it is called once for each, with dtype and sizes, and
/// its sizes must be these. Throws kCorruptData for a message that encode_state_dict did not make; its length bounds what is allocated.
StateDict decode_state_dict(ByteSpan message, const std::function<at::Tensor(at::ScalarType, const Dims&)>& make);

/// A copy of `value` in which each tensor, those of shards too, is what `change` makes of it. In the order of the wire; a tensor under
/// several names is changed each time.
StateValue transform_tensors(const StateValue& value, const std::function<at::Tensor(const at::Tensor&)>& change);

}  // namespace reshard
