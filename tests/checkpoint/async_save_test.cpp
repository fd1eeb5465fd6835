// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/async_save.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

#include "reshard/checkpoint/rank_local.h"
#include "reshard/storage/verify.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

constexpr FileSystemWriterOptions kNoSync{.sync_files = false};

template <class Body>
CheckpointError error_of(Body&& body) {
  try {
    body();
  } catch (const CheckpointError& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return CheckpointError("none", {{0, {}}}, Committed::kUnknown);
}

/// Stops the background at a test point until open().
class Gate {
 public:
  explicit Gate(std::string_view point) {
    set_test_point_handler([point, open = open_.get_future().share()](std::string_view name) {
      if (name == point) open.wait();
    });
  }
  ~Gate() {
    open();
    set_test_point_handler(nullptr);
  }
  void open() {
    if (!std::exchange(is_open_, true)) open_.set_value();
  }

 private:
  std::promise<void> open_;
  bool is_open_ = false;
};

/// The data files of a checkpoint, whole.
std::map<std::string, std::string> data_files(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".distcp") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    files[entry.path().filename()] = std::string(std::istreambuf_iterator<char>(in), {});
  }
  return files;
}

at::Tensor counting(int64_t n, double from) { return at::arange(n, at::kFloat) + from; }

// What a blocking save writes of it is the measure: the files must be equal, byte for byte.
struct Everything {
  at::Tensor base = counting(600, 0).view({20, 30});
  at::Tensor parameter = counting(50, 7).requires_grad_();
  at::Tensor complex = at::complex(counting(6, 1), counting(6, 2));
  at::Tensor mixed = at::arange(64, at::kByte);
  at::Tensor half = counting(33, 3).to(at::kBFloat16);
  at::Tensor in_tuple = counting(4, 9);
  at::Tensor row_block = counting(24, 5).view({4, 6});

  StateDict state() const {
    return {
        {"model", StateDict{{"base", base},
                            {"tied", base},
                            {"transposed", base.t()},
                            {"rows", base.slice(0, 3, 9)},
                            {"columns", base.slice(1, 4, 8)},
                            {"tied_columns", base.slice(1, 4, 8)},
                            {"every_third", base.slice(1, 0, 30, 3)},
                            {"expanded", base.select(0, 0).unsqueeze(0).expand({5, 30})},
                            {"parameter", parameter},
                            {"detached", parameter.detach()},
                            {"scalar", base.select(0, 1).select(0, 2)},
                            {"empty", at::empty({0, 3})},
                            {"conj", complex.conj()},
                            {"neg", at::imag(complex.conj())},
                            {"byte", mixed.slice(0, 1, 2)},
                            {"long", mixed.view(at::kLong).slice(0, 1, 5)},
                            {"half", half}}},
        {"sharded", ShardedTensor({4, 12}, at::kFloat, {{{{0, 0}, {4, 6}}, row_block}, {{{0, 6}, {4, 6}}, row_block}})},
        {"list", StateList{1, StateDict{{"deep", base.select(1, 3)}}}},
        {"tuple", StateTuple{{StateValue(in_tuple), StateValue("x")}}},
        {"step", 7},
        {"bytes", ByteString{"\x01\x02"}},
        {"none", None{}}};
  }
  void overwrite() {
    const at::NoGradGuard no_grad;
    for (at::Tensor* tensor : {&base, &parameter, &complex, &half, &in_tuple, &row_block}) tensor->fill_(-1);
    mixed.fill_(255);
  }
};

