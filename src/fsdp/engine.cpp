// SPDX-License-Identifier: BSD-3-Clause
#include "fsdp/engine.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/api/include/torch/nn/modules/embedding.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "fsdp/recording.h"
#include "reshard/core/error.h"
#include "reshard/core/hooks.h"

namespace reshard {
namespace {

bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

template <class Options>
void refuse_embedding(const Options& options, const char* kind, const std::string& path) {
  if (options.sparse()) {
    throw Error(ErrorCode::kUnsupported,
                std::string(kind) + " with sparse gradients cannot be sharded: set sparse(false)", {.key = path});
  }
  if (options.max_norm().has_value()) {
    throw Error(ErrorCode::kUnsupported,
                std::string(kind) + " with max_norm cannot be sharded: it writes to its weight in the forward pass",
                {.key = path});
  }
}

void refuse_module(const torch::nn::Module& module, const std::string& path) {
  if (const auto* embedding = dynamic_cast<const torch::nn::EmbeddingImpl*>(&module)) {
    refuse_embedding(embedding->options, "Embedding", path);
  } else if (const auto* bag = dynamic_cast<const torch::nn::EmbeddingBagImpl*>(&module)) {
    refuse_embedding(bag->options, "EmbeddingBag", path);
  }
}

void refuse_parameter(const at::Tensor& handle, const std::string& name, const Recording* recording) {
  const ErrorContext context{.key = name};
  if (handle.key_set().has(kShardKey))
    throw Error(ErrorCode::kInvalidArgument, "parameter is sharded already", context);
  if (handle.layout() != at::kStrided || handle.is_quantized()) {
    throw Error(ErrorCode::kUnsupported, "only dense parameters can be sharded", context);
  }
  if (!handle.is_leaf())
    throw Error(ErrorCode::kInvalidArgument, "parameter is not a leaf of the autograd graph", context);
  if (handle.is_meta() && (recording == nullptr || !recording->knows(handle))) {
    throw Error(ErrorCode::kInvalidArgument,
                "parameter is on the meta device and its values are not known: build the module inside on_meta",
                context);
  }
}

/// A shard has memory of its own: what was one memory before would silently become two. (Tied parameters are one
/// tensor under several names, no aliases.)
void refuse_shared_memory(const std::vector<FsdpEngine::Entry>& entries, const std::vector<at::Tensor>& handles) {
  struct Range {
    const c10::StorageImpl* storage;
    size_t begin;  // in bytes
    size_t end;
    const FsdpEngine::Entry* entry;
  };
  std::vector<Range> ranges;
  std::set<const at::TensorImpl*> seen;
  for (const FsdpEngine::Entry& entry : entries) {
    const at::Tensor& tensor = entry.parameter ? handles[*entry.parameter] : entry.buffer;
    if (!seen.insert(tensor.unsafeGetTensorImpl()).second || !tensor.has_storage() || tensor.numel() == 0) continue;
    const auto size = static_cast<size_t>(tensor.element_size());
    const size_t begin = static_cast<size_t>(tensor.storage_offset()) * size;
    ranges.push_back({tensor.storage().unsafeGetStorageImpl(), begin,
                      begin + at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), size), &entry});
  }
  std::ranges::sort(ranges, {}, [](const Range& range) { return std::pair(range.storage, range.begin); });
  const Range* parameter = nullptr;  // of the ranges before, the one that ends last
  const Range* buffer = nullptr;
  for (const Range& range : ranges) {
    const auto meets = [&](const Range* other) {
      return other != nullptr && other->storage == range.storage && other->end > range.begin;
    };
    const Range* other = meets(parameter) ? parameter : range.entry->parameter && meets(buffer) ? buffer : nullptr;
    if (other != nullptr) {
      throw Error(ErrorCode::kUnsupported,
                  "shares memory with '" + other->entry->name +
                      "' and cannot be sharded: tie parameters by registering one tensor under both names",
                  {.key = range.entry->name});
    }
    const Range*& last = range.entry->parameter ? parameter : buffer;
    if (!meets(last) || last->end < range.end) last = &range;
  }
}

}  // namespace

