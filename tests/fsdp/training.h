// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Training the test model sharded and unsharded, side by side.

#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "fsdp/test_model.h"

namespace reshard::fsdp_test {

enum class Optimizer { kAdamW, kAdamWLargeEps, kSgd };
inline std::unique_ptr<torch::optim::Optimizer> make_optimizer(Optimizer kind, std::vector<at::Tensor> parameters) {
  if (kind == Optimizer::kAdamW) {
    return std::make_unique<torch::optim::AdamW>(std::move(parameters), torch::optim::AdamWOptions(3e-3));
  }
  // The usual small eps makes AdamW blind to the gradient's scale, and so to a missing average.
  if (kind == Optimizer::kAdamWLargeEps) {
    return std::make_unique<torch::optim::AdamW>(std::move(parameters),
                                                 torch::optim::AdamWOptions(3e-3).eps(1e-3).weight_decay(0.1));
  }
  return std::make_unique<torch::optim::SGD>(std::move(parameters), torch::optim::SGDOptions(0.05).momentum(0.9));
}

/// Trains a sharded and an unsharded model for 20 steps from the same start on the same batches, and compares. The ranks of
/// `group` share the batches, and the parameters, unless the options have a mesh. Rank 0 prints the largest differences.
inline void train_and_compare(const std::shared_ptr<ProcessGroup>& group, Optimizer kind, FsdpOptions options,
                              bool from_meta) {
  const DoublePrecision in_double;
  if (!options.mesh) options.process_group = group;
  at::manual_seed(5);
  LanguageModel reference;
  reference->to(options.device);
  at::manual_seed(5);
  auto model = from_meta ? FullyShardedDataParallel(on_meta([] { return LanguageModel(); }), options)
                         : FullyShardedDataParallel(LanguageModel(), options);
  EXPECT_EQ(difference_to(model, *model.module(), *reference), 0.0);

  const auto optimizer = make_optimizer(kind, model.parameters());
  const auto reference_optimizer = make_optimizer(kind, distinct_parameters(*reference));
  double worst_loss = 0;
  for (int64_t step = 0; step < 20; ++step) {
    const at::Tensor tokens = tokens_of_step(step).to(options.device);
    optimizer->zero_grad();
    at::Tensor loss = model(rows_of_rank(tokens, *group));
    loss.backward();
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
    optimizer->step();

    reference_optimizer->zero_grad();
    const at::Tensor reference_loss = reference(tokens);
    reference_loss.backward();
    reference_optimizer->step();

    at::Tensor mean_loss = loss.detach().clone();
    group->all_reduce_sum(mean_loss);
    const double off = std::abs(mean_loss.item<double>() / group->size() - reference_loss.item<double>());
    EXPECT_LT(off, 1e-9) << "step " << step;
    worst_loss = std::max(worst_loss, off);
  }
  const double worst = difference_to(model, *model.module(), *reference);
  EXPECT_LT(worst, 1e-9);
  if (group->rank() == 0) {
    std::printf(
        "%s, %d ranks%s, 20 steps, float64: largest difference from unsharded training: parameters %.1e, loss %.1e\n",
        kind == Optimizer::kSgd     ? "SGD"
        : kind == Optimizer::kAdamW ? "AdamW"
                                    : "AdamW, eps 1e-3",
        group->size(), options.mesh ? (" as " + to_string(options.mesh->shape())).c_str() : "", worst, worst_loss);
  }
}

}  // namespace reshard::fsdp_test
