// SPDX-License-Identifier: BSD-3-Clause
#include "fsdp/interception.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>

namespace reshard {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<const c10::StorageImpl*, TouchTarget*> targets;
};

Registry& registry() {
  static auto* instance = new Registry;  // never destroyed: operators may run during exit
  return *instance;
}

TouchTarget* target_of(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.key_set().has(kShardKey) || !tensor.has_storage()) return nullptr;
  Registry& r = registry();
  std::shared_lock lock(r.mutex);
  const auto it = r.targets.find(tensor.storage().unsafeGetStorageImpl());
  return it == r.targets.end() ? nullptr : it->second;
}

// Operators that look at sizes and strides only: views, and factories that copy a shape.
bool reads_no_values(const c10::OperatorHandle& op) {
  const std::string_view name = op.operator_name().name;
  if (name.starts_with("aten::") &&
      (name.ends_with("_like") || name.starts_with("aten::new_") || name == "aten::is_same_size"))
    return true;
  const c10::FunctionSchema& schema = op.schema();
  bool aliases = false;
  for (const c10::Argument& result : schema.returns()) {
    if (const c10::AliasInfo* info = result.alias_info()) {
      if (info->isWrite()) return false;
      aliases = true;
    }
  }
  return aliases;
}

/// Keeps units in memory while an operator runs: kernels call further operators, whose touches must not evict what is
/// in use.
class Pins {
 public:
  explicit Pins(const std::string& op) : op_(op) {}
  Pins(const Pins&) = delete;
  Pins& operator=(const Pins&) = delete;
  ~Pins() {
    for (TouchTarget* target : targets_) target->unpin();
  }
  void add(const at::Tensor& tensor, bool written) {
    TouchTarget* target = target_of(tensor);
    if (target == nullptr) return;
    if (!written && std::find(targets_.begin(), targets_.end(), target) != targets_.end()) return;
    target->pin(op_, tensor, written);
    targets_.push_back(target);
  }

 private:
  const std::string& op_;
  c10::SmallVector<TouchTarget*, 4> targets_;
};

void on_touch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  Pins pins(op.operator_name().name);
  if (!reads_no_values(op)) {
    const auto& arguments = op.schema().arguments();
    const size_t begin = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& value = (*stack)[begin + i];
      const c10::AliasInfo* alias = arguments[i].alias_info();
      const bool written = alias != nullptr && alias->isWrite();
      if (value.isTensor()) {
        pins.add(value.toTensor(), written);
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) pins.add(tensor, written);
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
          if (tensor.has_value()) pins.add(*tensor, written);
        }
      }
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kShardKey), stack);
}

TORCH_LIBRARY_IMPL(_, DeferredInit, m) {
  static_assert(kShardKey == c10::DispatchKey::DeferredInit);
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_touch>());
}

}  // namespace

void watch_storage(const c10::StorageImpl* storage, TouchTarget* target) {
  std::unique_lock lock(registry().mutex);
  registry().targets[storage] = target;
}

void forget_storage(const c10::StorageImpl* storage) noexcept {
  std::unique_lock lock(registry().mutex);
  registry().targets.erase(storage);
}

}  // namespace reshard
