// SPDX-License-Identifier: BSD-3-Clause
// What the library does with tensors that the host must not touch. The same bodies on real GPUs: tests/e2e, tests/fsdp.
#include "device/mapped_device.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <gtest/gtest.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <future>
#include <mutex>
#include <thread>

#include "dtensor/layouts.h"
#include "fsdp/test_model.h"
#include "reshard/checkpoint/async_save.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/fsdp/optimizer_state.h"
#include "reshard/planner/default_planner.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/temporary_directory.h"

namespace reshard::device_test {
namespace {

using fsdp_test::BlockImpl;
using fsdp_test::difference_to;
using fsdp_test::DoublePrecision;
using fsdp_test::LanguageModel;
using fsdp_test::LanguageModelImpl;

const c10::Device kDevice(kMapped, 1);  // not the first one: a forgotten index shows
// Some operators take another path on the CPU than on a device (fused attention), so in double precision they agree but for rounding.
constexpr double kTolerance = 1e-9;

class MappedDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override { register_mapped_device(); }
};

// --- the device itself: its traps close ------------------------------------------------------------------------------

TEST_F(MappedDeviceTest, OperatorsGiveTheValuesOfTheCpu) {
  const at::Tensor a = at::arange(12, at::kFloat).view({3, 4});
  const at::Tensor b = a.to(kDevice);
  EXPECT_EQ(b.device(), kDevice);
  EXPECT_TRUE(at::matmul(b, b.t()).cpu().equal(at::matmul(a, a.t())));
  EXPECT_TRUE(b.t().narrow(0, 1, 2).cpu().equal(a.t().narrow(0, 1, 2)));
  at::Tensor c = b.clone();
  c.slice(1, 0, 4, 2).add_(1);
  EXPECT_TRUE(c.cpu().equal(at::arange(12, at::kFloat).view({3, 4}) + at::tensor({1.f, 0.f, 1.f, 0.f})));
}

using MappedDeviceDeathTest = MappedDeviceTest;

TEST_F(MappedDeviceDeathTest, TheHostCannotReadItsMemory) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        std::signal(SIGSEGV, SIG_DFL);  // a sanitizer has a handler
        const at::Tensor t = at::ones({4}).to(kDevice);
        const volatile float* data = t.const_data_ptr<float>();
        std::exit(data[0] == 1.0f ? 1 : 2);
      },
      ::testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(MappedDeviceDeathTest, MemoryInUseByAnotherStreamMustNotBeFreed) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(
      {
        const c10::impl::VirtualGuardImpl impl(kMapped);
        const at::Tensor pinned = at::ones({4}).pin_memory();
        at::Tensor t = at::zeros({4}, at::TensorOptions(kDevice));
        {
          const c10::StreamGuard side(impl.getNewStream(kDevice));
          t.copy_(pinned, /*non_blocking=*/true);
        }
        t.reset();
      },
      "still had work on it");
}

TEST_F(MappedDeviceTest, AsynchronousCopiesWaitForTheirStream) {
  const c10::DeviceGuard guard(kDevice);
  const c10::impl::VirtualGuardImpl impl(kMapped);
  const at::Tensor source = at::full({4}, 7.f).to(kDevice);
  const at::Tensor host = at::zeros({4}).pin_memory();
  const uint64_t deferred = mapped_counters().deferred_copies;
  host.copy_(source, /*non_blocking=*/true);
  EXPECT_EQ(mapped_counters().deferred_copies, deferred + 1);
  EXPECT_TRUE(host.isnan().all().item<bool>()) << "read before the stream was synchronised";
  impl.synchronizeStream(impl.getStream(kDevice));
  EXPECT_TRUE(host.equal(at::full({4}, 7.f)));
}

