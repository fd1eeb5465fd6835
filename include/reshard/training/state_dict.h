// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// State dicts of models and optimizers: torch.distributed.checkpoint.state_dict for LibTorch. Keys are fully qualified names, the same
// whether a model is sharded or not, on any number of ranks, in C++ and in Python.
//
//   auto [model_state, optimizer_state] = reshard::get_state_dict(model, optimizer);
//   reshard::StateDict state{{"model", model_state}, {"optim", optimizer_state}};
//   reshard::load(state, reshard::FileSystemReader(dir));       // into the tensors of model and optimizer, in place
//   reshard::set_state_dict(model, optimizer, state.at("model"), state.at("optim"));
//
// The getters give views, without communication and without copies, unless an option says otherwise. A model is a module
// (a reference, a holder such as torch::nn::Linear, a shared_ptr) or a sharded one; an optimizer is one of torch::optim over its parameters().

#include <torch/csrc/api/include/torch/nn/pimpl.h>
#include <torch/csrc/api/include/torch/optim/optimizer.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// A module that keeps more than parameters and buffers derives from this, too. What it gives is in the state dict as
/// `<name of the module>._extra_state`.
class ExtraState {
 public:
  virtual ~ExtraState() = default;
  virtual StateValue get_extra_state() const = 0;
  virtual void set_extra_state(const StateValue& value) = 0;
};

/// Any model, borrowed for a call.
class ModelRef {
 public:
  ModelRef(const torch::nn::Module& module) : module_(&module) {}
  ModelRef(const ShardedModule& model) : module_(&model.root()), sharded_(&model) {}
  template <class Module>
  ModelRef(const torch::nn::ModuleHolder<Module>& holder) : module_(holder.get()) {}
  template <class Module>
  ModelRef(const std::shared_ptr<Module>& module) : module_(module.get()) {}

  const torch::nn::Module& module() const { return *module_; }
  /// Null for a plain module.
  const ShardedModule* sharded() const { return sharded_; }

 private:
  const torch::nn::Module* module_;
  const ShardedModule* sharded_ = nullptr;
};

/// One or more optimizers of one model, borrowed for a call. Groups of several are put one after the other.
class OptimizersRef {
 public:
  OptimizersRef(torch::optim::Optimizer& optimizer) : optimizers_{&optimizer} {}
  OptimizersRef(std::vector<torch::optim::Optimizer*> optimizers) : optimizers_(std::move(optimizers)) {}
  const std::vector<torch::optim::Optimizer*>& optimizers() const { return optimizers_; }

 private:
  std::vector<torch::optim::Optimizer*> optimizers_;
};

/// Each function uses the ones that it names.
struct StateDictOptions {
  /// get: sharded tensors are gathered, so that every rank has whole ones. set: the dict has whole ones. (A setter takes both anyway; it
  /// matters with the next two.)
  bool full_state_dict = false;
  /// get: tensors are on the host. With full_state_dict only rank 0 gets them, the others an empty dict.
  bool cpu_offload = false;
  /// set, with full_state_dict: rank 0 has the dict, what the others pass is not looked at. Tensors travel one at a time and each rank keeps
  /// its own part, so that no rank but 0 ever holds more than one whole tensor.
  bool broadcast_from_rank0 = false;
  /// get and set: without parameters whose requires_grad is off.
  bool ignore_frozen_params = false;
  /// set: a key that is missing, or that the model does not have, is an error; otherwise it is only reported.
  bool strict = true;
  /// get: the dict of the optimizer has one level, state.<fqn>.exp_avg, param_groups.<fqn>.lr, so that ranks with different parameters
  /// (pipelines) can save into one checkpoint. A setter sees from the dict which it is.
  bool flatten_optimizer_state_dict = false;
  /// get and set: only what lies in these modules, given by their fully qualified names. Empty: all.
  std::vector<std::string> submodules = {};
  /// get and set: keys begin after the name of the submodule ("pretrain.layer1.weight" is "layer1.weight").
  bool keep_submodule_prefixes = true;
  /// get and set: buffers and parameters that are in no state dict, as buffers that PyTorch calls non-persistent.
  std::vector<std::string> exclude = {};
  /// get and set: from the name that the model has to the key in the dict, where they are not the same.
  std::function<std::string(const std::string& fqn)> rename = {};
  /// Ranks of a collective call. Null: the sharded model's group; for a plain module the default group, or this process alone.
  std::shared_ptr<ProcessGroup> process_group = nullptr;
};

/// What did not fit.
struct IncompatibleKeys {
  std::vector<std::string> missing_keys;     // the model or optimizer has them, the dict has not
  std::vector<std::string> unexpected_keys;  // the dict has them
};

/// Parameters under all their names, buffers, and extra states. Collective only with full_state_dict.
StateDict get_model_state_dict(ModelRef model, const StateDictOptions& options = {});

/// {"state": {<fqn>: {..}}, "param_groups": [{.., "params": [<fqn>, ..]}]}, for SGD, Adam, AdamW, Adagrad, RMSprop, and LBFGS over a plain
/// module. State that an optimizer has not created yet (all but LBFGS's) is created, with step 0: the result is also the target of a load
/// into a new optimizer. Collective only with full_state_dict. Throws kInvalidArgument naming what an optimizer holds that is no
/// parameter of the model, kUnsupported for another optimizer.
StateDict get_optimizer_state_dict(ModelRef model, OptimizersRef optimizers, const StateDictOptions& options = {});

struct ModelAndOptimizerState {
  StateDict model;
  StateDict optimizer;
};
ModelAndOptimizerState get_state_dict(ModelRef model, OptimizersRef optimizers, const StateDictOptions& options = {});

/// Takes sharded tensors (that cover this rank's part) and whole ones, mixed at will; one name of a tied parameter is enough. What is the
/// model's own memory already is left alone; a plain module's parameters and buffers on the meta device get memory on the host.
/// Everything is checked before anything is written: kNotFound naming missing keys, kInvalidArgument naming unexpected ones, a shape or
/// dtype that differs, or, with broadcast_from_rank0, parameters on several devices. Collective only with broadcast_from_rank0, where any
/// rank's error is one CheckpointError on every rank.
IncompatibleKeys set_model_state_dict(ModelRef model, const StateDict& state, const StateDictOptions& options = {});

/// Takes what get_optimizer_state_dict gives, here or in PyTorch, flattened or not. A dict may hold more parameters than the optimizers (the
/// result says which). A setting that LibTorch's optimizer has no place for, such as `initial_lr`, is an unexpected key and never an
/// error; one that changes what a step does (maximize, ...) is kUnsupported. Groups are found by their parameters, not by position.
/// Otherwise as set_model_state_dict.
IncompatibleKeys set_optimizer_state_dict(ModelRef model, OptimizersRef optimizers, const StateDict& state,
                                          const StateDictOptions& options = {});

/// Both. Nothing is written to the model if the optimizers' part is wrong.
IncompatibleKeys set_state_dict(ModelRef model, OptimizersRef optimizers, const StateDict& model_state,
                                const StateDict& optimizer_state, const StateDictOptions& options = {});

}  // namespace reshard
