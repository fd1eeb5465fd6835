// SPDX-License-Identifier: BSD-3-Clause
// Any messages of another rank to one rank of two that saves or loads. The input's first byte says which of the four
// that is (bit 0: it loads, bit 1: it is not the coordinator); the rest are the messages, each behind its length in two
// bytes. However it ends, it ends with a result or with the one error of the protocol.
#include "fuzz/fuzz.h"
#include "reshard/format/sha256.h"
#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "support/memory_state.h"

namespace reshard::fuzz {

namespace {

/// Receives what the input says; silent when that is used up.
class ScriptedTransport final : public Transport {
 public:
  ScriptedTransport(int rank, ByteSpan script) : rank_(rank), script_(script, "script") {}
  int rank() const override { return rank_; }
  int world_size() const override { return 2; }
  void send(int, ByteSpan) override {}
  Bytes receive(int from) override {
    if (script_.remaining() < 2) throw Error(ErrorCode::kTimeout, "silent", {.rank = from});
    const size_t length = script_.u16();
    const ByteSpan message = script_.bytes(std::min(length, script_.remaining()));
    return {message.begin(), message.end()};
  }
  void heartbeat() noexcept override {}

 private:
  int rank_;
  ByteReader script_;
};

/// Asks the planner for everything that the plan names, and keeps nothing.
class NoWriter final : public StorageWriter {
 public:
  std::string checkpoint_id() const override { return "nowhere"; }
  void begin_save(const std::string&) override {}
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    for (SavePlan& plan : plans) plan.storage.assign(plan.items.size(), {"file", 0, 1, {}});
    return plans;
  }
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext&) override {
    std::vector<WriteResult> results;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const WriteItem& item = plan.items[i];
      item.type == WriteItemType::kByteIo ? static_cast<void>(planner.resolve_bytes(item))
                                          : static_cast<void>(planner.resolve_tensor(item));
      results.push_back({item.index, i < plan.storage.size() ? plan.storage[i] : StorageInfo{}});
    }
    return results;
  }
  void finish(const Metadata&, const StorageContext&, Committed& committed) override { committed = Committed::kYes; }
  void abandon() noexcept override {}
};

/// Delivers nothing, but asks the planner where everything would go.
class NoReader final : public StorageReader {
 public:
  Metadata read_metadata() override {
    Metadata metadata;
    metadata.state_dict_metadata.insert("t", TensorStorageMetadata{{}, {4, 2}, {whole_box({4, 2})}});
    metadata.state_dict_metadata.insert("v", BytesStorageMetadata{});
    metadata.storage_data.insert({"t", Dims{0, 0}, 0}, {"file", 0, 1, {}});
    metadata.storage_data.insert({"v", {}, {}}, {"file", 1, 1, {}});
    return metadata;
  }
  void set_up_storage_reader(const Metadata&) override {}
  void read_data(const LoadPlan& plan, LoadPlanner& planner, const StorageContext&) override {
    for (const ReadItem& item : plan.items) {
      if (!item.is_bytes) planner.commit_tensor(item, planner.resolve_tensor(item));
    }
  }
};

}  // namespace

void target(ByteSpan input) {
  // What the digest's library makes once, at its first use, is not the input's doing.
  [[maybe_unused]] static const Sha256Digest first_use = Sha256::of({});
  if (input.empty()) return;
  const auto role = std::to_integer<unsigned>(input[0]);
  const int rank = (role & 2) != 0 ? 1 : 0;
  ScriptedTransport transport(rank, input.subspan(1));
  const std::vector<StateEntry> entries{tensor_entry("t", {4, 2}, {{{2 * rank, 0}, {2, 2}}}), bytes_entry("v", 3)};
  const auto run = [&] {
    if ((role & 1) == 0) {
      MemorySaveState state(entries);
      DefaultSavePlanner planner;
      NoWriter writer;
      run_save(transport, state, planner, writer);
    } else {
      MemoryLoadState state(entries);
      DefaultLoadPlanner planner({.allow_partial_load = true, .allow_cast = true});
      NoReader reader;
      run_load(transport, state, planner, reader);
    }
  };
  try {
    limit_memory(4096 * input.size() + (64 << 10), run);
  } catch (const CheckpointError& error) {
    require(!error.failures().empty(), "an error of the protocol has a cause");
  } catch (const Error&) {
    require(false, "an error of the protocol is a CheckpointError");
  }
}

}  // namespace reshard::fuzz