TEST(AsyncSaveTest, AProcessOfItsOwnWritesTheBytesOfABlockingSave) {
  const TemporaryDirectory dir;
  Everything values;
  save(values.state(), FileSystemWriter(dir / "blocking"));
  const auto stager = std::make_shared<DefaultStager>(StagingOptions{.save_process = RESHARD_CLI});
  for (const char* name : {"first", "second"}) {
    const AsyncSaveResponse response = async_save(values.state(), FileSystemWriter(dir / name), {.stager = stager});
    if (name == std::string("second")) values.overwrite();
    EXPECT_EQ(response.upload_completion.get().items, 25u);
    EXPECT_EQ(data_files(dir / name), data_files(dir / "blocking"));
    const Metadata metadata = FileSystemReader(dir / name).read_metadata();
    const Metadata blocking = FileSystemReader(dir / "blocking").read_metadata();
    EXPECT_EQ(metadata.storage_data, blocking.storage_data);
    EXPECT_EQ(metadata.state_dict_metadata, blocking.state_dict_metadata);
    EXPECT_EQ(metadata.planner_data, blocking.planner_data);
    EXPECT_TRUE(verify_checkpoint(dir / name).problems.empty());
  }
  EXPECT_EQ(stager->counters().allocations, 1u);
}

TEST(AsyncSaveTest, AProcessOfItsOwnCannotMakeEverySave) {
  const TemporaryDirectory dir;
  const StateDict state{{"a", at::zeros({2})}};
  const auto stager = std::make_shared<DefaultStager>(StagingOptions{.save_process = RESHARD_CLI});
  const auto error_with = [&](const FileSystemWriter& writer, AsyncSaveOptions options) {
    options.stager = stager;
    return error_of([&] { async_save(state, writer, options).upload_completion.get(); });
  };
  const CheckpointError planner =
      error_with(FileSystemWriter(dir / "a"), {.planner = std::make_shared<DefaultSavePlanner>()});
  EXPECT_EQ(planner.code(), ErrorCode::kUnsupported);
  EXPECT_THAT(planner.what(), HasSubstr("default planner only"));
  FaultFileSystem files;
  EXPECT_THAT(error_with(FileSystemWriter(dir / "a", {}, files), {}).what(), HasSubstr("file system of this process"));
  const auto missing = std::make_shared<DefaultStager>(StagingOptions{.save_process = dir / "missing"});
  const CheckpointError gone =
      error_of([&] { async_save(state, FileSystemWriter(dir / "a"), {.stager = missing}).upload_completion.get(); });
  EXPECT_EQ(gone.code(), ErrorCode::kNotFound);
  EXPECT_THAT(gone.what(), HasSubstr(dir / "missing"));
  EXPECT_FALSE(std::filesystem::exists(dir / "a"));
  async_save(state, FileSystemWriter(dir / "a"), {.stager = stager}).upload_completion.get();
}

TEST(AsyncSaveTest, WritesTheBytesOfABlockingSaveWhateverIsOverwrittenAfterStaging) {
  for (const bool use_async_staging : {false, true}) {
    const TemporaryDirectory dir;
    Everything values;
    save(values.state(), FileSystemWriter(dir / "blocking"));
    const auto stager = std::make_shared<DefaultStager>(StagingOptions{.use_async_staging = use_async_staging});
    {
      Gate gate("save.planned");  // nothing is read for the files before all is overwritten
      StateDict state = values.state();
      const AsyncSaveResponse response = async_save(state, FileSystemWriter(dir / "async"), {.stager = stager});
      if (use_async_staging) response.staging_completion.wait();
      EXPECT_TRUE(response.staging_completion.is_done());
      values.overwrite();
      state = StateDict();
      EXPECT_FALSE(response.upload_completion.is_done());
      gate.open();
      const SaveResult result = response.upload_completion.get();
      EXPECT_GT(result.bytes_written, 0u);
      EXPECT_EQ(result.items, 25u);
    }
    EXPECT_EQ(data_files(dir / "async"), data_files(dir / "blocking"));
    const Metadata metadata = FileSystemReader(dir / "async").read_metadata();
    const Metadata blocking = FileSystemReader(dir / "blocking").read_metadata();
    EXPECT_EQ(metadata.storage_data, blocking.storage_data);
    EXPECT_EQ(metadata.state_dict_metadata, blocking.state_dict_metadata);
    EXPECT_TRUE(verify_checkpoint(dir / "async").problems.empty());
  }
}

