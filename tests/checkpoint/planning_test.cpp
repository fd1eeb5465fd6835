// SPDX-License-Identifier: BSD-3-Clause
// What a caller can do about the planning of a save or load: ids, keys, objects, and planners of one's own.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <set>

#include "reshard/checkpoint/load_from_keys.h"
#include "reshard/checkpoint/stateful.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

std::vector<std::string> keys_of(const StateDict& dict) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : dict.items()) keys.push_back(key);
  return keys;
}

const at::Tensor& tensor_at(const StateDict& dict, const std::string& key) { return dict.at(key).as<at::Tensor>(); }

StateDict example() {
  return {{"model", StateDict{{"embedding", StateDict{{"weight", at::arange(12.0).reshape({4, 3})}}},
                              {"embedding.scale", at::full({2}, 3.0)},
                              {"head", at::full({2, 2}, 5.0, at::kBFloat16)}}},
          {"optim", StateDict{{"state", StateDict{{"head", StateDict{{"exp_avg", at::ones({2, 2})}, {"step", 4}}}}},
                              {"param_groups", StateList{StateDict{{"lr", 0.5}, {"params", StateList{"head"}}}}}}},
          {"mixed", StateList{at::zeros({2}), "text", at::ones({3}), StateDict{{"deep", 7}}}},
          {"plain", StateList{1, 2}},
          {"nothing", None{}}};
}

// test_auto_detect.
TEST(CheckpointIdTest, APathIsEnoughAndOtherIdsAreRefused) {
  const TemporaryDirectory directory;
  save(example(), directory / "ckpt");
  StateDict target{{"model", StateDict{{"head", at::zeros({2, 2}, at::kBFloat16)}}}};
  load(target, directory / "ckpt");
  EXPECT_EQ(tensor_at(target.at("model"), "head").sum().item<float>(), 20);
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "Cannot detect", save(example(), "abc://abc.abc"));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "abc://abc.abc", load(target, "abc://abc.abc"));
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "must be specified", save(example(), ""));
  EXPECT_ERROR(ErrorCode::kNotFound, "no-such", load(target, directory / "no-such"));
}

// test_partial_load.
TEST(LoadFromKeysTest, GivesAllOrWhatLiesUnderTheKeysNestedAsItWasSaved) {
  const TemporaryDirectory directory;
  save(example(), directory.path());
  FileSystemReader reader(directory.path());
  const StateDict all = load_state_dict_from_keys(reader);
  EXPECT_EQ(keys_of(all), keys_of(example()));
  const StateDict& model = all.at("model");
  EXPECT_EQ(keys_of(model), keys_of(example().at("model")));
  EXPECT_TRUE(at::equal(tensor_at(model.at("embedding"), "weight"), at::arange(12.0).reshape({4, 3})));
  EXPECT_EQ(tensor_at(model, "head").scalar_type(), at::kBFloat16);
  EXPECT_TRUE(all.at("nothing").is<None>());
  EXPECT_EQ(all.at("plain").as<StateList>()[1].as<int64_t>(), 2);
  EXPECT_EQ(all.at("mixed").as<StateList>()[1].as<std::string>(), "text");
  EXPECT_EQ(all.at("mixed").as<StateList>()[3].as<StateDict>().at("deep").as<int64_t>(), 7);
  EXPECT_EQ(all.at("optim").as<StateDict>().at("param_groups").as<StateList>()[0].as<StateDict>().at("lr").as<double>(),
            0.5);

  // By elements of the path: not "model.embedding.scale", whose key only begins alike.
  FileSystemReader again(directory.path());
  const StateDict part = load_state_dict_from_keys(again, {"model.embedding", "optim.state", "mixed.2"});
  EXPECT_EQ(keys_of(part), (std::vector<std::string>{"model", "optim", "mixed"}));
  EXPECT_EQ(keys_of(part.at("model")), std::vector<std::string>{"embedding"});
  EXPECT_EQ(keys_of(part.at("optim")), std::vector<std::string>{"state"});
  EXPECT_TRUE(part.at("mixed").as<StateList>()[0].is<None>());
  EXPECT_EQ(part.at("mixed").as<StateList>()[2].as<at::Tensor>().sum().item<float>(), 3);
  EXPECT_LT(again.counters().bytes_needed, reader.counters().bytes_needed);

  EXPECT_ERROR(ErrorCode::kNotFound, "model.absent", load_state_dict_from_keys(reader, {"plain", "model.absent"}));
  EXPECT_EQ(keys_of(load_state_dict_from_keys(reader, {"plain", "model.absent"}, {.allow_partial_load = true})),
            std::vector<std::string>{"plain"});
}

