// SPDX-License-Identifier: BSD-3-Clause
// PyTorch reads what this library writes, and this library reads what PyTorch writes, 1 to 4 ranks on either side.
// peer.py has the same network, optimizers and boxes.
#include <ATen/ops/arange.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/nn/modules/activation.h>
#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>
#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adagrad.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/rmsprop.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>
#include <torch/csrc/api/include/torch/utils.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "fsdp/whole_state.h"
#include "reshard/checkpoint/async_save.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/format/sha256.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/fsdp/optimizer_state.h"
#include "reshard/storage/verify.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/run_python.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using nlohmann::json;

std::string sha256(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return to_hex(Sha256::of({static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()}));
}

using Optimizer = torch::optim::Optimizer;

/// The optimizers of peer.py with the learning rates given by `lr`.
std::map<std::string, std::unique_ptr<Optimizer>> optimizers(const std::vector<at::Tensor>& p,
                                                             const std::function<double(const std::string&)>& lr) {
  using namespace torch::optim;
  std::map<std::string, std::unique_ptr<Optimizer>> result;
  result["AdamW"] = std::make_unique<AdamW>(
      p, AdamWOptions(lr("AdamW")).betas({0.8, 0.95}).eps(1e-6).weight_decay(0.02).amsgrad(true));
  result["Adam"] = std::make_unique<Adam>(p, AdamOptions(lr("Adam")).betas({0.7, 0.9}));
  result["SGD"] = std::make_unique<SGD>(p, SGDOptions(lr("SGD")));
  result["Momentum"] = std::make_unique<SGD>(p, SGDOptions(lr("Momentum")).momentum(0.9).nesterov(true));
  result["Adagrad"] =
      std::make_unique<Adagrad>(p, AdagradOptions(lr("Adagrad")).lr_decay(0.1).initial_accumulator_value(0.25));
  result["RMSprop"] =
      std::make_unique<RMSprop>(p, RMSpropOptions(lr("RMSprop")).alpha(0.9).momentum(0.8).centered(true));
  return result;
}

/// The network of peer.py, sharded, with its optimizers.
struct Network {
  Network(const FsdpOptions& options, const std::function<double(const std::string&)>& lr)
      : model(torch::nn::Sequential(torch::nn::Linear(5, 7), torch::nn::Tanh(), torch::nn::Linear(7, 3)), options),
        kinds(optimizers(model.parameters(), lr)) {}

  void step() {
    model.zero_grad();
    {
      const ForwardScope forward(model);
      model.module()->forward<at::Tensor>(at::rand({4, 5})).sum().backward();
    }
    for (const auto& [kind, optimizer] : kinds) optimizer->step();
  }
  StateDict state() const {
    StateDict optim;
    for (const auto& [kind, optimizer] : kinds) optim[kind] = optimizer_state_dict(*optimizer, model);
    return {{"model", model.state_dict(StateDictType::kSharded)}, {"optim", std::move(optim)}};
  }
  void load_state(const StateDict& state) {
    model.load_state_dict(state.at("model"));
    for (const auto& [kind, optimizer] : kinds)
      load_optimizer_state_dict(*optimizer, model, state.at("optim").as<StateDict>().at(kind));
  }
  /// Digests of all tensors, whole, by name. `group` shares the parameters.
  std::map<std::string, std::string> digests(ProcessGroup& group) const {
    std::map<std::string, std::string> result;
    const StateDict whole = fsdp_test::whole_state(state(), group);
    const std::function<void(const std::string&, const StateValue&)> visit = [&](const std::string& name,
                                                                                 const StateValue& value) {
      if (value.is<at::Tensor>()) result[name] = sha256(value.as<at::Tensor>());
      if (!value.is<StateDict>()) return;
      for (const auto& [key, item] : value.as<StateDict>().items()) visit(name.empty() ? key : name + "." + key, item);
    };
    visit("", whole);
    return result;
  }

  FullyShardedDataParallel<torch::nn::Sequential> model;
  std::map<std::string, std::unique_ptr<Optimizer>> kinds;
};

