// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// DTensor: a sharded tensor that lies on a mesh of ranks by placements, as PyTorch's. It is a ShardedTensor: put into a
// StateDict it is saved and loaded like any other, without communication and from any mesh into any other.
//
//   const DeviceMesh mesh = init_device_mesh({2, 2});
//   DTensor w = distribute_tensor(whole, mesh, {Replicate(), Shard(0)});
//   save(StateDict{{"w", w}}, FileSystemWriter(dir));
//   ...
//   DTensor target = DTensor::zeros({10, 20}, other_mesh, {Shard(1)});
//   StateDict state{{"w", target}};                     // shares the memory
//   load(state, FileSystemReader(dir));
//   target.full_tensor();

#include <ATen/core/Tensor.h>

#include "reshard/core/placement.h"
#include "reshard/distributed/device_mesh.h"
#include "reshard/state_dict/sharded_tensor.h"

namespace reshard {

/// One rank's part of the tensor, and how the whole lies on the mesh. It has no operators: compute with to_local() or
/// full_tensor(), neither of which autograd sees through. A cheap value: copies share the memory. All ranks
/// of the mesh make it with the same arguments. On a rank outside the mesh it has no shards and an empty local tensor
/// of size {0}; functions that communicate do nothing there.
class DTensor : public ShardedTensor {
 public:
  /// `local` is this rank's part, of the shape that compute_local_layout gives (core/placement.h; kInvalidArgument
  /// otherwise), and stays its memory: any strides, any device. On a rank outside the mesh only its dtype and device
  /// count. No communication.
  static DTensor from_local(const at::Tensor& local, const DeviceMesh& mesh, Placements placements, const Dims& size);
  /// A new one of zeros, as a target to load into. No communication.
  static DTensor zeros(const Dims& size, const DeviceMesh& mesh, Placements placements,
                       const at::TensorOptions& options = {});

  const at::Tensor& to_local() const { return local_; }
  const DeviceMesh& device_mesh() const { return mesh_; }
  const Placements& placements() const { return placements_; }

  /// The whole tensor, of its own memory, on every rank of the mesh. Collective over the mesh: one all-gather for each
  /// of its dimensions that shards (parts filled up to the longest), none for those that replicate: replicas are taken
  /// to be equal.
  at::Tensor full_tensor() const;
  /// The same tensor by other placements on the same mesh, of its own memory. Collective over the mesh. Gathers along
  /// the dimensions whose placement changes or depends on one that does, and cuts anew: what only becomes finer
  /// (Replicate to Shard) costs nothing.
  DTensor redistribute(Placements placements) const;

 private:
  DTensor(ShardedTensor sharded, at::Tensor local, DeviceMesh mesh, Placements placements)
      : ShardedTensor(std::move(sharded)),
        local_(std::move(local)),
        mesh_(std::move(mesh)),
        placements_(std::move(placements)) {}

  at::Tensor local_;
  DeviceMesh mesh_;
  Placements placements_;
};

/// `full`, which every rank of the mesh gives with equal content, cut by placements: each rank copies its part. No
/// communication (PyTorch's src_data_rank=None).
DTensor distribute_tensor(const at::Tensor& full, const DeviceMesh& mesh, Placements placements);

}  // namespace reshard