TEST(AsyncSaveTest, MemoryIsTakenOnceAndEveryElementIsCopiedOnce) {
  const TemporaryDirectory dir;
  DefaultStager* counted = nullptr;
  const auto stager = std::make_shared<DefaultStager>();
  counted = stager.get();
  const auto save_it = [&](const StateDict& state) {
    async_save(state, FileSystemWriter(dir.path(), kNoSync), {.stager = stager}).upload_completion.get();
    return counted->counters();
  };
  const at::Tensor base = counting(10000, 0);
  const at::Tensor wide = counting(40000, 0).view({100, 400});
  // Names of one tensor, views of it, a slice of a larger one, columns of a larger one.
  const StateDict state{{"base", base},
                        {"tied", base},
                        {"half", base.slice(0, 0, 5000)},
                        {"square", base.view({100, 100}).t()},
                        {"row", wide.slice(0, 3, 4)},
                        {"columns", wide.slice(1, 0, 2)},
                        {"step", 1}};
  constexpr uint64_t kStaged = 4 * (10000 + 400 + 200);
  StagingCounters counters = save_it(state);
  EXPECT_EQ(counters.saves, 1u);
  EXPECT_EQ(counters.bytes_staged, kStaged);
  EXPECT_EQ(counters.allocations, 1u);
  const uint64_t allocated = counters.bytes_allocated;
  EXPECT_GE(allocated, kStaged);
  EXPECT_LE(allocated, kStaged + 3 * 64);
  for (uint64_t saves = 2; saves < 6; ++saves) {
    counters = save_it(state);
    EXPECT_EQ(counters.bytes_staged, saves * kStaged);
    EXPECT_EQ(counters.bytes_allocated, allocated);
    EXPECT_EQ(counters.allocations, 1u);
  }
  save_it({{"less", base}});
  EXPECT_EQ(save_it(state).allocations, 1u);
  EXPECT_EQ(save_it({{"more", wide}}).allocations, 2u);
  EXPECT_EQ(save_it(state).allocations, 2u);
}

// Optimizers and gathers make tensors anew, wherever there is room for them.
TEST(AsyncSaveTest, NothingIsTakenWhereOnlyAddressesChange) {
  const TemporaryDirectory dir;
  const auto stager = std::make_shared<DefaultStager>();
  std::vector<at::Tensor> kept;
  for (int save = 0; save < 4; ++save) {
    constexpr int64_t kTensors = 40;
    std::vector<at::Tensor> tensors(kTensors);
    for (int64_t i = 0; i < kTensors; ++i) {
      const int64_t at = (i * 7 + save * 11) % kTensors;  // made in another order each time
      kept.push_back(at::ones({at + 3}));
      tensors[static_cast<size_t>(at)] = kept.back().slice(0, at % 3);
    }
    StateDict state;
    for (size_t i = 0; i < tensors.size(); ++i) state["t" + std::to_string(i)] = tensors[i];
    async_save(state, FileSystemWriter(dir.path(), kNoSync), {.stager = stager});
  }
  stager->wait();
  EXPECT_EQ(stager->counters().allocations, 1u);
}

TEST(AsyncSaveTest, SeveralInFlightHaveMemoryOfTheirOwn) {
  const TemporaryDirectory dir;
  const auto stager = std::make_shared<DefaultStager>(StagingOptions{.max_in_flight = 2});
  const at::Tensor tensor = counting(1000, 0);
  const auto save_to = [&](const std::string& name) {
    return async_save({{"t", tensor}}, FileSystemWriter(dir / name, kNoSync), {.stager = stager});
  };
  Gate gate("save.before_write");
  const AsyncSaveResponse first = save_to("0");
  tensor.add_(1);
  const AsyncSaveResponse second = save_to("1");
  tensor.add_(1);
  EXPECT_FALSE(first.upload_completion.is_done());
  gate.open();
  save_to("2");
  tensor.add_(1);
  save_to("3");
  tensor.fill_(-1);
  stager->wait();
  EXPECT_EQ(stager->counters().allocations, 2u);
  for (int i = 0; i < 4; ++i) {
    StateDict target{{"t", at::zeros({1000})}};
    load(target, FileSystemReader(dir / std::to_string(i)));
    EXPECT_TRUE(target.at("t").as<at::Tensor>().equal(counting(1000, i))) << i;
  }
}