/// Every dtype that PyTorch's checkpoints hold; the packed and quantized ones have no tensors that can be saved.
std::vector<at::ScalarType> all_dtypes() {
  using S = at::ScalarType;
  return {S::Float,
          S::Double,
          S::Half,
          S::BFloat16,
          S::Char,
          S::Short,
          S::Int,
          S::Long,
          S::Byte,
          S::UInt16,
          S::UInt32,
          S::UInt64,
          S::Bool,
          S::ComplexHalf,
          S::ComplexFloat,
          S::ComplexDouble,
          S::Float8_e4m3fn,
          S::Float8_e5m2,
          S::Float8_e4m3fnuz,
          S::Float8_e5m2fnuz,
          S::Float8_e8m0fnu,
          S::Float4_e2m1fn_x2,
          S::BComplex32};
}

/// A tensor whose bytes count up, equal on every rank.
at::Tensor pattern(at::IntArrayRef sizes, at::ScalarType dtype, int seed) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (int64_t n : sizes) bytes *= n;
  const at::Tensor raw = ((at::arange(bytes) * 7 + seed).remainder(dtype == at::kBool ? 2 : 251)).to(at::kByte);
  at::Tensor result = at::empty(sizes, dtype);
  std::memcpy(result.mutable_data_ptr(), raw.const_data_ptr(), static_cast<size_t>(bytes));
  return result;
}

at::Tensor narrow_to(at::Tensor tensor, const Box& box) {
  for (size_t d = 0; d < box.sizes.size(); ++d)
    tensor = tensor.narrow(static_cast<int64_t>(d), box.offsets[d], box.sizes[d]);
  return tensor;
}

ShardedTensor shard_of(const at::Tensor& whole, const std::vector<Box>& boxes) {
  std::vector<LocalShard> shards;
  for (const Box& box : boxes) shards.push_back({box, narrow_to(whole, box)});
  return ShardedTensor(to_dims(whole.sizes()), whole.scalar_type(), std::move(shards));
}

class Interop : public TorchDistributedTest {
 protected:
  void set_up_rank() override {
    TorchDistributedTest::set_up_rank();
    if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  }

  const std::map<std::string, double> rates{{"AdamW", 0.05},     {"Adam", 0.04},    {"SGD", 0.03},
                                            {"Momentum", 0.025}, {"Adagrad", 0.02}, {"RMSprop", 0.01}};

  /// Every dtype, whole and cut in all ways; PyTorch must find each tensor's bytes.
  void write_and_let_pytorch_read() {
    const auto world = process_group();
    const int n = world->size();
    json wanted;
    StateDict plain, rows, columns, flat, nested;
    int seed = 0;
    for (const at::ScalarType dtype : all_dtypes()) {
      const std::string name(to_string(to_dtype(dtype)));
      const at::Tensor whole = pattern({5, 3, 2}, dtype, ++seed);
      const Box box = whole_box({5, 3, 2});
      plain[name] = whole;
      rows[name] =
          shard_of(whole, {split_evenly(box, 0, n, rank())});  // 5 rows: uneven, and empty on the last of 4 ranks
      columns[name] = shard_of(whole, {split_evenly(box, 1, n, rank())});  // not contiguous in memory
      flat[name] = shard_of(whole, flat_range_to_boxes({5, 3, 2}, rank() * 30 / n, (rank() + 1) * 30 / n));
      for (const char* group : {"plain.", "rows.", "columns.", "flat."}) wanted[group + name] = sha256(whole);
    }
    // One place in the file under two names.
    plain["tied"] = plain.at("float64");
    rows["tied"] = rows.at("float64");
    for (const char* group : {"plain", "rows"})
      wanted[std::string(group) + ".tied"] = wanted.at(std::string(group) + ".float64");
    const at::Tensor one = pattern({1, 4}, at::kFloat, 99);
    rows["tiny"] = shard_of(one, {split_evenly(whole_box({1, 4}), 0, n, rank())});
    wanted["rows.tiny"] = sha256(one);
    plain["scalar"] = pattern({}, at::kFloat, 5);
    wanted["plain.scalar"] = sha256(pattern({}, at::kFloat, 5));
    plain["empty"] = at::empty({0, 3});
    wanted["plain.empty"] = sha256(at::empty({0, 3}));
    plain["transposed"] = pattern({3, 4}, at::kFloat, 6).t();
    wanted["plain.transposed"] = sha256(pattern({3, 4}, at::kFloat, 6).t());
    const at::Tensor in_list = pattern({3}, at::kLong, 8);
    wanted["list.1.deep"] = sha256(in_list);

    const StateDict values{{"int", 7},
                           {"big", int64_t{1} << 40},
                           {"float", 0.1},
                           {"text", "h\xC3\xA9llo"},
                           {"none", None{}},
                           {"flag", true},
                           {"list", StateList{1, 2.5, "x"}},
                           {"tuple", StateTuple{{0.9, 0.999}}},
                           {"raw", ByteString{std::string("\x00\xFF", 2)}}};
    torch::manual_seed(4);
    Network network({.process_group = world}, [&](const std::string& kind) { return rates.at(kind); });
    network.step();
    network.step();
    const StateDict trained = network.state();
    for (const auto& [name, digest] : network.digests(*world)) wanted[name] = digest;

    const StateDict state{{"plain", plain},
                          {"rows", rows},
                          {"columns", columns},
                          {"flat", flat},
                          {"values", values},
                          {"list", StateList{1, StateDict{{"deep", in_list}}}},
                          {"model", trained.at("model")},
                          {"optim", trained.at("optim")}};
    const std::string directory = (temp_dir() / "checkpoint").string();
    save(state, FileSystemWriter(directory));
    const std::string async_directory = (temp_dir() / "async").string();
    const AsyncSaveResponse saved = async_save(state, FileSystemWriter(async_directory));
    network.step();  // the values go on, the copies do not
    saved.upload_completion.get();
    if (rank() == 0) {
      const std::string expected = (temp_dir() / "expected.json").string();
      std::ofstream(expected) << json{{"tensors", wanted}, {"lr", rates}}.dump();
      if (n == 2) expect_python_succeeds("judge.py whole '" + async_directory + "' --digest '" + expected + "'");
      expect_python_succeeds("judge.py whole '" + directory + "' --digest '" + expected + "'");
      expect_python_succeeds("judge.py values '" + directory + "'");
      expect_python_succeeds("judge.py peer '" + directory + "' --digest '" + expected + "' --ranks 4");
    }
    world->barrier();
  }

