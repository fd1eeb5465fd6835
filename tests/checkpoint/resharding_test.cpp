// SPDX-License-Identifier: BSD-3-Clause
// Counterparts of test_file_system_checkpoint_cpu.py: one tensor saved in one way of sharding and loaded in another.
#include <gtest/gtest.h>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard {
namespace {

/// Who holds which box. The glossary's names: 2 ranks, a 10 x 20 tensor.
using Spec = std::vector<std::pair<int, Box>>;

at::Tensor whole_of(const Dims& size) {
  int64_t n = volume(size);
  return at::arange(n, at::kFloat).view(at::IntArrayRef(size.data(), size.size())) + 1;
}

ShardedTensor shard(const Dims& size, const Spec& spec, int rank, bool filled) {
  const at::Tensor whole = whole_of(size);
  std::vector<LocalShard> shards;
  for (const auto& [owner, box] : spec) {
    if (owner != rank) continue;
    at::Tensor part = whole;
    for (size_t d = 0; d < box.sizes.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), box.offsets[d], box.sizes[d]);
    shards.push_back({box, filled ? part.clone() : at::zeros_like(part, at::MemoryFormat::Contiguous)});
  }
  return ShardedTensor(size, at::kFloat, std::move(shards));
}

void expect_filled(const ShardedTensor& tensor) {
  const at::Tensor whole = whole_of(tensor.size());
  for (const LocalShard& local : tensor.shards()) {
    at::Tensor part = whole;
    for (size_t d = 0; d < local.box.sizes.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), local.box.offsets[d], local.box.sizes[d]);
    EXPECT_TRUE(local.tensor.equal(part)) << to_string(local.box);
  }
}

Box rows(int64_t begin, int64_t n) { return {{begin, 0}, {n, 20}}; }
Box columns(int64_t begin, int64_t n) { return {{0, begin}, {10, n}}; }

// test_load_with_different_shard_plan, without cleaning the directory; test_load_rowwise_to_colwise; thread counts 1
// and 2.
RESHARD_DISTRIBUTED_TEST(ReshardingTest, EveryShardingLoadsIntoEveryOther, .ranks = 2) {
  process_group();
  const std::vector<Spec> specs = {
      {{0, rows(0, 5)}, {1, rows(5, 5)}},
      {{0, rows(0, 3)}, {1, rows(3, 3)}, {1, rows(6, 3)}, {0, rows(9, 1)}},
      {{0, rows(0, 2)}, {1, rows(2, 1)}, {1, rows(3, 3)}, {0, rows(6, 3)}, {0, rows(9, 1)}},
      {{1, rows(0, 8)}, {0, rows(8, 2)}},
      {{0, columns(0, 10)}, {1, columns(10, 10)}}};
  for (const int threads : {1, 2}) {
    const std::string dir = (temp_dir() / std::to_string(threads)).string();
    for (size_t from = 0; from < specs.size(); ++from) {
      save(StateDict{{"t", shard({10, 20}, specs[from], rank(), true)}},
           FileSystemWriter(dir, {.thread_count = threads, .sync_files = false}));
      for (size_t to = 0; to < specs.size(); ++to) {
        SCOPED_TRACE("spec " + std::to_string(from) + " into " + std::to_string(to));
        StateDict target{{"t", shard({10, 20}, specs[to], rank(), false)}};
        FileSystemReader reader(dir);
        load(target, reader);
        expect_filled(target.at("t").as<ShardedTensor>());
        EXPECT_EQ(reader.counters().bytes_payload, reader.counters().bytes_needed);
      }
    }
  }
}

// Parameters, casts, views and values, each rank with threads of its own.
RESHARD_DISTRIBUTED_TEST(ReshardingTest, SeveralThreadsLoadEveryKindOfValue, .ranks = 2) {
  process_group();
  const std::string dir = (temp_dir() / "ckpt").string();
  const Dims size{1024, 1024};
  const auto split = [&](size_t dim) {
    Spec spec;
    for (int r = 0; r < 2; ++r) spec.emplace_back(r, split_evenly(whole_box(size), dim, 2, r));
    return spec;
  };
  const at::Tensor whole = whole_of(size);
  StateDict state;
  for (int i = 0; i < 4; ++i) {
    const std::string n = std::to_string(i);
    state["rows" + n] = shard(size, split(0), rank(), true);
    state["parameter" + n] = whole + i;
    state["value" + n] = i;
  }
  save(state, FileSystemWriter(dir, {.thread_count = 2, .sync_files = false}));
  StateDict target;
  std::vector<int64_t> versions;
  for (int i = 0; i < 4; ++i) {
    const std::string n = std::to_string(i);
    target["rows" + n] = shard(size, split(1), rank(), false);
    const auto dtype = i % 2 == 0 ? at::kFloat : at::kDouble;
    target["parameter" + n] = at::zeros({1024, 1024}, dtype).t().requires_grad_();
    versions.push_back(target.at("parameter" + n).as<at::Tensor>()._version());
    target["value" + n] = None{};
  }
  load(target, FileSystemReader(dir, {.thread_count = 3}), {.allow_cast = true});
  for (int i = 0; i < 4; ++i) {
    const std::string n = std::to_string(i);
    expect_filled(target.at("rows" + n).as<ShardedTensor>());
    const at::Tensor& parameter = target.at("parameter" + n).as<at::Tensor>();
    EXPECT_TRUE(parameter.to(at::kFloat).equal(whole + i)) << i;
    EXPECT_TRUE(parameter.requires_grad() && parameter.is_leaf());
    EXPECT_GT(parameter._version(), versions[static_cast<size_t>(i)]);
    EXPECT_EQ(target.at("value" + n).as<int64_t>(), i);
  }
}