TEST_F(MappedDeviceTest, StreamsWaitForEventsOnly) {
  const c10::DeviceGuard guard(kDevice);
  const c10::impl::VirtualGuardImpl impl(kMapped);
  const c10::Stream side = impl.getNewStream(kDevice);
  const at::Tensor pinned = at::full({4}, 3.f).pin_memory();
  at::Tensor t = at::zeros({4}, at::TensorOptions(kDevice));
  c10::Event copied(kMapped);
  {
    const c10::StreamGuard on_side(side);
    t.copy_(pinned, /*non_blocking=*/true);
    copied.record(side);
  }
  EXPECT_FALSE(copied.query());
  EXPECT_TRUE(t.cpu().equal(at::zeros({4}))) << "nobody waited for the side stream";
  copied.block(impl.getStream(kDevice));
  EXPECT_TRUE(t.cpu().equal(at::full({4}, 3.f)));
  EXPECT_TRUE(copied.query());
}

// --- checkpoints -----------------------------------------------------------------------------------------------------

TEST_F(MappedDeviceTest, SavesAndLoadsTensorsOfEveryShape) {
  const TemporaryDirectory directory;
  const auto make = [](const at::Tensor& t) { return t.to(kDevice); };
  const at::Tensor base = at::arange(24, at::kDouble).view({2, 3, 4});
  const StateDict state{{"dense", make(base)},
                        {"transposed", make(base).transpose(0, 2)},
                        {"strided", make(base).slice(2, 0, 4, 2)},
                        {"expanded", make(at::ones({1, 3})).expand({5, 3})},
                        {"scalar", make(at::scalar_tensor(2.5))},
                        {"empty", make(at::empty({0, 3}))},
                        {"conjugated", make(at::complex(base, base + 1)).conj()},
                        {"bool", make(base.gt(3))},
                        {"step", 7},
                        {"tuple", StateTuple{{StateValue(make(at::arange(3))), StateValue("x")}}}};
  save(state, FileSystemWriter(directory.path()));

  StateDict target;
  for (const auto& [key, value] : state.items())
    target[key] = value.is<at::Tensor>()
                      ? StateValue(at::zeros_like(value.as<at::Tensor>(), at::MemoryFormat::Contiguous))
                      : StateValue(None{});
  load(target, FileSystemReader(directory.path()));
  for (const auto& [key, value] : state.items()) {
    if (!value.is<at::Tensor>()) continue;
    const at::Tensor& loaded = target.at(key).as<at::Tensor>();
    EXPECT_EQ(loaded.device(), kDevice) << key;
    EXPECT_TRUE(loaded.cpu().equal(value.as<at::Tensor>().cpu().resolve_conj())) << key;
  }
  EXPECT_EQ(target.at("step").as<int64_t>(), 7);

  // Into views that are not contiguous, and of another dtype.
  at::Tensor wide = at::zeros({4, 3, 2, 2}, at::TensorOptions(kDevice).dtype(at::kFloat));
  StateDict other{{"dense", wide.select(3, 1).transpose(0, 2)}};
  load(other, FileSystemReader(directory.path()), {.allow_cast = true});
  EXPECT_TRUE(wide.select(3, 1).transpose(0, 2).cpu().equal(base.to(at::kFloat)));
  EXPECT_TRUE(wide.select(3, 0).cpu().equal(at::zeros({4, 3, 2})));
}

TEST_F(MappedDeviceTest, ReaderThreadsWaitForWhatTheCallerHasBegun) {
  const TemporaryDirectory directory;
  StateDict state;
  for (int i = 0; i < 6; ++i) state["t" + std::to_string(i)] = at::full({1 << 20}, i + 1.f);
  save(state, FileSystemWriter(directory.path()));

  const c10::DeviceGuard guard(kDevice);
  const c10::impl::VirtualGuardImpl impl(kMapped);
  const c10::StreamGuard on_side(impl.getNewStream(kDevice));
  const at::Tensor before = at::full({1 << 20}, -1.f).pin_memory();
  StateDict target;
  for (const auto& [key, value] : state.items()) {
    at::Tensor t = at::empty({1 << 20}, at::TensorOptions(kDevice));
    t.copy_(before, /*non_blocking=*/true);  // happens when somebody waits for the side stream
    target[key] = t;
  }
  // The caller's own thread comes last: what it copies would wait for the side stream, and so for all of it.
  std::mutex mutex;
  std::condition_variable others_came;
  size_t others = 0;
  DefaultLoadPlanner planner(
      {.transform = [&, caller = std::this_thread::get_id()](const std::string&, const Box&, const MutableTensorView&) {
        std::unique_lock lock(mutex);
        if (std::this_thread::get_id() != caller) {
          ++others;
          others_came.notify_all();
        } else {
          EXPECT_TRUE(others_came.wait_for(lock, std::chrono::seconds(60), [&] { return others == 5; }));
        }
      }});
  load(target, FileSystemReader(directory.path(), {.thread_count = 3}), {.planner = &planner});
  impl.synchronizeStream(impl.getStream(kDevice));
  for (const auto& [key, value] : state.items()) {
    EXPECT_TRUE(target.at(key).as<at::Tensor>().cpu().equal(value.as<at::Tensor>())) << key;
  }
}