  /// Everything that PyTorch wrote, as tensors in several layouts over `group`.
  void read_tensors(const std::shared_ptr<ProcessGroup>& group, const std::string& directory, const json& expected) {
    FileSystemReader catalogue(directory);
    const Metadata metadata = catalogue.read_metadata();
    const int n = group->size(), r = group->rank();
    StateDict wholes, rows, columns, flat;
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
      const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
      if (tensor == nullptr) {
        wholes[fqn] = None{};
        continue;
      }
      const at::IntArrayRef sizes(tensor->size.data(), tensor->size.size());
      const at::ScalarType dtype = to_scalar_type(tensor->properties.dtype);
      wholes[fqn] = at::empty(sizes, dtype);
      const auto target = [&](const std::vector<Box>& boxes) {
        std::vector<LocalShard> shards;
        for (const Box& box : boxes)
          shards.push_back({box, at::empty(at::IntArrayRef(box.sizes.data(), box.sizes.size()), dtype)});
        return ShardedTensor(tensor->size, dtype, std::move(shards));
      };
      if (sizes.empty()) continue;
      const Box whole = whole_box(tensor->size);
      const int64_t numel = volume(tensor->size);
      rows[fqn] = target({split_evenly(whole, 0, n, r)});
      columns[fqn] = target({split_evenly(whole, sizes.size() - 1, n, r)});
      flat[fqn] = target(flat_range_to_boxes(tensor->size, r * numel / n, (r + 1) * numel / n));
    }
    load(wholes, FileSystemReader(directory), {.process_group = group});
    for (const auto& [fqn, digest] : expected.at("tensors").items())
      EXPECT_EQ(sha256(wholes.at(fqn).as<at::Tensor>()), digest.get<std::string>()) << fqn;
    for (StateDict* parts : {&rows, &columns, &flat}) {
      load(*parts, FileSystemReader(directory), {.process_group = group});
      for (const auto& [fqn, part] : parts->items()) {
        for (const LocalShard& shard : part.as<ShardedTensor>().shards())
          EXPECT_EQ(sha256(shard.tensor), sha256(narrow_to(wholes.at(fqn).as<at::Tensor>(), shard.box))) << fqn;
      }
    }
    EXPECT_EQ(wholes.at("values.int").as<int64_t>(), 7);
    EXPECT_EQ(wholes.at("values.big").as<int64_t>(), int64_t{1} << 40);
    EXPECT_EQ(wholes.at("values.float").as<double>(), 0.1);
    EXPECT_EQ(wholes.at("values.text").as<std::string>(), "h\xC3\xA9llo");
    EXPECT_TRUE(wholes.at("values.none").is<None>());
    EXPECT_TRUE(wholes.at("values.flag").as<bool>());
    EXPECT_EQ(wholes.at("values.list").as<StateList>()[1].as<double>(), 2.5);
    EXPECT_EQ(wholes.at("values.tuple").as<StateTuple>().items[1].as<double>(), 0.999);
    EXPECT_EQ(wholes.at("values.raw").as<ByteString>().data, std::string("\x00\xFF", 2));
    EXPECT_EQ(wholes.at("nested.1.deep.n").as<int64_t>(), 5);
  }

  /// The network that PyTorch trained, in each kind of model, into one of ours with its optimizers; over the mesh, if any.
  void read_network(const std::shared_ptr<ProcessGroup>& group, const std::optional<DeviceMesh>& mesh,
                    const std::string& directory, const json& expected, int writers) {
    std::vector<std::string> wraps{"fsdp", "flat", "fully_shard", "plain"};
    if (writers == 4) wraps.insert(wraps.end(), {"hsdp", "hsdp2"});
    for (const std::string& wrap : wraps) {
      SCOPED_TRACE(wrap);
      FsdpOptions options{.process_group = group,
                          .layout = wrap == "flat" ? ShardLayout::kDim0Chunks : ShardLayout::kFlat};
      if (mesh) {
        options.process_group = nullptr;
        options.mesh = mesh;
      }
      Network network(options, [](const std::string&) { return 7.0; });
      StateDict target{{wrap, network.state()}};
      load(target, FileSystemReader(directory), {.process_group = group});
      network.load_state(target.at(wrap));
      std::map<std::string, std::string> wanted;
      for (const auto& [name, digest] : expected.at("tensors").items()) {
        if (name.starts_with(wrap + ".")) wanted[name.substr(wrap.size() + 1)] = digest;
      }
      EXPECT_GT(wanted.size(), 40u);
      EXPECT_EQ(network.digests(mesh ? *mesh->get_group("shard") : *group), wanted);
      for (const auto& [kind, optimizer] : network.kinds)
        EXPECT_EQ(optimizer->param_groups()[0].options().get_lr(), expected.at("lr").at(kind).get<double>()) << kind;
    }
  }
};

