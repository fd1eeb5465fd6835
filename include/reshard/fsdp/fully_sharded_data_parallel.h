// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// FullyShardedDataParallel: trains any torch::nn::Module, unmodified, with its parameters sharded over the ranks of a
// process group.
//
// The parameters of each unit (see wrap_policy.h) are flattened, concatenated and padded; every rank keeps one equal
// shard. The first operation that reads a parameter in a forward or backward pass gathers its unit; touching the next
// unit frees it; when the last gradient of a unit is in, the gradients are averaged and reduce-scattered. So the
// unsharded memory at any time is one unit. The module keeps its own parameter handles, which have their full shapes
// throughout.
//
//   auto model = reshard::FullyShardedDataParallel(reshard::on_meta([] { return Net(1024); }),
//                                                  {.wrap_policy = reshard::wrap_by_type<BlockImpl>()});
//   torch::optim::AdamW optimizer(model.parameters());   // the local slices, never model.module()->parameters()
//   model(x).sum().backward();
//   optimizer.step();
//
// On a mesh of two dimensions (HSDP) each row of ranks holds the whole model, sharded as above. Gathers stay inside a row;
// gradients are reduce-scattered inside it and then averaged over the rows, so that all ranks train one model:
//
//   const DeviceMesh mesh = init_device_mesh({2, 4}, {.dim_names = {"replicate", "shard"}});
//   auto model = reshard::FullyShardedDataParallel(Net(1024), {.mesh = mesh});
//
// The rows start equal: with the parameters of the first one, whatever the others were built with. In a save each byte
// is written by one of them.
//
// What a touch does is a collective, so every rank must run the same operations in the same order, and a parameter
// unused in the forward pass must be unused on all ranks. Reading a parameter outside of a forward pass, a backward
// pass and SummonFullParams is kFailedPrecondition, and so is a backward pass that needs a parameter which an optimizer
// step or a load has changed since its forward pass. torch::autograd::grad gives this rank's own gradients, not
// averaged ones. One model is used by one thread at a time (the autograd engine's own threads count as the caller's).

#include <ATen/core/Tensor.h>
#include <torch/csrc/api/include/torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "reshard/distributed/device_mesh.h"
#include "reshard/distributed/process_group.h"
#include "reshard/fsdp/meta.h"
#include "reshard/fsdp/wrap_policy.h"
#include "reshard/state_dict/state_dict.h"

