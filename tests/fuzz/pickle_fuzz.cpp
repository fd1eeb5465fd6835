// SPDX-License-Identifier: BSD-3-Clause
// Any bytes as a pickle; what was read is written, read again, and written to the same bytes.
#include "reshard/format/pickle.h"

#include "fuzz/fuzz.h"

namespace reshard::fuzz {

void target(ByteSpan input) {
  const pickle::Tree tree = bounded(256, input, [&] {
    pickle::Tree parsed = pickle::parse(input);
    pickle::check_tree(parsed.root());
    return parsed;
  });
  pickle::plain_bytes(tree.root());
  const Bytes once = pickle::write(tree.root());
  const pickle::Tree back = pickle::parse(once);
  require(pickle::write(back.root()) == once, "a written pickle is read and written to the same bytes");
}

}  // namespace reshard::fuzz