constexpr auto kDeadline = std::chrono::seconds(300);

RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatOneRankWrites, .ranks = 1, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatTwoRanksWrite, .ranks = 2, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatThreeRanksWrite, .ranks = 3, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatFourRanksWrite, .ranks = 4, .deadline = kDeadline) {
  write_and_let_pytorch_read();
}

// Into every kind of model that PyTorch has, on one to four ranks.
RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, PyTorchReadsWhatReplicasWrite, .ranks = 4, .deadline = kDeadline) {
  const auto world = process_group();
  const DeviceMesh mesh = init_device_mesh({2, 2}, {.dim_names = {"replicate", "shard"}});
  torch::manual_seed(4);
  Network network({.mesh = mesh}, [&](const std::string& kind) { return rates.at(kind); });
  network.step();
  network.step();
  const std::string directory = (temp_dir() / "checkpoint").string();
  save(network.state(), FileSystemWriter(directory), {.verify_replicas = true});
  const json wanted = network.digests(*mesh.get_group("shard"));
  if (rank() == 0) {
    const std::string expected = (temp_dir() / "expected.json").string();
    std::ofstream(expected) << json{{"tensors", wanted}, {"lr", rates}}.dump();
    expect_python_succeeds("judge.py whole '" + directory + "' --digest '" + expected + "'");
    expect_python_succeeds("judge.py network '" + directory + "' --digest '" + expected + "' --ranks 4");
  }
  world->barrier();
}