TEST(AsyncSaveTest, WhatCannotBeSavedFailsWhereASaveFails) {
  const TemporaryDirectory dir;
  const auto stager = std::make_shared<DefaultStager>();
  const auto response = async_save({{"a", at::ones({2})}, {"sparse", at::ones({2, 2}).to_sparse()}},
                                   FileSystemWriter(dir.path(), kNoSync), {.stager = stager});
  const CheckpointError error = error_of([&] { response.upload_completion.get(); });
  EXPECT_EQ(error.step(), "plan");
  EXPECT_THAT(error.what(), HasSubstr("cannot save or load a sparse tensor; key sparse"));
  stager->wait();
}

TEST(AsyncSaveTest, AFailureThatNobodyLookedAtIsThrownByTheNextSave) {
  const TemporaryDirectory dir;
  FaultFileSystem files;
  files.inject({.call = FileCall::kWrite, .error = ENOSPC});
  const auto stager = std::make_shared<DefaultStager>();
  const StateDict state{{"t", at::ones({2})}};
  const auto save_it = [&] {
    return async_save(state, FileSystemWriter(dir.path(), kNoSync, files), {.stager = stager});
  };
  save_it();
  const CheckpointError error = error_of([&] { save_it(); });
  EXPECT_THAT(error.what(), HasSubstr("No space left on device"));
  EXPECT_EQ(error.committed(), Committed::kNo);
  stager->wait();
  EXPECT_FALSE(std::filesystem::exists(dir / ".metadata")) << "the save that threw is none";
  save_it().upload_completion.get();
  EXPECT_TRUE(std::filesystem::exists(dir / ".metadata"));
}

// Every call to the file system fails once; the older checkpoint or the new one stays, and the error says which.
TEST(AsyncSaveTest, AnErrorInAnyCallIsReportedAndTellsTheTruth) {
  const TemporaryDirectory dir;
  const auto stager = std::make_shared<DefaultStager>();
  set_log_sink([](LogLevel, std::string_view) {});
  int tried = 0;
  for (const bool after_effect : {false, true}) {
    for (uint64_t nth = 1;; ++nth) {
      const std::string directory = dir / (std::to_string(after_effect) + "-" + std::to_string(nth));
      at::Tensor tensor = counting(300, 1);
      save({{"t", tensor}, {"step", 1}}, FileSystemWriter(directory, kNoSync));
      FaultFileSystem files;
      files.inject({.nth = nth, .error = EIO, .after_effect = after_effect});
      tensor.add_(1);
      const auto response =
          async_save({{"t", tensor}, {"step", 2}}, FileSystemWriter(directory, {}, files), {.stager = stager});
      tensor.fill_(-1);
      std::optional<Committed> committed;
      try {
        response.upload_completion.get();
      } catch (const CheckpointError& error) {
        committed = error.committed();
      }
      StateDict target{{"t", at::zeros({300})}, {"step", 0}};
      load(target, FileSystemReader(directory));
      const int64_t step = target.at("step").as<int64_t>();
      EXPECT_TRUE(target.at("t").as<at::Tensor>().equal(counting(300, static_cast<double>(step)))) << nth;
      if (committed != Committed::kUnknown) {
        EXPECT_EQ(step, committed == Committed::kNo ? 1 : 2) << nth;
      }
      if (nth > files.calls()) break;
      ++tried;
    }
  }
  set_log_sink(nullptr);
  EXPECT_GT(tried, 20);
  stager->wait();
}

// --- the end of the process --------------------------------------------------------------------------------------------

// Exit handlers run in the reverse order of their registration, among them the end of the process's own stager.
TEST(AsyncSaveDeathTest, ExitWaitsForTheSaveAndLogsAFailure) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        static const TemporaryDirectory dir;
        static std::promise<void> exiting;
        std::atexit([] {
          std::fputs(std::filesystem::exists(dir / "checkpoint/.metadata") ? "committed" : "not committed", stderr);
        });
        set_test_point_handler([](std::string_view name) {
          if (name == "save.before_write") exiting.get_future().wait();
        });
        async_save({{"t", at::ones({2})}}, FileSystemWriter(dir / "checkpoint", kNoSync));
        std::atexit([] { exiting.set_value(); });
        std::exit(0);
      },
      ::testing::ExitedWithCode(0), "^committed");
  EXPECT_EXIT(
      {
        static FaultFileSystem files;  // before the stager, so that it ends after it
        static const TemporaryDirectory dir;
        files.inject({.call = FileCall::kWrite, .error = ENOSPC});
        async_save({{"t", at::ones({2})}}, FileSystemWriter(dir.path(), kNoSync, files));
        std::exit(0);
      },
      ::testing::ExitedWithCode(0), "nobody asked for its outcome.*No space left on device");
}

