// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// WrapPolicy: which submodules become units of their own. A unit is the set of parameters that is gathered and freed
// together, so the largest one bounds the unsharded memory. What lies in no wrapped submodule belongs to the root unit.

#include <torch/csrc/api/include/torch/nn/module.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace reshard {

/// Decides module by module. A cheap value; copied into the model. The default wraps nothing: the whole model is one
/// unit.
class WrapPolicy {
 public:
  /// `name` is the module's dotted path below the root ("layers.0"). Called once for each submodule, never for the
  /// root.
  using Predicate = std::function<bool(const std::string& name, const torch::nn::Module& module)>;

  WrapPolicy() = default;
  /// `must_match` names what the predicate is expected to find: see unmatched().
  explicit WrapPolicy(Predicate predicate, std::vector<std::string> must_match = {})
      : predicate_(std::move(predicate)), must_match_(std::move(must_match)) {}

  bool wraps(const std::string& name, const torch::nn::Module& module) const {
    return predicate_ && predicate_(name, module);
  }
  /// Names that have to be submodules; one that is not is kInvalidArgument when the model is wrapped.
  const std::vector<std::string>& must_match() const { return must_match_; }

 private:
  Predicate predicate_;
  std::vector<std::string> must_match_;
};

/// Every submodule of one of these types: wrap_by_type<torch::nn::TransformerEncoderLayerImpl>().
template <class... Modules>
WrapPolicy wrap_by_type() {
  return WrapPolicy([](const std::string&, const torch::nn::Module& module) {
    return ((dynamic_cast<const Modules*>(&module) != nullptr) || ...);
  });
}

/// Every submodule for which the predicate holds.
inline WrapPolicy wrap_by_predicate(WrapPolicy::Predicate predicate) { return WrapPolicy(std::move(predicate)); }

/// The submodules of these dotted names.
WrapPolicy wrap_by_name(std::vector<std::string> names);

/// These modules (holders convert through ptr()); one that is not below the root is simply never met.
WrapPolicy wrap_modules(std::vector<std::shared_ptr<torch::nn::Module>> modules);

}  // namespace reshard