struct FsdpEngine::ValueTarget final : TouchTarget {
  ValueTarget(FsdpEngine* e, FlatParameter* f) : engine(e), flat(f) {}
  void pin(const std::string& op, const at::Tensor& tensor, bool) override { engine->pin(*flat, op, tensor); }
  void unpin() noexcept override {
    std::lock_guard lock(engine->mutex_);
    --flat->pins;
  }
  FsdpEngine* engine;
  FlatParameter* flat;
};

struct FsdpEngine::GradientTarget final : TouchTarget {
  GradientTarget(FsdpEngine* e, FlatParameter* f) : engine(e), flat(f) {}
  void pin(const std::string& op, const at::Tensor& tensor, bool) override {
    throw Error(ErrorCode::kFailedPrecondition,
                op + " used the gradient of a module's own parameter handle, but the gradient is in the sharded "
                     "model's slices: give "
                     "parameters() of the sharded model to the optimizer, and clip with its clip_grad_norm",
                {.rank = engine->global_rank(), .key = engine->name_at(*flat, tensor)});
  }
  void unpin() noexcept override {}
  FsdpEngine* engine;
  FlatParameter* flat;
};

struct FsdpEngine::ShardTarget final : TouchTarget {
  ShardTarget(FsdpEngine* e, FlatParameter* f) : engine(e), flat(f) {}
  void pin(const std::string&, const at::Tensor& tensor, bool written) override {
    if (!written) return;
    std::lock_guard lock(engine->mutex_);
    flat->note_write(tensor.storage_offset());
  }
  void unpin() noexcept override {}
  FsdpEngine* engine;
  FlatParameter* flat;
};

struct FsdpEngine::GradientHook final : torch::autograd::PostAccumulateGradHook {
  GradientHook(FsdpEngine* e, FlatParameter* f, FlatParameter::Member* m) : engine(e), flat(f), member(m) {}
  void operator()(const torch::autograd::Variable&) override { engine->on_gradient(*flat, *member); }
  FsdpEngine* engine;
  FlatParameter* flat;
  FlatParameter::Member* member;
};

struct FsdpEngine::Watched {
  template <class... Args>
  explicit Watched(FsdpEngine* engine, Args&&... args)
      : flat(std::forward<Args>(args)...), values(engine, &flat), shard(engine, &flat), gradients(engine, &flat) {
    watch_storage(flat.storage(), &values);
    watch_storage(flat.shard_storage(), &shard);
    watch_storage(flat.gradient_storage(), &gradients);
  }
  ~Watched() {
    forget_storage(flat.storage());
    forget_storage(flat.shard_storage());
    forget_storage(flat.gradient_storage());
    for (size_t i = 0; i < hooks.size(); ++i) {
      at::Tensor& handle = flat.members()[i].handle;
      handle.remove_hook(hooks[i]);
      torch::autograd::impl::set_post_acc_grad_hooks(handle, nullptr);
      handle.mutable_grad().reset();
    }
  }
  FlatParameter flat;
  ValueTarget values;
  ShardTarget shard;
  GradientTarget gradients;
  std::vector<unsigned> hooks;
};

/// The module's parameters and the unit of each, before anything is changed.
struct FsdpEngine::Discovered {
  struct Unit {
    std::string name;
    size_t depth;
  };
  std::vector<Unit> units;
  std::vector<ShardedParameter> parameters;
  std::vector<at::Tensor> handles;
  std::vector<size_t> unit_of;
  std::vector<Entry> entries;
};

