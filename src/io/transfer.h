// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The loop around preadv and pwritev: any number of parts of any size, resumed after interruptions and short transfers.

#include <limits.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace reshard {

struct TransferResult {
  uint64_t bytes = 0;  // moved
  int error = 0;       // errno of the call that failed
};

/// Calls `call(iovecs, count, offset)`, which is preadv or pwritev on some file, until every byte of `parts` is moved
/// or it returns 0 (end of file) or an error other than EINTR.
template <class Part>
TransferResult transfer_fully(std::span<const Part> parts, uint64_t offset,
                              const std::function<ssize_t(const iovec*, int, off_t)>& call) {
  TransferResult result;
  size_t first = 0;  // the first part that is not finished
  size_t moved = 0;  // bytes of it that are
  for (;;) {
    iovec window[IOV_MAX];
    int count = 0;
    for (size_t i = first; i < parts.size() && count < IOV_MAX; ++i) {
      const size_t skip = i == first ? moved : 0;
      if (parts[i].size() == skip) continue;
      window[count++] = {const_cast<std::byte*>(parts[i].data()) + skip, parts[i].size() - skip};
    }
    if (count == 0) return result;
    const ssize_t n = call(window, count, static_cast<off_t>(offset + result.bytes));
    if (n < 0) {
      if (errno == EINTR) continue;
      result.error = errno;
      return result;
    }
    if (n == 0) return result;
    result.bytes += static_cast<uint64_t>(n);
    moved += static_cast<size_t>(n);
    while (first < parts.size() && moved >= parts[first].size()) moved -= parts[first++].size();
  }
}

}  // namespace reshard
