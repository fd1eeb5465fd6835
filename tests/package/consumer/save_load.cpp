// SPDX-License-Identifier: BSD-3-Clause
// One process saves a state dict and loads it into another.

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include <cstdio>

#include "reshard/checkpoint/checkpoint.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const reshard::StateDict saved{{"weight", at::arange(32).reshape({4, 8})}, {"step", 7}};
  reshard::save(saved, reshard::FileSystemWriter(argv[1]));

  reshard::StateDict loaded{{"weight", at::zeros({4, 8}, at::kLong)}, {"step", 0}};
  reshard::load(loaded, reshard::FileSystemReader(argv[1]));
  const bool equal = loaded.at("weight").as<at::Tensor>().equal(saved.at("weight").as<at::Tensor>()) &&
                     loaded.at("step").as<int64_t>() == 7;
  std::printf("%s\n", equal ? "equal" : "different");
  return equal ? 0 : 1;
}
