// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// on_meta: builds a module without memory for its parameters. The factory and in-place operations that the constructors
// run are recorded instead of computed, and FullyShardedDataParallel replays them one unit at a time, so a model larger
// than one host's memory can be initialised. With the same seed, parameters, computed buffers and the random generator
// afterwards equal those of the ordinary build bit for bit, on every number of ranks.

#include <torch/csrc/api/include/torch/nn/module.h>

#include <functional>
#include <memory>
#include <utility>

namespace reshard {

class Recording;

/// A module built on the meta device, with the operations that initialise it. Hand it to FullyShardedDataParallel.
/// Movable and cheap to copy.
template <class ModuleHolder>
class MetaModule {
 public:
  MetaModule(ModuleHolder module, std::shared_ptr<Recording> recording)
      : module_(std::move(module)), recording_(std::move(recording)) {}
  const ModuleHolder& module() const { return module_; }
  const std::shared_ptr<Recording>& recording() const { return recording_; }

 private:
  ModuleHolder module_;
  std::shared_ptr<Recording> recording_;
};

namespace detail {
std::shared_ptr<Recording> record_on_meta(const std::function<void()>& build);
}

/// Runs `build`, which returns a module holder or a shared_ptr to a module, on this thread and at once. The CPU
/// generator advances as the ordinary build would advance it. Tensors that exist before are used as they are: what a
/// recorded operation reads of them is copied then and there. An operation whose result cannot be computed later
/// (reading a value back, writing through a raw pointer as torch::tensor does for a std::vector, a device other than
/// cpu, a generator of one's own) is kUnsupported, named in the error.
template <class Build>
auto on_meta(Build&& build) {
  using ModuleHolder = std::decay_t<decltype(build())>;
  std::unique_ptr<ModuleHolder> module;
  auto recording = detail::record_on_meta([&] { module = std::make_unique<ModuleHolder>(build()); });
  return MetaModule<ModuleHolder>(std::move(*module), std::move(recording));
}

}  // namespace reshard
