// SPDX-License-Identifier: BSD-3-Clause
// The step of docs/pytorch-users.md, as a program of one rank.
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>

#include <string>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/training/state_dict.h"

namespace {

struct NetImpl : torch::nn::Module {
  torch::nn::Linear linear = register_module("linear", torch::nn::Linear(8, 8));
  at::Tensor forward(const at::Tensor& x) { return linear(x); }
};
TORCH_MODULE(Net);

void train(int64_t step, const std::string& path) {
#include "pytorch-users_1.inc"
}

}  // namespace

int main(int argc, char** argv) {
  reshard::init_process_group();
  train(1, argc > 1 ? argv[1] : "checkpoint-of-the-guide");
}
