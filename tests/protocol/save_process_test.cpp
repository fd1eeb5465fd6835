// SPDX-License-Identifier: BSD-3-Clause
// Saves by processes of their own, one a rank: the real program, over sockets, with memory that both share.
#include "protocol/save_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "storage/checkpoint_runs.h"
#include "support/expect_error.h"
#include "support/fault_file_system.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using namespace std::chrono_literals;

/// A state whose tensors of more than one element lie in a file in memory, every second one transposed in place.
class SharedState final : public SaveState {
 public:
  explicit SharedState(MemorySaveState state) : state_{std::move(state)}, fd_(memfd_create("test", MFD_CLOEXEC)) {
    uint64_t size = 1;
    for_each_chunk([&](size_t e, size_t c) {
      places_[{e, c}] = size += 7;
      size += state_.memory_bytes(e, c).size();
    });
    EXPECT_EQ(ftruncate(fd_, static_cast<off_t>(size)), 0);
    memory_ = {static_cast<std::byte*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0)), size};
    for_each_chunk([&](size_t e, size_t c) {
      std::ranges::copy(state_.memory_bytes(e, c), memory_.begin() + static_cast<ptrdiff_t>(places_[{e, c}]));
    });
  }
  ~SharedState() override {
    munmap(memory_.data(), memory_.size());
    close(fd_);
  }
  SharedState(const SharedState&) = delete;
  const std::vector<StateEntry>& entries() const override { return state_.entries(); }
  TensorView tensor(size_t entry, size_t chunk) const override {
    TensorView view = state_.tensor(entry, chunk);
    if (const auto place = places_.find({entry, chunk}); place != places_.end())
      view.data = memory_.data() + place->second;
    return view;
  }
  ByteSpan bytes(size_t entry) const override { return state_.bytes(entry); }
  int fd() const { return fd_; }
  MutableByteSpan memory() const { return memory_; }

 private:
  struct Source {
    MemorySaveState state;
    const std::vector<StateEntry>& entries() const { return state.entries(); }
    TensorView tensor(size_t e, size_t c) const { return state.tensor(e, c); }
    ByteSpan bytes(size_t e) const { return state.bytes(e); }
    const Bytes& memory_bytes(size_t e, size_t c) const {
      return const_cast<MemorySaveState&>(state).memory().buffer(e, c);
    }
  };
  template <class Fn>
  void for_each_chunk(const Fn& fn) {
    for (size_t e = 0; e < entries().size(); ++e) {
      const auto* tensor = std::get_if<TensorEntry>(&entries()[e].value);
      for (size_t c = 0; tensor != nullptr && c < tensor->chunks.size(); ++c) {
        if (volume(tensor->chunks[c].sizes) > 1) fn(e, c);
      }
    }
  }
  Source state_;
  int fd_;
  std::map<std::pair<size_t, size_t>, uint64_t> places_;
  MutableByteSpan memory_;
};

MemorySaveState state_of(int rank, int64_t rows = 5) {
  MemorySaveState state;
  state.add(tensor_entry("model.sharded", {3 * rows, 4}, {{{rank * rows, 0}, {rows, 4}}}));
  state.add(replica_entry("model.replica", {7}));
  state.add(replica_entry("model.scalar", {}));
  state.add(replica_entry("empty", {0, 3}));
  StateEntry tied = replica_entry("model.tied", {7});
  std::get<TensorEntry>(tied.value).tied_to = 1;
  state.add(std::move(tied));
  state.memory().buffer(4) = state.memory().buffer(1);
  state.add_value("step", value_archive("seventeen"));
  return state;
}