FsdpEngine::Discovered FsdpEngine::discover(const torch::nn::Module& root) const {
  Discovered found;
  found.units.push_back({"", 0});
  std::map<const at::TensorImpl*, size_t> index;
  std::set<std::string> names;
  const std::function<void(const torch::nn::Module&, const std::string&, size_t)> visit =
      [&](const torch::nn::Module& module, const std::string& path, size_t unit) {
        refuse_module(module, path);
        names.insert(path);
        if (!path.empty() && options_.wrap_policy.wraps(path, module)) {
          found.units.push_back({path, found.units[unit].depth + 1});
          unit = found.units.size() - 1;
        }
        for (const auto& item : module.named_parameters(/*recurse=*/false)) {
          const at::Tensor& handle = item.value();
          const auto [it, is_new] = index.try_emplace(handle.unsafeGetTensorImpl(), found.handles.size());
          const size_t i = it->second;
          if (is_new) {
            found.handles.push_back(handle);
            found.unit_of.push_back(unit);
            found.parameters.push_back(
                {.names = {}, .shape = to_dims(handle.sizes()), .begin = 0, .end = 0, .slice = {}});
          } else if (found.units[unit].depth < found.units[found.unit_of[i]].depth) {
            found.unit_of[i] = unit;  // a tied parameter belongs to the outermost unit that uses it
          }
          found.parameters[i].names.push_back(join(path, item.key()));
          found.entries.push_back({join(path, item.key()), i, {}});
        }
        for (const auto& item : module.named_buffers(/*recurse=*/false)) {
          found.entries.push_back({join(path, item.key()), std::nullopt, item.value()});
        }
        for (const auto& child : module.named_children()) visit(*child.value(), join(path, child.key()), unit);
      };
  visit(root, "", 0);
  for (const std::string& name : options_.wrap_policy.must_match()) {
    if (!names.contains(name))
      throw Error(ErrorCode::kInvalidArgument, "the wrap policy names a module that the model does not have",
                  {.key = name});
  }
  return found;
}

FsdpEngine::FsdpEngine(std::shared_ptr<torch::nn::Module> module, const std::shared_ptr<Recording>& recording,
                       FsdpOptions options)
    : module_(std::move(module)), options_(std::move(options)) {
  if (!module_) throw Error(ErrorCode::kInvalidArgument, "no module to shard");
  if (options_.mesh) {
    const size_t dims = options_.mesh->ndim();
    if (options_.process_group)
      throw Error(ErrorCode::kInvalidArgument, "FsdpOptions has a process group and a mesh: one says it all");
    if (dims > 2) {
      throw Error(ErrorCode::kInvalidArgument, "cannot shard a model over such a mesh: take a submesh",
                  {.wanted = "1 dimension (shard) or 2 (replicate, shard)", .found = std::to_string(dims)});
    }
    options_.process_group = options_.mesh->get_group(dims - 1);
  }
  if (!options_.process_group) options_.process_group = default_process_group();
  group().rank();  // throws for a rank that is not a member
  const MixedPrecision& mixed = options_.mixed_precision;
  for (const auto& dtype : {mixed.param_dtype, mixed.reduce_dtype, mixed.output_dtype}) {
    if (dtype && !at::isFloatingType(*dtype)) {
      throw Error(ErrorCode::kInvalidArgument, "mixed precision is for real floating-point dtypes",
                  {.found = c10::toString(*dtype)});
    }
  }
  Discovered found = discover(*module_);
  for (size_t i = 0; i < found.handles.size(); ++i)
    refuse_parameter(found.handles[i], found.parameters[i].names.front(), recording.get());
  refuse_shared_memory(found.entries, found.handles);
  require_same_on_all_ranks(found);
  std::set<const c10::StorageImpl*> parameter_storages;
  for (const at::Tensor& handle : found.handles) parameter_storages.insert(handle.storage().unsafeGetStorageImpl());
  build_units(std::move(found), recording);
  build_buffers(recording, parameter_storages);
}

FsdpEngine::~FsdpEngine() = default;

void FsdpEngine::require_same_on_all_ranks(const Discovered& found) const {
  // Without this, collectives of different sizes meet, and the backend aborts the process.
  std::string text = std::to_string(static_cast<int>(options_.layout));
  for (const auto& dtype : {options_.mixed_precision.param_dtype, options_.mixed_precision.reduce_dtype})
    text += " " + std::to_string(dtype ? static_cast<int>(*dtype) : -1);
  for (size_t i = 0; i < found.handles.size(); ++i) {
    const ShardedParameter& parameter = found.parameters[i];
    for (const std::string& name : parameter.names) text += "\n" + name;
    text += to_string(parameter.shape) + std::to_string(static_cast<int>(found.handles[i].scalar_type())) +
            (found.handles[i].requires_grad() ? "trainable" : "frozen") + std::to_string(found.unit_of[i]);
  }
  const auto hash = static_cast<int64_t>(std::hash<std::string>()(text));
  at::Tensor extremes = at::empty({2}, at::kLong);
  extremes[0].fill_(hash);
  extremes[1].fill_(~hash);  // its largest is the complement of the smallest hash
  if (!group().has_backend(c10::kCPU)) extremes = extremes.to(options_.device);
  group().all_reduce_max(extremes);
  if (ProcessGroup* replicas = replica_group(options_)) replicas->all_reduce_max(extremes);
  if (extremes[0].item<int64_t>() == ~extremes[1].item<int64_t>()) return;
  throw Error(
      ErrorCode::kInvalidArgument,
      "the ranks of the group wrap different models: names, shapes, dtypes, what is frozen, units, layout or mixed "
      "precision differ",
      {.rank = global_rank(), .found = std::to_string(found.handles.size()) + " parameters here"});
}

