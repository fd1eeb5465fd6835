// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/meta.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_set>

#include "fsdp/recording.h"
#include "reshard/core/dims.h"
#include "reshard/core/error.h"

namespace reshard {
namespace {

constexpr c10::DispatchKey kRecordKey = c10::DispatchKey::TESTING_ONLY_GenericMode;
constexpr const char* kRawAccess =
    "memory of a tensor was accessed through a raw pointer while its module was built on the meta device";

thread_local Recording* active_recording = nullptr;

[[noreturn]] void refuse(const std::string& op, const std::string& why) {
  throw Error(ErrorCode::kUnsupported, "on_meta cannot replay " + op + ": " + why);
}

std::string full_name(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Random and constant fills: what the tensor held before does not matter.
bool is_overwrite(std::string_view op) {
  static const std::set<std::string_view> names = {
      "aten::uniform_", "aten::normal_",     "aten::random_",    "aten::exponential_", "aten::geometric_",
      "aten::cauchy_",  "aten::log_normal_", "aten::bernoulli_", "aten::zero_",        "aten::fill_"};
  return names.contains(op);
}

/// Calls fn(tensor, index of the argument, index in its list or nothing) for each defined tensor among IValues.
template <class Fn>
void for_each_tensor(const torch::jit::Stack& values, size_t begin, Fn&& fn) {
  for (size_t i = begin; i < values.size(); ++i) {
    const c10::IValue& value = values[i];
    if (value.isTensor()) {
      if (value.toTensor().defined()) fn(value.toTensor(), i - begin, std::optional<size_t>());
    } else if (value.isTensorList()) {
      const auto list = value.toTensorVector();
      for (size_t k = 0; k < list.size(); ++k) {
        if (list[k].defined()) fn(list[k], i - begin, std::optional<size_t>(k));
      }
    } else if (value.isOptionalTensorList()) {
      const auto list = value.toOptionalTensorVector();
      for (size_t k = 0; k < list.size(); ++k) {
        if (list[k].has_value() && list[k]->defined()) fn(*list[k], i - begin, std::optional<size_t>(k));
      }
    }
  }
}

/// Replaces one tensor among IValues; lists are copied, never shared.
void set_tensor(torch::jit::Stack& values, size_t index, std::optional<size_t> item, const at::Tensor& tensor) {
  c10::IValue& value = values[index];
  if (!item) {
    value = tensor.defined() ? c10::IValue(tensor) : c10::IValue();
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    list[*item] = tensor;
    value = c10::IValue(std::move(list));
  } else {
    auto list = value.toOptionalTensorVector();
    list[*item] = tensor;
    value = c10::IValue(c10::List<std::optional<at::Tensor>>(list));
  }
}

at::Tensor generator_state() {
  const at::Generator generator = at::detail::getDefaultCPUGenerator();
  return generator.get_state();
}

void set_generator_state(const at::Tensor& state) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  generator.set_state(state);
}

/// False: from now on a raw pointer to the storage cannot be had, but throws.
void let_read(const c10::Storage& storage, bool allowed) {
  if (allowed) {
    storage.unsafeGetStorageImpl()->clear_data_ptr_access_error_msg_();
  } else {
    storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(kRawAccess);
  }
}

/// A copy with memory of its own and the same strides.
at::Tensor copy_of(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  if (tensor.layout() != at::kStrided || tensor.numel() == 0) return tensor.clone();
  const auto elements =
      static_cast<int64_t>(at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), /*itemsize=*/1));
  return tensor.as_strided({elements}, {1}, tensor.storage_offset())
      .clone()
      .as_strided(tensor.sizes(), tensor.strides(), 0);
}

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  return a.nbytes() == b.nbytes() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

/// True if the generator is as manual_seed leaves it.
bool is_freshly_seeded() {
  auto* generator = at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>();
  const at::mt19937_data_pod data = generator->engine().data();
  return data.left_ == 1 && data.next_ == 0;
}

/// Puts the generator back on every way out.
class KeepGenerator {
 public:
  KeepGenerator() : state_(generator_state()) {}
  ~KeepGenerator() { set_generator_state(state_); }
  KeepGenerator(const KeepGenerator&) = delete;
  KeepGenerator& operator=(const KeepGenerator&) = delete;

 private:
  at::Tensor state_;
};

