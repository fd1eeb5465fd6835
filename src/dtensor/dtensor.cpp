// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/dtensor/dtensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "reshard/core/error.h"

namespace reshard {
namespace {

at::IntArrayRef sizes_of(const Dims& dims) { return {dims.data(), dims.size()}; }

/// `box`, which lies in `part`, as a view of the local tensor that holds the part.
at::Tensor view_of(at::Tensor local, const LocalLayout::Part& part, const Box& box) {
  for (size_t d = 0; d < box.sizes.size(); ++d) {
    local = local.narrow(static_cast<int64_t>(d), part.local_offsets[d] + box.offsets[d] - part.box.offsets[d],
                         box.sizes[d]);
  }
  return local;
}

/// Copies what two local tensors of one whole have in common.
void copy_common(const at::Tensor& to, const LocalLayout& to_layout, const at::Tensor& from,
                 const LocalLayout& from_layout) {
  for (const LocalLayout::Part& target : to_layout.parts) {
    for (const LocalLayout::Part& source : from_layout.parts) {
      if (const auto common = intersect(target.box, source.box))
        view_of(to, target, *common).copy_(view_of(from, source, *common));
    }
  }
}

std::optional<int64_t> sharded_dim(const Placement& placement, size_t rank) {
  int64_t dim = 0;
  if (const auto* shard = std::get_if<Shard>(&placement)) {
    dim = shard->dim;
  } else if (const auto* strided = std::get_if<StridedShard>(&placement)) {
    dim = strided->dim;
  } else {
    return std::nullopt;
  }
  return dim < 0 ? dim + static_cast<int64_t>(rank) : dim;
}

/// Gathers `local` along one dimension of the mesh, whose placement becomes Replicate, and returns the larger local
/// tensor.
at::Tensor gather_along(size_t mesh_dim, const at::Tensor& local, const Dims& size, const DeviceMesh& mesh,
                        Placements& placements) {
  ProcessGroup& group = *mesh.get_group(mesh_dim);
  Dims coordinate = *mesh.get_coordinate();
  std::vector<LocalLayout> layouts;  // by rank of the group
  int64_t longest = 0;
  for (int64_t i = 0; i < group.size(); ++i) {
    coordinate[mesh_dim] = i;
    layouts.push_back(compute_local_layout(size, mesh.shape(), coordinate, placements));
    longest = std::max(longest, volume(layouts.back().sizes));
  }
  placements[mesh_dim] = Replicate();
  const LocalLayout layout = compute_local_layout(size, mesh.shape(), coordinate, placements);
  at::Tensor result = at::empty(sizes_of(layout.sizes), local.options());
  if (longest == 0) return result;

  at::Tensor mine = local.resolve_conj().resolve_neg().contiguous().view(-1);
  if (mine.numel() < longest) {
    const at::Tensor padded = at::zeros({longest}, local.options());
    padded.narrow(0, 0, mine.numel()).copy_(mine);
    mine = padded;
  }
  const at::Tensor all = at::empty({longest * group.size()}, local.options());
  at::Tensor bytes = mine.view(at::kByte);
  at::Tensor all_bytes = all.view(at::kByte);
  group.all_gather_into(all_bytes, bytes);
  for (size_t i = 0; i < layouts.size(); ++i) {
    const at::Tensor part =
        all.narrow(0, static_cast<int64_t>(i) * longest, volume(layouts[i].sizes)).view(sizes_of(layouts[i].sizes));
    copy_common(result, layout, part, layouts[i]);
  }
  return result;
}

}  // namespace

DTensor DTensor::from_local(const at::Tensor& local, const DeviceMesh& mesh, Placements placements, const Dims& size) {
  const auto& coordinate = mesh.get_coordinate();
  if (!coordinate) {
    compute_local_layout(size, mesh.shape(), Dims(mesh.ndim(), 0), placements);  // what is wrong is wrong everywhere
    const at::Tensor nothing = at::empty({0}, local.options());
    return DTensor(ShardedTensor(size, local.scalar_type(), {}, local.requires_grad()), nothing, mesh,
                   std::move(placements));
  }
  const LocalLayout layout = compute_local_layout(size, mesh.shape(), *coordinate, placements);
  if (to_dims(local.sizes()) != layout.sizes) {
    throw Error(ErrorCode::kInvalidArgument,
                "the local tensor of a tensor of " + to_string(size) + " by " + to_string(placements) +
                    " has another shape at coordinate " + to_string(*coordinate),
                {.wanted = to_string(layout.sizes), .found = to_string(to_dims(local.sizes()))});
  }
  const at::NoGradGuard no_grad;
  const at::Tensor plain = local.detach();  // shares memory and version counter
  std::vector<LocalShard> shards;
  for (const LocalLayout::Part& part : layout.parts) shards.push_back({part.box, view_of(plain, part, part.box)});
  return DTensor(ShardedTensor(size, local.scalar_type(), std::move(shards), local.requires_grad()), local, mesh,
                 std::move(placements));
}

DTensor DTensor::zeros(const Dims& size, const DeviceMesh& mesh, Placements placements,
                       const at::TensorOptions& options) {
  const auto& coordinate = mesh.get_coordinate();
  const Dims local = coordinate ? compute_local_layout(size, mesh.shape(), *coordinate, placements).sizes : Dims{0};
  return from_local(at::zeros(sizes_of(local), options), mesh, std::move(placements), size);
}

at::Tensor DTensor::full_tensor() const { return redistribute(Placements(mesh_.ndim(), Replicate())).to_local(); }

DTensor DTensor::redistribute(Placements placements) const {
  if (!mesh_.get_coordinate()) return from_local(local_, mesh_, std::move(placements), size());
  const at::NoGradGuard no_grad;
  const Dims& coordinate = *mesh_.get_coordinate();
  const LocalLayout target = compute_local_layout(size(), mesh_.shape(), coordinate, placements);
  // A placement depends on those before it that shard the same dimension of the tensor, now or afterwards.
  std::vector<size_t> changes;
  const auto depends_on_a_change = [&](size_t m) {
    const auto dim = sharded_dim(placements_[m], size().size());
    return dim && std::any_of(changes.begin(), changes.end(), [&](size_t before) {
             return sharded_dim(placements_[before], size().size()) == dim ||
                    sharded_dim(placements[before], size().size()) == dim;
           });
  };
  for (size_t m = 0; m < placements.size(); ++m) {
    if (placements[m] != placements_[m] || depends_on_a_change(m)) changes.push_back(m);
  }
  Placements between = placements_;
  at::Tensor local = local_.detach();
  for (auto m = changes.rbegin(); m != changes.rend(); ++m) {
    if (!std::holds_alternative<Replicate>(between[*m])) local = gather_along(*m, local, size(), mesh_, between);
  }
  const at::Tensor result = at::empty(sizes_of(target.sizes), local.options());
  copy_common(result, target, local, compute_local_layout(size(), mesh_.shape(), coordinate, between));
  return from_local(result.set_requires_grad(requires_grad()), mesh_, std::move(placements), size());
}

DTensor distribute_tensor(const at::Tensor& full, const DeviceMesh& mesh, Placements placements) {
  const Dims size = to_dims(full.sizes());
  const at::NoGradGuard no_grad;
  const DTensor result = DTensor::zeros(size, mesh, std::move(placements), full.options());
  for (const LocalShard& shard : result.shards()) {
    at::Tensor part = full.detach();
    for (size_t d = 0; d < size.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), shard.box.offsets[d], shard.box.sizes[d]);
    at::Tensor(shard.tensor).copy_(part);
  }
  return result;
}

}  // namespace reshard
