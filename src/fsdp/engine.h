// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// FsdpEngine: the units of one sharded model and the rules of when they are gathered, freed and reduced.
//
// Order of events. Forward or backward: an operator touches a flat parameter -> units that are not in use are freed ->
// all-gather -> the flat parameter is pinned -> the operator runs -> unpinned. A parameter's gradient is complete ->
// copied into the flat gradient; the last one of a flat parameter -> reduce-scatter, free. End of a backward pass ->
// flat parameters with some gradients missing are reduced, all is freed.

#include <torch/csrc/api/include/torch/nn/module.h>

#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/flat_parameter.h"
#include "fsdp/interception.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace reshard {

class FsdpEngine : public std::enable_shared_from_this<FsdpEngine> {
 public:
  /// One entry of the state dict, in the module's order: a parameter under one of its names, or a buffer.
  struct Entry {
    std::string name;
    std::optional<size_t> parameter;  // index into parameters()
    at::Tensor buffer;
  };

  FsdpEngine(std::shared_ptr<torch::nn::Module> module, const std::shared_ptr<Recording>& recording,
             FsdpOptions options);
  ~FsdpEngine();
  FsdpEngine(const FsdpEngine&) = delete;
  FsdpEngine& operator=(const FsdpEngine&) = delete;

  const std::vector<ShardedParameter>& parameters() const { return parameters_; }
  const std::vector<Entry>& entries() const { return entries_; }
  const torch::nn::Module& module() const { return *module_; }
  const FsdpMemoryStats& stats() const { return stats_; }
  const FsdpOptions& options() const { return options_; }
  /// The flat parameters under their names in a local state dict.
  const std::vector<std::pair<std::string, FlatParameter*>>& flat_parameters() const { return flat_parameters_; }
  ProcessGroup& group() const { return *options_.process_group; }
  /// Of this process: what errors name, since replicas have equal ranks in their groups.
  int global_rank() const { return group().ranks()[static_cast<size_t>(group().rank())]; }
  const std::shared_ptr<ProcessGroup>& shared_group() const { return options_.process_group; }
  std::vector<std::string> unit_names() const { return unit_names_; }

  void begin_forward();
  void end_forward() noexcept;
  void begin_summon();
  void end_summon(bool writeback);
  void begin_no_sync() { ++no_sync_depth_; }
  void end_no_sync() { --no_sync_depth_; }

  /// Whole copies of all parameters, in the order of parameters(). Collective.
  std::vector<at::Tensor> full_parameters();
  double clip_grad_norm(double max_norm, double norm_type);
  /// Frees all units that are not in use.
  void reshard();
  /// The shards were loaded, perhaps by means that left no trace.
  void note_load();

 private:
  struct ValueTarget;
  struct ShardTarget;
  struct GradientTarget;
  struct GradientHook;
  struct Watched;  // a flat parameter with what is registered for it
  struct Discovered;

  Discovered discover(const torch::nn::Module& module) const;
  void require_same_on_all_ranks(const Discovered& found) const;
  void build_units(Discovered found, const std::shared_ptr<Recording>& recording);
  void build_buffers(const std::shared_ptr<Recording>& recording,
                     const std::set<const c10::StorageImpl*>& parameter_storages);
  void attach(FlatParameter& flat);
  void pin(FlatParameter& flat, const std::string& op, const at::Tensor& tensor);
  void gather(FlatParameter& flat);
  void prefetch_after(FlatParameter& flat);
  void release(FlatParameter& flat);
  void on_gradient(FlatParameter& flat, FlatParameter::Member& member);
  void queue_end_of_backward();
  void end_of_backward();
  void check_before_forward();
  bool is_armed() const;
  void require_idle(const char* what) const;
  const std::string& name_at(const FlatParameter& flat, const at::Tensor& tensor) const;

  std::shared_ptr<torch::nn::Module> module_;
  FsdpOptions options_;
  FsdpMemoryStats stats_;
  std::vector<ShardedParameter> parameters_;
  std::vector<Entry> entries_;
  std::vector<std::string> unit_names_;
  std::vector<std::unique_ptr<Watched>> flats_;
  std::vector<std::pair<std::string, FlatParameter*>> flat_parameters_;
  mutable std::recursive_mutex mutex_;  // the autograd engine's device threads and the caller's thread
  const std::string* last_unit_ = nullptr;
  int forward_depth_ = 0;
  int summon_depth_ = 0;
  bool summon_writeback_ = false;
  int no_sync_depth_ = 0;
  /// What a pass gathered, in its order, for the prefetches of the next one.
  struct PassOrder {
    std::vector<FlatParameter*> last, now;
    bool follows = true;  // `now` is a beginning of `last` so far
    void begin_pass() {
      last = std::exchange(now, {});
      follows = true;
    }
  };
  PassOrder forward_order_, backward_order_;
  int queued_task_ = -1;  // graph task at whose end end_of_backward() will run
};

}  // namespace reshard
