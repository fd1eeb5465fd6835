// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "reshard/checkpoint/async_save.h"
#include "reshard/checkpoint/rank_local.h"
#include "reshard/storage/verify.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

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

/// Rows [begin, end) of a [rows, 3] tensor that counts up, as this rank's shard.
ShardedTensor rows_of(int64_t rows, int64_t begin, int64_t end, double fill_scale) {
  const at::Tensor whole = at::arange(rows * 3, at::kFloat).view({rows, 3}) * fill_scale;
  return ShardedTensor({rows, 3}, at::kFloat, {{{{begin, 0}, {end - begin, 3}}, whole.slice(0, begin, end).clone()}});
}

TEST(CheckpointTest, OneProcessSavesAndLoadsEveryKindOfValue) {
  const TemporaryDirectory dir;
  const at::Tensor strided = at::arange(12, at::kDouble).view({3, 4}).t();
  const at::Tensor conj = at::complex(at::ones({2}), at::ones({2})).conj();
  const StateDict state{
      {"model", StateDict{{"w", strided}, {"scalar", at::full({}, 2.5)}, {"empty", at::empty({0, 3})}, {"conj", conj}}},
      {"optim", StateDict{{"groups", StateList{StateDict{{"lr", 0.1}, {"betas", StateTuple{{0.9, 0.999}}}}}}}},
      {"step", 7},
      {"name", "run"},
      {"raw", ByteString{"\x01\x02"}},
      {"none", None{}},
      {"flag", true},
      {"list", StateList{1, 2, 3}}};
  const SaveResult result = save(state, FileSystemWriter(dir / "ckpt"));
  EXPECT_GT(result.bytes_written, 0u);
  StateDict target{{"model", StateDict{{"w", at::zeros({4, 3}, at::kDouble)},
                                       {"scalar", at::zeros({})},
                                       {"empty", at::empty({0, 3})},
                                       {"conj", at::zeros({2}, at::kComplexFloat)}}},
                   {"optim", StateDict{{"groups", StateList{StateDict{{"lr", 0.0}, {"betas", StateTuple{}}}}}}},
                   {"step", 0},
                   {"name", ""},
                   {"raw", None{}},
                   {"none", 1},
                   {"flag", false},
                   {"list", StateList{}}};
  const LoadReport report = load(target, FileSystemReader(dir / "ckpt"));
  EXPECT_TRUE(report.missing.empty() && report.unexpected.empty() && report.cast.empty());
  const StateDict& model = target.at("model");
  EXPECT_TRUE(model.at("w").as<at::Tensor>().equal(strided));
  EXPECT_EQ(model.at("scalar").as<at::Tensor>().item<double>(), 2.5);
  EXPECT_TRUE(model.at("conj").as<at::Tensor>().equal(conj.resolve_conj()));
  const StateDict& group = target.at("optim").as<StateDict>().at("groups").as<StateList>()[0];
  EXPECT_EQ(group.at("lr").as<double>(), 0.1);
  EXPECT_EQ(group.at("betas").as<StateTuple>().items[1].as<double>(), 0.999);
  EXPECT_EQ(target.at("step").as<int64_t>(), 7);
  EXPECT_EQ(target.at("name").as<std::string>(), "run");
  EXPECT_EQ(target.at("raw").as<ByteString>().data, "\x01\x02");
  EXPECT_TRUE(target.at("none").is<None>());
  EXPECT_TRUE(target.at("flag").as<bool>());
  EXPECT_EQ(target.at("list").as<StateList>().size(), 3u);
}

// Counterpart of test_strict and test_load_different_sizes_throws.
TEST(CheckpointTest, WhatDiffersIsNamedBeforeAnythingIsTouched) {
  const TemporaryDirectory dir;
  save(StateDict{{"a", at::ones({2, 2})}, {"b", at::ones({3})}, {"v", 1}}, FileSystemWriter(dir.path()));
  const at::Tensor a = at::zeros({2, 2});

  StateDict missing{{"a", a}, {"extra", at::zeros({1})}};
  CheckpointError error = error_of([&] { load(missing, FileSystemReader(dir.path())); });
  EXPECT_THAT(error.what(), HasSubstr("Missing key in checkpoint state_dict: extra."));
  EXPECT_EQ(error.failures().at(0).code, ErrorCode::kNotFound);
  EXPECT_TRUE(a.equal(at::zeros({2, 2})));
  const LoadReport report = load(missing, FileSystemReader(dir.path()), {.allow_partial_load = true});
  EXPECT_EQ(report.missing, std::vector<std::string>{"extra"});
  EXPECT_EQ(report.unexpected, (std::vector<std::string>{"b", "v"}));
  EXPECT_TRUE(a.equal(at::ones({2, 2})));
}