struct Counter : Stateful {
  explicit Counter(at::Tensor start, std::vector<std::string>* calls = nullptr, std::string name = "")
      : values(std::move(start)), log(calls), called(std::move(name)) {}
  StateDict state_dict() const override {
    if (log != nullptr) log->push_back("get " + called);
    return {{"values", values}, {"count", count}};
  }
  void load_state_dict(const StateDict& state) override {
    if (log != nullptr) log->push_back("set " + called);
    count = state.at("count").as<int64_t>();
  }
  at::Tensor values;
  int64_t count = 0;
  std::vector<std::string>* log;
  std::string called;
};

// test_stateful_and_non_stateful_loads, test_init_state_dict.
TEST(StatefulTest, ObjectsAreSavedAndLoadedAsTheyAre) {
  const TemporaryDirectory directory;
  Counter counter(at::ones({3}));
  counter.count = 5;
  save(StatefulObjects{{"counter", &counter}}, FileSystemWriter(directory.path()));
  std::vector<std::string> calls;
  Counter other(at::zeros({3}), &calls, "other");
  const void* memory = other.values.const_data_ptr();
  load(StatefulObjects{{"counter", &other}}, FileSystemReader(directory.path()));
  EXPECT_EQ(calls, (std::vector<std::string>{"get other", "set other"}));
  EXPECT_EQ(other.count, 5);
  EXPECT_EQ(other.values.const_data_ptr(), memory) << "in place";
  EXPECT_EQ(other.values.sum().item<float>(), 3);
  Counter narrow(at::zeros({2}), &calls, "narrow");
  EXPECT_ERROR(ErrorCode::kInvalidArgument, "Size mismatch",
               load(StatefulObjects{{"counter", &narrow}}, FileSystemReader(directory.path())));
  EXPECT_EQ(calls.back(), "get narrow") << "a load that failed gives nothing to the object";
}

/// Its state dict takes a collective.
struct Collective : Stateful {
  Collective(ProcessGroup& process_group, bool broadcasts) : group(process_group), broadcast(broadcasts) {}
  void talk() const {
    at::Tensor t = at::ones({1});
    if (broadcast) {
      group.broadcast(t, 0);
    } else {
      group.all_reduce_sum(t);
    }
  }
  StateDict state_dict() const override {
    talk();
    return {{"t", at::ones({2})}};
  }
  void load_state_dict(const StateDict& /*state*/) override { talk(); }
  ProcessGroup& group;
  bool broadcast;
};

// test_different_ordered_state_dict_keys.
RESHARD_DISTRIBUTED_TEST(StatefulDistributedTest, OrderOfObjectsIsThatOfTheirNamesOnEveryRank, .ranks = 2) {
  const std::string directory = (temp_dir() / "checkpoint").string();
  Collective a(*process_group(), true), b(*process_group(), false);
  StatefulObjects objects;
  const std::vector<std::pair<const char*, Stateful*>> order{{"a", &a}, {"b", &b}};
  for (size_t i = 0; i < 2; ++i) {
    const auto& [name, object] = order[process_group()->rank() == 0 ? i : 1 - i];
    objects[name] = object;
  }
  save(objects, FileSystemWriter(directory));
  load(objects, FileSystemReader(directory));
}

RESHARD_DISTRIBUTED_TEST(LoadFromKeysDistributedTest, EveryRankGetsWholeTensorsOfWhatManySaved, .ranks = 3) {
  const std::string directory = (temp_dir() / "checkpoint").string();
  const int64_t r = process_group()->rank();
  const at::Tensor whole = at::arange(12.0).reshape({6, 2});
  save({{"sharded", ShardedTensor({6, 2}, at::kFloat, {{{{2 * r, 0}, {2, 2}}, whole.slice(0, 2 * r, 2 * r + 2)}})},
        {"only " + std::to_string(r), 10 + r}},
       directory);
  FileSystemReader reader(directory);
  const StateDict all = load_state_dict_from_keys(reader);
  EXPECT_TRUE(at::equal(tensor_at(all, "sharded"), whole));
  EXPECT_EQ(all.at("only 2").as<int64_t>(), 12);
  // Ranks may ask for different keys; one that asks for what is not there fails all.
  const StateDict mine = load_state_dict_from_keys(reader, {"only " + std::to_string(r)});
  EXPECT_EQ(mine.at("only " + std::to_string(r)).as<int64_t>(), 10 + r);
  EXPECT_ERROR(ErrorCode::kNotFound, "rank 1: not found: nothing is stored under this key; key only 7",
               load_state_dict_from_keys(reader, {r == 1 ? "only 7" : "only 0"}));
}

