// SPDX-License-Identifier: BSD-3-Clause
// The mission's case as a program of one rank: a sharded model is saved and loaded into another one, on the same ranks
// or on other groups.
//
//   reshard launch -n 2 -- seed_case DIR                     saved by 2, loaded by the same 2
//   reshard launch -n 4 -- seed_case DIR --load halves       saved by 4, loaded by the even ranks and by the odd ranks
//   reshard launch -n 4 -- seed_case DIR --save halves     saved by two groups of 2 with equal models, loaded by 4
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/utils.h>

#include <ATen/ops/rand.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"

namespace {

/// The group of this rank's parity among all ranks of `world`.
std::shared_ptr<reshard::ProcessGroup> group_of_parity(const reshard::ProcessGroup& world) {
  std::shared_ptr<reshard::ProcessGroup> mine;
  for (int parity = 0; parity < 2; ++parity) {
    std::vector<int> ranks;
    for (int r = parity; r < world.size(); r += 2) ranks.push_back(r);
    auto group = reshard::new_group(ranks);
    if (group->is_member()) mine = group;
  }
  return mine;
}

int run(const std::string& directory, bool save_in_halves, bool load_in_halves, const std::string& device_name) {
  const auto world = reshard::init_process_group(
      {.backend = device_name == "cuda-shared" ? "cpu:gloo,cuda:gloo" : "cpu:gloo,cuda:nccl"});
  const c10::Device device = reshard::rank_device(device_name != "cpu");
  const auto half = save_in_halves || load_in_halves ? group_of_parity(*world) : nullptr;
  const auto build = [&](const std::shared_ptr<reshard::ProcessGroup>& group) {
    return reshard::FullyShardedDataParallel(reshard::on_meta([] { return torch::nn::Linear(8, 8); }),
                                             {.process_group = group, .device = device});
  };
  torch::manual_seed(0);

  auto model = build(save_in_halves ? half : world);
  model(at::rand({8, 8}, device)).sum().backward();
  const auto before = model.process_group().traffic().bytes;
  reshard::StateDict state{{"model", model.state_dict(reshard::StateDictType::kSharded)}};
  const auto sent = model.process_group().traffic().bytes - before;
  if (sent != 0) throw reshard::Error(reshard::ErrorCode::kInternal, "the sharded state dict was sent somewhere");
  const auto saved = reshard::save(state, reshard::FileSystemWriter(directory));

  auto other = build(load_in_halves ? half : world);
  const auto equal = [&] {
    const reshard::SummonFullParams full(model), full_other(other);
    return std::pair(model.module()->weight.equal(other.module()->weight),
                     model.module()->bias.equal(other.module()->bias));
  };
  if (equal() != std::pair(false, false))
    throw reshard::Error(reshard::ErrorCode::kInternal, "the models are equal before the load");
  reshard::StateDict target{{"model", other.state_dict(reshard::StateDictType::kSharded)}};
  reshard::load(target, reshard::FileSystemReader(directory));
  other.load_state_dict(target.at("model"));
  if (equal() != std::pair(true, true))
    throw reshard::Error(reshard::ErrorCode::kInternal, "the models differ after the load");
  if (world->rank() == 0) {
    std::printf("equal bit for bit; %llu bytes saved; %llu bytes sent for the state dict; device %s\n",
                static_cast<unsigned long long>(saved.bytes_written), static_cast<unsigned long long>(sent),
                device.str().c_str());
  }
  world->barrier();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Saves a sharded Linear(8, 8) and loads it into another one.");
  std::string directory, save_by = "all", load_by = "all", device = "cpu";
  app.add_option("directory", directory, "of the checkpoint")->required();
  app.add_option("--save", save_by, "all, or halves: even and odd ranks each hold the whole model")
      ->check(CLI::IsMember({"all", "halves"}));
  app.add_option("--load", load_by, "all or halves")->check(CLI::IsMember({"all", "halves"}));
  app.add_option("--device", device, "cpu, cuda, or cuda-shared (ranks share GPUs over gloo)")
      ->check(CLI::IsMember({"cpu", "cuda", "cuda-shared"}));
  CLI11_PARSE(app, argc, argv);
  try {
    return run(directory, save_by == "halves", load_by == "halves", device);
  } catch (const std::exception& error) {
    std::cerr << "seed_case: " << error.what() << "\n";
    return 1;
  }
}