// --- ranks -------------------------------------------------------------------------------------------------------------

/// Rows [begin, end) of a [rows, 3] tensor that counts up from `from`, as this rank's shard.
ShardedTensor rows_of(int64_t rows, int64_t begin, int64_t end, double from, c10::Device device) {
  const at::Tensor whole = counting(rows * 3, from).view({rows, 3});
  return ShardedTensor({rows, 3}, at::kFloat,
                       {{{{begin, 0}, {end - begin, 3}}, whole.slice(0, begin, end).clone().to(device)}});
}

RESHARD_DEVICE_TEST(AsyncSaveDistributedTest, HoldsTheValuesOfTheMomentWhileTrainingGoesOn, .ranks = {2, 4},
                    .one_gpu_ranks = {1, 2}) {
  const auto world = process_group();
  const int64_t rows = 4 * world_size();
  for (const StagingOptions& staging :
       {StagingOptions{}, StagingOptions{.use_async_staging = true}, StagingOptions{.save_process = RESHARD_CLI}}) {
    const bool use_async_staging = staging.use_async_staging;
    const std::string mode = use_async_staging ? "async" : staging.save_process.empty() ? "thread" : "process";
    const auto stager = std::make_shared<DefaultStager>(staging);
    at::Tensor replica = counting(1000, 1).to(device());
    const ShardedTensor sharded = rows_of(rows, rank() * 4, rank() * 4 + 4, 0, device());
    const at::Tensor local = sharded.shards()[0].tensor;
    at::Tensor sum = at::zeros({10}, at::TensorOptions(device()));
    for (int step = 0; step < 5; ++step) {
      const std::string directory = (temp_dir() / (mode + std::to_string(step))).string();
      const StateDict state{{"replica", replica},
                            {"tied", replica},
                            {"sharded", sharded},
                            {"mine", rank_local(rank() * 100 + step, *world)}};
      const auto response = async_save(state, FileSystemWriter(directory, kNoSync), {.stager = stager});
      if (use_async_staging) response.staging_completion.wait();
      // Training: collectives, and the next values in place.
      sum.fill_(rank());
      world->all_reduce_sum(sum);
      replica.add_(1);
      local.add_(1);
      EXPECT_EQ(sum[0].item<float>(), static_cast<float>(world_size() * (world_size() - 1) / 2));
    }
    stager->wait();
    EXPECT_EQ(stager->counters().allocations, 1u);
    world->barrier();
    for (int step = 0; step < 5; ++step) {
      const std::string directory = (temp_dir() / (mode + std::to_string(step))).string();
      StateDict target{{"replica", at::zeros({1000}, at::TensorOptions(device()))},
                       {"sharded", rows_of(rows, 0, rows, -1, device())},
                       {"mine", rank_local(None{}, *world)}};
      load(target, FileSystemReader(directory));
      EXPECT_TRUE(target.at("replica").as<at::Tensor>().cpu().equal(counting(1000, 1 + step))) << step;
      EXPECT_TRUE(target.at("sharded").as<ShardedTensor>().shards()[0].tensor.cpu().equal(
          counting(rows * 3, step).view({rows, 3})))
          << step;
      EXPECT_EQ(rank_local_value(target.at("mine"), *world).as<int64_t>(), rank() * 100 + step);
      EXPECT_TRUE(rank() != 0 || verify_checkpoint(directory).problems.empty());
    }
  }
}

