// SPDX-License-Identifier: BSD-3-Clause
// A transfer, for each pair of ranks: the sender's message (what comes), the receiver's answer (whether it can take that), the sender's
// verdict once all have answered, then the elements of each tensor.

#include "reshard/training/pg_transport.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

#include "protocol/failure_wire.h"
#include "reshard/core/error.h"
#include "reshard/state_dict/wire.h"
#include "training/group_round.h"
#include "training/tensor_bytes.h"

namespace reshard {
namespace {

constexpr int64_t kMaxMessageBytes = int64_t{1} << 32;  // without the elements of tensors

using Failures = std::map<int, RankFailure>;

Bytes encode_failures(const Failures& failures) {
  ByteWriter out;
  put_failures(out, failures);
  return out.take();
}

void decode_failures(const Bytes& message, Failures& failures) {
  ByteReader in(message, "answer of a rank");
  get_failures(in, failures);
}

/// For each tensor that comes: where it goes, several places if it is tied.
using Targets = std::unordered_map<const at::TensorImpl*, std::vector<at::Tensor>>;

[[noreturn]] void mismatch(const std::string& path, const std::string& what, std::string wanted, std::string found) {
  throw Error(ErrorCode::kInvalidArgument, "what is sent does not fit: " + what,
              {.key = path, .wanted = std::move(wanted), .found = std::move(found)});
}

std::string describe(const at::Tensor& tensor) {
  return to_string(to_dims(tensor.sizes())) + " " + c10::toString(tensor.scalar_type());
}

void match_tensor(const at::Tensor& sent, const at::Tensor& own, const std::string& path, Targets& targets) {
  if (!own.defined() || sent.sizes() != own.sizes() || sent.scalar_type() != own.scalar_type())
    mismatch(path, "sizes or dtype differ", own.defined() ? describe(own) : "a tensor", describe(sent));
  if (sent.dim() > 0) targets[sent.unsafeGetTensorImpl()].push_back(own.detach());
}

/// Finds the place of every tensor of `sent` in `own`, which must be made alike.
void match(const StateValue& sent, const StateValue& own, const std::string& path, Targets& targets) {
  const auto items = [&](const std::vector<StateValue>& a, const std::vector<StateValue>& b) {
    if (a.size() != b.size()) mismatch(path, "lengths differ", std::to_string(b.size()), std::to_string(a.size()));
    for (size_t i = 0; i < a.size(); ++i) match(a[i], b[i], path + "." + std::to_string(i), targets);
  };
  const auto is_value = [](const StateValue& v) {
    return !(v.is<at::Tensor>() || v.is<ShardedTensor>() || v.is<StateDict>() || v.is<StateList>() ||
             v.is<StateTuple>());
  };
  if (is_value(sent) && is_value(own)) return;  // it is replaced
  if (sent.variant().index() != own.variant().index())
    mismatch(path, "types differ", own.type_name(), sent.type_name());
  if (sent.is<at::Tensor>()) {
    match_tensor(sent.as<at::Tensor>(), own.as<at::Tensor>(), path, targets);
  } else if (sent.is<ShardedTensor>()) {
    const ShardedTensor& a = sent.as<ShardedTensor>();
    const ShardedTensor& b = own.as<ShardedTensor>();
    if (a.size() != b.size()) mismatch(path, "sizes differ", to_string(b.size()), to_string(a.size()));
    const auto boxes = [](const ShardedTensor& t) {
      std::string text;
      for (const LocalShard& shard : t.shards()) text += (text.empty() ? "" : ", ") + to_string(shard.box);
      return text.empty() ? std::string("no shards") : text;
    };
    if (!std::ranges::equal(a.shards(), b.shards(), {}, &LocalShard::box, &LocalShard::box))
      mismatch(path, "shards differ", boxes(b), boxes(a));
    for (size_t i = 0; i < a.shards().size(); ++i)
      match_tensor(a.shards()[i].tensor, b.shards()[i].tensor, path, targets);
  } else if (sent.is<StateDict>()) {
    const StateDict& a = sent.as<StateDict>();
    const StateDict& b = own.as<StateDict>();
    const auto name = [&](const std::string& key) { return path.empty() ? key : path + "." + key; };
    for (const auto& [key, value] : a.items()) {
      if (!b.contains(key)) mismatch(name(key), "a key that is not here", "no such key", value.type_name());
    }
    for (const auto& [key, value] : b.items()) {
      if (!a.contains(key)) mismatch(name(key), "a key is missing", value.type_name(), "no such key");
      match(a.at(key), value, name(key), targets);
    }
  } else if (sent.is<StateList>()) {
    items(sent.as<StateList>(), own.as<StateList>());
  } else {
    items(sent.as<StateTuple>().items, own.as<StateTuple>().items);
  }
}

/// Values of `sent` into `own`; tensors without dimensions came with it and are copied, the others are there already.
void take_values(const StateValue& sent, StateValue& own) {
  const auto items = [](const std::vector<StateValue>& a, std::vector<StateValue>& b) {
    for (size_t i = 0; i < a.size(); ++i) take_values(a[i], b[i]);
  };
  if (sent.is<at::Tensor>()) {
    if (sent.as<at::Tensor>().dim() == 0) own.as<at::Tensor>().detach().copy_(sent.as<at::Tensor>());
  } else if (sent.is<StateDict>()) {
    for (const auto& [key, value] : sent.as<StateDict>().items()) take_values(value, own.as<StateDict>().at(key));
  } else if (sent.is<StateList>()) {
    items(sent.as<StateList>(), own.as<StateList>());
  } else if (sent.is<StateTuple>()) {
    items(sent.as<StateTuple>().items, own.as<StateTuple>().items);
  } else if (!sent.is<ShardedTensor>()) {
    own = sent;
  }
}

}  // namespace

PGTransport::PGTransport(std::shared_ptr<ProcessGroup> group, PGTransportOptions options)
    : group_(std::move(group)), options_(options) {
  group_->rank();  // throws for a rank that is not a member
  timeout_ = options_.timeout.value_or(group_->timeout());
}

void PGTransport::check_peer(int rank) const {
  if (rank < 0 || rank >= group_->size() || rank == group_->rank()) {
    throw Error(ErrorCode::kInvalidArgument, "not a peer to send to or receive from",
                {.rank = group_->rank(),
                 .wanted = "another rank of " + std::to_string(group_->size()),
                 .found = std::to_string(rank)});
  }
}

void PGTransport::send_message(int to, const Bytes& message) {
  at::Tensor length = at::full({1}, static_cast<int64_t>(message.size()), at::kLong);
  at::Tensor bytes = at::from_blob(const_cast<std::byte*>(message.data()), {length.item<int64_t>()}, at::kByte);
  // Through the host if it can be, where nothing has to be ordered with a stream.
  if (!group_->has_backend(c10::kCPU)) {
    length = length.to(options_.device);
    bytes = bytes.to(options_.device);
  }
  group_->send(length, to, timeout_);
  if (!message.empty()) group_->send(bytes, to, timeout_);
}

Bytes PGTransport::receive_message(int from) {
  const c10::Device device = group_->has_backend(c10::kCPU) ? c10::Device(c10::kCPU) : options_.device;
  at::Tensor length = at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device));
  group_->recv(length, from, timeout_);
  const auto n = length.item<int64_t>();
  if (n < 0 || n > kMaxMessageBytes) {
    throw Error(ErrorCode::kCorruptData, "a message of an absurd length: the peer is not in the same call",
                {.rank = from, .found = std::to_string(n) + " bytes"});
  }
  Bytes message(static_cast<size_t>(n));
  if (n == 0) return message;
  at::Tensor bytes = at::empty({n}, at::TensorOptions().dtype(at::kByte).device(device));
  group_->recv(bytes, from, timeout_);
  const at::Tensor host = bytes.cpu();
  std::memcpy(message.data(), host.const_data_ptr(), message.size());
  return message;
}

