// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/fsdp/fully_sharded_data_parallel.h"

#include <ATen/ATen.h>

#include "fsdp/engine.h"

namespace reshard {

ShardedModule::ShardedModule(std::shared_ptr<torch::nn::Module> module, std::shared_ptr<Recording> recording,
                             FsdpOptions options)
    : engine_(std::make_shared<FsdpEngine>(std::move(module), recording, std::move(options))) {}
ShardedModule::ShardedModule(ShardedModule&&) noexcept = default;
ShardedModule& ShardedModule::operator=(ShardedModule&&) noexcept = default;
ShardedModule::~ShardedModule() = default;

std::vector<at::Tensor> ShardedModule::parameters() const {
  std::vector<at::Tensor> result;
  for (const ShardedParameter& parameter : engine_->parameters()) result.push_back(parameter.slice);
  return result;
}

std::vector<std::pair<std::string, at::Tensor>> ShardedModule::named_parameters() const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (const ShardedParameter& parameter : engine_->parameters())
    result.emplace_back(parameter.names.front(), parameter.slice);
  return result;
}

std::vector<std::vector<std::string>> ShardedModule::tied_names() const {
  std::vector<std::vector<std::string>> result;
  for (const ShardedParameter& parameter : engine_->parameters()) {
    if (parameter.names.size() > 1) result.push_back(parameter.names);
  }
  return result;
}

const std::vector<ShardedParameter>& ShardedModule::sharded_parameters() const { return engine_->parameters(); }

void ShardedModule::zero_grad() {
  for (const ShardedParameter& parameter : engine_->parameters()) parameter.slice.mutable_grad().reset();
}

NoSync ShardedModule::no_sync() { return NoSync(engine_); }
double ShardedModule::clip_grad_norm(double max_norm, double norm_type) {
  return engine_->clip_grad_norm(max_norm, norm_type);
}
void ShardedModule::reshard() { engine_->reshard(); }
const FsdpMemoryStats& ShardedModule::memory_stats() const { return engine_->stats(); }
const ProcessGroup& ShardedModule::process_group() const { return engine_->group(); }
std::vector<std::string> ShardedModule::unit_names() const { return engine_->unit_names(); }

const torch::nn::Module& ShardedModule::root() const { return engine_->module(); }

bool ShardedModule::needs_cast(const at::Tensor& argument) const {
  const MixedPrecision& mixed = engine_->options().mixed_precision;
  return mixed.param_dtype && mixed.cast_forward_inputs && argument.defined() && argument.is_floating_point() &&
         argument.scalar_type() != *mixed.param_dtype;
}
at::Tensor ShardedModule::cast(const at::Tensor& argument) const {
  return argument.to(*engine_->options().mixed_precision.param_dtype);
}
at::Tensor ShardedModule::cast_output(at::Tensor result) const {
  const auto dtype = engine_->options().mixed_precision.output_dtype;
  return dtype && result.defined() && result.is_floating_point() ? result.to(*dtype) : result;
}

NoSync::NoSync(std::shared_ptr<FsdpEngine> engine) : engine_(std::move(engine)) { engine_->begin_no_sync(); }
NoSync::~NoSync() { engine_->end_no_sync(); }

ForwardScope::ForwardScope(const ShardedModule& model) : engine_(model.engine()) { engine_->begin_forward(); }
ForwardScope::~ForwardScope() { engine_->end_forward(); }

SummonFullParams::SummonFullParams(const ShardedModule& model, SummonOptions options)
    : engine_(model.engine()), options_(options) {
  engine_->begin_summon();
}
SummonFullParams::~SummonFullParams() { engine_->end_summon(options_.writeback); }

}  // namespace reshard