void on_operator(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard outermost_only(kRecordKey);
  const c10::DispatchKeySet rest = keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kRecordKey);
  if (active_recording == nullptr) {
    op.redispatchBoxed(rest, stack);
  } else {
    active_recording->record(op, rest, stack);
  }
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, m) {
  static_assert(kRecordKey == c10::DispatchKey::TESTING_ONLY_GenericMode);
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_operator>());
}

}  // namespace

Recording::Place Recording::place_of(const at::Tensor& tensor) const {
  return {ids_.at(tensor.storage().unsafeGetStorageImpl()), tensor.storage_offset(), tensor.sizes().vec(),
          tensor.strides().vec(), tensor.scalar_type()};
}

bool Recording::knows(const at::Tensor& tensor) const {
  return tensor.is_meta() && tensor.has_storage() && ids_.contains(tensor.storage().unsafeGetStorageImpl());
}

void Recording::record(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const std::string name = full_name(op);
  const std::string_view base = op.operator_name().name;
  const auto& arguments = op.schema().arguments();
  const size_t begin = stack->size() - arguments.size();
  const bool is_random = op.hasTag(at::Tag::nondeterministic_seeded);

  Operation operation{.op = op, .arguments = {stack->begin() + static_cast<std::ptrdiff_t>(begin), stack->end()}};
  for_each_tensor(*stack, begin, [&](const at::Tensor& tensor, size_t index, std::optional<size_t> item) {
    const c10::AliasInfo* alias = arguments[index].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (!tensor.is_meta()) {
      if (written && is_random) refuse(name, "it draws random numbers into a tensor made outside of on_meta");
      return;
    }
    if (!knows(tensor)) refuse(name, "it uses a tensor on the meta device that was made outside of on_meta");
    if (tensor.is_conj() || tensor.is_neg()) refuse(name, "it uses a lazily conjugated or negated tensor");
    operation.places.push_back({index, item, place_of(tensor)});
    const size_t storage = operation.places.back().place.storage;
    if (written) operation.writes.push_back(storage);
    operation.reads.push_back(storage);
  });
  const bool has_recorded = !operation.places.empty();
  for_each_tensor(*stack, begin, [&](const at::Tensor& tensor, size_t index, std::optional<size_t>) {
    const c10::AliasInfo* alias = arguments[index].alias_info();
    if (has_recorded && !tensor.is_meta() && alias != nullptr && alias->isWrite()) {
      refuse(name, "it writes recorded values into a tensor made outside of on_meta");
    }
  });
  operation.overwrites_self =
      is_overwrite(base) && operation.places.size() == 1 && operation.places[0].index == 0 && !operation.writes.empty();
  if (operation.overwrites_self) operation.reads.clear();

  bool is_factory = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    if (value.isStorage()) refuse(name, "it takes a storage");
    if (value.isGenerator() && value.toGenerator().defined() &&
        !(value.toGenerator() == at::detail::getDefaultCPUGenerator())) {
      refuse(name, "it has a random generator of its own");
    }
    if (arguments[i].name() != "device") continue;
    // torch::nn::init asks a parameter for its device, which is meta while it records.
    if (value.isDevice() && value.toDevice().is_meta()) operation.arguments[i] = c10::Device(c10::kCPU);
    if (value.isDevice() && !value.toDevice().is_cpu() && !value.toDevice().is_meta())
      refuse(name, "it asks for device " + value.toDevice().str() + "; use FsdpOptions::device");
    const bool is_conversion = base == "aten::to" || base == "aten::_to_copy";
    if (is_conversion && !has_recorded) continue;  // of a tensor made outside: done for real
    is_factory = !is_conversion;
    value = c10::Device(c10::kMeta);
  }
  if (is_random && (has_recorded || is_factory)) {
    const at::Tensor state = generator_state();
    if (!last_seed_state_.defined() || !same_bytes(state, last_seed_state_)) {
      if (last_seed_state_.defined() && !is_freshly_seeded()) {
        refuse(name, "the random generator was used or set by other means than recorded operations and manual_seed");
      }
      operation.random_state = state;
    }
    // Meta kernels draw nothing. One draw by hand makes every later manual_seed show as another state, also one with
    // the same seed.
    at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>()->random();
    last_seed_state_ = generator_state();
  } else if (is_random) {
    refuse(name, "it draws random numbers from tensors made outside of on_meta");
  }
  if (has_recorded || is_factory) {
    // Operators want all tensors on one device. The recorded arguments keep the real ones.
    for_each_tensor(torch::jit::Stack(*stack), begin,
                    [&](const at::Tensor& tensor, size_t index, std::optional<size_t> item) {
                      if (tensor.is_meta() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
                      set_tensor(*stack, begin + index, item,
                                 at::empty_strided(tensor.sizes(), tensor.strides(),
                                                   tensor.options().device(at::kMeta).requires_grad(false)));
                    });
  }

  // Operators may look at the (null) pointers of meta tensors, to see whether memory overlaps; nobody else may.
  for (const auto& argument : operation.places) let_read(storages_[argument.place.storage], true);
  try {
    op.redispatchBoxed(keys, stack);
  } catch (const c10::Error& error) {
    refuse(name, error.what_without_backtrace());
  }
  for (const auto& argument : operation.places) let_read(storages_[argument.place.storage], false);
  if (!has_recorded && !is_factory) return;

  size_t result_index = 0;
  const size_t results = op.schema().returns().size();
  for_each_tensor(*stack, stack->size() - results, [&](const at::Tensor& tensor, size_t, std::optional<size_t>) {
    const size_t index = result_index++;
    if (!tensor.is_meta()) return;
    const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
    results_.emplace_back(tensor.getIntrusivePtr());
    if (ids_.contains(storage)) return;
    ids_[storage] = storages_.size();
    storages_.push_back(tensor.storage());
    let_read(storages_.back(), false);
    operation.creates.emplace_back(index, place_of(tensor));
  });
  if (operation.creates.empty() && operation.writes.empty()) return;
  if (is_factory) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      // The default dtype may be another one when it is replayed.
      if (arguments[i].name() == "dtype" && operation.arguments[i].isNone() && !operation.creates.empty()) {
        operation.arguments[i] = static_cast<int64_t>(operation.creates[0].second.dtype);
      }
    }
  }
  // Of tensors made outside, what they hold now is what counts, whatever becomes of them.
  for_each_tensor(torch::jit::Stack(operation.arguments), 0,
                  [&](const at::Tensor& tensor, size_t index, std::optional<size_t> item) {
                    if (!tensor.is_meta() && !tensor.unsafeGetTensorImpl()->is_wrapped_number())
                      set_tensor(operation.arguments, index, item, copy_of(tensor));
                  });
  for (const auto& argument : operation.places)
    set_tensor(operation.arguments, argument.index, argument.item, at::Tensor());
  operations_.push_back(std::move(operation));
}