namespace reshard {

class FsdpEngine;

/// How the elements of a unit lie on the ranks.
enum class ShardLayout : uint8_t {
  /// The flattened unit is cut into equal contiguous ranges. No copies around collectives. The default.
  kFlat,
  /// Each parameter is cut along dimension 0 as torch.chunk does: the chunk grid of PyTorch's fully_shard. Gathering
  /// copies once more.
  kDim0Chunks,
};

enum class StateDictType : uint8_t {
  /// Each value is a ShardedTensor of views of this rank's memory: no communication, no copy.
  kSharded,
  /// Each value is a whole tensor of its own, on every rank. Collective; gathers one unit at a time.
  kFull,
  /// One 1-D ShardedTensor of views for each flat parameter, "<unit>._flat_param" ("<unit>._flat_param_1", ... where a
  /// unit has several: dtypes, and frozen parameters, are kept apart), without its padding; buffers as they are. No
  /// communication, no copy, fewest keys. It fits models wrapped alike with ShardLayout::kFlat (kUnsupported without),
  /// on any number of ranks; what is inside only they know.
  kLocal,
};

/// Parameters are kept, updated and saved in their own dtype; each gather sends a copy in another one, in which forward
/// and backward passes compute. The fields and defaults are those of PyTorch's MixedPrecisionPolicy. Only real
/// floating-point parameters are meant; buffers are left alone.
struct MixedPrecision {
  /// What the module's own handles are and are computed with; none: their own dtype.
  std::optional<at::ScalarType> param_dtype = std::nullopt;
  /// What gradients are added up and reduced in; none: param_dtype. The slices get them in their own dtype.
  std::optional<at::ScalarType> reduce_dtype = std::nullopt;
  /// What the call's result is cast to, where it is a tensor; none: as forward() left it.
  std::optional<at::ScalarType> output_dtype = std::nullopt;
  /// Casts floating-point tensors among the call's arguments to param_dtype.
  bool cast_forward_inputs = true;
};

struct FsdpOptions {
  /// The ranks that share the parameters; null: the default group, where there is no mesh.
  std::shared_ptr<ProcessGroup> process_group = nullptr;
  /// In place of process_group. One dimension: its ranks share the parameters. Two: hybrid sharding (HSDP), replicas
  /// over the first dimension, each sharded over the second.
  std::optional<DeviceMesh> mesh = std::nullopt;
  WrapPolicy wrap_policy = {};
  /// False keeps every unit gathered from its first use in the forward pass until its gradients are reduced: less
  /// communication, more memory.
  bool reshard_after_forward = true;
  /// Broadcasts parameters and buffers from rank 0 of the group (of the mesh) while wrapping.
  bool sync_module_states = false;
  /// Where shards, gathered units and buffers live.
  c10::Device device = c10::kCPU;
  ShardLayout layout = ShardLayout::kFlat;
  MixedPrecision mixed_precision = {};
  /// Begins to gather the unit that came next in the pass before while the one now gathered computes. It costs the memory
  /// of one more unit, and pays where computing leaves the network and the cores that serve it idle. A pass that goes
  /// another way than the one before prefetches nothing more.
  bool forward_prefetch = false;
  bool backward_prefetch = false;
  /// A forward pass refuses to start while a gradient of the last backward pass was neither used by an optimizer nor
  /// cleared: in most programs that means that nothing trains. Set it to let gradients add up over backward passes that
  /// each reduce; no_sync() needs no option.
  bool accumulate_reduced_gradients = false;
  /// Debugging aid: overwrites each unit with 0xFF bytes (NaN) before it is freed, so that a read of freed memory
  /// shows.
  bool poison_freed = false;
};

/// Bytes of gathered parameters on this rank (with the transfer buffer of kDim0Chunks), and counts since the model was
/// wrapped.
struct FsdpMemoryStats {
  uint64_t unsharded_bytes = 0;
  uint64_t peak_unsharded_bytes = 0;
  uint64_t largest_unit_bytes = 0;
  uint64_t all_units_bytes = 0;
  uint64_t gradient_bytes = 0;  // unreduced flat gradients
  uint64_t peak_gradient_bytes = 0;
  uint64_t gathers = 0;
  uint64_t prefetches = 0;  // of the gathers, those that had begun before they were asked for
  uint64_t reductions = 0;
};

/// A parameter's place in the model: one distinct tensor, however many names it has.
struct ShardedParameter {
  /// Names in the order of named_parameters(); the first is the canonical one, the others are tied to it.
  std::vector<std::string> names;
  Dims shape;
  /// This rank owns the row-major elements [begin, end) of the parameter; begin == end where it owns none.
  int64_t begin = 0;
  int64_t end = 0;
  /// Those elements, 1-D, in the shard's memory. A leaf; its grad is the averaged gradient.
  at::Tensor slice;
};

/// `local` (1-D: the elements [begin, end) of a row-major tensor of `shape`) as a sharded tensor of views.
ShardedTensor as_sharded_tensor(const at::Tensor& local, const Dims& shape, int64_t begin, int64_t end);

/// Cuts gradient communication for its lifetime: backward passes add into the unreduced gradient, and the first
/// backward pass after it reduces the sum. Meanwhile each rank holds gradients of the whole model. Get it from
/// ShardedModule::no_sync().
class [[nodiscard]] NoSync {
 public:
  explicit NoSync(std::shared_ptr<FsdpEngine> engine);
  ~NoSync();
  NoSync(const NoSync&) = delete;
  NoSync& operator=(const NoSync&) = delete;

