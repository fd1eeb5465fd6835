// SPDX-License-Identifier: BSD-3-Clause
// What a run is besides model and optimizer: random generators, learning-rate schedules, the position in the data.

#include <ATen/ATen.h>
#include <torch/csrc/api/include/torch/nn/modules/dropout.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/schedulers/step_lr.h>
#include <torch/csrc/api/include/torch/serialize/archive.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "fsdp/test_model.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/checkpoint/rng_state.h"
#include "reshard/testing/torch_distributed_test.h"
#include "reshard/training/resumable_sampler.h"
#include "reshard/training/scheduler_state.h"
#include "reshard/training/state_dict.h"

namespace reshard {
namespace {

using fsdp_test::expect_error;

struct NetImpl : torch::nn::Module {
  NetImpl() {
    first = register_module("first", torch::nn::Linear(4, 16));
    dropout = register_module("dropout", torch::nn::Dropout(0.5));
    second = register_module("second", torch::nn::Linear(16, 1));
  }
  at::Tensor forward(const at::Tensor& x) { return second(dropout(at::tanh(first(x)))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
  torch::nn::Dropout dropout{nullptr};
};
TORCH_MODULE(Net);

/// A training run with all of its state.
struct WholeRun {
  static constexpr size_t kSamples = 37, kBatch = 3;

  WholeRun(const std::shared_ptr<ProcessGroup>& world, uint64_t seed)
      : group(world),
        model((at::manual_seed(seed), Net()), {.process_group = world}),
        optimizer(model.parameters(), torch::optim::AdamWOptions(0.05)),
        scheduler(optimizer, /*step_size=*/4, /*gamma=*/0.5),
        sampler(kSamples, {.num_replicas = static_cast<size_t>(world->size()),
                           .rank = static_cast<size_t>(world->rank()),
                           .seed = seed}) {
    // Dropout differs by rank.
    at::manual_seed(seed + 100 * static_cast<uint64_t>(world->rank()));
    data = at::arange(static_cast<int64_t>(kSamples) * 4, at::kDouble)
               .reshape({-1, 4})
               .sin()
               .to(c10::get_default_dtype_as_scalartype());
  }

  double step() {
    auto samples = sampler.next(kBatch);
    if (!samples) {
      sampler.reset();
      samples = sampler.next(kBatch);
    }
    std::vector<int64_t> rows(samples->begin(), samples->end());
    const at::Tensor x = data.index_select(0, at::tensor(rows));
    model.zero_grad();
    at::Tensor loss = (model(x) - x.sum(1, true)).square().mean();
    loss.backward();
    optimizer.step();
    scheduler.step();
    at::Tensor mean = loss.detach().clone();
    group->all_reduce_sum(mean);
    return mean.item<double>();
  }

  StateDict state() {
    auto [of_model, of_optimizer] = get_state_dict(model, optimizer);
    return {{"model", std::move(of_model)},
            {"optim", std::move(of_optimizer)},
            {"scheduler", scheduler_state_dict(scheduler)},
            {"data", sampler.state_dict()}};
  }
  void save_to(const std::string& directory) {
    StateDict all = state();
    all["rng"] = rng_state(*group);
    save(all, FileSystemWriter(directory, {.sync_files = false}), {.process_group = group});
  }
  bool load_from(const std::string& directory, std::optional<uint64_t> reseed = {}) {
    StateDict all = state();
    FileSystemReader reader(directory);
    load(all, reader, {.process_group = group});
    set_state_dict(model, optimizer, all.at("model"), all.at("optim"));
    load_scheduler_state_dict(scheduler, all.at("scheduler"));
    sampler.load_state_dict(all.at("data"));
    FileSystemReader again(directory);
    return load_rng_state("rng", again, {.process_group = group, .reseed = reseed});
  }

  std::shared_ptr<ProcessGroup> group;
  FullyShardedDataParallel<Net> model;
  torch::optim::AdamW optimizer;
  torch::optim::StepLR scheduler;
  ResumableDistributedSampler sampler;
  at::Tensor data;
};

RESHARD_DISTRIBUTED_TEST(RunStateTest, AResumedRunHasTheSameDropoutDataOrderAndLearningRates, .ranks = 2) {
  const auto world = process_group();
  const std::string directory = (temp_dir() / "checkpoint").string();
  WholeRun run(world, 1);
  for (int i = 0; i < 9; ++i) run.step();  // into the second epoch, past two changes of the learning rate
  run.save_to(directory);
  std::vector<double> wanted;
  for (int i = 0; i < 9; ++i) wanted.push_back(run.step());

  WholeRun resumed(world, 2);
  ASSERT_TRUE(resumed.load_from(directory));
  EXPECT_EQ(resumed.sampler.epoch(), 1u);
  for (int i = 0; i < 9; ++i) EXPECT_EQ(resumed.step(), wanted[static_cast<size_t>(i)]) << "step " << i;
  EXPECT_EQ(resumed.optimizer.param_groups()[0].options().get_lr(), run.optimizer.param_groups()[0].options().get_lr());

  // The controls: each part matters.
  for (const char* part : {"rng", "scheduler", "data"}) {
    WholeRun forgetful(world, 2);
    forgetful.load_from(directory);
    if (std::string(part) == "rng") at::manual_seed(5);
    if (std::string(part) == "scheduler") load_scheduler_state_dict(forgetful.scheduler, {{"last_epoch", 0}});
    if (std::string(part) == "data")
      forgetful.sampler = ResumableDistributedSampler(WholeRun::kSamples,
                                                      {.num_replicas = 2, .rank = static_cast<size_t>(world->rank())});
    std::vector<double> losses;
    for (int i = 0; i < 9; ++i) losses.push_back(forgetful.step());
    EXPECT_NE(losses, wanted) << part;
  }
}

RESHARD_DISTRIBUTED_TEST(RunStateTest, OnAnotherNumberOfRanksGeneratorsAreAnErrorOrSeededAnew, .ranks = 3) {
  const auto world = process_group();
  const std::string directory = (temp_dir() / "checkpoint").string();
  WholeRun run(world, 1);
  for (int i = 0; i < 3; ++i) run.step();
  run.save_to(directory);
  std::vector<size_t> seen_by_three = *run.sampler.next(4);

  const auto pair = new_group({0, 2});
  if (pair->is_member()) {
    WholeRun resumed(pair, 2);
    const at::Tensor before = at::globalContext().defaultGenerator(c10::kCPU).get_state();
    expect_error(ErrorCode::kNotFound, {"rng.cpu.rank_", "_of_2"}, [&] { resumed.load_from(directory); });
    EXPECT_TRUE(at::equal(before, at::globalContext().defaultGenerator(c10::kCPU).get_state()));
    EXPECT_EQ(resumed.sampler.position(), 27u) << "what all ranks had taken";
    EXPECT_FALSE(resumed.load_from(directory, 77));
    const double drawn = at::rand({}).item<double>();
    EXPECT_FALSE(resumed.load_from(directory, 77));
    EXPECT_EQ(at::rand({}).item<double>(), drawn) << "the same seed, the same numbers";
    at::Tensor extremes = at::tensor({drawn, -drawn});
    pair->all_reduce_max(extremes);
    EXPECT_NE(extremes[0].item<double>(), -extremes[1].item<double>()) << "another seed on each rank";
    EXPECT_FALSE(resumed.load_from(directory, 78));
    EXPECT_NE(at::rand({}).item<double>(), drawn);
    FileSystemReader reader(directory);
    expect_error(ErrorCode::kNotFound, {"nothing"},
                 [&] { load_rng_state("nothing", reader, {.process_group = pair}); });
  }
  world->barrier();
}

/// The samples of all ranks of one step, in the order of ranks; empty at the end of an epoch.
std::vector<size_t> step_of_all(std::vector<ResumableDistributedSampler>& ranks, size_t batch) {
  std::vector<size_t> all;
  std::optional<size_t> each;
  for (ResumableDistributedSampler& rank : ranks) {
    const auto samples = rank.next(batch);
    const size_t count = samples ? samples->size() : 0;
    EXPECT_EQ(count, each.value_or(count)) << "as many on each rank";
    each = count;
    if (samples) all.insert(all.end(), samples->begin(), samples->end());
  }
  return all;
}

std::vector<ResumableDistributedSampler> samplers(size_t size, size_t ranks, uint64_t seed, bool allow_duplicates) {
  std::vector<ResumableDistributedSampler> result;
  for (size_t r = 0; r < ranks; ++r)
    result.emplace_back(size, ResumableSamplerOptions{ranks, r, seed, allow_duplicates});
  return result;
}

TEST(ResumableDistributedSamplerTest, WalksThroughOnePermutationOnAnyNumberOfRanks) {
  for (const size_t size : {1, 7, 100, 128}) {
    std::vector<size_t> of_one;
    for (const size_t ranks : {1, 2, 3, 8}) {
      SCOPED_TRACE(std::to_string(size) + " on " + std::to_string(ranks));
      auto group = samplers(size, ranks, 5, true);
      std::vector<size_t> all;
      for (auto step = step_of_all(group, 4); !step.empty(); step = step_of_all(group, 4))
        all.insert(all.end(), step.begin(), step.end());
      if (ranks == 1) of_one = all;
      EXPECT_EQ(all.size(), (size + ranks - 1) / ranks * ranks);
      all.resize(size);
      EXPECT_EQ(all, of_one) << "the same order";
      std::ranges::sort(all);
      for (size_t i = 0; i < size; ++i) ASSERT_EQ(all[i], i) << "each sample once";

      auto exact = samplers(size, ranks, 5, false);
      size_t count = 0;
      for (auto step = step_of_all(exact, 4); !step.empty(); step = step_of_all(exact, 4)) count += step.size();
      EXPECT_EQ(count, size / ranks * ranks);
    }
  }
  // Epochs and seeds differ.
  ResumableDistributedSampler a(50), b(50, {.seed = 1});
  const auto first = *a.next(50);
  EXPECT_NE(first, *b.next(50));
  a.reset();
  EXPECT_EQ(a.epoch(), 1u);
  EXPECT_NE(first, *a.next(50));
}

TEST(ResumableDistributedSamplerTest, GoesOnOnAnotherNumberOfRanks) {
  for (const size_t taken : {0, 1, 3, 6}) {
    auto four = samplers(101, 4, 9, true);
    for (size_t i = 0; i < taken; ++i) step_of_all(four, 4);
    const StateDict state = four[2].state_dict();
    auto one = samplers(101, 1, 9, true);
    auto three = samplers(101, 3, 0, true);
    for (auto* group : {&one, &three}) {
      for (auto& rank : *group) {
        rank.load_state_dict(state);
        rank.reset();  // as a DataLoader does before it begins: no new epoch
      }
    }
    std::vector<size_t> of_one, of_three, of_four;
    const auto rest = [](auto& group, std::vector<size_t>& into) {
      for (auto step = step_of_all(group, 4); !step.empty(); step = step_of_all(group, 4))
        into.insert(into.end(), step.begin(), step.end());
      into.resize(std::min<size_t>(into.size(), 101));
    };
    rest(one, of_one);
    rest(three, of_three);
    rest(four, of_four);
    const size_t left = 101 - taken * 16;
    of_three.resize(left);
    of_four.resize(left);
    EXPECT_EQ(of_one.size(), left);
    EXPECT_EQ(of_three, of_one);
    EXPECT_EQ(of_four, of_one);
    one[0].reset();
    four[0].reset();
    EXPECT_EQ(one[0].epoch(), 1u);
    EXPECT_EQ(*one[0].next(4), *four[0].next(4));
  }
}

TEST(ResumableDistributedSamplerTest, ArchivesAndRefusals) {
  ResumableDistributedSampler sampler(10, {.seed = UINT64_MAX});
  sampler.next(3);
  torch::serialize::OutputArchive out;
  sampler.save(out);
  std::stringstream stream;
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  ResumableDistributedSampler other(10);
  other.load(in);
  EXPECT_EQ(*other.next(7), *sampler.next(7));
  EXPECT_FALSE(other.next(1).has_value());

  StateDict state = sampler.state_dict();
  state["position"] = 11;
  expect_error(ErrorCode::kInvalidArgument, {"position", "10", "11"}, [&] { other.load_state_dict(state); });
  state["size"] = 12;
  expect_error(ErrorCode::kInvalidArgument, {"another size", "10", "12"}, [&] { other.load_state_dict(state); });
  expect_error(ErrorCode::kNotFound, {"epoch"}, [&] { other.load_state_dict(StateDict()); });
  expect_error(ErrorCode::kInvalidArgument, {"no such rank"},
               [] { ResumableDistributedSampler(10, {.num_replicas = 2, .rank = 2}); });
  EXPECT_EQ(other.position(), 10u) << "as it was";
  // A dataset that grew begins anew.
  other.reset(20);
  EXPECT_EQ(other.epoch(), 1u);
  EXPECT_EQ(other.next(100)->size(), 20u);
}

TEST(SchedulerStateTest, CountsAsPyTorchNamesItAndRefusesWhatIsNoCount) {
  torch::nn::Linear model(2, 2);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1));
  torch::optim::StepLR scheduler(optimizer, 2, 0.5);
  for (int i = 0; i < 3; ++i) scheduler.step();
  EXPECT_EQ(scheduler_state_dict(scheduler).at("last_epoch").as<int64_t>(), 3);
  expect_error(ErrorCode::kInvalidArgument, {"last_epoch", "-1"}, [&] {
    load_scheduler_state_dict(scheduler, {{"last_epoch", -1}});
  });
  expect_error(ErrorCode::kNotFound, {"last_epoch"}, [&] { load_scheduler_state_dict(scheduler, {{"gamma", 0.5}}); });
  load_scheduler_state_dict(scheduler, {{"last_epoch", 7}, {"gamma", 0.5}});
  EXPECT_EQ(scheduler_state_dict(scheduler).at("last_epoch").as<int64_t>(), 7);
}

}  // namespace
}  // namespace reshard
