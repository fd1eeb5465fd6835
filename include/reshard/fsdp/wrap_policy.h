// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// WrapPolicy: which submodules become units of their own. A unit is the set of parameters that is gathered and freed
// together, so the largest one bounds the unsharded memory. Units nest: a parameter belongs to the innermost wrapped
// submodule around it, to the root unit if there is none, and a tied one to the outermost of the units that use it.

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
  /// root; every rank must answer alike.
  using Predicate = std::function<bool(const std::string& name, const torch::nn::Module& module)>;

  WrapPolicy() = default;
  /// `must_match`: see must_match().
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

/// Every submodule of one of these types or derived from one: wrap_by_type<torch::nn::TransformerEncoderLayerImpl>().
template <class... Modules>
WrapPolicy wrap_by_type() {
  return WrapPolicy([](const std::string&, const torch::nn::Module& module) {
    return ((dynamic_cast<const Modules*>(&module) != nullptr) || ...);
  });
}

/// Every submodule for which the predicate holds.
inline WrapPolicy wrap_by_predicate(WrapPolicy::Predicate predicate) { return WrapPolicy(std::move(predicate)); }

/// The submodules of these dotted names, as in named_modules(); one that does not exist is kInvalidArgument.
WrapPolicy wrap_by_name(std::vector<std::string> names);

}  // namespace reshard
