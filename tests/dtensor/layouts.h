// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Meshes and placements in all combinations.

#include <ATen/ATen.h>

#include <string>
#include <utility>
#include <vector>

#include "reshard/dtensor/dtensor.h"

namespace reshard {

/// 1, 2, 3, ... in row-major order.
inline at::Tensor counting(const Dims& size, const at::TensorOptions& options) {
  return (at::arange(volume(size), at::kLong) + 1).to(options).view({size.data(), size.size()});
}

/// Every way to give each dimension of a mesh one of `choices`.
inline std::vector<Placements> all_placements(size_t mesh_dims, const Placements& choices) {
  std::vector<Placements> result{{}};
  for (size_t m = 0; m < mesh_dims; ++m) {
    std::vector<Placements> longer;
    for (const Placements& before : result) {
      for (const Placement& choice : choices) {
        longer.push_back(before);
        longer.back().push_back(choice);
      }
    }
    result = std::move(longer);
  }
  return result;
}

struct Layout {
  DeviceMesh mesh;
  Placements placements;
  std::string name() const {
    std::string ranks;
    for (const int rank : mesh.ranks()) ranks += " " + std::to_string(rank);
    return to_string(placements) + " over " + to_string(mesh.shape()) + " of" + ranks;
  }
};

/// Layouts of matrices on four ranks: one to three dimensions, all ranks or some, in order or not. Collective.
inline std::vector<Layout> layouts_on_four_ranks() {
  std::vector<Layout> layouts;
  const auto add = [&](const DeviceMesh& mesh) {
    for (Placements& placements : all_placements(mesh.ndim(), {Replicate(), Shard(0), Shard(1)}))
      layouts.push_back({mesh, std::move(placements)});
  };
  add(init_device_mesh({4}));
  add(init_device_mesh({3}, {.ranks = {0, 1, 2}}));
  add(init_device_mesh({2}, {.ranks = {0, 2}}));
  add(init_device_mesh({1}, {.ranks = {3}}));
  const DeviceMesh square = init_device_mesh({2, 2});
  add(square);
  layouts.push_back({square, {StridedShard(0, 2), Shard(0)}});
  layouts.push_back({square, {StridedShard(1, 2), Replicate()}});  // with gaps
  add(init_device_mesh({2, 2}, {.ranks = {3, 1, 0, 2}}));
  layouts.push_back({init_device_mesh({2, 1, 2}), {Shard(0), Shard(1), Shard(0)}});
  return layouts;
}

/// Even, uneven, mostly empty.
inline std::vector<Dims> layout_sizes() { return {{4, 4}, {5, 3}, {1, 2}}; }

}  // namespace reshard
