// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Values of a state dict as torch.save archives, and back.

#include "reshard/core/bytes.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// Throws kUnsupported naming what it is for a tensor that has no dense elements: undefined, sparse, quantized, meta.
void check_dense(const at::Tensor& tensor);

/// The archive of a value that is no tensor. Tensors inside tuples and lists are saved inside it; a sharded tensor
/// there is kUnsupported.
Bytes encode_value(const StateValue& value);

/// The value in a whole archive. What StateValue has no type for (sets, bytearrays, big integers, user classes, dicts with other
/// keys than strings, sparse tensors, expanded ones of absurd size) comes back as an OpaqueValue that holds the
/// archive. Throws kCorruptData for a broken archive.
StateValue decode_value(ByteSpan archive);

}  // namespace reshard