// --- asynchronous saves ----------------------------------------------------------------------------------------------

class MappedAsyncSaveTest : public MappedDeviceTest {
 protected:
  static void TearDownTestSuite() { set_test_point_handler(nullptr); }
  void TearDown() override { set_test_point_handler(nullptr); }
  /// Keeps what is written from being read before open().
  void close() {
    set_test_point_handler([until = opened_.get_future().share()](std::string_view name) {
      if (name == "save.before_write") until.wait();
    });
  }
  void open() { opened_.set_value(); }

  const TemporaryDirectory directory_;

 private:
  std::promise<void> opened_;
};

TEST_F(MappedAsyncSaveTest, StagesOverAStreamOfItsOwnAfterTheCurrentOne) {
  const c10::DeviceGuard guard(kDevice);
  const c10::impl::VirtualGuardImpl impl(kMapped);
  const c10::Stream training = impl.getNewStream(kDevice);
  const c10::StreamGuard on_training(training);
  for (const bool use_async_staging : {false, true}) {
    const auto stager = std::make_shared<DefaultStager>(StagingOptions{.use_async_staging = use_async_staging});
    at::Tensor t = at::zeros({1000}, at::TensorOptions(kDevice));
    const at::Tensor on_cpu = at::full({10}, 4.f);
    const at::Tensor next = at::full({1000}, 7.f).pin_memory();
    t.copy_(next, /*non_blocking=*/true);  // still to come when the save is asked for
    const uint64_t deferred = mapped_counters().deferred_copies;
    const auto saved = async_save({{"t", t}, {"tied", t}, {"other", t.slice(0, 0, 500)}, {"cpu", on_cpu}},
                                  FileSystemWriter(directory_.path()), {.stager = stager});
    saved.staging_completion.wait();
    EXPECT_EQ(mapped_counters().deferred_copies, deferred + 1) << "one copy, not blocking, of memory with three names";
    EXPECT_EQ(mapped_counters().pending_copies, 0u);
    EXPECT_EQ(stager->counters().bytes_staged, 4000u + 40u);
    t.fill_(-1);
    saved.upload_completion.get();
    StateDict target{{"t", at::zeros({1000})}, {"other", at::zeros({500})}, {"cpu", at::zeros({10})}};
    load(target, FileSystemReader(directory_.path()));
    EXPECT_TRUE(target.at("t").as<at::Tensor>().equal(next));
    EXPECT_TRUE(target.at("other").as<at::Tensor>().equal(next.slice(0, 0, 500)));
    EXPECT_TRUE(target.at("cpu").as<at::Tensor>().equal(on_cpu));
  }
}

