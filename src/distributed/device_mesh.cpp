// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/device_mesh.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "reshard/core/error.h"

namespace reshard {
namespace {

std::string join(const std::vector<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += (text.empty() ? "\"" : ", \"") + value + "\"";
  return "[" + text + "]";
}
std::string join(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return "[" + text + "]";
}

[[noreturn]] void refuse(const std::string& what, const std::string& wanted, const std::string& found) {
  throw Error(ErrorCode::kInvalidArgument, what, {.wanted = wanted, .found = found});
}

void require_distinct(const std::vector<std::string>& names) {
  if (std::set<std::string>(names.begin(), names.end()).size() != names.size())
    refuse("two dimensions of a mesh have one name", "distinct names", join(names));
}

Dims coordinate_of(size_t index, const Dims& shape) {
  Dims coordinate(shape.size(), 0);
  for (size_t d = shape.size(); d-- > 0;) {
    coordinate[d] = static_cast<int64_t>(index) % shape[d];
    index /= static_cast<size_t>(shape[d]);
  }
  return coordinate;
}

size_t index_at(const Dims& coordinate, const Dims& shape) {
  size_t index = 0;
  for (size_t d = 0; d < shape.size(); ++d)
    index = index * static_cast<size_t>(shape[d]) + static_cast<size_t>(coordinate[d]);
  return index;
}

}  // namespace

size_t DeviceMesh::checked(size_t dim) const {
  if (dim >= ndim())
    refuse("the mesh has no such dimension", "one of its " + std::to_string(ndim()),
           "dimension " + std::to_string(dim));
  return dim;
}

size_t DeviceMesh::index_of(const std::string& name) const {
  const auto& names = dim_names();
  const auto it = std::find(names.begin(), names.end(), name);
  if (it == names.end()) refuse("the mesh has no dimension of this name", "one of " + join(names), "\"" + name + "\"");
  return static_cast<size_t>(it - names.begin());
}

void DeviceMesh::require_member() const {
  if (!get_coordinate()) {
    refuse("this rank is not in the mesh", "one of the global ranks " + join(ranks()),
           "global rank " + std::to_string(default_process_group()->rank()));
  }
}

int DeviceMesh::get_local_rank(size_t dim) const {
  require_member();
  return static_cast<int>((*state_->coordinate)[checked(dim)]);
}

const std::shared_ptr<ProcessGroup>& DeviceMesh::get_group(size_t dim) const {
  require_member();
  return state_->groups[checked(dim)];
}

DeviceMesh DeviceMesh::submesh(const std::vector<std::string>& names) const {
  if (names.empty()) refuse("a mesh needs a dimension", "some of " + join(dim_names()), "none");
  require_distinct(names);
  const Dims here = state_->coordinate.value_or(Dims(ndim(), 0));
  State sub;
  sub.dim_names = names;
  if (state_->coordinate) sub.coordinate = Dims();
  std::vector<size_t> kept;
  for (const std::string& name : names) {
    const size_t dim = index_of(name);
    kept.push_back(dim);
    sub.shape.push_back(shape()[dim]);
    if (!sub.coordinate) continue;
    sub.coordinate->push_back(here[dim]);
    sub.groups.push_back(state_->groups[dim]);
  }
  for (size_t i = 0; i < static_cast<size_t>(volume(sub.shape)); ++i) {
    const Dims place = coordinate_of(i, sub.shape);
    Dims coordinate = here;
    for (size_t k = 0; k < kept.size(); ++k) coordinate[kept[k]] = place[k];
    sub.ranks.push_back(ranks()[index_at(coordinate, shape())]);
  }
  return DeviceMesh(std::move(sub));
}

DeviceMesh init_device_mesh(const Dims& shape, DeviceMeshOptions options) {
  const auto world = default_process_group();
  if (shape.empty() || std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 1; }))
    refuse("a mesh needs dimensions of at least one rank", "sizes from 1", to_string(shape));
  if (!options.dim_names.empty() && options.dim_names.size() != shape.size()) {
    refuse("a mesh needs one name for each dimension, or none", std::to_string(shape.size()) + " names",
           join(options.dim_names));
  }
  require_distinct(options.dim_names);
  std::vector<int> ranks = std::move(options.ranks);
  if (ranks.empty()) {
    ranks.resize(static_cast<size_t>(world->size()));
    std::iota(ranks.begin(), ranks.end(), 0);
  }
  if (volume(shape) != static_cast<int64_t>(ranks.size())) {
    refuse("the sizes of a mesh must multiply to its number of ranks", std::to_string(ranks.size()) + " ranks",
           to_string(shape));
  }
  const std::set<int> distinct(ranks.begin(), ranks.end());
  if (distinct.size() != ranks.size() || *distinct.begin() < 0 || *distinct.rbegin() >= world->size()) {
    refuse("a mesh needs distinct ranks of the default group", "some of 0.." + std::to_string(world->size() - 1),
           join(ranks));
  }

  DeviceMesh::State state{shape, std::move(options.dim_names), std::move(ranks), std::nullopt, {}};
  const auto self = std::find(state.ranks.begin(), state.ranks.end(), world->rank());
  if (self != state.ranks.end())
    state.coordinate = coordinate_of(static_cast<size_t>(self - state.ranks.begin()), shape);
  // Every rank makes every group, dimension by dimension, line by line.
  for (size_t d = 0; d < shape.size(); ++d) {
    for (size_t i = 0; i < state.ranks.size(); ++i) {
      Dims coordinate = coordinate_of(i, shape);
      if (coordinate[d] != 0) continue;
      std::vector<int> line;
      for (; coordinate[d] < shape[d]; ++coordinate[d]) line.push_back(state.ranks[index_at(coordinate, shape)]);
      auto group = line == world->ranks() ? world : new_group(line);
      if (group->is_member()) state.groups.push_back(std::move(group));
    }
  }
  // A rank that went on, and ended, while others still connect would break their connections.
  world->barrier();
  return DeviceMesh(std::move(state));
}

}  // namespace reshard
