// SPDX-License-Identifier: BSD-3-Clause
// PyTorch reads what is saved through zstd here, and what it saves through zstd is read here.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/verify.h"
#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/run_python.h"
#include "support/streams.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

const std::map<std::string, Dims> kShapes{
    {"rows", {600, 50}}, {"columns", {40, 900}}, {"flat", {70'000}}, {"scalar", {}}, {"none", {0, 3}}};

/// The elements of `box`, as extension_peer.py has them.
Bytes part_of(const std::string& name, const Box& box) {
  std::vector<float> whole(static_cast<size_t>(volume(kShapes.at(name))));
  for (size_t i = 0; i < whole.size(); ++i) whole[i] = static_cast<float>((i / 7 + name.size()) % 1000);
  Bytes part(static_cast<size_t>(volume(box.sizes)) * 4);
  for_each_run(whole_box(kShapes.at(name)), box, [&](int64_t from, int64_t to, int64_t length) {
    std::memcpy(part.data() + to * 4, whole.data() + from, static_cast<size_t>(length) * 4);
  });
  return part;
}

class ExtensionPeerTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  }
  TemporaryDirectory directory_;
};

TEST_F(ExtensionPeerTest, PyTorchReadsWhatAnyNumberOfRanksSaves) {
  for (const int64_t world_size : {1, 2, 3, 4}) {
    std::vector<MemorySaveState> ranks(static_cast<size_t>(world_size));
    for (int64_t rank = 0; rank < world_size; ++rank) {
      MemorySaveState& state = ranks[static_cast<size_t>(rank)];
      for (const auto& [name, size] : kShapes) {
        const bool whole = size.empty() || volume(size) == 0;
        const Box box = whole ? whole_box(size) : split_evenly(whole_box(size), size.size() - 1, world_size, rank);
        state.add(whole ? replica_entry(name, size) : tensor_entry(name, size, {box}));
        state.memory().buffer(state.entries().size() - 1) = part_of(name, box);
      }
      pickle::Tree tree;
      state.add_value("step", as_text(encode_value_archive(tree.integer(7))));
    }
    const std::string checkpoint = directory_ / std::to_string(world_size);
    save_checkpoint(checkpoint, ranks, {.extensions = {std::make_shared<ZStandard>(1)}});
    expect_python_succeeds("extension_peer.py check '" + checkpoint + "' " + std::to_string(4 / world_size + 1));
  }
}

TEST_F(ExtensionPeerTest, WhatPyTorchSavesIsReadOnAnyNumberOfRanks) {
  expect_python_succeeds("extension_peer.py write '" + directory_.path() + "'");
  FileSystemReaderOptions options;
  options.extension_registry.register_extension("stream.rot13", Rot13::from_descriptor);
  for (const char* kind : {"zstd", "rot13", "plain"}) {
    SCOPED_TRACE(kind);
    const std::string checkpoint = directory_ / kind;
    for (const Error& problem : verify_checkpoint(checkpoint, local_file_system(), {}, options).problems) {
      ADD_FAILURE() << problem.what();
    }
    for (int64_t world_size = 1; world_size <= 4; ++world_size) {
      for (int64_t rank = 0; rank < world_size; ++rank) {
        FileSystemReader files(checkpoint, options);
        const CheckpointReader reader(files);
        for (const auto& [name, size] : kShapes) {
          const Box box =
              size.empty() ? whole_box(size) : split_evenly(whole_box(size), size.size() - 1, world_size, rank);
          Bytes part(static_cast<size_t>(volume(box.sizes)) * 4);
          reader.read_box(name, box, part);
          EXPECT_EQ(part, part_of(name, box)) << name << " " << rank << " of " << world_size;
        }
        const Bytes step = reader.read_value("step");
        EXPECT_EQ(decode_value_archive(MemorySource(step)).root().as_int(), 7);
      }
    }
  }
  // Its archives are streamed, not decoded whole: a walk in blocks decodes each element once.
  FileSystemReader files(directory_ / "zstd");
  const CheckpointReader reader(files);
  for (const Box& box : cut_into_blocks(whole_box({70'000}), 1000)) {
    Bytes block(static_cast<size_t>(volume(box.sizes)) * 4);
    reader.read_box("flat", box, block);
    ASSERT_EQ(block, part_of("flat", box));
  }
  EXPECT_EQ(files.counters().bytes_payload, 280'000U);
  EXPECT_LT(files.counters().bytes_read, 140'000U);
}

}  // namespace
}  // namespace reshard
