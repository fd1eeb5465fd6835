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
#include "support/run_python.h"
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

/// All objects or files of one place into another.
void copy_all(FileSystem& from, const std::string& source, FileSystem& to, const std::string& target) {
  to.create_directories(target);
  for (const std::string& name : from.list(source)) {
    const Bytes bytes = from.read_file(source + "/" + name, 1 << 30);
    const auto file = to.create(target + "/" + name, CreateMode::kExclusive);
    file->write(0, bytes);
    file->close();
  }
}

RESHARD_DISTRIBUTED_TEST(ObjectStoreTest, PyTorchReadsWhatIsDownloadedAndIsReadWhereItIsUploaded, .ranks = 2) {
  const auto group = process_group();
  std::string missing;
  const S3Options options = options_on(*group, missing);
  if (!missing.empty()) GTEST_SKIP() << missing;
  S3FileSystem s3(options);
  const std::string url = "s3://bucket/both/ours";
  const at::Tensor whole = at::arange(300'000, at::kFloat).view({1000, 300});
  const auto rows_of = [&](const at::Tensor& tensor) {
    const Box box = split_evenly(whole_box({1000, 300}), 0, 2, rank());
    return ShardedTensor({1000, 300}, at::kFloat, {{box, tensor.narrow(0, box.offsets[0], box.sizes[0]).clone()}});
  };
  const StateDict state{{"rows", rows_of(whole)}, {"half", at::arange(7).to(at::kBFloat16) / 4}, {"step", 12}};
  save(state, FileSystemWriter(url, {}, s3));

  const std::string theirs = "s3://bucket/both/theirs";
  if (rank() == 0) {
    const std::string directory = temp_dir().string();
    copy_all(s3, url, local_file_system(), directory + "/theirs");
    expect_python_succeeds("object_store_peer.py '" + directory + "'");
    copy_all(local_file_system(), directory + "/ours", s3, theirs);
  }
  group->barrier();
  StateDict target{{"rows", rows_of(at::zeros_like(whole))}, {"half", at::zeros({7}, at::kBFloat16)}, {"step", 0}};
  load(target, FileSystemReader(theirs, {.thread_count = 2}, s3));
  EXPECT_TRUE(target.at("rows").as<ShardedTensor>().shards()[0].tensor.equal(rows_of(whole + 1).shards()[0].tensor));
  EXPECT_TRUE(target.at("half").as<at::Tensor>().equal(at::arange(7).to(at::kBFloat16) / 4));
  EXPECT_EQ(target.at("step").as<int64_t>(), 13);
  group->barrier();  // the server ends with rank 0
}

}  // namespace
}  // namespace reshard