TEST_F(MappedAsyncSaveTest, TensorsOfEveryShapeAreOverwrittenAndFreedBeforeTheyAreWritten) {
  const at::Tensor base = at::arange(24, at::kDouble).view({2, 3, 4});
  const auto make = [&](c10::Device device) {
    const at::Tensor t = base.to(device, /*non_blocking=*/false, /*copy=*/true);
    const at::Tensor other = base.to(c10::Device(kMapped, 0));
    const at::Tensor complex = at::complex(base, base + 1).to(device);
    return StateDict{{"dense", t},
                     {"transposed", t.transpose(0, 2)},
                     {"strided", t.slice(2, 0, 4, 2)},
                     {"expanded", t.select(0, 0).select(0, 0).unsqueeze(0).expand({5, 4})},
                     {"scalar", t.select(0, 1).select(0, 1).select(0, 1)},
                     {"empty", at::empty({0, 3}, at::TensorOptions(device))},
                     {"conjugated", complex.conj()},
                     {"bool", t.gt(3)},
                     {"another_device", device.is_cpu() ? base.clone() : other},
                     {"sharded", ShardedTensor({2, 3, 4}, at::kDouble, {{whole_box({2, 3, 4}), t}})},
                     {"step", 7},
                     {"tuple", StateTuple{{StateValue(t.select(0, 0).clone()), StateValue("x")}}}};
  };
  const StateDict wanted = make(c10::kCPU);
  const uint64_t before = mapped_counters().live_bytes;
  const auto stager = std::make_shared<DefaultStager>();
  close();
  StateDict state = make(kDevice);
  const auto saved = async_save(state, FileSystemWriter(directory_.path()), {.stager = stager});
  for (auto& [key, value] : state.items()) {
    if (key != "expanded" && value.is<at::Tensor>() && value.as<at::Tensor>().numel() > 0)
      value.as<at::Tensor>().zero_();
  }
  state = StateDict();
  open();
  saved.upload_completion.get();
  EXPECT_EQ(mapped_counters().live_bytes, before);

  StateDict target;
  for (const auto& [key, value] : wanted.items()) {
    target[key] = value.is<at::Tensor>()
                      ? StateValue(at::zeros_like(value.as<at::Tensor>(), at::MemoryFormat::Contiguous))
                      : StateValue(None{});
  }
  target["sharded"] = at::zeros({2, 3, 4}, at::kDouble);
  load(target, FileSystemReader(directory_.path()));
  for (const auto& [key, value] : wanted.items()) {
    if (!value.is<at::Tensor>()) continue;
    EXPECT_TRUE(target.at(key).as<at::Tensor>().equal(value.as<at::Tensor>().resolve_conj())) << key;
  }
  EXPECT_TRUE(target.at("sharded").as<at::Tensor>().equal(base));
  EXPECT_TRUE(target.at("tuple").as<StateTuple>().items[0].as<at::Tensor>().equal(base.select(0, 0)));
}

// Memory for the second save is that of the first, pinned.
TEST_F(MappedAsyncSaveTest, PinnedMemoryIsTakenOnce) {
  const auto stager = std::make_shared<DefaultStager>();
  const auto save_it = [&](const at::Tensor& tensor) {
    async_save({{"t", tensor}}, FileSystemWriter(directory_.path(), {.sync_files = false}), {.stager = stager})
        .upload_completion.get();
    return stager->counters().allocations;
  };
  EXPECT_EQ(save_it(at::ones({100})), 1u);
  EXPECT_EQ(save_it(at::ones({100}).to(kDevice)), 2u) << "now it has to be pinned";
  EXPECT_EQ(save_it(at::ones({100}).to(kDevice)), 2u);
  EXPECT_EQ(save_it(at::ones({100})), 2u);
}

TEST_F(MappedAsyncSaveTest, AFailureBetweenTwoCopiesLeavesNoCopyUnderWay) {
  const auto stager = std::make_shared<DefaultStager>();
  std::atomic<int> copies = 0;
  set_test_point_handler([&](std::string_view name) {
    if (name == "stage.copy" && ++copies == 2) throw std::bad_alloc();
  });
  at::Tensor a = at::ones({100}).to(kDevice), b = at::ones({100}).to(kDevice);
  const auto saved = async_save({{"a", a}, {"b", b}}, FileSystemWriter(directory_.path()), {.stager = stager});
  EXPECT_EQ(mapped_counters().pending_copies, 0u);
  a.reset();
  b.reset();
  EXPECT_THROW(saved.upload_completion.get(), CheckpointError);
}

// --- sharded training ------------------------------------------------------------------------------------------------