void PGTransport::send_checkpoint(const std::vector<int>& dst_ranks, const StateDict& state) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < dst_ranks.size(); ++i) {
    check_peer(dst_ranks[i]);
    if (std::find(dst_ranks.begin(), dst_ranks.begin() + static_cast<std::ptrdiff_t>(i), dst_ranks[i]) !=
        dst_ranks.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw Error(ErrorCode::kInvalidArgument, "a receiver is named twice", {.found = std::to_string(dst_ranks[i])});
    }
  }
  std::vector<at::Tensor> tensors;
  const Bytes structure = encode_state_dict(state, tensors);
  Failures failures;
  std::vector<int> alive;
  const auto with_each = [&](const std::vector<int>& ranks, const auto& body) {
    for (const int rank : ranks) {
      try {
        body(rank);
        alive.push_back(rank);
      } catch (...) {
        failures[rank] = current_failure();
      }
    }
    return std::exchange(alive, {});
  };
  std::vector<int> peers = with_each(dst_ranks, [&](int rank) { send_message(rank, structure); });
  peers = with_each(peers, [&](int rank) { decode_failures(receive_message(rank), failures); });
  const Bytes verdict = encode_failures(failures);
  peers = with_each(peers, [&](int rank) { send_message(rank, verdict); });
  if (!failures.empty()) throw CheckpointError("receive", std::move(failures), Committed::kNo);

  for (const at::Tensor& tensor : tensors) {
    const c10::Device carrier = group_->has_backend(tensor.device().type()) ? tensor.device() : c10::Device(c10::kCPU);
    at::Tensor bytes = byte_alias(tensor.to(carrier).resolve_conj().resolve_neg().contiguous());
    if (bytes.numel() == 0) continue;
    for (const int rank : peers) group_->send(bytes, rank, timeout_);
  }
}

