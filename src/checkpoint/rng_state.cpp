// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/rng_state.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "reshard/checkpoint/rank_local.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

struct NamedGenerator {
  const char* name;
  at::Generator generator;

  at::Tensor state() const {
    at::Generator copy = generator;
    const std::lock_guard lock(copy.mutex());
    return copy.get_state();
  }
  void set_state(const at::Tensor& state) const {
    at::Generator copy = generator;
    const std::lock_guard lock(copy.mutex());
    copy.set_state(state);
  }
};

std::vector<NamedGenerator> default_generators() {
  std::vector<NamedGenerator> result{{"cpu", at::globalContext().defaultGenerator(c10::kCPU)}};
  if (at::hasCUDA()) result.push_back({"cuda", at::globalContext().defaultGenerator(rank_device(/*want_cuda=*/true))});
  return result;
}

/// Seeds that have nothing in common for neighbours (the finaliser of SplitMix64).
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

StateDict rng_state(const ProcessGroup& group) {
  StateDict result;
  for (const NamedGenerator& g : default_generators()) result[g.name] = rank_local(g.state(), group);
  return result;
}

bool load_rng_state(const std::string& key, StorageReader& reader, const RngLoadOptions& options) {
  const std::shared_ptr<ProcessGroup> group = options.process_group ? options.process_group : default_process_group();
  const std::vector<NamedGenerator> generators = default_generators();
  StateDict states;
  for (const NamedGenerator& g : generators) states[g.name] = rank_local(at::empty_like(g.state()), *group);
  StateDict wanted{{key, std::move(states)}};
  // The CPU's state is there in every checkpoint with such a key; a GPU's may not be.
  const bool is_optional = options.reseed.has_value() || generators.size() > 1;
  const LoadReport report = load(wanted, reader, {.process_group = group, .allow_partial_load = is_optional});
  const auto is_missing = [&](const char* name) {
    const std::string prefix = key + "." + name + ".";
    return std::ranges::any_of(report.missing, [&](const std::string& fqn) { return fqn.starts_with(prefix); });
  };
  if (is_missing("cpu")) {
    if (!options.reseed) {
      throw Error(
          ErrorCode::kNotFound, "no state of random generators for this number of ranks",
          {.rank = group->rank(), .key = key, .wanted = "saved by " + std::to_string(group->size()) + " ranks"});
    }
    const uint64_t seed =
        mix(mix(*options.reseed + static_cast<uint64_t>(group->size())) + static_cast<uint64_t>(group->rank()));
    for (const NamedGenerator& g : generators) {
      at::Generator copy = g.generator;
      const std::lock_guard lock(copy.mutex());
      copy.set_current_seed(seed);
    }
    return false;
  }
  for (const NamedGenerator& g : generators) {
    if (!is_missing(g.name))
      g.set_state(rank_local_value(wanted.at(key).as<StateDict>().at(g.name).as<StateDict>(), *group).as<at::Tensor>());
  }
  return true;
}

}  // namespace reshard
