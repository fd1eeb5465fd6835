// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// DeviceMesh: an N-dimensional grid of ranks with a process group along each dimension, as PyTorch's.
//
//   const DeviceMesh mesh = init_device_mesh({2, 4}, {.dim_names = {"replicate", "shard"}});
//   mesh.get_group("shard")->all_reduce_sum(t);       // over the 4 ranks of this rank's row
//   mesh["shard"]                                     // that row as a mesh of its own

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reshard/core/dims.h"
#include "reshard/distributed/process_group.h"

namespace reshard {

struct DeviceMeshOptions {
  /// One for each dimension, or none at all.
  std::vector<std::string> dim_names = {};
  /// Global ranks in row-major order of the grid. Empty: all of the default group, in order.
  std::vector<int> ranks = {};
};

/// A cheap value: copies share the grid and the groups. Usable on ranks outside the grid too, where it has no
/// coordinate and no groups. Dimensions are named or counted from 0; one that there is not is kInvalidArgument.
class DeviceMesh {
 public:
  size_t ndim() const { return state_->shape.size(); }
  const Dims& shape() const { return state_->shape; }
  /// Of all dimensions together.
  int size() const { return static_cast<int>(state_->ranks.size()); }
  int size(size_t dim) const { return static_cast<int>(state_->shape[checked(dim)]); }
  int size(const std::string& dim) const { return size(index_of(dim)); }
  const std::vector<std::string>& dim_names() const { return state_->dim_names; }
  /// Global ranks, row-major.
  const std::vector<int>& ranks() const { return state_->ranks; }

  /// This rank's place in the grid; nothing on a rank outside it.
  const std::optional<Dims>& get_coordinate() const { return state_->coordinate; }
  /// This rank's coordinate along one dimension. kInvalidArgument on a rank outside the grid, as are the groups.
  int get_local_rank(size_t dim) const;
  int get_local_rank(const std::string& dim) const { return get_local_rank(index_of(dim)); }
  /// The ranks that differ from this one in that coordinate only, in its order.
  const std::shared_ptr<ProcessGroup>& get_group(size_t dim) const;
  const std::shared_ptr<ProcessGroup>& get_group(const std::string& dim) const { return get_group(index_of(dim)); }

  /// The mesh of the named dimensions, in that order, that holds this rank; its groups are those of this mesh, so no
  /// communication. On a rank outside, the one at coordinate 0 of the other dimensions. kInvalidArgument for an unknown
  /// name or one that comes twice.
  DeviceMesh submesh(const std::vector<std::string>& names) const;
  DeviceMesh operator[](const std::string& name) const { return submesh({name}); }

 private:
  friend DeviceMesh init_device_mesh(const Dims& shape, DeviceMeshOptions options);
  struct State {
    Dims shape;
    std::vector<std::string> dim_names;
    std::vector<int> ranks;
    std::optional<Dims> coordinate;
    std::vector<std::shared_ptr<ProcessGroup>> groups;  // of this rank, by dimension
  };
  explicit DeviceMesh(State state) : state_(std::make_shared<const State>(std::move(state))) {}
  size_t checked(size_t dim) const;
  size_t index_of(const std::string& name) const;
  void require_member() const;

  std::shared_ptr<const State> state_;
};

/// Makes a mesh of `shape` and its groups. Collective over the default group: every rank calls it with the same
/// arguments in the same order of calls, new_group included, also ranks outside the grid. kInvalidArgument for a shape
/// without dimensions or with one below 1, a number of ranks that is not its product, ranks that come twice or do not
/// exist, and names that come twice or are not one a dimension.
DeviceMesh init_device_mesh(const Dims& shape, DeviceMeshOptions options = {});

}  // namespace reshard