StateDict PGTransport::receive(int src_rank, StateDict* into) {
  const at::NoGradGuard no_grad;
  check_peer(src_rank);
  const Bytes structure = receive_message(src_rank);
  Failures failures;
  StateDict described;
  std::vector<at::Tensor> slots;  // without memory, in the order in which they come
  Targets targets;
  try {
    described = decode_state_dict(structure, [&](at::ScalarType dtype, const Dims& sizes) {
      return slots.emplace_back(
          at::empty({sizes.data(), sizes.size()}, at::TensorOptions().dtype(dtype).device(c10::kMeta)));
    });
    if (into != nullptr) {
      match(StateValue(described), StateValue(*into), "", targets);
    } else {
      for (const at::Tensor& slot : slots)
        targets[slot.unsafeGetTensorImpl()] = {at::empty(slot.sizes(), slot.options().device(options_.device))};
    }
  } catch (...) {
    failures[group_->rank()] = current_failure();
  }
  send_message(src_rank, encode_failures(failures));
  failures.clear();
  decode_failures(receive_message(src_rank), failures);
  if (!failures.empty()) throw CheckpointError("receive", std::move(failures), Committed::kNo);

  for (const at::Tensor& slot : slots) {
    if (slot.numel() == 0) continue;
    const std::vector<at::Tensor>& places = targets.at(slot.unsafeGetTensorImpl());
    const at::Tensor& first = places.front();
    const c10::Device carrier = group_->has_backend(first.device().type()) ? first.device() : c10::Device(c10::kCPU);
    const at::Tensor received = first.is_contiguous() && first.device() == carrier
                                    ? first
                                    : at::empty(slot.sizes(), slot.options().device(carrier));
    at::Tensor bytes = byte_alias(received);
    group_->recv(bytes, src_rank, timeout_);
    for (const at::Tensor& place : places) {
      if (!place.is_same(received)) place.copy_(received);
    }
  }
  if (into != nullptr) {
    StateValue own(std::move(*into));
    take_values(StateValue(described), own);
    *into = std::move(own.as<StateDict>());
    return {};
  }
  return transform_tensors(described,
                           [&](const at::Tensor& t) {
                             return t.dim() == 0 ? t.to(options_.device) : targets.at(t.unsafeGetTensorImpl()).front();
                           })
      .as<StateDict>();
}

StateDict PGTransport::recv_checkpoint(int src_rank) { return receive(src_rank, nullptr); }

void PGTransport::recv_checkpoint(int src_rank, StateDict& state) { receive(src_rank, &state); }

}  // namespace reshard