at::Tensor Recording::tensor_at(const Place& place, const Values& values) {
  return at::empty({0}, place.dtype).set_(values.at(place.storage), place.offset, place.sizes, place.strides);
}

void Recording::execute(const Operation& operation, Values& values) const {
  const at::NoGradGuard no_grad;
  torch::jit::Stack stack = operation.arguments;
  for (const auto& argument : operation.places)
    set_tensor(stack, argument.index, argument.item, tensor_at(argument.place, values));
  if (operation.random_state.defined()) set_generator_state(operation.random_state);
  operation.op.callBoxed(stack);
  std::vector<at::Tensor> results;
  for_each_tensor(stack, 0,
                  [&](const at::Tensor& tensor, size_t, std::optional<size_t>) { results.push_back(tensor); });
  for (const auto& [index, place] : operation.creates) {
    const at::Tensor& result = results.at(index);
    if (result.sizes() != at::IntArrayRef(place.sizes) || result.strides() != at::IntArrayRef(place.strides) ||
        result.storage_offset() != place.offset || result.scalar_type() != place.dtype) {
      refuse(full_name(operation.op), "its result has another layout than on the meta device");
    }
    values[place.storage] = result.storage();
  }
}

Recording::Values Recording::replay(const std::vector<size_t>& storages, size_t end) const {
  // Backwards: which operations matter? Once a storage was overwritten as a whole, only its creation does.
  std::unordered_set<size_t> needed(storages.begin(), storages.end());
  std::unordered_set<size_t> overwritten;
  std::vector<const Operation*> chosen;
  for (size_t i = end; i-- > 0;) {
    const Operation& operation = operations_[i];
    const bool matters = std::any_of(operation.creates.begin(), operation.creates.end(),
                                     [&](const auto& c) { return needed.contains(c.second.storage); }) ||
                         std::any_of(operation.writes.begin(), operation.writes.end(),
                                     [&](size_t s) { return needed.contains(s) && !overwritten.contains(s); });
    if (!matters) continue;
    chosen.push_back(&operation);
    for (const size_t s : operation.reads) {
      needed.insert(s);
      overwritten.erase(s);
    }
    for (const size_t s : operation.writes) needed.insert(s);
    if (operation.overwrites_self) {
      const Place& place = operation.places[0].place;
      const Dims sizes{std::span<const int64_t>(place.sizes)};
      const Dims strides = contiguous_strides(sizes);
      const bool whole = std::equal(strides.begin(), strides.end(), place.strides.begin()) &&
                         volume(sizes) * static_cast<int64_t>(c10::elementSize(place.dtype)) ==
                             static_cast<int64_t>(storages_[place.storage].nbytes());
      if (whole) overwritten.insert(place.storage);
    }
  }
  Values values;
  for (auto it = chosen.rbegin(); it != chosen.rend(); ++it) execute(**it, values);
  return values;
}

