// SPDX-License-Identifier: BSD-3-Clause
// Trains a small byte-level language model, sharded, and goes on from a checkpoint on any number of ranks.
//
//   reshard launch -n 4 -- train_lm --checkpoint ckpt --steps 20 --save-every 10
//   reshard launch -n 3 -- train_lm --checkpoint ckpt --steps 20 --resume
//   torchrun --no-python --nproc-per-node 4 -- train_lm ...              or alone, as one rank
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/utils.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "language_model.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/fsdp/optimizer_state.h"
#include "reshard/storage/checkpoint_manager.h"
#include "text.h"

namespace {

struct Arguments {
  std::string checkpoint;
  int64_t steps = 20;
  int64_t save_every = 0;
  int64_t keep_last = 0;
  bool resume = false;
  int64_t resume_step = -1;
  bool drop_moments = false;
  bool unsharded = false;
  std::vector<std::string> text = {TRAIN_LM_DEFAULT_TEXT};
  uint64_t seed = 0;
  std::string log;
  std::string stats;
  std::string device = "auto";
  int64_t batch = 12;
  double learning_rate = 3e-3;
  bool float64 = false;
  LanguageModelOptions model;
};

int train(const Arguments& args) {
  const auto world = reshard::init_process_group(
      {.backend = args.device == "cuda-shared" ? "cpu:gloo,cuda:gloo" : "cpu:gloo,cuda:nccl"});
  const c10::Device device = reshard::rank_device(args.device == "cuda" || args.device == "cuda-shared" ||
                                                  (args.device == "auto" && world->has_backend(c10::kCUDA)));
  const int rank = world->rank();
  if (args.batch % world->size() != 0) {
    throw reshard::Error(
        reshard::ErrorCode::kInvalidArgument, "the global batch must divide by the number of ranks",
        {.wanted = "a multiple of " + std::to_string(world->size()), .found = std::to_string(args.batch)});
  }
  const int64_t share = args.batch / world->size();
  const std::string text = read_text(args.text);

  if (args.float64) c10::set_default_dtype(caffe2::TypeMeta::Make<double>());
  torch::manual_seed(args.seed);
  std::optional<reshard::FullyShardedDataParallel<LanguageModel>> model;
  LanguageModel plain{nullptr};  // instead of it with --unsharded: the same values, bit for bit
  if (args.unsharded) {
    if (world->size() > 1 || args.resume || args.save_every > 0)
      throw reshard::Error(reshard::ErrorCode::kInvalidArgument, "--unsharded is for one rank and saves nothing");
    plain = LanguageModel(args.model);
    plain->to(device);
  } else {
    model.emplace(reshard::on_meta([&] { return LanguageModel(args.model); }),
                  reshard::FsdpOptions{
                      .process_group = world, .wrap_policy = reshard::wrap_by_type<BlockImpl>(), .device = device});
  }
  torch::optim::AdamW optimizer(model ? model->parameters() : plain->parameters(),
                                torch::optim::AdamWOptions(args.learning_rate).weight_decay(0.01));

  nlohmann::ordered_json stats;
  const auto state_dict = [&](bool moments, int64_t step) {
    const uint64_t before = world->traffic().bytes;
    reshard::StateDict state{{"model", model->state_dict(reshard::StateDictType::kSharded)}, {"step", step}};
    if (moments) state["optim"] = reshard::optimizer_state_dict(optimizer, *model);
    stats["state_dict_bytes_sent"] = world->traffic().bytes - before;
    return state;
  };

  // Rank 0 looks after the directory: one job at a time saves there, unfinished saves are cleaned up, old steps deleted.
  std::optional<reshard::CheckpointManager> manager;
  std::vector<int64_t> steps;
  if (rank == 0) {
    if (args.save_every > 0) {
      manager.emplace(args.checkpoint, reshard::CheckpointManagerOptions{.keep_last = args.keep_last});
      manager->resume();
    }
    steps = reshard::committed_steps(args.checkpoint);
  }

  int64_t step = 0;
  if (args.resume) {
    // Rank 0 looks, all follow: a checkpoint that commits meanwhile must not split them.
    at::Tensor found = at::empty({1}, at::kLong);
    found.fill_(args.resume_step >= 0 ? args.resume_step : steps.empty() ? -1 : steps.back());
    world->broadcast(found, 0);
    step = found.item<int64_t>();
    if (step < 0)
      throw reshard::Error(reshard::ErrorCode::kNotFound, "no committed checkpoint to resume from",
                           {.file = args.checkpoint});
    reshard::StateDict state = state_dict(!args.drop_moments, 0);
    reshard::FileSystemReader reader(reshard::step_directory(args.checkpoint, step));
    reshard::load(state, reader);
    model->load_state_dict(state.at("model"));
    if (!args.drop_moments) reshard::load_optimizer_state_dict(optimizer, *model, state.at("optim"));
    if (state.at("step").as<int64_t>() != step) {
      throw reshard::Error(reshard::ErrorCode::kCorruptData, "the checkpoint is of another step",
                           {.file = reshard::step_directory(args.checkpoint, step)});
    }
    at::Tensor bytes = at::empty({2}, at::kLong);
    bytes[0] = static_cast<int64_t>(reader.counters().bytes_read);
    bytes[1] = static_cast<int64_t>(reader.counters().bytes_needed);
    world->all_reduce_sum(bytes);
    stats["bytes_read"] = bytes[0].item<int64_t>();
    stats["bytes_needed"] = bytes[1].item<int64_t>();
    if (rank == 0) {
      std::printf("resumed from step %lld on %d ranks: %lld bytes read, %lld needed\n", static_cast<long long>(step),
                  world->size(), stats["bytes_read"].get<long long>(), stats["bytes_needed"].get<long long>());
    }
  }

  std::ofstream log;
  if (rank == 0 && !args.log.empty()) {
    log.open(args.log, args.resume ? std::ios::app : std::ios::trunc);
    if (!log) throw reshard::Error(reshard::ErrorCode::kIo, "cannot write the log", {.file = args.log});
  }
  while (step < args.steps) {
    const at::Tensor batch =
        batch_of(text, args.seed, step, rank * share, (rank + 1) * share, args.model.context).to(device);
    optimizer.zero_grad();
    const at::Tensor inputs = batch.slice(1, 0, -1);
    const at::Tensor logits = model ? (*model)(inputs) : plain->forward(inputs);
    at::Tensor loss = at::cross_entropy_loss(logits.flatten(0, 1), batch.slice(1, 1).flatten());
    loss.backward();
    optimizer.step();
    ++step;

    at::Tensor mean = loss.detach().to(at::kCPU, at::kDouble) / world->size();
    world->all_reduce_sum(mean);
    if (rank == 0) {
      std::printf("step %3lld  loss %.6f\n", static_cast<long long>(step), mean.item<double>());
      std::fflush(stdout);
      if (log) log << nlohmann::ordered_json{{"step", step}, {"loss", mean.item<double>()}}.dump() << std::endl;
    }
    if (args.save_every > 0 && step % args.save_every == 0) {
      const auto result = reshard::save(state_dict(true, step),
                                        reshard::FileSystemWriter(reshard::step_directory(args.checkpoint, step)));
      if (manager) manager->saved(step);
      if (rank == 0)
        std::printf("saved step %lld: %llu bytes\n", static_cast<long long>(step),
                    static_cast<unsigned long long>(result.bytes_written));
    }
  }
  if (rank == 0 && !args.stats.empty()) {
    if (model) {
      const auto& memory = model->memory_stats();
      stats["peak_unsharded_bytes"] = memory.peak_unsharded_bytes;
      stats["largest_unit_bytes"] = memory.largest_unit_bytes;
      stats["all_units_bytes"] = memory.all_units_bytes;
    }
    stats["device"] = device.str();
    std::ofstream(args.stats) << stats.dump() << "\n";
  }
  world->barrier();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments args;
  CLI::App app("Trains a small sharded byte-level language model.");
  app.add_option("--checkpoint", args.checkpoint, "directory of the checkpoints, one folder step-<n> each")->required();
  app.add_option("--steps", args.steps, "train up to this step");
  app.add_option("--save-every", args.save_every, "save every so many steps (0: never)");
  app.add_option("--keep-last", args.keep_last, "keep so many of the newest checkpoints (0: all)");
  app.add_flag("--resume", args.resume, "go on from the newest committed checkpoint");
  app.add_option("--resume-step", args.resume_step, "with --resume: from this step");
  app.add_flag("--drop-moments", args.drop_moments,
               "with --resume: leave the optimizer's state out (to show what it is good for)");
  app.add_flag("--unsharded", args.unsharded, "train the plain module in one process (to compare)");
  app.add_option("--text", args.text, "text files; default: the texts and sources of this project");
  app.add_option("--seed", args.seed, "of the initial weights and of the order of the data");
  app.add_option("--log", args.log, "rank 0 writes one {\"step\": n, \"loss\": x} a line; --resume appends");
  app.add_option("--stats", args.stats, "rank 0 writes counters of bytes as JSON");
  app.add_option("--device", args.device, "auto, cpu, cuda, or cuda-shared (ranks share GPUs over gloo)")
      ->check(CLI::IsMember({"auto", "cpu", "cuda", "cuda-shared"}));
  app.add_option("--batch", args.batch, "samples a step, over all ranks");
  app.add_option("--learning-rate", args.learning_rate, "of AdamW");
  app.add_flag("--float64", args.float64, "compute in float64 (to compare runs closely)");
  app.add_option("--width", args.model.width, "of the model");
  app.add_option("--blocks", args.model.blocks, "transformer blocks");
  app.add_option("--context", args.model.context, "bytes a sample");
  CLI11_PARSE(app, argc, argv);
  try {
    return train(args);
  } catch (const std::exception& error) {
    std::cerr << "train_lm: " << error.what() << "\n";
    return 1;
  }
}