class MappedDeviceFixture : public TorchDistributedTest {
 protected:
  /// All ranks, with a backend for mapped tensors beside gloo.
  std::shared_ptr<ProcessGroup> group() {
    register_mapped_device();
    const auto world = process_group();
    if (!group_) {
      const auto gloo = c10::intrusive_ptr<c10d::Backend>::unsafe_reclaim_from_nonowning(&world->backend(c10::kCPU));
      group_ = std::make_shared<ProcessGroup>(
          "mapped", world->rank(), world->ranks(), c10::make_intrusive<c10d::PrefixStore>("mapped", world->store()),
          ProcessGroup::BackendMap{{c10::kCPU, gloo}, {kMapped, make_mapped_backend(gloo)}}, world->timeout());
    }
    return group_;
  }
  /// A mesh whose groups have a backend for mapped tensors, too.
  DeviceMesh mesh(const Dims& shape) {
    const auto world = group();
    const DeviceMesh mesh = init_device_mesh(shape, {.dim_names = {"replicate", "shard"}});
    for (size_t d = 0; d < mesh.ndim(); ++d) {
      ProcessGroup& line = *mesh.get_group(d);
      const auto gloo = c10::intrusive_ptr<c10d::Backend>::unsafe_reclaim_from_nonowning(&line.backend(c10::kCPU));
      line = ProcessGroup(line.name(), line.rank(), line.ranks(), line.store(),
                          {{c10::kCPU, gloo}, {kMapped, make_mapped_backend(gloo)}}, line.timeout());
    }
    return mesh;
  }
  void tear_down_rank() override {
    group_.reset();
    TorchDistributedTest::tear_down_rank();
  }

  FullyShardedDataParallel<LanguageModel> build(uint64_t seed, c10::Device device, FsdpOptions options = {}) {
    at::manual_seed(seed);
    if (!options.mesh) options.process_group = group();
    options.device = device;
    options.wrap_policy = wrap_by_type<BlockImpl>();
    options.poison_freed = true;
    return FullyShardedDataParallel(on_meta([] { return LanguageModel(); }), options);
  }
  static std::unique_ptr<torch::optim::AdamW> make_optimizer(const ShardedModule& model) {
    return std::make_unique<torch::optim::AdamW>(model.parameters(), torch::optim::AdamWOptions(3e-3).eps(1e-3));
  }
  double train(FullyShardedDataParallel<LanguageModel>& model, torch::optim::Optimizer& optimizer, c10::Device device,
               int64_t step) {
    at::manual_seed(100 + static_cast<uint64_t>(step));
    const at::Tensor tokens = at::randint(LanguageModelImpl::kVocabulary, {12, LanguageModelImpl::kLength}, at::kLong);
    const int64_t rows = 12 / world_size();
    optimizer.zero_grad();
    at::Tensor loss = model(tokens.slice(0, rank() * rows, (rank() + 1) * rows).to(device));
    loss.backward();
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0u);
    model.clip_grad_norm(1.0);
    optimizer.step();
    return loss.item<double>();
  }

 private:
  std::shared_ptr<ProcessGroup> group_;
};

RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, TrainsAsOnTheCpu, .ranks = 2) {
  const DoublePrecision in_double;
  for (const bool prefetch : {false, true}) {
    const ShardLayout layout = prefetch ? ShardLayout::kDim0Chunks : ShardLayout::kFlat;
    auto on_cpu = build(5, c10::kCPU, {.layout = layout});
    auto on_device = build(
        5, kDevice,
        {.sync_module_states = true, .layout = layout, .forward_prefetch = prefetch, .backward_prefetch = prefetch});
    const auto cpu_optimizer = make_optimizer(on_cpu), device_optimizer = make_optimizer(on_device);
    for (int64_t step = 0; step < 5; ++step) {
      const double wanted = train(on_cpu, *cpu_optimizer, c10::kCPU, step);
      EXPECT_NEAR(train(on_device, *device_optimizer, kDevice, step), wanted, kTolerance) << "step " << step;
    }
    for (const at::Tensor& slice : on_device.parameters()) EXPECT_EQ(slice.device(), kDevice);
    const SummonFullParams full(on_cpu);
    EXPECT_LT(difference_to(on_device, *on_device.module(), *on_cpu.module()), kTolerance);
  }
}