 private:
  std::shared_ptr<FsdpEngine> engine_;
};

/// What a sharded model can do, whatever its module's type. Move-only; the module must not outlive it in use:
/// destroying it leaves the module's parameters unreadable.
class ShardedModule {
 public:
  ShardedModule(std::shared_ptr<torch::nn::Module> module, std::shared_ptr<Recording> recording, FsdpOptions options);
  ShardedModule(ShardedModule&&) noexcept;
  ShardedModule& operator=(ShardedModule&&) noexcept;
  ~ShardedModule();

  /// The local slices, one for each distinct parameter, in the order of the module's named_parameters(). Frozen and
  /// empty ones are included, so that positions agree on all ranks. Give these to the optimizer: any that treats each
  /// element by itself, as SGD, Adam, AdamW, Adagrad and RMSprop do. (LBFGS would take the inner products of this rank's
  /// part for those of the whole.)
  std::vector<at::Tensor> parameters() const;
  /// Canonical name and slice, in the same order.
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;
  /// For each parameter that has several names: all of them, the canonical one first.
  std::vector<std::vector<std::string>> tied_names() const;
  const std::vector<ShardedParameter>& sharded_parameters() const;
  /// Clears the gradients of the slices. (torch::nn::Module::zero_grad cannot reach them.)
  void zero_grad();

  /// Parameters under all their names, and buffers, in the module's order. Buffers are plain tensors, not copied.
  StateDict state_dict(StateDictType type) const;
  /// Takes sharded tensors (any layout that covers this rank's part) and whole ones, mixed at will. Shards that are
  /// this model's own memory are left alone. Everything is checked first: kNotFound for a missing name (one name of a
  /// tied parameter is enough), kInvalidArgument for an unknown name, a shape, a dtype, or a part that no shard covers.
  /// Call it also after loading in place. No communication. Keys of StateDictType::kLocal stand for their parameters.
  void load_state_dict(const StateDict& state);

  NoSync no_sync();
  /// Scales all gradients by max_norm / (norm + 1e-6) if the norm over all ranks exceeds max_norm. `norm_type` > 0,
  /// infinity allowed. Returns the norm before scaling. Collective over process_group().
  double clip_grad_norm(double max_norm, double norm_type = 2.0);

  /// Frees gathered units, as after a backward pass. Seldom needed.
  void reshard();
  const FsdpMemoryStats& memory_stats() const;
  /// The ranks that share the parameters: with a mesh of two dimensions, this rank's row.
  const ProcessGroup& process_group() const;
  /// Names of the units, the root ("") first.
  std::vector<std::string> unit_names() const;
  /// The module that was wrapped.
  const torch::nn::Module& root() const;

  const std::shared_ptr<FsdpEngine>& engine() const { return engine_; }

 protected:
  /// The casts of a call: see FsdpOptions::mixed_precision.
  bool needs_cast(const at::Tensor& argument) const;
  at::Tensor cast(const at::Tensor& argument) const;
  at::Tensor cast_output(at::Tensor result) const;

 private:
  std::shared_ptr<FsdpEngine> engine_;
};

/// Lets parameters be touched for its lifetime: put it around a forward pass that does not go through operator().
/// Scopes nest.
class [[nodiscard]] ForwardScope {
 public:
  explicit ForwardScope(const ShardedModule& model);
  ~ForwardScope();
  ForwardScope(const ForwardScope&) = delete;
  ForwardScope& operator=(const ForwardScope&) = delete;