void expect_loads(const std::string& directory, int64_t rows = 5) {
  std::vector<MemoryLoadState> ranks;
  for (int64_t rank = 0; rank < 2; ++rank) {
    MemoryLoadState& state = ranks.emplace_back();
    state.memory().add(tensor_entry("model.sharded", {3 * rows, 4}, {{{0, 2 * rank}, {3 * rows, 2}}}));
    state.memory().add(replica_entry("model.replica", {7}));
    state.memory().add(replica_entry("model.scalar", {}));
    state.memory().add(replica_entry("empty", {0, 3}));
    state.memory().add(bytes_entry("step", 0));
  }
  load_checkpoint(directory, ranks);
  for (MemoryLoadState& state : ranks) {
    EXPECT_EQ(state.first_difference(), "");
    EXPECT_EQ(state.value(4), value_archive("seventeen"));
  }
}

/// The processes that this one started and that make saves.
std::vector<pid_t> workers() {
  std::vector<pid_t> result;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream children(task.path() / "children");
    for (pid_t pid; children >> pid;) {
      std::string command;
      std::getline(std::ifstream("/proc/" + std::to_string(pid) + "/cmdline"), command);
      if (command.find("save-worker") != std::string::npos) result.push_back(pid);
    }
  }
  return result;
}

pid_t last_started() {
  const std::vector<pid_t> all = workers();
  return all.empty() ? -1 : *std::ranges::max_element(all);
}

SaveResult save_by(SaveProcess& process, Transport& transport, const std::string& directory, const SharedState& state,
                   ProgressFn progress = {}, std::chrono::milliseconds silence = 30s,
                   StreamTransformExtensions extensions = {}) {
  const FileSystemWriter writer(
      directory,
      {.thread_count = 2, .sync_files = false, .storage_alignment = 4096, .extensions = std::move(extensions)});
  return process.save(transport, {.state = state,
                                  .memory_fd = state.fd(),
                                  .memory = state.memory(),
                                  .writer = writer,
                                  .silence = silence,
                                  .progress = std::move(progress)});
}

TEST(SaveProcessTest, SavesWhatItIsGivenAgainAndAgain) {
  const TemporaryDirectory directory;
  std::vector<std::unique_ptr<SaveProcess>> processes;
  for (int rank = 0; rank < 3; ++rank) processes.push_back(std::make_unique<SaveProcess>(RESHARD_CLI));
  std::set<std::vector<pid_t>> seen;
  for (int64_t rows = 5; rows < 8; ++rows) {  // into one directory, with memory of another size each time
    std::atomic<uint64_t> progress = 0;
    std::vector<SaveResult> results(3);
    on_ranks(3, [&](size_t rank, Transport& transport) {
      const MemorySaveState memory = state_of(static_cast<int>(rank), rows);
      const SharedState state(memory);
      results[rank] = save_by(*processes[rank], transport, directory / "checkpoint", state,
                              [&](const Progress& made) { progress = std::max<uint64_t>(progress, made.total); });
    });
    for (const SaveResult& result : results) {
      EXPECT_EQ(result.save_id, results[0].save_id);
      EXPECT_EQ(result.items, 3U + 4U + 1U) << "what is tied is an item of its own";
      EXPECT_GT(result.bytes_written, 0U);
    }
    EXPECT_GT(progress, 0U);
    expect_loads(directory / "checkpoint", rows);
    seen.insert(workers());
  }
  ASSERT_EQ(seen.size(), 1U) << "the same processes for all saves";
  EXPECT_EQ(seen.begin()->size(), 3U);
  // Compressed, too.
  on_ranks(3, [&](size_t rank, Transport& transport) {
    const SharedState state(state_of(static_cast<int>(rank)));
    save_by(*processes[rank], transport, directory / "compressed", state, {}, 30s, {std::make_shared<ZStandard>(9)});
  });
  expect_loads(directory / "compressed");
  for (const auto& [index, info] : FileSystemReader(directory / "compressed").read_metadata().storage_data)
    EXPECT_EQ(info.transform_descriptors, std::vector<std::string>{"stream.zstd/1"});
  processes.clear();
  EXPECT_EQ(workers().size(), 0U);
}