// What is saved from the device goes on on the CPU, and the other way round, moments of the optimizer included.
RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, CheckpointsMoveBetweenDevices, .ranks = 2) {
  const DoublePrecision in_double;
  const auto round_trip = [&](c10::Device from, c10::Device to, const std::string& name) {
    const std::string directory = (temp_dir() / name).string();
    auto model = build(5, from);
    const auto optimizer = make_optimizer(model);
    for (int64_t step = 0; step < 2; ++step) train(model, *optimizer, from, step);
    const uint64_t sent = model.process_group().traffic().bytes;
    const StateDict state{{"model", model.state_dict(StateDictType::kSharded)},
                          {"optim", optimizer_state_dict(*optimizer, model)}};
    EXPECT_EQ(model.process_group().traffic().bytes, sent) << "a sharded state dict sends nothing";
    save(state, FileSystemWriter(directory), {.process_group = process_group()});

    auto other = build(6, to);
    const auto other_optimizer = make_optimizer(other);
    StateDict target{{"model", other.state_dict(StateDictType::kSharded)},
                     {"optim", optimizer_state_dict(*other_optimizer, other)}};
    load(target, FileSystemReader(directory), {.process_group = process_group()});
    other.load_state_dict(target.at("model"));
    load_optimizer_state_dict(*other_optimizer, other, target.at("optim"));
    {
      const SummonFullParams full(model);
      EXPECT_EQ(difference_to(other, *other.module(), *model.module()), 0.0) << name;
    }
    for (int64_t step = 2; step < 4; ++step) {
      const double wanted = train(model, *optimizer, from, step);
      const double found = train(other, *other_optimizer, to, step);
      EXPECT_NEAR(found, wanted, from == to ? 0.0 : kTolerance) << name << ", step " << step;
    }
  };
  round_trip(kDevice, c10::kCPU, "to-cpu");
  round_trip(c10::kCPU, kDevice, "to-device");
  round_trip(kDevice, kDevice, "on-device");
}

RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, FullStateDictAndWriteBack, .ranks = 2) {
  auto model = build(5, kDevice);
  {
    const at::NoGradGuard no_grad;
    const SummonFullParams full(model, {.writeback = true});
    model.module()->norm->weight.fill_(0.5);
  }
  const StateDict full = model.state_dict(StateDictType::kFull);
  const at::Tensor weight = full.at("norm.weight").as<at::Tensor>();
  EXPECT_EQ(weight.device(), kDevice);
  EXPECT_TRUE(weight.cpu().equal(at::full({LanguageModelImpl::kWidth}, 0.5f)));

  auto other = build(6, kDevice);
  other.load_state_dict(full);
  const SummonFullParams a(model), b(other);
  for (const auto& item : model.module()->named_parameters())
    EXPECT_TRUE(item.value().cpu().equal(other.module()->named_parameters()[item.key()].cpu())) << item.key();
}

// Saves in the background while training goes on, with views of the live parameters and moments.
RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, AsyncSavesHoldTheStepTheyWereMadeIn, .ranks = 2) {
  const auto stager = std::make_shared<DefaultStager>(StagingOptions{.use_async_staging = true});
  auto model = build(5, kDevice);
  const auto optimizer = make_optimizer(model);
  const auto state_of = [&](auto& of_model, auto& of_optimizer) {
    return StateDict{{"model", of_model.state_dict(StateDictType::kSharded)},
                     {"optim", optimizer_state_dict(of_optimizer, of_model)}};
  };
  const auto directory = [&](int64_t step) { return (temp_dir() / std::to_string(step)).string(); };
  constexpr int64_t kSteps = 4;
  std::vector<double> losses;
  for (int64_t step = 0; step < kSteps; ++step) {
    losses.push_back(train(model, *optimizer, kDevice, step));
    async_save(state_of(model, *optimizer), FileSystemWriter(directory(step), {.sync_files = false}),
               {.process_group = process_group(), .stager = stager})
        .staging_completion.wait();
  }
  stager->wait();
  EXPECT_EQ(stager->counters().allocations, 1u);
  process_group()->barrier();
  for (int64_t step = 0; step + 1 < kSteps; ++step) {
    auto other = build(6, kDevice);
    const auto other_optimizer = make_optimizer(other);
    StateDict target = state_of(other, *other_optimizer);
    load(target, FileSystemReader(directory(step)), {.process_group = process_group()});
    other.load_state_dict(target.at("model"));
    load_optimizer_state_dict(*other_optimizer, other, target.at("optim"));
    EXPECT_EQ(train(other, *other_optimizer, kDevice, step + 1), losses[static_cast<size_t>(step + 1)]) << step;
  }
}