 private:
  std::shared_ptr<FsdpEngine> engine_;
};

struct SummonOptions {
  /// Keeps what was written to the parameters: at the end each rank takes its own part. Otherwise writes are lost.
  bool writeback = false;
};

/// Gathers all parameters for its lifetime: the module's own handles are whole and readable, in the dtype that the shards
/// have. Collective when made; needs the memory of the whole model. Not inside a forward or backward pass (kFailedPrecondition).
class [[nodiscard]] SummonFullParams {
 public:
  explicit SummonFullParams(const ShardedModule& model, SummonOptions options = {});
  ~SummonFullParams();
  SummonFullParams(const SummonFullParams&) = delete;
  SummonFullParams& operator=(const SummonFullParams&) = delete;

 private:
  std::shared_ptr<FsdpEngine> engine_;
  SummonOptions options_;
};

namespace detail {
template <class T>
std::shared_ptr<T> module_pointer(const std::shared_ptr<T>& module) {
  return module;
}
template <class Holder>
auto module_pointer(const Holder& holder) -> decltype(holder.ptr()) {
  return holder.ptr();
}
}  // namespace detail

/// A sharded module of a known type: adds the call. `ModuleHolder` is a holder such as torch::nn::Linear, or
/// std::shared_ptr<Module>.
template <class ModuleHolder>
class FullyShardedDataParallel : public ShardedModule {
 public:
  /// Wraps a module that has its values. Frees the module's own copy of them, unit by unit, and drops gradients that it
  /// has. What is frozen now stays frozen. Collective. Refuses what cannot work sharded, naming it: embeddings with sparse
  /// gradients or max_norm, sparse and quantized parameters, distinct parameters or buffers that share memory with a
  /// parameter (kUnsupported); parameters that are no leaves or sharded already, a policy that names a missing module,
  /// ranks that wrap different models, a rank that is not a member of the group or mesh, a mesh of more than two
  /// dimensions, a group beside a mesh (kInvalidArgument).
  explicit FullyShardedDataParallel(ModuleHolder module, FsdpOptions options = {})
      : ShardedModule(detail::module_pointer(module), nullptr, std::move(options)), module_(std::move(module)) {}
  /// Initialises and shards a module built by on_meta, unit by unit.
  explicit FullyShardedDataParallel(MetaModule<ModuleHolder> meta, FsdpOptions options = {})
      : ShardedModule(detail::module_pointer(meta.module()), meta.recording(), std::move(options)),
        module_(meta.module()) {}

  /// module->forward(args...) inside a ForwardScope, with the casts of FsdpOptions::mixed_precision.
  template <class... Args>
  decltype(auto) operator()(Args&&... args) {
    ForwardScope scope(*this);
    const auto module = detail::module_pointer(module_);
    using Result = decltype(module->forward(std::forward<Args>(args)...));
    if constexpr (std::is_same_v<Result, at::Tensor>) {
      return cast_output(module->forward(cast_input(std::forward<Args>(args))...));
    } else {
      return module->forward(cast_input(std::forward<Args>(args))...);
    }
  }

  const ModuleHolder& module() const { return module_; }
  ModuleHolder& module() { return module_; }

 private:
  /// The argument itself, or its cast in `place`, which lives as long as the call.
  template <class T>
  T&& cast_input(T&& argument, at::Tensor&& place = at::Tensor()) const {
    if constexpr (std::is_same_v<std::remove_cvref_t<T>, at::Tensor>) {
      if (needs_cast(argument)) {
        place = cast(argument);
        return static_cast<T&&>(place);
      }
    }
    return static_cast<T&&>(argument);
  }

  ModuleHolder module_;
};

template <class ModuleHolder>
FullyShardedDataParallel(MetaModule<ModuleHolder>, FsdpOptions) -> FullyShardedDataParallel<ModuleHolder>;
template <class ModuleHolder>
FullyShardedDataParallel(MetaModule<ModuleHolder>) -> FullyShardedDataParallel<ModuleHolder>;
template <class ModuleHolder>
FullyShardedDataParallel(ModuleHolder, FsdpOptions) -> FullyShardedDataParallel<ModuleHolder>;

}  // namespace reshard
