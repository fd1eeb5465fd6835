// SPDX-License-Identifier: BSD-3-Clause
// Counterpart of test_fsspec.py: a sharded model and its optimizer through an object store, on two ranks.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/utils.h>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/fsdp/optimizer_state.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/s3_server.h"

namespace reshard {
namespace {

/// Rank 0 starts the server and tells the others where it is.
S3Options options_on(ProcessGroup& group, std::string& missing) {
  std::string endpoint;
  if (group.rank() == 0) {
    missing = S3Server::instance().missing();
    endpoint = missing.empty() ? S3Server::instance().endpoint() : "";
    group.store()->set("s3", std::vector<uint8_t>(endpoint.begin(), endpoint.end()));
  }
  const std::vector<uint8_t> told = group.store()->get("s3");
  endpoint.assign(told.begin(), told.end());
  if (endpoint.empty() && missing.empty()) missing = "rank 0 has no server";
  return {.credentials = S3Credentials{"AKIDOFTHETEST", "secret-of-the-test", "token-of-the-test"},
          .region = "us-east-1",
          .endpoint = endpoint};
}

RESHARD_DISTRIBUTED_TEST(ObjectStoreTest, ShardedModelAndOptimizerComeBack, .ranks = 2) {
  const auto group = process_group();
  std::string missing;
  const S3Options options = options_on(*group, missing);
  if (!missing.empty()) GTEST_SKIP() << missing;
  S3FileSystem s3(options);
  const std::string url = "s3://bucket/run/step-1";

  const auto train = [&](uint64_t seed) {
    torch::manual_seed(seed);
    auto model = FullyShardedDataParallel(torch::nn::Linear(6, 5), {.process_group = group});
    torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(0.1));
    model(at::ones({3, 6})).sum().backward();
    optimizer.step();
    return std::make_pair(std::move(model), std::move(optimizer));
  };
  const auto state_of = [](auto& run) {
    return StateDict{{"model", run.first.state_dict(StateDictType::kSharded)},
                     {"optim", optimizer_state_dict(run.second, run.first)}};
  };
  const auto weight_of = [](auto& run) {
    return run.first.state_dict(StateDictType::kFull).at("weight").template as<at::Tensor>().clone();
  };
  auto first = train(1);
  save(state_of(first), FileSystemWriter(url, {.overwrite = false}, s3));
  auto second = train(2);
  EXPECT_FALSE(weight_of(second).equal(weight_of(first)));
  StateDict target = state_of(second);
  load(target, FileSystemReader(url, {}, s3));
  second.first.load_state_dict(target.at("model"));
  load_optimizer_state_dict(second.second, second.first, target.at("optim"));
  EXPECT_TRUE(weight_of(second).equal(weight_of(first)));

  // As test_overwrite.
  const at::Tensor t1 = at::arange(10, at::kFloat);
  const at::Tensor t2 = t1 + 1;
  const std::string other = "s3://bucket/run/step-2";
  save(StateDict{{"t", t1}}, FileSystemWriter(other, {.overwrite = false}, s3));
  save(StateDict{{"t", t2}}, FileSystemWriter(other, {}, s3));
  StateDict loaded{{"t", at::zeros({10})}};
  load(loaded, FileSystemReader(other, {}, s3));
  EXPECT_TRUE(loaded.at("t").as<at::Tensor>().equal(t2));
  try {
    save(StateDict{{"t", t1}}, FileSystemWriter(other, {.overwrite = false}, s3));
    ADD_FAILURE() << "saved over a checkpoint";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.code(), ErrorCode::kAlreadyExists) << error.what();
    EXPECT_THAT(error.what(), testing::HasSubstr(other));
  }
  group->barrier();  // the server ends with rank 0
}

}  // namespace
}  // namespace reshard