void FsdpEngine::build_units(Discovered found, const std::shared_ptr<Recording>& recording) {
  parameters_ = std::move(found.parameters);
  entries_ = std::move(found.entries);
  for (const Discovered::Unit& unit : found.units) unit_names_.push_back(unit.name);
  // Frozen and trainable parameters are kept apart, so that no zeros travel for frozen ones; so are dtypes.
  std::map<std::tuple<size_t, at::ScalarType, bool>, size_t> group_of;
  std::vector<std::vector<FlatParameter::Member>> groups;
  std::vector<size_t> unit_of_group;
  for (size_t i = 0; i < found.handles.size(); ++i) {
    const at::Tensor& handle = found.handles[i];
    const auto [it, is_new] =
        group_of.try_emplace({found.unit_of[i], handle.scalar_type(), handle.requires_grad()}, groups.size());
    if (is_new) {
      groups.emplace_back();
      unit_of_group.push_back(found.unit_of[i]);
    }
    FlatParameter::Member member;
    member.index = i;
    member.handle = handle;
    groups[it->second].push_back(std::move(member));
  }
  found.handles.clear();
  const auto values = [&](const std::vector<at::Tensor>& handles) {
    std::vector<at::Tensor> on_meta;
    for (const at::Tensor& handle : handles) {
      if (handle.is_meta()) on_meta.push_back(handle);
    }
    std::vector<at::Tensor> replayed;
    if (!on_meta.empty()) replayed = recording->materialize(on_meta);
    std::vector<at::Tensor> result;
    size_t next = 0;
    for (const at::Tensor& handle : handles) result.push_back(handle.is_meta() ? replayed[next++] : handle.detach());
    return result;
  };
  std::vector<uint64_t> unit_bytes(unit_names_.size(), 0);
  for (size_t g = 0; g < groups.size(); ++g) {
    flats_.push_back(std::make_unique<Watched>(this, unit_names_[unit_of_group[g]], std::move(groups[g]), parameters_,
                                               options_, stats_, values));
    attach(flats_.back()->flat);
    unit_bytes[unit_of_group[g]] += flats_.back()->flat.bytes();
    const auto before =
        std::count(unit_of_group.begin(), unit_of_group.begin() + static_cast<ptrdiff_t>(g), unit_of_group[g]);
    flat_parameters_.emplace_back(
        join(unit_names_[unit_of_group[g]], before == 0 ? "_flat_param" : "_flat_param_" + std::to_string(before)),
        &flats_.back()->flat);
  }
  for (const uint64_t bytes : unit_bytes) {
    stats_.largest_unit_bytes = std::max(stats_.largest_unit_bytes, bytes);
    stats_.all_units_bytes += bytes;
  }
}

void FsdpEngine::attach(FlatParameter& flat) {
  if (!flat.requires_grad()) return;
  for (FlatParameter::Member& member : flat.members()) {
    FlatParameter::Member* m = &member;
    // Before a gradient is accumulated, so that autograd never adds to the stand-in, nor to what a broken pass left.
    flats_.back()->hooks.push_back(
        member.handle.register_hook([m](const at::Tensor&) { m->handle.mutable_grad().reset(); }));
    torch::autograd::impl::set_post_acc_grad_hooks(member.handle, std::make_unique<GradientHook>(this, &flat, m));
  }
}

