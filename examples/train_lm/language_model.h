// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A small decoder-only transformer over bytes. Plain torch::nn: nothing here knows that it will be sharded.
// tests/interop/language_model.py is its twin in Python, name for name, so that PyTorch can go on training from the
// same checkpoint.

#include <ATen/ops/arange.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/api/include/torch/nn/modules/container/modulelist.h>
#include <torch/csrc/api/include/torch/nn/modules/embedding.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/nn/modules/normalization.h>

struct LanguageModelOptions {
  int64_t context = 64;  // bytes of text a sample
  int64_t width = 64;
  int64_t heads = 4;
  int64_t blocks = 3;
};

/// One transformer block: [batch, context, width] -> the same.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const LanguageModelOptions& options)
      : heads(options.heads),
        ln1(register_module("ln1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})))),
        qkv(register_module("qkv", torch::nn::Linear(options.width, 3 * options.width))),
        proj(register_module("proj", torch::nn::Linear(options.width, options.width))),
        ln2(register_module("ln2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})))),
        up(register_module("up", torch::nn::Linear(options.width, 4 * options.width))),
        down(register_module("down", torch::nn::Linear(4 * options.width, options.width))) {}

  at::Tensor forward(const at::Tensor& x) {
    const auto batch = x.size(0), context = x.size(1), width = x.size(2);
    const auto parts = qkv(ln1(x)).view({batch, context, 3, heads, width / heads}).permute({2, 0, 3, 1, 4});
    const auto attended = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, /*is_causal=*/true);
    const auto mixed = x + proj(attended.transpose(1, 2).reshape({batch, context, width}));
    return mixed + down(at::gelu(up(ln2(mixed))));
  }

  int64_t heads;
  torch::nn::LayerNorm ln1;
  torch::nn::Linear qkv, proj;
  torch::nn::LayerNorm ln2;
  torch::nn::Linear up, down;
};
TORCH_MODULE(Block);

/// Bytes [batch, context] (int64) -> logits of the next byte [batch, context, 256].
struct LanguageModelImpl : torch::nn::Module {
  explicit LanguageModelImpl(const LanguageModelOptions& options)
      : token(register_module("token", torch::nn::Embedding(256, options.width))),
        position(register_module("position", torch::nn::Embedding(options.context, options.width))),
        blocks(register_module("blocks", torch::nn::ModuleList())),
        ln(register_module("ln", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})))),
        head(register_module("head", torch::nn::Linear(torch::nn::LinearOptions(options.width, 256).bias(false)))) {
    for (int64_t i = 0; i < options.blocks; ++i) blocks->push_back(Block(options));
  }

  at::Tensor forward(const at::Tensor& bytes) {
    at::Tensor x = token(bytes) + position(at::arange(bytes.size(1), bytes.options()));
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return head(ln(x));
  }

  torch::nn::Embedding token, position;
  torch::nn::ModuleList blocks;
  torch::nn::LayerNorm ln;
  torch::nn::Linear head;
};
TORCH_MODULE(LanguageModel);
