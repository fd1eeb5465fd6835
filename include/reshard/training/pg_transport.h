// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// PGTransport: a state dict from one rank to others over a process group, without a disk: how a replica that lost its state is healed by
// one that has it.
//
//   reshard::PGTransport transport(group);
//   if (group->rank() == 0) transport.send_checkpoint({1, 2}, state);
//   if (group->rank() == 1 || group->rank() == 2) transport.recv_checkpoint(0, state);   // in place
//
// Ranks that neither send nor receive take no part. What both ends call is blocking and in one order with the other collectives of the group.

#include <chrono>
#include <memory>
#include <optional>
#include <vector>

#include "reshard/core/bytes.h"
#include "reshard/distributed/process_group.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

struct PGTransportOptions {
  /// How long a peer may be silent. Default: the group's timeout.
  std::optional<std::chrono::milliseconds> timeout = {};
  /// Where a fresh receive puts tensors. Tensors travel on it if the group has a backend for it, through the host otherwise.
  c10::Device device = c10::kCPU;
};

/// Stateless between calls; one call at a time.
class PGTransport {
 public:
  explicit PGTransport(std::shared_ptr<ProcessGroup> group, PGTransportOptions options = {});

  /// Sends values, tensors and this rank's shards of sharded tensors. Nothing of a tensor is sent before every receiver has agreed to take
  /// it. Throws kInvalidArgument for a rank that is none of the group, this one, or named twice; kUnsupported naming the key of a tensor
  /// without dense elements; kTimeout or kUnavailable naming a receiver that is silent or gone; and a CheckpointError (step "receive")
  /// naming the receivers that cannot take it, who get the same one.
  void send_checkpoint(const std::vector<int>& dst_ranks, const StateDict& state);

  /// A fresh state dict. Tensors are contiguous; names that were tied are tied. Sharded tensors have the boxes that the sender's rank has.
  StateDict recv_checkpoint(int src_rank);
  /// Into the tensors of `state`, which must have the keys, sizes, dtypes and boxes of the sender's; other values are replaced. Nothing
  /// is touched unless all of it fits: kInvalidArgument names the key, on both sides. If the connection breaks later, tensors hold some of
  /// both.
  void recv_checkpoint(int src_rank, StateDict& state);

 private:
  void check_peer(int rank) const;
  StateDict receive(int src_rank, StateDict* into);
  void send_message(int to, const Bytes& message);
  Bytes receive_message(int from);

  std::shared_ptr<ProcessGroup> group_;
  PGTransportOptions options_;
  std::chrono::milliseconds timeout_;
};

}  // namespace reshard