RESHARD_DISTRIBUTED_TEST_F(Interop, InteropTest, OneToFourRanksReadWhatPyTorchWritesOnOneToFour, .ranks = 4,
                           .deadline = kDeadline) {
  const auto world = process_group();
  const std::string root = (temp_dir() / "python").string();
  if (rank() == 0) expect_python_succeeds("write.py '" + root + "' --ranks 4");
  world->barrier();
  for (int readers = 1; readers <= 4; ++readers) {
    std::vector<int> ranks;
    for (int r = 0; r < readers; ++r) ranks.push_back(r);
    const auto group = new_group(ranks);
    std::optional<DeviceMesh> mesh;
    if (readers == 4) mesh = init_device_mesh({2, 2}, {.dim_names = {"replicate", "shard"}});
    for (int writers = 1; writers <= 4 && group->is_member(); ++writers) {
      SCOPED_TRACE(std::to_string(writers) + " wrote, " + std::to_string(readers) + " read");
      const std::string directory = root + "/" + std::to_string(writers);
      const json expected = json::parse(std::ifstream(directory + ".json"));
      read_tensors(group, directory, expected);
      read_network(group, std::nullopt, directory, expected, writers);
      if (mesh) read_network(group, mesh, directory, expected, writers);
    }
    world->barrier();
  }

  // Objects that only Python knows are kept, and saved again as they were.
  StateDict objects;
  for (const char* name : {"thing", "date", "path", "set", "complex", "enum", "dtype", "size", "int_keys", "huge",
                           "array", "range", "counter"})
    objects[name] = None{};
  StateDict state{{"objects", objects}};
  load(state, FileSystemReader(root + "/4"));
  for (const auto& [name, value] : state.at("objects").as<StateDict>().items())
    EXPECT_TRUE(value.is<OpaqueValue>()) << name << " is " << value.type_name();
  const std::string again = (temp_dir() / "again").string();
  save(state, FileSystemWriter(again));
  if (rank() == 0) expect_python_succeeds("judge.py objects '" + again + "'");
  world->barrier();
}

// It knows nothing of sidecars: ours stay, and must not be taken for those of what it wrote.
TEST(SavedOverTest, WhatPyTorchSavesOverACheckpointOfOursIsReadAsItsOwn) {
  if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  const TemporaryDirectory root;
  const std::string directory = root / "1";
  const StateDict ours{{"dense", StateDict{{"float32", at::zeros({3, 4})}}}, {"only_ours", at::ones({9})}};
  save(ours, FileSystemWriter(directory));
  expect_python_succeeds("write.py '" + root.path() + "' --ranks 1");

  const json expected = json::parse(std::ifstream(root / "1.json"));
  const Metadata metadata = FileSystemReader(directory).read_metadata();
  EXPECT_FALSE(metadata.sidecars);
  EXPECT_FALSE(metadata.state_dict_metadata.contains("only_ours"));
  StateDict wholes;
  for (const auto& [fqn, digest] : expected.at("tensors").items()) {
    const auto& tensor = std::get<TensorStorageMetadata>(*metadata.state_dict_metadata.find(fqn));
    wholes[fqn] =
        at::empty(at::IntArrayRef(tensor.size.data(), tensor.size.size()), to_scalar_type(tensor.properties.dtype));
  }
  load(wholes, FileSystemReader(directory));
  for (const auto& [fqn, digest] : expected.at("tensors").items())
    EXPECT_EQ(sha256(wholes.at(fqn).as<at::Tensor>()), digest.get<std::string>()) << fqn;
  VerifyReport report = verify_checkpoint(directory);
  EXPECT_THAT(report.problems, testing::IsEmpty());
  EXPECT_THAT(report.notes, testing::Contains(testing::HasSubstr(": sidecar of a save that PyTorch saved over")));

  // And back: nothing of the other's save is left.
  save(ours, FileSystemWriter(directory));
  report = verify_checkpoint(directory);
  EXPECT_THAT(report.problems, testing::IsEmpty());
  EXPECT_THAT(report.notes, testing::IsEmpty());
  EXPECT_EQ(report.files, 1u);
}

TEST(JudgeTest, NamesTheTensorThatDiffers) {
  if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  const TemporaryDirectory directory;
  const at::Tensor good = pattern({5}, at::kFloat, 1), other = pattern({5}, at::kFloat, 2);
  save(StateDict{{"good", good}, {"bad", good}}, FileSystemWriter(directory / "checkpoint"));
  std::ofstream(directory / "expected.json") << json{{"good", sha256(good)}, {"bad", sha256(other)}}.dump();
  const PythonResult result = run_python("judge.py whole '" + (directory / "checkpoint") + "' --digest '" +
                                         (directory / "expected.json") + "'");
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, testing::HasSubstr("1 of 2 tensors differ: bad"));
}

}  // namespace
}  // namespace reshard
