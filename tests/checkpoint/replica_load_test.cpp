// SPDX-License-Identifier: BSD-3-Clause
// Loads in which one replica reads for all.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "dtensor/layouts.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;

DeviceMesh two_by_two() { return init_device_mesh({2, 2}, {.dim_names = {"replicate", "shard"}}); }

RESHARD_DEVICE_TEST(ReplicaLoadTest, TheFirstReplicaReadsForAll, .ranks = {4}, .one_gpu_ranks = {4}) {
  const auto world = process_group();
  const DeviceMesh mesh = two_by_two();
  const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device());
  const Placements rows{Replicate(), Shard(0)};
  const auto make = [&](double scale) {
    return StateDict{
        {"rows", distribute_tensor(counting({301, 5}, options) * scale, mesh, rows)},
        {"gaps", distribute_tensor(counting({9}, options) * scale, mesh, {Replicate(), StridedShard(0, 2)})},
        {"tiny", distribute_tensor(counting({1}, options) * scale, mesh, rows)},
        {"plain", counting({3, 4}, at::kDouble) * scale},
        {"turned", (counting({4, 3}, options) * scale).t()},
        {"flags", at::full({5}, scale == 1, options.dtype(at::kBool))},
        {"scalar", at::full({}, scale, options)},
        {"empty", at::zeros({0, 2}, options)},
        {"nested", StateDict{{"step", static_cast<int64_t>(scale)}, {"name", scale == 1 ? "saved" : "other"}}},
        {"list", StateList{at::full({2}, scale, options), scale}},
        {"tuple", StateTuple{{scale, scale == 1}}}};
  };
  const std::string dir = (temp_dir() / "checkpoint").string();
  StateDict state = make(1);
  state["only_saved"] = 5;
  save(state, FileSystemWriter(dir));

  StateDict target = make(7);
  target["only_wanted"] = at::full({2}, rank() / 2, options);
  FileSystemReader reader(dir);
  const LoadReport report = load(target, reader, {.replicas = mesh.get_group("replicate"), .allow_partial_load = true});
  EXPECT_EQ(report.missing, std::vector<std::string>{"only_wanted"});
  EXPECT_EQ(report.unexpected, std::vector<std::string>{"only_saved"});
  EXPECT_EQ(target.at("only_wanted").as<at::Tensor>()[0].item<float>(), static_cast<float>(rank() / 2)) << "left alone";
  EXPECT_EQ(reader.counters().bytes_payload > 0, rank() < 2);
  EXPECT_EQ(reader.counters().bytes_needed > 0, rank() < 2);

  const StateDict wanted = make(1);
  for (const auto& [key, value] : wanted.items()) {
    if (value.is<at::Tensor>()) {
      EXPECT_TRUE(target.at(key).as<at::Tensor>().equal(value.as<at::Tensor>())) << key;
    } else if (value.is<ShardedTensor>()) {
      const auto& found = target.at(key).as<ShardedTensor>().shards();
      const auto& shards = value.as<ShardedTensor>().shards();
      ASSERT_EQ(found.size(), shards.size());
      for (size_t i = 0; i < shards.size(); ++i) EXPECT_TRUE(found[i].tensor.equal(shards[i].tensor)) << key;
    }
  }
  const StateDict& nested = target.at("nested");
  EXPECT_EQ(nested.at("step").as<int64_t>(), 1);
  EXPECT_EQ(nested.at("name").as<std::string>(), "saved");
  const StateList& list = target.at("list").as<StateList>();
  EXPECT_EQ(list[0].as<at::Tensor>()[1].item<float>(), 1.0f);
  EXPECT_EQ(list[1].as<double>(), 1.0);
  EXPECT_TRUE(target.at("tuple").as<StateTuple>().items[1].as<bool>());

  // A graph that has saved the old values refuses to go on, also where they came over the group.
  at::Tensor w = at::zeros({3, 4}, at::kDouble).requires_grad_();
  const at::Tensor y = (w * w).sum();
  StateDict watched{{"plain", w}};
  load(watched, FileSystemReader(dir), {.replicas = mesh.get_group("replicate")});
  EXPECT_THROW(y.backward(), c10::Error);
  EXPECT_TRUE(w.equal(wanted.at("plain").as<at::Tensor>()));
}

