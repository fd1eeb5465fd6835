// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A whole state dict in one archive, as torch.save(model.state_dict(), "model.pt") leaves it: its leaves under the names that
// a checkpoint gives them, and the nested dicts and lists put together again from such names. Opens no file. All
// functions are thread-safe.

#include <optional>
#include <string>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/format/pickle.h"
#include "reshard/format/torch_archive.h"
#include "reshard/metadata/metadata.h"

namespace reshard {

/// One tensor or value of a state dict.
struct StateLeaf {
  std::string fqn;
  ObjectPath path;
  pickle::Value value;               // valid as long as the archive
  std::optional<TensorItem> tensor;  // what `value` rebuilds, if that is a tensor
};

/// The leaves in order, by PyTorch's current rule: mappings are always entered, lists only if they hold a tensor or a
/// mapping; keys become text as str() makes it; empty mappings vanish. Parameters and buffers are tensors.
///
/// Throws kUnsupported, naming the key, for what is no state dict, keys that are neither text, numbers nor None, tensors
/// that are sparse, quantized, nested or of a class of their own, two leaves that get one name, and names that shared parts
/// would unfold out of proportion.
std::vector<StateLeaf> flatten_archive(const ValueArchive& archive);

/// A part of an archive as an archive of its own, with the storages that it refers to. Reads those from `source`, the
/// bytes of the archive.
Bytes extract_value(const ValueArchive& archive, const pickle::Value& value, const ByteSource& source);

/// The keys of the storages that `value` refers to, each once, in order of appearance.
std::vector<std::string> referenced_storages(const pickle::Value& value);

/// Leaf number n of a nested state dict.
struct NestedLeaf {
  ObjectPath path;
  pickle::Value value;
};
/// The nested dict whose leaves lie at these paths, in order. A list is as long as its largest position asks for, with
/// None where nothing is. Throws kCorruptData, naming the key, where a leaf is in the way of another, and where positions
/// are out of all proportion.
pickle::Value nest(pickle::Tree& tree, const std::vector<NestedLeaf>& leaves);

}  // namespace reshard
