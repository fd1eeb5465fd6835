// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A transport that notes what goes through it.

#include <functional>
#include <span>
#include <vector>

#include "reshard/protocol/transport.h"

namespace reshard {

/// Notes the size of each message that a rank sends, and of each that it gets by receive().
class CountingTransport final : public Transport {
 public:
  explicit CountingTransport(Transport& inner) : inner_(inner) {}
  int rank() const override { return inner_.rank(); }
  int world_size() const override { return inner_.world_size(); }
  void send(int to, ByteSpan message) override {
    sent.push_back(message.size());
    inner_.send(to, message);
  }
  Bytes receive(int from) override {
    Bytes message = inner_.receive(from);
    received.push_back(message.size());
    return message;
  }
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    inner_.gather(from, arrived);
  }
  void heartbeat() noexcept override { inner_.heartbeat(); }

  std::vector<size_t> sent;
  std::vector<size_t> received;

 private:
  Transport& inner_;
};

}  // namespace reshard