// Before torch 2.4 a list without tensors was one value: what the first replica reads is then flattened by that rule.
RESHARD_DISTRIBUTED_TEST(ReplicaLoadTest, ReadsWhatOldReleasesFlattenedOtherwise, .ranks = 2) {
  const auto world = process_group();
  const auto make = [] {
    const StateDict group{{"lr", 0.0}};
    return StateDict{{"model", StateDict{{"layer1", StateDict{{"weight", at::zeros({4, 3})}}}}},
                     {"list_of_dicts", StateList{group, group}}};
  };
  const std::string dir = RESHARD_TEST_DATA "/oracle/2.1.2/nested";
  StateDict wanted = make(), target = make();
  load(wanted, FileSystemReader(dir));
  FileSystemReader reader(dir);
  load(target, reader, {.replicas = world});
  EXPECT_EQ(reader.counters().bytes_needed > 0, rank() == 0);
  const auto weight = [](const StateDict& state) {
    return state.at("model").as<StateDict>().at("layer1").as<StateDict>().at("weight").as<at::Tensor>();
  };
  EXPECT_FALSE(weight(target).equal(at::zeros({4, 3})));
  EXPECT_TRUE(weight(target).equal(weight(wanted)));
  const StateList& groups = target.at("list_of_dicts").as<StateList>();
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].as<StateDict>().at("lr").as<double>(), 0.1);
  EXPECT_EQ(groups[1].as<StateDict>().at("lr").as<double>(), 0.2);
}

RESHARD_DISTRIBUTED_TEST(ReplicaLoadTest, AnErrorOfAnyRankIsEveryRanksErrorAndTouchesNothing, .ranks = 4) {
  const auto world = process_group();
  const DeviceMesh mesh = two_by_two();
  const std::string dir = (temp_dir() / "checkpoint").string();
  save(StateDict{{"a", at::ones({2})}, {"b", at::ones({3})}}, FileSystemWriter(dir));
  const LoadOptions options{.replicas = mesh.get_group("replicate")};
  const at::Tensor a = at::zeros({2});
  const auto refused = [&](StateDict target, ErrorCode code, int bad_rank, const std::string& text) {
    try {
      load(target, FileSystemReader(dir), options);
      ADD_FAILURE() << "loaded";
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      EXPECT_EQ(error.step(), "plan");
      EXPECT_TRUE(error.failures().contains(bad_rank)) << error.what();
      EXPECT_THAT(error.what(), HasSubstr(text));
    }
    EXPECT_TRUE(a.equal(at::zeros({2})));
  };
  const auto invalid = ErrorCode::kInvalidArgument;
  refused({{"a", a}, {"nowhere", at::zeros({1})}}, ErrorCode::kNotFound, 0, "nowhere");
  // Ranks 1 and 3 are replicas that want different things.
  StateDict other{{"a", a}};
  if (rank() == 3) other["b"] = at::zeros({3});
  refused(other, invalid, 1, "load into different states");
  refused({{"a", a}, {"b", rank() == 3 ? at::zeros({3}, at::kHalf) : at::zeros({3})}}, invalid, 3, "different states");
  // One that only the others would have to fill.
  StateDict sparse{{"a", a}};
  if (rank() == 2) sparse["b"] = at::zeros({3}).to_sparse();
  refused(sparse, ErrorCode::kInvalidArgument, 0, "different states");

  // The next load is none the worse.
  StateDict target{{"a", a}};
  load(target, FileSystemReader(dir), options);
  EXPECT_TRUE(a.equal(at::ones({2})));
}

}  // namespace
}  // namespace reshard