void FsdpEngine::build_buffers(const std::shared_ptr<Recording>& recording,
                               const std::set<const c10::StorageImpl*>& parameter_storages) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> on_meta;
  std::set<const at::TensorImpl*> seen;
  std::vector<std::pair<std::string, at::Tensor>> buffers;
  for (const Entry& entry : entries_) {
    if (entry.parameter || !seen.insert(entry.buffer.unsafeGetTensorImpl()).second) continue;
    if (entry.buffer.is_meta() && (!recording || !recording->knows(entry.buffer))) {
      throw Error(ErrorCode::kInvalidArgument,
                  "buffer is on the meta device and its values are not known: build the module inside on_meta",
                  {.key = entry.name});
    }
    buffers.emplace_back(entry.name, entry.buffer);
    if (entry.buffer.is_meta()) on_meta.push_back(entry.buffer);
  }
  if (recording) {
    // Tensors that a module holds without having registered them are part of it all the same.
    for (const at::Tensor& tensor : recording->alive()) {
      if (!tensor.is_meta() || !seen.insert(tensor.unsafeGetTensorImpl()).second) continue;
      if (parameter_storages.contains(tensor.storage().unsafeGetStorageImpl())) {
        throw Error(ErrorCode::kUnsupported,
                    "a tensor that is not registered with its module shares memory with a parameter",
                    {.found = "a tensor of sizes " + to_string(to_dims(tensor.sizes()))});
      }
      on_meta.push_back(tensor);
    }
    const std::vector<at::Tensor> values = recording->materialize(on_meta);
    for (size_t i = 0; i < on_meta.size(); ++i)
      on_meta[i].unsafeGetTensorImpl()->shallow_copy_from(values[i].getIntrusivePtr());
  }
  for (auto& [name, buffer] : buffers) {
    if (buffer.device() != options_.device &&
        !(buffer.device().type() == options_.device.type() && !options_.device.has_index())) {
      buffer.unsafeGetTensorImpl()->shallow_copy_from(buffer.to(options_.device).getIntrusivePtr());
    }
    if (options_.sync_module_states && buffer.numel() > 0) {
      const at::Tensor dense = buffer.is_contiguous() ? buffer : buffer.contiguous();
      at::Tensor bytes = byte_view(dense);
      group().broadcast(bytes, 0);
      if (ProcessGroup* replicas = replica_group(options_)) replicas->broadcast(bytes, 0);
      if (!dense.is_same(buffer)) buffer.copy_(dense);
    }
  }
}

const std::string& FsdpEngine::name_at(const FlatParameter& flat, const at::Tensor& tensor) const {
  const auto& members = flat.members();
  size_t i = 0;
  while (i + 1 < members.size() && members[i + 1].full_offset <= tensor.storage_offset()) ++i;
  return parameters_[members[i].index].names.front();
}

bool FsdpEngine::is_armed() const { return forward_depth_ > 0 || summon_depth_ > 0 || in_backward(); }

void FsdpEngine::pin(FlatParameter& flat, const std::string& op, const at::Tensor& tensor) {
  std::lock_guard lock(mutex_);
  if (!is_armed()) {
    throw Error(
        ErrorCode::kFailedPrecondition,
        op + " used a sharded parameter outside of a forward pass, a backward pass and SummonFullParams; gathering "
             "it here would wait for the other ranks. (An optimizer or a clip needs the sharded model's "
             "parameters(), not the module's.)",
        {.rank = global_rank(), .key = name_at(flat, tensor)});
  }
  if (in_backward()) {
    if (flat.is_stale() && forward_depth_ == 0) {
      throw Error(ErrorCode::kFailedPrecondition,
                  op + " of the backward pass needs a parameter as the forward pass saw it, but it was written since: "
                       "no optimizer step or load may come between the two",
                  {.rank = global_rank(), .key = name_at(flat, tensor)});
    }
    queue_end_of_backward();
  }
  gather(flat);
  ++flat.pins;
}

void FsdpEngine::gather(FlatParameter& flat) {
  last_unit_ = &flat.unit();
  if (flat.is_stale() && flat.pins == 0) flat.reshard();
  if (flat.is_unsharded()) return;
  if (options_.reshard_after_forward && summon_depth_ == 0) {
    for (const auto& other : flats_) {
      if (other->flat.unit() != flat.unit()) release(other->flat);
    }
  }
  flat.unshard();
  prefetch_after(flat);
}

