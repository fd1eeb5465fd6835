// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A small language model with everything that is hard to shard: a tied head, frozen and trainable parameters side by
// side, a block used twice, tuple outputs, sizes that no number of ranks divides, and a computed buffer.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/functional/loss.h>
#include <torch/csrc/api/include/torch/nn/modules/activation.h>
#include <torch/csrc/api/include/torch/nn/modules/container/modulelist.h>
#include <torch/csrc/api/include/torch/nn/modules/embedding.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/nn/modules/normalization.h>
#include <torch/csrc/api/include/torch/utils.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "reshard/core/error.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace reshard::fsdp_test {

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(int64_t width) {
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    attention =
        register_module("attention", torch::nn::MultiheadAttention(torch::nn::MultiheadAttentionOptions(width, 2)));
    up = register_module("up", torch::nn::Linear(width, 2 * width + 1));
    down = register_module("down", torch::nn::Linear(2 * width + 1, width));
  }
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x) {
    const at::Tensor h = norm->forward(x);
    const at::Tensor attended = x + std::get<0>(attention->forward(h, h, h));
    const at::Tensor out = attended + down->forward(at::gelu(up->forward(attended)));
    return {out, out.square().mean()};
  }
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::MultiheadAttention attention{nullptr};
  torch::nn::Linear up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

struct HeadImpl : torch::nn::Module {
  explicit HeadImpl(const at::Tensor& tied) { weight = register_parameter("weight", tied); }
  at::Tensor forward(const at::Tensor& x) { return at::matmul(x, weight.t()); }
  at::Tensor weight;
};
TORCH_MODULE(Head);

struct LanguageModelImpl : torch::nn::Module {
  static constexpr int64_t kVocabulary = 13, kWidth = 6, kLength = 5;

  LanguageModelImpl() {
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, kWidth));
    for (const char* name : {"block0", "block1", "block2"}) blocks.push_back(register_module(name, Block(kWidth)));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    head = register_module("head", Head(embedding->weight));
    const at::Tensor position = at::arange(kLength).unsqueeze(1);
    const at::Tensor frequency = at::exp(at::arange(0, kWidth, 2) * (-0.5));
    at::Tensor table = at::zeros({kLength, kWidth});
    table.slice(1, 0, kWidth, 2).copy_(at::sin(position * frequency));
    table.slice(1, 1, kWidth, 2).copy_(at::cos(position * frequency));
    positions = register_buffer("positions", table);
    blocks[1]->norm->weight.set_requires_grad(false);
    blocks[2]->up->bias.set_requires_grad(false);
  }
  /// The mean loss of predicting each next token.
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embedding->forward(tokens);
    x = (x + positions.to(x.scalar_type())).transpose(0, 1);
    at::Tensor extra = at::zeros({}, x.options());
    for (const size_t i : {0, 1, 0, 2}) {
      const auto [out, penalty] = blocks[i]->forward(x);
      x = out;
      extra = extra + penalty;
    }
    const at::Tensor logits = head->forward(norm->forward(x)).transpose(0, 1);
    return at::cross_entropy_loss(logits.slice(1, 0, kLength - 1).reshape({-1, kVocabulary}),
                                  tokens.slice(1, 1).reshape({-1})) +
           1e-2 * extra;
  }
  torch::nn::Embedding embedding{nullptr};
  std::vector<Block> blocks;
  torch::nn::LayerNorm norm{nullptr};
  Head head{nullptr};
  at::Tensor positions;
};
TORCH_MODULE(LanguageModel);

/// The global batch of a step, equal on every rank; 12 rows, so that 2 and 3 ranks share it evenly.
inline at::Tensor tokens_of_step(int64_t step) {
  at::manual_seed(100 + static_cast<uint64_t>(step));
  return at::randint(LanguageModelImpl::kVocabulary, {12, LanguageModelImpl::kLength}, at::kLong);
}

/// This rank's share of the rows of a global batch.
inline at::Tensor rows_of_rank(const at::Tensor& batch, const ProcessGroup& group) {
  const int64_t rows = batch.size(0) / group.size();
  return batch.slice(0, group.rank() * rows, (group.rank() + 1) * rows);
}

/// torch::optim updates a tied parameter once for each time that it is listed; this lists it once.
inline std::vector<at::Tensor> distinct_parameters(const torch::nn::Module& module) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& parameter : module.parameters()) {
    if (std::ranges::none_of(result, [&](const at::Tensor& known) { return known.is_same(parameter); })) {
      result.push_back(parameter);
    }
  }
  return result;
}

/// Runs `body`, which must throw a reshard::Error of this code whose text holds all of `parts`.
template <class Body>
void expect_error(ErrorCode code, const std::vector<std::string>& parts, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    for (const std::string& part : parts)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << part << " in: " << error.what();
    return;
  } catch (const std::exception& error) {
    FAIL() << "not a reshard::Error: " << error.what();
  }
  FAIL() << "nothing was thrown; wanted " << to_string(code);
}

inline double max_difference(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0.0 : (a.cpu().to(at::kDouble) - b.cpu().to(at::kDouble)).abs().max().item<double>();
}

/// The largest difference of any parameter or buffer of a sharded model to those of `reference`. Collective.
inline double difference_to(const ShardedModule& model, const torch::nn::Module& sharded,
                            const torch::nn::Module& reference) {
  const at::NoGradGuard no_grad;
  const SummonFullParams full(model);
  double worst = 0;
  const auto wanted = reference.named_parameters();
  for (const auto& item : sharded.named_parameters())
    worst = std::max(worst, max_difference(item.value(), wanted[item.key()]));
  const auto buffers = reference.named_buffers();
  for (const auto& item : sharded.named_buffers())
    worst = std::max(worst, max_difference(item.value(), buffers[item.key()]));
  return worst;
}

/// All new tensors are double, for comparisons that leave only rounding.
class DoublePrecision {
 public:
  DoublePrecision() { c10::set_default_dtype(caffe2::TypeMeta::Make<double>()); }
  ~DoublePrecision() { c10::set_default_dtype(caffe2::TypeMeta::Make<float>()); }
};

}  // namespace reshard::fsdp_test