TEST(SaveProcessTest, ErrorsOfASaveAreThoseOfAnyOtherAndTheProcessGoesOn) {
  const TemporaryDirectory directory;
  std::ofstream(directory / "file") << "no directory";
  std::vector<std::unique_ptr<SaveProcess>> processes;
  for (int rank = 0; rank < 2; ++rank) processes.push_back(std::make_unique<SaveProcess>(RESHARD_CLI));
  const auto save_two = [&](const std::string& path, const std::vector<MemorySaveState>& states) {
    std::vector<std::string> texts(2);
    on_ranks(2, [&](size_t rank, Transport& transport) {
      const SharedState state(states[rank]);
      try {
        save_by(*processes[rank], transport, path, state);
      } catch (const CheckpointError& error) {
        EXPECT_EQ(error.committed(), Committed::kNo);
        texts[rank] = error.what();
      }
    });
    EXPECT_EQ(texts[0], texts[1]) << "one error";
    return texts[0];
  };
  std::vector<MemorySaveState> halves(2);
  for (int64_t rank = 0; rank < 2; ++rank)
    halves[static_cast<size_t>(rank)].add(tensor_entry("w", {4}, {{{2 * rank}, {2}}}));
  EXPECT_NE(save_two(directory / "file", halves).find(directory / "file"), std::string::npos);
  std::vector<MemorySaveState> hole(2);
  hole[0].add(tensor_entry("w", {4}, {{{0}, {2}}}));
  hole[1].add(tensor_entry("w", {4}, {{{0}, {2}}}));
  const std::string text = save_two(directory / "checkpoint", hole);
  EXPECT_NE(text.find("key w"), std::string::npos) << text;
  const std::vector<pid_t> before = workers();
  EXPECT_EQ(save_two(directory / "checkpoint", halves), "");
  EXPECT_EQ(workers(), before);
}

/// Signals the process that was started last before it hands on the first message that it receives.
class SignallingTransport final : public Transport {
 public:
  SignallingTransport(Transport& transport, int signal) : transport_(transport), signal_(signal) {}
  int rank() const override { return transport_.rank(); }
  int world_size() const override { return transport_.world_size(); }
  void send(int to, ByteSpan message) override { transport_.send(to, message); }
  Bytes receive(int from) override {
    if (const int sent = std::exchange(signal_, 0); sent != 0) kill(last_started(), sent);
    return transport_.receive(from);
  }
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    transport_.gather(from, arrived);
  }
  void heartbeat() noexcept override { transport_.heartbeat(); }

 private:
  Transport& transport_;
  int signal_;
};

