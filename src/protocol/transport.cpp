// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/protocol/transport.h"

namespace reshard {

void Transport::gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) {
  for (const int rank : from) {
    Arrival arrival{.from = rank, .message = {}, .error = nullptr};
    try {
      arrival.message = receive(rank);
    } catch (...) {
      arrival.error = std::current_exception();
    }
    arrived(std::move(arrival));
  }
}

}  // namespace reshard