// test_switch_between_sharded_tensor_to_tensor.
RESHARD_DISTRIBUTED_TEST(ReshardingTest, TheKindOfContainerIsNotPartOfTheFile, .ranks = 2) {
  process_group();
  const std::vector<Spec> specs = {{{0, {{0}, {16}}}, {1, {{16}, {16}}}},
                                   {{0, {{0}, {8}}}, {1, {{8}, {8}}}, {1, {{16}, {8}}}, {0, {{24}, {8}}}},
                                   {{1, {{0}, {8}}}, {0, {{8}, {24}}}},
                                   {{0, {{0}, {10}}}, {1, {{10}, {22}}}}};
  const std::string dir = (temp_dir() / "ckpt").string();
  for (const Spec& save_spec : specs) {
    save(StateDict{{"sharded", shard({32}, save_spec, rank(), true)}, {"replicated", whole_of({32})}},
         FileSystemWriter(dir, {.sync_files = false}));
    for (const Spec& load_spec : specs) {
      StateDict target{{"sharded", at::zeros({32})}, {"replicated", shard({32}, load_spec, rank(), false)}};
      load(target, FileSystemReader(dir));
      EXPECT_TRUE(target.at("sharded").as<at::Tensor>().equal(whole_of({32})));
      expect_filled(target.at("replicated").as<ShardedTensor>());
    }
  }
}

// Four ranks' shards read by three, and rows read as columns, cost no byte more than is needed, but for the rest of the blocks
// that are verified: four times the bytes where, as here, a block holds a piece of every rank's columns.
RESHARD_DISTRIBUTED_TEST(ReshardingTest, ReadsOnlyTheBytesThatAreNeeded, .ranks = 4) {
  process_group();
  const Dims size{2400, 1000};  // large enough that the items' headers (2 KiB each) are small beside them
  const auto split = [&](size_t dim, int parts) {
    Spec spec;
    for (int r = 0; r < parts; ++r) spec.emplace_back(r, split_evenly(whole_box(size), dim, parts, r));
    return spec;
  };
  const std::string dir = (temp_dir() / "ckpt").string();
  save(StateDict{{"t", shard(size, split(0, 4), rank(), true)}}, FileSystemWriter(dir, {.sync_files = false}));
  for (const auto& [name, spec] :
       std::map<std::string, Spec>{{"4 to 3 ranks", split(0, 3)}, {"rows to columns", split(1, 4)}}) {
    for (const bool verify : {false, true}) {
      StateDict target{{"t", shard(size, spec, rank(), false)}};
      FileSystemReader reader(dir, {.verify_checksums = verify});
      load(target, reader);
      expect_filled(target.at("t").as<ShardedTensor>());
      const ReadCounters& counters = reader.counters();
      at::Tensor bytes = at::zeros({3}, at::kDouble);
      bytes[0] = static_cast<double>(counters.bytes_needed);
      bytes[1] = static_cast<double>(counters.bytes_read - counters.bytes_verify);
      bytes[2] = static_cast<double>(counters.bytes_read);
      process_group()->all_reduce_sum(bytes);
      bytes /= bytes[0].item<double>();
      EXPECT_LE(bytes[1].item<double>(), 1.01) << name;
      EXPECT_LE(bytes[2].item<double>(), verify ? 4.02 : 1.01) << name;
      if (rank() == 0) {
        const std::string what = name + (verify ? ", verified" : ", not verified");
        RecordProperty("read_over_needed " + what, std::to_string(bytes[2].item<double>()));
        std::printf("%s: bytes read / needed = %.4f\n", what.c_str(), bytes[2].item<double>());
      }
    }
  }
}

}  // namespace
}  // namespace reshard