TEST(CheckpointTest, WritingBehindAutogradsBackIsSeen) {
  const TemporaryDirectory dir;
  save(StateDict{{"w", at::ones({2})}}, FileSystemWriter(dir.path()));
  at::Tensor w = at::zeros({2}).requires_grad_();
  const at::Tensor y = (w * w).sum();
  StateDict target{{"w", w}};
  load(target, FileSystemReader(dir.path()));
  EXPECT_THROW(y.backward(), c10::Error) << "a graph that saved the old values must refuse to go on";
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, ReplicasAreWrittenOnceAndKeysMayDiffer, .ranks = 3) {
  process_group();
  const std::string dir = (temp_dir() / "ckpt").string();
  StateDict state{{"sharded", rows_of(7, rank() * 3, std::min(7, rank() * 3 + 3), 1)},
                  {"replica", at::arange(5, at::kInt)},
                  {"value", 42}};
  state["only" + std::to_string(rank())] = at::full({2}, rank());
  const SaveResult result = save(state, FileSystemWriter(dir));
  EXPECT_EQ(result.items, 3u + 1 + 1 + 3);

  StateDict target{{"sharded", rows_of(7, 0, 7, 0)},
                   {"replica", at::zeros({5}, at::kInt)},
                   {"value", 0},
                   {"only1", at::zeros({2}, at::kLong)}};
  const LoadReport report = load(target, FileSystemReader(dir));
  EXPECT_EQ(report.unexpected.size(), 2u);
  EXPECT_TRUE(
      target.at("sharded").as<ShardedTensor>().shards()[0].tensor.equal(rows_of(7, 0, 7, 1).shards()[0].tensor));
  EXPECT_TRUE(target.at("replica").as<at::Tensor>().equal(at::arange(5, at::kInt)));
  EXPECT_TRUE(target.at("only1").as<at::Tensor>().equal(at::full({2}, 1)));
  EXPECT_EQ(target.at("value").as<int64_t>(), 42);
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, OneKeyWithTwoContentsIsRefusedUnlessRankLocal, .ranks = 3) {
  const auto group = process_group();
  const std::string directory = (temp_dir() / "checkpoint").string();
  const at::Tensor mine = at::full({5}, static_cast<double>(rank() == 2 ? 1 : 0));
  const auto whole = [](const at::Tensor& tensor) {
    return ShardedTensor({5}, tensor.scalar_type(), {{whole_box({5}), tensor}});
  };
  for (const StateValue& value : {StateValue(mine), StateValue(rank() == 2 ? "a" : "b"), StateValue(whole(mine))}) {
    const StateDict state{{"model", StateDict{{"key", value}}}};
    try {
      save(state, FileSystemWriter(directory), {.verify_replicas = true});
      ADD_FAILURE() << "saved " << value.type_name();
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.committed(), Committed::kNo);
      for (const char* part : {"model.key", "ranks 1 and 2 hold different contents"})
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  const StateDict state{
      {"declared", whole(mine)}, {"rng", rank_local(mine, *group)}, {"name", rank_local(rank(), *group)}};
  save(state, FileSystemWriter(directory));

  StateDict target{{"rng", rank_local(at::zeros_like(mine), *group)}, {"name", rank_local(None{}, *group)}};
  load(target, FileSystemReader(directory));
  EXPECT_TRUE(rank_local_value(target.at("rng"), *group).as<at::Tensor>().equal(mine));
  EXPECT_EQ(rank_local_value(target.at("name"), *group).as<int64_t>(), rank());

  // On another number of ranks nobody can say whose they are.
  const auto pair = new_group({0, 1});
  if (!pair->is_member()) return;
  StateDict fewer{{"rng", rank_local(at::zeros_like(mine), *pair)}};
  try {
    load(fewer, FileSystemReader(directory), {.process_group = pair});
    ADD_FAILURE() << "loaded";
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("rng.rank_" + std::to_string(rank()) + "_of_2"), std::string::npos)
        << error.what();
  }
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, TiedTensorsAreWrittenOnceAndComeBackTied, .ranks = 3) {
  process_group();
  // Two names of a replica, of a shard, and of a parameter beside its detached self; and two that only begin alike.
  const auto make = [&](double scale) {
    const at::Tensor replica = at::arange(3000, at::kFloat) * scale;
    const ShardedTensor sharded = rows_of(900, rank() * 300, (rank() + 1) * 300, scale);
    const at::Tensor parameter = (at::ones({1000}) * scale).requires_grad_();
    return StateDict{{"embedding", replica},
                     {"parameter", parameter},
                     {"rows", sharded},
                     {"head", replica},
                     {"detached", parameter.detach()},
                     {"tied_rows", sharded},
                     {"reshaped", replica.view({3, 1000})}};
  };
  const std::string dir = (temp_dir() / "ckpt").string();
  const SaveResult result = save(make(1), FileSystemWriter(dir));
  EXPECT_EQ(result.items, 1u + 1 + 3 + 1 + 1 + 3 + 1);
  // embedding and reshaped 12,000 each, parameter 4,000, rows 10,800 in three items: and an archive around each.
  EXPECT_LT(result.bytes_written, 12000u * 2 + 4000 + 10800 + 6 * 2000);

  const Metadata metadata = FileSystemReader(dir).read_metadata();
  const auto places_of = [&](const std::string& fqn) {
    std::vector<std::tuple<std::string, uint64_t, uint64_t>> places;
    for (const auto& [index, place] : metadata.storage_data) {
      if (index.fqn == fqn) places.emplace_back(place.relative_path, place.offset, place.length);
    }
    return places;
  };
  EXPECT_EQ(places_of("head"), places_of("embedding"));
  EXPECT_EQ(places_of("detached"), places_of("parameter"));
  EXPECT_EQ(places_of("tied_rows"), places_of("rows"));
  EXPECT_NE(places_of("reshaped"), places_of("embedding"));
  EXPECT_TRUE(verify_checkpoint(dir).problems.empty());

  StateDict target = make(0);
  load(target, FileSystemReader(dir));
  const StateDict wanted = make(1);
  for (const char* key : {"embedding", "head", "parameter", "detached"})
    EXPECT_TRUE(target.at(key).as<at::Tensor>().equal(wanted.at(key).as<at::Tensor>())) << key;
  EXPECT_TRUE(target.at("head").as<at::Tensor>().is_same(target.at("embedding").as<at::Tensor>()));
  EXPECT_TRUE(target.at("tied_rows")
                  .as<ShardedTensor>()
                  .shards()[0]
                  .tensor.equal(wanted.at("rows").as<ShardedTensor>().shards()[0].tensor));
  // Into tensors that are not tied, each name has its values.
  StateDict apart{{"head", at::zeros({3000})}, {"tied_rows", rows_of(900, 0, 900, 0)}};
  load(apart, FileSystemReader(dir));
  EXPECT_TRUE(apart.at("head").as<at::Tensor>().equal(at::arange(3000, at::kFloat)));
  EXPECT_TRUE(
      apart.at("tied_rows").as<ShardedTensor>().shards()[0].tensor.equal(rows_of(900, 0, 900, 1).shards()[0].tensor));
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, ACompressedSaveLoadsOnOtherRanks, .ranks = 3) {
  process_group();
  const std::string dir = (temp_dir() / "ckpt").string();
  const FileSystemWriterOptions compressed{.extensions = {std::make_shared<ZStandard>()}};
  const at::Tensor tied = at::arange(3000, at::kFloat).remainder(10);
  const StateDict state{
      {"rows", rows_of(900, rank() * 300, (rank() + 1) * 300, 1)}, {"a", tied}, {"b", tied}, {"step", 7}};
  const SaveResult result = save(state, FileSystemWriter(dir, compressed));
  EXPECT_LT(result.bytes_written, (900u * 3 + 3000) * 4 / 2);
  EXPECT_TRUE(verify_checkpoint(dir).problems.empty());
  // The next save of the same structure, in the background.
  async_save(state, FileSystemWriter(dir, compressed)).upload_completion.get();

  const auto pair = new_group({0, 1});
  if (!pair->is_member()) return;
  StateDict target{{"rows", rows_of(900, rank() * 450, (rank() + 1) * 450, 0)},
                   {"a", at::zeros({3000})},
                   {"b", at::zeros({3000})},
                   {"step", 0}};
  load(target, FileSystemReader(dir), {.process_group = pair});
  EXPECT_TRUE(target.at("rows").as<ShardedTensor>().shards()[0].tensor.equal(
      rows_of(900, rank() * 450, (rank() + 1) * 450, 1).shards()[0].tensor));
  EXPECT_TRUE(target.at("a").as<at::Tensor>().equal(tied));
  EXPECT_TRUE(target.at("b").as<at::Tensor>().equal(tied));
  EXPECT_EQ(target.at("step").as<int64_t>(), 7);
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, OneRanksErrorIsEveryRanksErrorAndTheNextSaveWorks, .ranks = 2) {
  const auto world = process_group();
  const std::string dir = (temp_dir() / "ckpt").string();
  const StateDict good{{"t", rows_of(4, rank() * 2, rank() * 2 + 2, 1)}};
  save(good, FileSystemWriter(dir));

  // A hole: nobody supplies rows 2 and 3. An overlap: both supply row 1.
  CheckpointError error = error_of([&] {
    save(StateDict{{"t", rows_of(4, rank(), rank() + 1, 2)}}, FileSystemWriter(dir));
  });
  EXPECT_THAT(error.what(), HasSubstr("no rank supplies the part of a tensor at [2, 0]; key t"));
  EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
  EXPECT_EQ(error.committed(), Committed::kNo);
  error = error_of([&] {
    save(StateDict{{"t", rows_of(4, rank() == 0 ? 0 : 1, rank() == 0 ? 2 : 4, 2)}}, FileSystemWriter(dir));
  });
  EXPECT_THAT(error.what(), HasSubstr("overlap at [1, 0]; key t"));
  EXPECT_THAT(error.what(), HasSubstr("[0, 0]+[2, 3] of rank 0 and [1, 0]+[3, 3] of rank 1"));
  EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);

  // Rank 1 alone cannot plan.
  StateDict bad{{"t", rows_of(4, rank() * 2, rank() * 2 + 2, 2)}};
  if (rank() == 1) bad["s"] = at::ones({2, 2}).to_sparse();
  error = error_of([&] { save(bad, FileSystemWriter(dir)); });
  ASSERT_EQ(error.failures().size(), 1u);
  EXPECT_EQ(error.failures().begin()->first, 1);
  EXPECT_EQ(error.failures().at(1).code, ErrorCode::kUnsupported);

  // Rank 0 alone asks for what is not there: nothing is read on rank 1 either.
  const at::Tensor local = at::zeros({2, 3});
  StateDict target{{"t", ShardedTensor({4, 3}, at::kFloat, {{{{rank() * 2, 0}, {2, 3}}, local}})}};
  if (rank() == 0) target["nope"] = at::zeros({1});
  error = error_of([&] { load(target, FileSystemReader(dir)); });
  EXPECT_EQ(error.failures().begin()->first, 0);
  EXPECT_TRUE(local.equal(at::zeros({2, 3})));

  // The first save is untouched by all of this.
  StateDict check{{"t", rows_of(4, 0, 4, 0)}};
  load(check, FileSystemReader(dir));
  EXPECT_TRUE(check.at("t").as<ShardedTensor>().shards()[0].tensor.equal(rows_of(4, 0, 4, 1).shards()[0].tensor));

  // One rank saves, the other loads.
  error = error_of([&] {
    StateDict one{{"t", rows_of(4, 0, 4, 1)}};
    if (rank() == 0) {
      save(one, FileSystemWriter(dir));
    } else {
      load(one, FileSystemReader(dir));
    }
  });
  EXPECT_FALSE(error.failures().empty());
  save(good, FileSystemWriter(dir));
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, ADeadRankIsNamedWithinTheDeadline, .ranks = 3,
                         .expected = {{2, killed_by(SIGKILL)}}) {
  const auto world = process_group();
  const std::string dir = (temp_dir() / "ckpt").string();
  world->barrier();
  if (rank() == 2) raise(SIGKILL);
  const auto start = std::chrono::steady_clock::now();
  const CheckpointError error = error_of([&] {
    save(StateDict{{"t", at::ones({2})}}, FileSystemWriter(dir), {.silence_timeout = std::chrono::milliseconds(1000)});
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(3500));
  ASSERT_EQ(error.failures().size(), 1u) << error.what();
  EXPECT_EQ(error.failures().begin()->first, 2);
  EXPECT_EQ(error.committed(), Committed::kNo);
  EXPECT_FALSE(fs::exists(dir + "/.metadata"));
}

RESHARD_DISTRIBUTED_TEST(CheckpointDistributedTest, BadDirectoriesAreClearErrorsOnEveryRank, .ranks = 2) {
  const auto world = process_group();
  StateDict target{{"t", at::zeros({2})}};
  CheckpointError error = error_of([&] { load(target, FileSystemReader((temp_dir() / "nowhere").string())); });
  EXPECT_EQ(error.failures().at(0).code, ErrorCode::kNotFound);
  EXPECT_THAT(error.what(), HasSubstr("nowhere"));
  const fs::path broken = temp_dir() / "broken";
  if (rank() == 0) {
    fs::create_directories(broken);
    std::ofstream(broken / ".metadata") << "no pickle";
  }
  world->barrier();
  error = error_of([&] { load(target, FileSystemReader(broken.string())); });
  EXPECT_EQ(error.failures().at(0).code, ErrorCode::kCorruptData);
  EXPECT_THAT(error.what(), HasSubstr(".metadata"));
}

}  // namespace
}  // namespace reshard