/// Stores float32 tensors as bfloat16. A planner of one's own is another one with something changed.
class Bfloat16SavePlanner final : public SavePlanner {
 public:
  void set_up_planner(const SaveState& state, bool is_coordinator) override {
    inner_.set_up_planner(state, is_coordinator);
  }
  SavePlan create_local_plan() override {
    SavePlan plan = inner_.create_local_plan();
    for (WriteItem& item : plan.items) {
      if (item.type == WriteItemType::kByteIo || item.properties.dtype != DType::kFloat32) continue;
      item.properties.dtype = DType::kBFloat16;
      cast_.insert(item.index.fqn);
    }
    return plan;
  }
  GlobalSavePlan create_global_plan(std::vector<SavePlan> plans) override {
    return inner_.create_global_plan(std::move(plans));
  }
  SavePlan finish_plan(SavePlan plan) override { return inner_.finish_plan(std::move(plan)); }
  TensorView resolve_tensor(const WriteItem& item) const override {
    if (!cast_.contains(item.index.fqn)) return inner_.resolve_tensor(item);
    WriteItem original = item;
    original.properties.dtype = DType::kFloat32;
    const TensorView view = inner_.resolve_tensor(original);
    const at::Tensor source = at::from_blob(const_cast<std::byte*>(view.data), {view.sizes.data(), view.sizes.size()},
                                            {view.strides.data(), view.strides.size()}, to_scalar_type(view.dtype));
    const auto cast = std::make_shared<at::Tensor>(source.to(at::kBFloat16).contiguous());
    return {static_cast<const std::byte*>(cast->const_data_ptr()), DType::kBFloat16, view.sizes,
            contiguous_strides(view.sizes), cast};
  }
  ByteSpan resolve_bytes(const WriteItem& item) const override { return inner_.resolve_bytes(item); }

 private:
  DefaultSavePlanner inner_;
  std::set<std::string> cast_;
};

// test_nested..., PyTorch's own examples of custom planners: rename keys on load, cast on save, change what is read.
TEST(CustomPlannerTest, CastsOnSaveRenamesAndTransformsOnLoad) {
  const TemporaryDirectory directory;
  Bfloat16SavePlanner casting;
  const at::Tensor weight = at::arange(12.0).reshape({4, 3});
  save({{"model", StateDict{{"weight", weight.t()}, {"count", at::arange(3)}, {"name", "x"}}}},
       FileSystemWriter(directory.path()), {.planner = &casting});
  FileSystemReader whole(directory.path());
  const StateDict stored = load_state_dict_from_keys(whole);
  EXPECT_EQ(tensor_at(stored.at("model"), "weight").scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(tensor_at(stored.at("model"), "weight").to(at::kFloat), weight.t()));
  EXPECT_EQ(tensor_at(stored.at("model"), "count").scalar_type(), at::kLong);

  std::mutex mutex;
  std::vector<std::string> transformed;
  DefaultLoadPlanner planner({.allow_cast = true,
                              .rename = [](const std::string& fqn) { return "model." + fqn.substr(4); },
                              .transform =
                                  [&](const std::string& fqn, const Box& region, const MutableTensorView& view) {
                                    const std::lock_guard lock(mutex);
                                    transformed.push_back(fqn + " " + to_string(region));
                                    if (view.dtype != DType::kBFloat16) return;
                                    at::Tensor part =
                                        at::from_blob(view.data, {view.sizes.data(), view.sizes.size()},
                                                      {view.strides.data(), view.strides.size()}, at::kBFloat16);
                                    part.neg_();
                                  }});
  StateDict target{{"net", StateDict{{"weight", at::zeros({3, 4})}, {"name", None{}}}}};
  const LoadReport report = load(target, FileSystemReader(directory.path()), {.planner = &planner});
  EXPECT_TRUE(at::equal(tensor_at(target.at("net"), "weight"), -weight.t()));
  EXPECT_EQ(target.at("net").as<StateDict>().at("name").as<std::string>(), "x");
  EXPECT_EQ(transformed, std::vector<std::string>{"net.weight [0, 0]+[3, 4]"});
  EXPECT_EQ(report.unexpected, std::vector<std::string>{"model.count"}) << "by its stored name";
  EXPECT_EQ(report.cast, std::vector<std::string>{"net.weight: bfloat16 -> float32"});
  // Two names may want one stored tensor; a name that comes to nothing is missing as itself.
  DefaultLoadPlanner same({.allow_cast = true, .rename = [](const std::string&) { return "model.weight"; }});
  StateDict twice{{"a", at::zeros({3, 4})}, {"b", at::zeros({3, 4})}};
  load(twice, FileSystemReader(directory.path()), {.planner = &same});
  EXPECT_TRUE(at::equal(tensor_at(twice, "a"), tensor_at(twice, "b")));
  DefaultLoadPlanner nowhere({.rename = [](const std::string& fqn) { return fqn + ".gone"; }});
  StateDict one{{"a", at::zeros({3, 4})}};
  EXPECT_ERROR(ErrorCode::kNotFound, "Missing key in checkpoint state_dict: a.",
               load(one, FileSystemReader(directory.path()), {.planner = &nowhere}));
}

}  // namespace
}  // namespace reshard