void FsdpEngine::prefetch_after(FlatParameter& flat) {
  const bool backward = in_backward();
  if (!(backward ? options_.backward_prefetch : options_.forward_prefetch)) return;
  PassOrder& order = backward ? backward_order_ : forward_order_;
  const size_t i = order.now.size();
  order.now.push_back(&flat);
  order.follows = order.follows && i < order.last.size() && order.last[i] == &flat;
  if (!order.follows || i + 1 == order.last.size()) return;
  FlatParameter& next = *order.last[i + 1];
  // One that was written to since the forward pass is left for pin() to refuse.
  if (!next.is_unsharded() && !(backward && next.is_stale())) next.begin_unshard();
}

void FsdpEngine::release(FlatParameter& flat) {
  if (flat.pins == 0 && summon_depth_ == 0) flat.reshard();
}

void FsdpEngine::reshard() {
  std::lock_guard lock(mutex_);
  for (const auto& watched : flats_) release(watched->flat);
}

void FsdpEngine::note_load() {
  std::lock_guard lock(mutex_);
  for (const auto& watched : flats_) watched->flat.note_writes();
}

void FsdpEngine::on_gradient(FlatParameter& flat, FlatParameter::Member& member) {
  std::lock_guard lock(mutex_);
  const ErrorContext context{.rank = global_rank(), .key = parameters_[member.index].names.front()};
  if (at::GradMode::is_enabled()) {
    throw Error(ErrorCode::kUnsupported, "backward with create_graph cannot go through a sharded parameter", context);
  }
  const at::Tensor gradient = member.handle.grad();
  if (gradient.layout() != at::kStrided)
    throw Error(ErrorCode::kUnsupported, "a sharded parameter got a sparse gradient", context);
  flat.add_gradient(member, gradient);
  member.handle.mutable_grad() = member.refused_grad;
  member.refusing = true;
  queue_end_of_backward();
  if (!flat.all_arrived()) return;
  release(flat);  // before the reduction, which needs memory of its own
  if (no_sync_depth_ == 0) {
    flat.reduce_gradient();
  } else {
    flat.end_pass();
  }
}

void FsdpEngine::queue_end_of_backward() {
  const int task = torch::autograd::get_current_graph_task_id();
  if (task == queued_task_) return;
  queued_task_ = task;
  backward_order_.begin_pass();
  torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this()] {
    if (const auto engine = weak.lock()) engine->end_of_backward();
  });
}

void FsdpEngine::end_of_backward() {
  std::lock_guard lock(mutex_);
  queued_task_ = -1;
  for (const auto& watched : flats_) {
    release(watched->flat);
    if (watched->flat.has_gradient() && no_sync_depth_ == 0) watched->flat.reduce_gradient();
    watched->flat.end_pass();
  }
}

void FsdpEngine::check_before_forward() {
  for (const auto& watched : flats_) {
    FlatParameter& flat = watched->flat;
    if (flat.pass_is_open()) {
      log(LogLevel::kWarning,
          "a backward pass broke off; the gradients of unit '" + flat.unit() + "' that it left are dropped");
      flat.drop_gradient();
    }
    for (FlatParameter::Member& member : flat.members()) {
      const ShardedParameter& parameter = parameters_[member.index];
      const ErrorContext context{.rank = global_rank(), .key = parameter.names.front()};
      if (!flat.owns(member)) {
        throw Error(ErrorCode::kFailedPrecondition,
                    "the module's parameter no longer belongs to the sharded model: Module::to, set_data or an "
                    "assignment replaced it",
                    context);
      }
      if (member.handle.requires_grad() && !flat.requires_grad()) {
        throw Error(ErrorCode::kFailedPrecondition,
                    "the parameter was frozen when the model was wrapped, so nothing takes its gradient: set "
                    "requires_grad before wrapping",
                    context);
      }
      if (!flat.gradient_is_as_left(member) || !at::GradMode::is_enabled() || no_sync_depth_ > 0) continue;
      if (member.writes == member.left_writes) {
        if (options_.accumulate_reduced_gradients) continue;
        throw Error(
            ErrorCode::kFailedPrecondition,
            "no optimizer used the gradient of the last backward pass: give parameters() of the sharded model to the "
            "optimizer. To add "
            "gradients up over passes use no_sync() or accumulate_reduced_gradients; to drop them call zero_grad()",
            context);
      }
      if (member.refusing && !member.handle.grad().defined()) {
        throw Error(ErrorCode::kFailedPrecondition,
                    "the module's zero_grad() does not reach the gradients of a sharded model: call zero_grad() of the "
                    "optimizer or of the sharded "
                    "model",
                    context);
      }
    }
  }
}