// A thousand saves while the main thread is in collectives of the same group. RESHARD_ASYNC_SAVES is another number.
RESHARD_DISTRIBUTED_TEST(AsyncSaveDistributedTest, ManySavesAndCollectivesDoNotMeet, .ranks = 2,
                         .deadline = std::chrono::seconds(300)) {
  const auto world = process_group();
  const char* asked = std::getenv("RESHARD_ASYNC_SAVES");
  const int saves = asked != nullptr ? std::atoi(asked) : 1000;
  const std::string directory = (temp_dir() / "checkpoint").string();
  const auto stager = std::make_shared<DefaultStager>(StagingOptions{.max_in_flight = 4});
  const at::Tensor value = at::zeros({64});
  at::Tensor sum = at::zeros({16});
  uint64_t in_flight = 0, collectives = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < saves; ++i) {
    value.fill_(i);
    const auto response = async_save({{"value", value}, {"mine", rank_local(i, *world)}},
                                     FileSystemWriter(directory, kNoSync), {.stager = stager});
    for (int j = 0; j < 5; ++j) {
      sum.fill_(rank() + 1);
      world->all_reduce_sum(sum);
      ++collectives;
      ASSERT_EQ(sum[0].item<float>(), 3);
    }
    in_flight += response.upload_completion.is_done() ? 0 : 1;
    value.fill_(-1);
  }
  stager->wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  EXPECT_GT(in_flight, 0u) << "no save was under way during collectives";
  EXPECT_EQ(stager->counters().saves, static_cast<uint64_t>(saves));
  world->barrier();
  StateDict target{{"value", at::zeros({64})}, {"mine", rank_local(None{}, *world)}};
  load(target, FileSystemReader(directory));
  EXPECT_TRUE(target.at("value").as<at::Tensor>().equal(at::full({64}, static_cast<double>(saves - 1))));
  EXPECT_EQ(rank_local_value(target.at("mine"), *world).as<int64_t>(), saves - 1);
  if (rank() == 0)
    std::printf("%d async saves and %llu all-reduces in %.1f s\n", saves, static_cast<unsigned long long>(collectives),
                took.count());
}

RESHARD_DISTRIBUTED_TEST(AsyncSaveDistributedTest, OneRanksErrorIsEveryRanksErrorWhoeverAsksForIt, .ranks = 2) {
  const auto world = process_group();
  const auto stager = std::make_shared<DefaultStager>();
  FaultFileSystem files;
  const StateDict state{{"t", rows_of(4, rank() * 2, rank() * 2 + 2, 1, device())}};
  const std::string directory = (temp_dir() / "checkpoint").string();
  const auto save_it = [&] {
    return async_save(state, FileSystemWriter(directory, kNoSync, files), {.stager = stager});
  };
  if (rank() == 1) files.inject({.call = FileCall::kWrite, .error = ENOSPC});
  CheckpointError error = error_of([&] { save_it().upload_completion.get(); });
  EXPECT_EQ(error.step(), "write");
  ASSERT_EQ(error.failures().size(), 1u);
  EXPECT_EQ(error.failures().begin()->first, 1);
  save_it().upload_completion.get();

  // Only rank 0 asks. The next save throws on rank 1 and is refused there; rank 0 learns so at once, and the one after it works.
  if (rank() == 1) files.inject({.call = FileCall::kWrite, .error = ENOSPC});
  const auto failed = save_it();
  if (rank() == 0) {
    error_of([&] { failed.upload_completion.get(); });
    error = error_of([&] { save_it().upload_completion.get(); });
    EXPECT_EQ(error.failures().begin()->first, 1);
    EXPECT_EQ(error.step(), "plan");
    EXPECT_THAT(error.what(), HasSubstr("an earlier asynchronous save failed"));
  } else {
    error = error_of([&] { save_it(); });
    EXPECT_EQ(error.step(), "write");
  }
  // A blocking save in between keeps its place in the order, too.
  save(state, FileSystemWriter(directory, kNoSync));
  save_it().upload_completion.get();
  stager->wait();
}