// --- meshes ----------------------------------------------------------------------------------------------------------

RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, ReplicasTrainAndLoadAsOnTheCpu, .ranks = 4) {
  const DoublePrecision in_double;
  const DeviceMesh square = mesh({2, 2});
  const std::string directory = (temp_dir() / "checkpoint").string();
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    auto on_cpu = build(5, c10::kCPU, {.mesh = square, .layout = layout});
    auto on_device = build(5, kDevice, {.mesh = square, .sync_module_states = true, .layout = layout});
    const auto cpu_optimizer = make_optimizer(on_cpu), device_optimizer = make_optimizer(on_device);
    for (int64_t step = 0; step < 3; ++step) {
      const double wanted = train(on_cpu, *cpu_optimizer, c10::kCPU, step);
      EXPECT_NEAR(train(on_device, *device_optimizer, kDevice, step), wanted, kTolerance) << "step " << step;
    }
    {
      const SummonFullParams full(on_cpu);
      EXPECT_LT(difference_to(on_device, *on_device.module(), *on_cpu.module()), kTolerance);
    }
    const auto state_of = [](auto& model, auto& optimizer) {
      return StateDict{{"model", model.state_dict(StateDictType::kSharded)},
                       {"optim", optimizer_state_dict(optimizer, model)}};
    };
    save(state_of(on_device, *device_optimizer), FileSystemWriter(directory), {.verify_replicas = true});
    auto other = build(6, kDevice, {.mesh = square});
    const auto other_optimizer = make_optimizer(other);
    StateDict target = state_of(other, *other_optimizer);
    FileSystemReader reader(directory);
    load(target, reader, {.replicas = square.get_group("replicate")});
    EXPECT_EQ(reader.counters().bytes_needed > 0, square.get_local_rank("replicate") == 0);
    other.load_state_dict(target.at("model"));
    load_optimizer_state_dict(*other_optimizer, other, target.at("optim"));
    {
      const SummonFullParams full(on_device);
      EXPECT_EQ(difference_to(other, *other.module(), *on_device.module()), 0.0);
    }
    EXPECT_EQ(train(other, *other_optimizer, kDevice, 3), train(on_device, *device_optimizer, kDevice, 3));
  }
}

RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, TensorsOnMeshesAreGatheredAndMoved, .ranks = 4) {
  const DeviceMesh square = mesh({2, 2});
  const at::Tensor whole = at::arange(15, at::kDouble).view({5, 3});
  const Placements choices{Replicate(), Shard(0), Shard(1), StridedShard(0, 2)};
  for (const Placements& from : all_placements(2, choices)) {
    const DTensor tensor = distribute_tensor(whole.to(kDevice), square, from);
    EXPECT_EQ(tensor.to_local().device(), kDevice);
    EXPECT_TRUE(tensor.full_tensor().cpu().equal(whole)) << to_string(from);
    for (const Placements& to : all_placements(2, choices)) {
      EXPECT_TRUE(tensor.redistribute(to).to_local().cpu().equal(distribute_tensor(whole, square, to).to_local()))
          << to_string(from) << " to " << to_string(to);
    }
  }
}

// Everything that was allocated is freed: no unit, shard, or buffer stays behind.
RESHARD_DISTRIBUTED_TEST_F(MappedDeviceFixture, MappedDeviceFsdpTest, LeavesNoDeviceMemory, .ranks = 2) {
  group();
  const uint64_t before = mapped_counters().live_bytes;
  {
    auto model = build(5, kDevice);
    const auto optimizer = make_optimizer(model);
    train(model, *optimizer, kDevice, 0);
    EXPECT_GT(mapped_counters().live_bytes, before);
  }
  EXPECT_EQ(mapped_counters().live_bytes, before);
}

}  // namespace
}  // namespace reshard::device_test
