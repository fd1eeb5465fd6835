// SPDX-License-Identifier: BSD-3-Clause
#include "training/group_round.h"

#include <map>
#include <numeric>
#include <string>
#include <utility>

#include "protocol/failure_wire.h"
#include "reshard/distributed/store_transport.h"

namespace reshard {
namespace {

using Failures = std::map<int, RankFailure>;

RankFailure failure_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (...) {
    return current_failure();
  }
}

/// A result, or failures by rank.
Bytes encode(const Bytes& result, const Failures& failures) {
  ByteWriter out;
  put_failures(out, failures);
  if (failures.empty()) out.bytes(result);
  return out.take();
}

Bytes decode(const Bytes& message, Failures& failures) {
  ByteReader in(message, "message of a rank");
  get_failures(in, failures);
  const ByteSpan rest = in.rest();
  return {rest.begin(), rest.end()};
}

}  // namespace

GroupRounds::GroupRounds(ProcessGroup* group) {
  if (group != nullptr && group->size() > 1) transport_ = std::make_unique<StoreTransport>(*group, group->timeout());
}

Bytes GroupRounds::round(const char* step, const std::function<Bytes()>& body,
                         const std::function<Bytes(std::vector<Bytes>)>& answer) {
  if (!transport_) return answer({body()});
  Failures failures;
  Bytes result;
  try {
    result = body();
  } catch (...) {
    failures[transport_->rank()] = current_failure();
  }
  if (transport_->rank() == 0) {
    std::vector<Bytes> results(static_cast<size_t>(transport_->world_size()));
    results[0] = std::move(result);
    std::vector<int> others(results.size() - 1);
    std::iota(others.begin(), others.end(), 1);
    transport_->gather(others, [&](Transport::Arrival arrival) {
      if (arrival.error) {
        failures[arrival.from] = failure_of(arrival.error);
      } else {
        results[static_cast<size_t>(arrival.from)] = decode(arrival.message, failures);
      }
    });
    result.clear();
    if (failures.empty()) {
      try {
        result = answer(std::move(results));
      } catch (...) {
        failures[0] = current_failure();
      }
    }
    const Bytes message = encode(result, failures);
    for (const int rank : others) transport_->send(rank, message);
  } else {
    transport_->send(0, encode(result, failures));
    failures.clear();
    try {
      result = decode(transport_->receive(0), failures);
    } catch (...) {
      failures[0] = current_failure();
    }
  }
  if (!failures.empty()) throw CheckpointError(step, std::move(failures), Committed::kNo);
  return result;
}

void GroupRounds::agree(const char* step, const std::function<void()>& body) {
  round(
      step,
      [&] {
        body();
        return Bytes();
      },
      [](const std::vector<Bytes>&) { return Bytes(); });
}

}  // namespace reshard