RESHARD_DISTRIBUTED_TEST(AsyncSaveDistributedTest, ARankThatStopsWhileItStagesIsNamedWithinTheDeadline, .ranks = 2) {
  const auto world = process_group();
  const std::string directory = (temp_dir() / "checkpoint").string();
  const StateDict state{{"t", rows_of(4, rank() * 2, rank() * 2 + 2, 1, device())}};
  const auto stager = std::make_shared<DefaultStager>();
  const auto save_it = [&](milliseconds silence) {
    return async_save(state, FileSystemWriter(directory, kNoSync), {.silence_timeout = silence, .stager = stager});
  };
  constexpr milliseconds kSilence{500};
  save_it(std::chrono::seconds(30)).upload_completion.get();  // connections are made
  world->barrier();
  if (rank() == 1) {
    set_test_point_handler([&](std::string_view name) {
      if (name == "stage.copy") world->store()->wait({"noticed"});
    });
  }
  const auto start = std::chrono::steady_clock::now();
  const CheckpointError error = error_of([&] { save_it(kSilence).upload_completion.get(); });
  if (rank() == 0) {
    EXPECT_LT(std::chrono::steady_clock::now() - start, kSilence + std::chrono::seconds(2));
    EXPECT_EQ(error.code(), ErrorCode::kTimeout);
    EXPECT_EQ(error.failures().begin()->first, 1);
    world->store()->set("noticed", std::vector<uint8_t>{1});
  }
  EXPECT_EQ(error.committed(), Committed::kNo);
  set_test_point_handler(nullptr);
  save_it(std::chrono::seconds(30)).upload_completion.get();
}

RESHARD_DISTRIBUTED_TEST(AsyncSaveDistributedTest, ARankThatDiesInTheBackgroundIsNamedWithinTheDeadline, .ranks = 3,
                         .expected = {{1, killed_by(SIGKILL)}}) {
  const auto world = process_group();
  const std::string directory = (temp_dir() / "checkpoint").string();
  const StateDict state{{"t", rows_of(6, rank() * 2, rank() * 2 + 2, 1, device())}};
  const auto stager = std::make_shared<DefaultStager>();
  constexpr milliseconds kSilence{1000};
  const auto save_it = [&] {
    return async_save(state, FileSystemWriter(directory, kNoSync), {.silence_timeout = kSilence, .stager = stager});
  };
  const SaveResult first = save_it().upload_completion.get();
  world->barrier();
  if (rank() == 1) {
    set_test_point_handler([](std::string_view name) {
      if (name == "save.before_vote") raise(SIGKILL);
    });
  }
  const auto start = std::chrono::steady_clock::now();
  const CheckpointError error = error_of([&] { save_it().upload_completion.get(); });
  EXPECT_LT(std::chrono::steady_clock::now() - start, kSilence + milliseconds(2500));
  ASSERT_EQ(error.failures().size(), 1u) << error.what();
  EXPECT_EQ(error.failures().begin()->first, 1);
  if (rank() == 0) {
    EXPECT_EQ(error.committed(), Committed::kNo);
    EXPECT_EQ(FileSystemReader(directory).read_metadata().storage_meta->save_id, first.save_id);
  }
}

RESHARD_DISTRIBUTED_TEST(AsyncSaveDistributedTest, ARankThatStagesForLongIsNotSilent, .ranks = 2) {
  const auto world = process_group();
  const auto stager = std::make_shared<DefaultStager>();
  StateDict state;
  for (int i = 0; i < 8; ++i) state["t" + std::to_string(i)] = at::ones({4});
  constexpr milliseconds kSilence{1000};
  std::atomic<int> copies = 0;
  if (rank() == 1) {
    // Each copy takes a while, and all of them more than the deadline.
    set_test_point_handler([&](std::string_view name) {
      if (name != "stage.copy") return;
      ++copies;
      for (const auto end = std::chrono::steady_clock::now() + kSilence / 4; std::chrono::steady_clock::now() < end;)
        std::this_thread::yield();
    });
  }
  async_save(state, FileSystemWriter((temp_dir() / "checkpoint").string(), kNoSync),
             {.silence_timeout = kSilence, .stager = stager})
      .upload_completion.get();
  set_test_point_handler(nullptr);
  EXPECT_EQ(copies, rank() == 1 ? 8 : 0);
}

}  // namespace
}  // namespace reshard