void Recording::replay_randomness() {
  const bool seeded_at_end = last_seed_state_.defined() && !same_bytes(generator_state(), last_seed_state_);
  if (seeded_at_end && !is_freshly_seeded()) {
    throw Error(
        ErrorCode::kUnsupported,
        "on_meta: the random generator was used or set by other means than recorded operations and manual_seed");
  }
  const at::Tensor at_end = seeded_at_end ? generator_state() : at::Tensor();
  for (size_t i = 0; i < operations_.size(); ++i) {
    Operation& operation = operations_[i];
    if (!operation.op.hasTag(at::Tag::nondeterministic_seeded)) continue;
    if (operation.random_state.defined()) set_generator_state(operation.random_state);
    const at::Tensor before = generator_state();
    Values values;
    if (operation.overwrites_self) {
      const c10::Storage& storage = storages_[operation.places[0].place.storage];
      values[operation.places[0].place.storage] =
          at::empty({static_cast<int64_t>(storage.nbytes())}, at::kByte).storage();
    } else {
      const KeepGenerator keep;
      values = replay(operation.reads, i);
    }
    operation.random_state = before;
    execute(operation, values);
  }
  if (seeded_at_end) set_generator_state(at_end);
}

std::vector<at::Tensor> Recording::materialize(const std::vector<at::Tensor>& tensors) const {
  const KeepGenerator keep;
  std::vector<size_t> storages;
  for (const at::Tensor& tensor : tensors) storages.push_back(place_of(tensor).storage);
  const Values values = replay(storages, operations_.size());
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(tensor_at(place_of(tensor), values));
  return result;
}

std::vector<at::Tensor> Recording::alive() const {
  std::vector<at::Tensor> result;
  for (const auto& weak : results_) {
    if (auto impl = weak.lock()) {
      at::Tensor tensor(std::move(impl));
      if (knows(tensor)) result.push_back(std::move(tensor));
    }
  }
  return result;
}

namespace detail {

std::shared_ptr<Recording> record_on_meta(const std::function<void()>& build) {
  if (active_recording != nullptr) throw Error(ErrorCode::kFailedPrecondition, "on_meta inside on_meta");
  auto recording = std::make_shared<Recording>();
  const at::Tensor state = generator_state();
  try {
    struct Active {
      explicit Active(Recording* recording) { active_recording = recording; }
      ~Active() { active_recording = nullptr; }
    } const active(recording.get());
    const c10::impl::IncludeDispatchKeyGuard record(kRecordKey);
    build();
  } catch (const c10::Error& error) {
    set_generator_state(state);
    if (std::string_view(error.what()).find(kRawAccess) == std::string_view::npos) throw;
    throw Error(ErrorCode::kUnsupported,
                std::string("on_meta cannot replay a raw access: ") + kRawAccess +
                    " (torch::tensor of a std::vector does that, and so do data_ptr and accessor)");
  } catch (...) {
    set_generator_state(state);
    throw;
  }
  recording->replay_randomness();
  return recording;
}

}  // namespace detail
}  // namespace reshard