void FsdpEngine::begin_forward() {
  std::lock_guard lock(mutex_);
  if (forward_depth_ == 0 && !in_backward()) {
    check_before_forward();
    forward_order_.begin_pass();
  }
  ++forward_depth_;
}

void FsdpEngine::end_forward() noexcept {
  std::lock_guard lock(mutex_);
  if (--forward_depth_ > 0 || in_backward() || !options_.reshard_after_forward) return;
  // Backward usually begins with the unit that forward ended with.
  const bool keep_last = at::GradMode::is_enabled() && last_unit_ != nullptr;
  for (const auto& watched : flats_) {
    if (!keep_last || watched->flat.unit() != *last_unit_) release(watched->flat);
  }
}

void FsdpEngine::require_idle(const char* what) const {
  if (forward_depth_ > 0 || in_backward()) {
    throw Error(ErrorCode::kFailedPrecondition, std::string(what) + " is not allowed inside a forward or backward pass",
                {.rank = global_rank()});
  }
}

void FsdpEngine::begin_summon() {
  std::lock_guard lock(mutex_);
  require_idle("SummonFullParams");
  if (summon_depth_ == 0) {
    summon_writeback_ = false;
    try {
      for (const auto& watched : flats_) watched->flat.summon();
    } catch (...) {
      for (const auto& watched : flats_) watched->flat.end_summon(/*written_back=*/false);
      throw;
    }
  }
  ++summon_depth_;
}

void FsdpEngine::end_summon(bool writeback) {
  std::lock_guard lock(mutex_);
  summon_writeback_ = summon_writeback_ || writeback;
  if (--summon_depth_ > 0) return;
  for (const auto& watched : flats_) watched->flat.end_summon(summon_writeback_);
}

std::vector<at::Tensor> FsdpEngine::full_parameters() {
  std::lock_guard lock(mutex_);
  require_idle("a full state dict");
  std::vector<at::Tensor> result(parameters_.size());
  for (const auto& watched : flats_) release(watched->flat);
  for (const auto& watched : flats_) {
    std::vector<at::Tensor> values = watched->flat.full_parameters();
    for (size_t i = 0; i < values.size(); ++i) result[watched->flat.members()[i].index] = std::move(values[i]);
  }
  return result;
}

double FsdpEngine::clip_grad_norm(double max_norm, double norm_type) {
  if (!(norm_type > 0)) {
    throw Error(ErrorCode::kInvalidArgument, "clip_grad_norm needs norm_type > 0",
                {.found = std::to_string(norm_type)});
  }
  const at::NoGradGuard no_grad;
  const bool infinity = std::isinf(norm_type);
  at::Tensor total = at::zeros({1}, at::TensorOptions().dtype(at::kDouble).device(options_.device));
  for (const ShardedParameter& parameter : parameters_) {
    const at::Tensor& gradient = parameter.slice.grad();
    if (!gradient.defined() || gradient.numel() == 0) continue;
    const at::Tensor norm = at::linalg_vector_norm(gradient, norm_type, std::nullopt, /*keepdim=*/false,
                                                   at::toOpMathType(gradient.scalar_type()))
                                .to(at::kDouble);
    infinity ? total.copy_(at::maximum(total, norm)) : total.add_(norm.pow(norm_type));
  }
  infinity ? group().all_reduce_max(total) : group().all_reduce_sum(total);
  const double norm = infinity ? total.item<double>() : std::pow(total.item<double>(), 1.0 / norm_type);
  const double scale = max_norm / (norm + 1e-6);
  if (!(scale >= 1.0)) {  // also when the norm is not a number, as torch does
    for (const auto& watched : flats_) watched->flat.scale_gradients(scale);
  }
  return norm;
}

}  // namespace reshard