TEST(SaveProcessTest, ItsDeathOrSilenceIsAnErrorAndTheNextSaveHasAnother) {
  for (const int signal : {SIGKILL, SIGSTOP}) {
    const TemporaryDirectory directory;
    std::vector<std::unique_ptr<SaveProcess>> processes;
    for (int rank = 0; rank < 2; ++rank) processes.push_back(std::make_unique<SaveProcess>(RESHARD_CLI));
    // Rank 1's process gets the signal `sent`, if any, while it waits for its part of the plan.
    const auto save_two = [&](const std::string& path, int sent) {
      std::vector<std::optional<CheckpointError>> errors(2);
      ThreadHub hub(2, sent == 0 ? kTestSilence : 5s);
      const auto others = run_ranks(2, [&](int rank) {
        const auto transport = hub.transport(rank);
        SignallingTransport signalling(*transport, rank == 1 ? sent : 0);
        const SharedState state(MemorySaveState({tensor_entry("w", {2 << 18}, {{{int64_t{rank} << 18}, {1 << 18}}})}));
        try {
          save_by(*processes[static_cast<size_t>(rank)], signalling, path, state, {}, sent == 0 ? 30s : 3s);
        } catch (const CheckpointError& error) {
          errors[static_cast<size_t>(rank)] = error;
        }
      });
      for (const std::exception_ptr& other : others) EXPECT_FALSE(other);
      return errors;
    };
    for (int rank = 0; rank < 2; ++rank) {
      // Started one after the other, so that the last is rank 1's.
      const auto transport = solo_transport();
      save_by(*processes[static_cast<size_t>(rank)], *transport, directory / "alone",
              SharedState(MemorySaveState({replica_entry("r", {2})})));
    }
    const auto first = save_two(directory / "checkpoint", 0);
    EXPECT_FALSE(first[0] || first[1]);
    EXPECT_EQ(workers().size(), 2U);

    const auto errors = save_two(directory / "checkpoint", signal);
    ASSERT_TRUE(errors[0] && errors[1]);
    EXPECT_EQ(errors[0]->failures().begin()->first, 1) << errors[0]->what();
    EXPECT_EQ(errors[0]->committed(), Committed::kNo);
    const std::string text = errors[1]->what();
    EXPECT_EQ(errors[1]->code(), signal == SIGKILL ? ErrorCode::kUnavailable : ErrorCode::kTimeout) << text;
    EXPECT_EQ(errors[1]->committed(), Committed::kUnknown);
    EXPECT_EQ(errors[1]->failures().begin()->first, 1);
    EXPECT_NE(text.find(signal == SIGKILL ? "killed by signal 9" : "silent"), std::string::npos) << text;
    EXPECT_EQ(workers().size(), 1U);
    std::vector<MemoryLoadState> old(1);
    old[0].memory().add(tensor_entry("w", {2 << 18}, {{{0}, {2 << 18}}}));
    load_checkpoint(directory / "checkpoint", old);
    EXPECT_EQ(old[0].first_difference(), "") << "the checkpoint before it";

    const auto next = save_two(directory / "checkpoint", 0);
    EXPECT_FALSE(next[0] || next[1]);
    // One that ends between saves is replaced without a word.
    ASSERT_EQ(workers().size(), 2U);
    const pid_t idle = last_started();
    kill(idle, SIGKILL);
    for (std::string stat; stat.find(") Z") == std::string::npos; std::this_thread::yield()) {
      std::getline(std::ifstream("/proc/" + std::to_string(idle) + "/stat"), stat);
    }
    const auto last = save_two(directory / "checkpoint", 0);
    EXPECT_FALSE(last[0] || last[1]);
    EXPECT_EQ(workers().size(), 2U);
  }
}

TEST(SaveProcessTest, WhatCannotBeIsSaidBeforeAnythingIsSent) {
  const TemporaryDirectory directory;
  const auto transport = solo_transport();
  const MemorySaveState memory = state_of(0);
  const SharedState state(memory);
  SaveProcess missing(directory / "no-such-program");
  EXPECT_ERROR(ErrorCode::kNotFound, "no-such-program", save_by(missing, *transport, directory / "checkpoint", state));
  FaultFileSystem other(local_file_system());
  const FileSystemWriter writer(directory / "checkpoint", {}, other);
  SaveProcess process(RESHARD_CLI);
  EXPECT_ERROR(ErrorCode::kUnsupported, "file system of this process",
               process.save(*transport, {.state = state, .writer = writer, .silence = 30s}));
  struct Own final : StreamTransformExtension {
    std::string get_descriptor() const override { return "stream.own/1"; }
    std::unique_ptr<ByteOutputStream> transform_to(ByteOutputStream&) const override { return nullptr; }
    std::unique_ptr<ByteInputStream> transform_from(ByteInputStream&) const override { return nullptr; }
  };
  EXPECT_ERROR(ErrorCode::kUnsupported, "stream.own/1",
               save_by(process, *transport, directory / "checkpoint", state, {}, 30s, {std::make_shared<Own>()}));
  // A program that is something else.
  SaveProcess wrong("/bin/true");
  EXPECT_ERROR(ErrorCode::kUnavailable, "exit code 0", save_by(wrong, *transport, directory / "checkpoint", state));
  EXPECT_FALSE(std::filesystem::exists(directory / "checkpoint"));
}

}  // namespace
}  // namespace reshard
