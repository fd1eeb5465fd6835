// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a whole file of torch.save: flattened, every leaf read, and put together again.
#include <algorithm>
#include <unordered_set>

#include "fuzz/fuzz.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_file.h"

namespace reshard::fuzz {

namespace {

void read_tensor(ByteSpan input, const TensorItem& item) {
  const Box all = whole_box(item.sizes);
  const ByteRange range = payload_range(item, all);
  const ByteSpan payload = input.subspan(item.payload_offset, item.payload_size);  // ends the program if it cannot
  require(range.begin <= range.end && range.end <= payload.size(), "the range of a tensor lies in its payload");
  const auto bytes = static_cast<size_t>(volume(item.sizes) * element_size(item.dtype));
  if (bytes > input.size()) return;  // expanded
  Bytes dense(bytes);
  copy_region(item, payload.subspan(range.begin, range.end - range.begin), all, dense);
}

void read_value(const ValueArchive& archive, const pickle::Value& value, const ByteSource& source) {
  const Bytes alone = extract_value(archive, value, source);
  verify_archive(MemorySource(alone));
  const ValueArchive back = decode_value_archive(MemorySource(alone));
  require(pickle::write(back.root()) == pickle::write(value), "a value taken out is the same value");
}

/// The file again, from its leaves.
void write_again(const ValueArchive& archive, const std::vector<StateLeaf>& leaves, const ByteSource& source) {
  pickle::Tree tree;
  std::vector<NestedLeaf> nested;
  for (const StateLeaf& leaf : leaves) nested.push_back({leaf.path, tree.copy(leaf.value)});
  const pickle::Value root = nest(tree, nested);
  const Bytes again = extract_value(archive, root, source);
  const ValueArchive back = decode_value_archive(MemorySource(again));
  std::unordered_set<std::string> tensors;
  for (const StateLeaf& leaf : flatten_archive(back)) {
    if (leaf.tensor) tensors.insert(leaf.fqn);
  }
  for (const StateLeaf& leaf : leaves) {
    require(!leaf.tensor || tensors.contains(leaf.fqn), "every tensor is in the file that is put together again");
  }
}

}  // namespace

void target(ByteSpan input) {
  const auto attempt = [](const auto& body) {
    try {
      body();
    } catch (const Error& error) {
      require(error.code() == ErrorCode::kCorruptData || error.code() == ErrorCode::kUnsupported,
              "a file is refused with kCorruptData or kUnsupported");
    }
  };
  attempt([&] {
    const MemorySource source(input);
    const ValueArchive archive = bounded(256, input, [&] { return decode_value_archive(source); });
    const std::vector<StateLeaf> leaves = bounded(1024, input, [&] { return flatten_archive(archive); });
    for (const StateLeaf& leaf : leaves) {
      attempt([&] {
        if (leaf.tensor) return read_tensor(input, *leaf.tensor);
        read_value(archive, leaf.value, source);
      });
    }
    write_again(archive, leaves, source);
  });
}

}  // namespace reshard::fuzz
