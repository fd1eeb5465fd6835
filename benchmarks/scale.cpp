// SPDX-License-Identifier: BSD-3-Clause
// What a save of many ranks costs the coordinator, with ranks that are made up: everything here is the real planner, wire
// form, placement, protocol and catalogue; only the tensors and the disk are missing.
//
//   scale [--json] [--row plans|protocol|repeat] [--ranks R] [--tensors T] [--metadata FILE]
//
// Row `plans` carries R plans of T tensors, each rank holding one chunk [4, 1024] of every [4 R, 1024] float32 tensor,
// from the local plans to the bytes of `.metadata` and back, phase by phase. Row `protocol` runs run_save() on R ranks
// that are fibers of one thread, and counts what goes through the coordinator; row `repeat` is the second such save of
// ranks that keep their plans. Without --ranks a sweep of cases runs.
// Each case has a process of its own, so that its peak of memory is its own. --metadata keeps the catalogue of row `plans`.
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reshard/core/hooks.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/planner/default_planner.h"
#include "reshard/planner/plan_wire.h"
#include "reshard/protocol/protocol.h"
#include "reshard/storage/filesystem.h"
#include "support/memory_file_system.h"

namespace reshard {
namespace {

/// Processor time: all of it is one thread that waits for nothing, and so other programs do not count.
double now() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// --- results ---------------------------------------------------------------------------------------------------------

struct Result {
  std::string row;
  std::string name;
  std::vector<std::pair<std::string, double>> seconds;  // by phase, in order
  uint64_t metadata_bytes = 0;
  uint64_t messages = 0;
  uint64_t bytes = 0;  // of the messages

  double& phase(std::string_view phase) {
    for (auto& [known, time] : seconds) {
      if (known == phase) return time;
    }
    return seconds.emplace_back(phase, 0).second;
  }
  double total() const {
    double sum = 0;
    for (const auto& [phase, time] : seconds) sum += time;
    return sum;
  }
};

uint64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

void print(const Result& result, bool json) {
  if (json) {
    std::printf(R"({"row":"%s","case":"%s","seconds":{)", result.row.c_str(), result.name.c_str());
    for (const auto& [phase, time] : result.seconds) std::printf(R"("%s":%.4f,)", phase.c_str(), time);
    std::printf(R"("total":%.4f},"peak_bytes":%llu,"metadata_bytes":%llu,"messages":%llu,"bytes":%llu})",
                result.total(), static_cast<unsigned long long>(peak_bytes()),
                static_cast<unsigned long long>(result.metadata_bytes),
                static_cast<unsigned long long>(result.messages), static_cast<unsigned long long>(result.bytes));
    std::printf("\n");
  } else {
    std::printf("%s %s: %.3f s, peak %.1f MiB, metadata %.1f MiB, %llu messages of %.1f MiB\n", result.row.c_str(),
                result.name.c_str(), result.total(), static_cast<double>(peak_bytes()) / (1 << 20),
                static_cast<double>(result.metadata_bytes) / (1 << 20),
                static_cast<unsigned long long>(result.messages), static_cast<double>(result.bytes) / (1 << 20));
    for (const auto& [phase, time] : result.seconds) std::printf("  %-18s %9.4f s\n", phase.c_str(), time);
  }
  std::fflush(stdout);
}

/// Adds the time since it was made or last asked to phases of a result.
class Stopwatch {
 public:
  explicit Stopwatch(Result& result) : result_(result) {}
  void skip() { since_ = now(); }
  void add_to(std::string_view phase) {
    const double time = now();
    result_.phase(phase) += time - since_;
    since_ = time;
  }

 private:
  Result& result_;
  double since_ = now();
};

// --- made-up ranks ---------------------------------------------------------------------------------------------------

constexpr int64_t kRows = 4;
constexpr int64_t kColumns = 1024;

/// The state dict of one rank: `tensors` chunks, and if wished a plain tensor and a value that all ranks hold. The
/// sharded tensors have no memory: nothing here reads them.
class MadeUpState final : public SaveState {
 public:
  MadeUpState(int64_t rank, int64_t ranks, int64_t tensors, bool with_replicas) {
    entries_.reserve(static_cast<size_t>(tensors) + 2);
    for (int64_t t = 0; t < tensors; ++t) {
      StateEntry& entry = add({"model", "layers", t, "weight"});
      entry.value = TensorEntry{.properties = {},
                                .size = {kRows * ranks, kColumns},
                                .chunks = {{{kRows * rank, 0}, {kRows, kColumns}}},
                                .sharded = true};
    }
    if (!with_replicas) return;
    add({"model", "scale"}).value = TensorEntry{.properties = {}, .size = {64}, .chunks = {{{0}, {64}}}};
    add({"trainer", "epoch"}).value = BytesEntry{sizeof(content_)};
  }
  const std::vector<StateEntry>& entries() const override { return entries_; }
  TensorView tensor(size_t entry, size_t) const override {
    const auto& tensor = std::get<TensorEntry>(entries_[entry].value);
    return {.data = content_, .dtype = DType::kFloat32, .sizes = tensor.size, .strides = {1}, .owner = nullptr};
  }
  ByteSpan bytes(size_t) const override { return content_; }

 private:
  StateEntry& add(ObjectPath path) {
    std::string fqn = path_to_fqn(path);
    return entries_.emplace_back(StateEntry{std::move(fqn), std::move(path), {}});
  }
  std::vector<StateEntry> entries_;
  std::byte content_[256] = {};
};

/// Places items as FileSystemWriter does in an empty directory, writes nothing, and keeps the length of the catalogue.
class DisklessWriter final : public StorageWriter {
 public:
  std::string checkpoint_id() const override { return "/checkpoint"; }
  void begin_save(const std::string& save_id) override { writer_.begin_save(save_id); }
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    return writer_.prepare_global_plan(std::move(plans));
  }
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner&, const StorageContext&) override {
    std::vector<WriteResult> results;
    results.reserve(plan.items.size());
    for (size_t i = 0; i < plan.items.size(); ++i) results.push_back({plan.items[i].index, plan.storage[i]});
    return results;
  }
  void finish(const Metadata& metadata, const StorageContext&, Committed& committed) override {
    metadata_bytes_ = encode_metadata(metadata).size();
    committed = Committed::kYes;
  }
  void abandon() noexcept override {}
  uint64_t metadata_bytes() const { return metadata_bytes_; }

 private:
  MemoryFileSystem file_system_{{}, {"/checkpoint"}};
  FileSystemWriter writer_{"/checkpoint", {}, file_system_};
  uint64_t metadata_bytes_ = 0;
};

// --- plans -----------------------------------------------------------------------------------------------------------

/// Where row `plans` keeps its catalogue, if anywhere.
std::string& metadata_file() {
  static std::string path;
  return path;
}

Result run_plans(int64_t ranks, int64_t tensors) {
  Result result{.row = "plans", .name = std::to_string(ranks) + "x" + std::to_string(tensors), .seconds = {}};
  Stopwatch watch(result);
  const auto send = [&](const Bytes& message) {
    ++result.messages;
    result.bytes += message.size();
  };

  std::vector<SavePlan> plans(static_cast<size_t>(ranks));
  SavePlanDecoder decoder;
  DefaultSavePlanner coordinator;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const MadeUpState state(rank, ranks, tensors, false);
    DefaultSavePlanner planner;
    watch.skip();
    planner.set_up_planner(state, rank == 0);
    SavePlan plan = planner.create_local_plan();
    watch.add_to("local_plan");
    const Bytes message = encode_save_plan(plan);
    watch.add_to("encode");
    plans[static_cast<size_t>(rank)] = decoder.decode(message);
    watch.add_to("decode");
    send(message);
  }

  watch.skip();
  GlobalSavePlan global = coordinator.create_global_plan(std::move(plans));
  watch.add_to("global_plan");
  DisklessWriter writer;
  writer.begin_save("save");
  plans = writer.prepare_global_plan(std::move(global.plans));
  watch.add_to("place");
  Metadata& metadata = global.metadata;
  std::vector<std::pair<MetadataIndex, StorageInfo>> stored;
  stored.reserve(static_cast<size_t>(ranks * tensors));
  uint64_t freed = 0;
  for (SavePlan& plan : plans) {
    plan.planner_data = {};
    send(encode_save_plan(plan));
    for (size_t i = 0; i < plan.items.size(); ++i) {
      stored.emplace_back(std::move(plan.items[i].index), std::move(plan.storage[i]));
    }
    freed += plan.items.size() * (sizeof(WriteItem) + sizeof(StorageInfo));
    plan = {};
    if (freed >= 256 << 20) {  // as in run_save()
      malloc_trim(0);
      freed = 0;
    }
  }
  if (metadata.storage_data.assign(std::move(stored))) std::abort();
  watch.add_to("answers");
  const Bytes file = encode_metadata(metadata);
  watch.add_to("metadata_encode");
  result.metadata_bytes = file.size();
  if (!metadata_file().empty()) local_file_system().create(metadata_file(), CreateMode::kTruncate)->write(0, file);
  global = {};
  watch.skip();
  const Metadata decoded = decode_metadata(file);
  watch.add_to("metadata_decode");
  if (decoded.storage_data.size() != static_cast<size_t>(ranks * tensors)) std::abort();
  return result;
}

// --- protocol --------------------------------------------------------------------------------------------------------

/// The ranks of one job as fibers of this thread, each with the ordinary blocking protocol: a rank that waits for a
/// message lets the others run. So one processor plays any number of ranks, the order is always the same, and all
/// messages can be counted.
class Fibers {
 public:
  explicit Fibers(int64_t ranks) : fibers_(static_cast<size_t>(ranks)) {}
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;
  ~Fibers() {
    for (Fiber& fiber : fibers_) {
      if (fiber.stack != nullptr) munmap(fiber.stack, kStackBytes);
    }
  }

  /// Runs body(rank) on all ranks until all have returned. `on_switch(rank)` is called when a rank stops for now.
  void run(const std::function<void(int)>& body, const std::function<void(int)>& on_switch) {
    body_ = &body;
    for (size_t rank = 0; rank < fibers_.size(); ++rank) start(rank);
    for (size_t left = fibers_.size(); left > 0;) {
      for (size_t rank = fibers_.size(); rank-- > 0;) {  // the coordinator last: it finds all messages
        Fiber& fiber = fibers_[rank];
        if (fiber.done) continue;
        running_ = rank;
        swapcontext(&scheduler_, &fiber.context);
        on_switch(static_cast<int>(rank));
        if (fiber.done) --left;
      }
    }
  }

  std::unique_ptr<Transport> transport(int rank) { return std::make_unique<FiberTransport>(*this, rank); }
  uint64_t messages() const { return messages_; }
  uint64_t bytes() const { return bytes_; }
  void reset_counters() { messages_ = bytes_ = 0; }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    bool done = false;
    std::deque<Bytes> from_coordinator;
    std::deque<Bytes> to_coordinator;
  };

  class FiberTransport final : public Transport {
   public:
    FiberTransport(Fibers& fibers, int rank) : fibers_(fibers), rank_(rank) {}
    int rank() const override { return rank_; }
    int world_size() const override { return static_cast<int>(fibers_.fibers_.size()); }
    void send(int to, ByteSpan message) override {
      ++fibers_.messages_;
      fibers_.bytes_ += message.size();
      Fiber& peer = fibers_.fibers_[static_cast<size_t>(rank_ == 0 ? to : rank_)];
      (rank_ == 0 ? peer.from_coordinator : peer.to_coordinator).emplace_back(message.begin(), message.end());
    }
    Bytes receive(int from) override {
      Fiber& peer = fibers_.fibers_[static_cast<size_t>(rank_ == 0 ? from : rank_)];
      auto& queue = rank_ == 0 ? peer.to_coordinator : peer.from_coordinator;
      while (queue.empty()) fibers_.wait();
      Bytes message = std::move(queue.front());
      queue.pop_front();
      return message;
    }
    void heartbeat() noexcept override {}

   private:
    Fibers& fibers_;
    const int rank_;
  };

  void start(size_t rank) {
    Fiber& fiber = fibers_[rank];
    fiber.done = false;
    if (fiber.stack == nullptr) {
      fiber.stack =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber.stack == MAP_FAILED) std::abort();
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<uintptr_t>(this);  // makecontext() passes ints only
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  static void enter(unsigned high, unsigned low) {
    auto& self = *reinterpret_cast<Fibers*>(static_cast<uintptr_t>(high) << 32 | low);
    const size_t rank = self.running_;
    (*self.body_)(static_cast<int>(rank));
    self.fibers_[rank].done = true;
  }
  void wait() { swapcontext(&fibers_[running_].context, &scheduler_); }

  std::vector<Fiber> fibers_;
  ucontext_t scheduler_{};
  const std::function<void(int)>* body_ = nullptr;
  size_t running_ = 0;
  uint64_t messages_ = 0;
  uint64_t bytes_ = 0;
};

/// `saves`: the last of so many is measured; with more than one, ranks keep their plans.
Result run_protocol(int64_t ranks, int64_t tensors, int saves) {
  Result result{.row = saves > 1 ? "repeat" : "protocol",
                .name = std::to_string(ranks) + "x" + std::to_string(tensors),
                .seconds = {}};
  std::vector<std::unique_ptr<MadeUpState>> states;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    states.push_back(std::make_unique<MadeUpState>(rank, ranks, tensors, true));
  }
  Fibers fibers(ranks);
  Stopwatch watch(result);
  // What the coordinator does between its test points is a phase; all that other ranks do is another.
  bool coordinator_runs = false;
  set_test_point_handler([&](std::string_view point) {
    if (!coordinator_runs) return;
    if (point == "save.planned_globally") watch.add_to("gather_and_plan");
    if (point == "save.placed") watch.add_to("place_and_encode");
    if (point == "save.before_commit") watch.add_to("write_and_votes");
    if (point == "save.after_commit") watch.add_to("commit");
  });
  std::vector<SavePlanCache> caches(states.size());
  for (int n = 0; n < saves; ++n) {
    fibers.reset_counters();
    result.seconds.clear();
    watch.skip();
    fibers.run(
        [&](int rank) {
          const auto r = static_cast<size_t>(rank);
          coordinator_runs = rank == 0;
          DefaultSavePlanner planner;
          DisklessWriter writer;
          run_save(*fibers.transport(rank), *states[r], planner, writer, {}, saves > 1 ? &caches[r] : nullptr);
          if (rank == 0) result.metadata_bytes = writer.metadata_bytes();
        },
        [&](int rank) {
          watch.add_to(rank == 0 ? "answers" : "ranks");
          coordinator_runs = rank == 1;  // whose turn is next
        });
  }
  set_test_point_handler({});
  result.messages = fibers.messages();
  result.bytes = fibers.bytes();
  return result;
}

// --- the program -----------------------------------------------------------------------------------------------------

Result run_one_save(int64_t ranks, int64_t tensors) { return run_protocol(ranks, tensors, 1); }
Result run_second_save(int64_t ranks, int64_t tensors) { return run_protocol(ranks, tensors, 2); }

struct Case {
  Result (*run)(int64_t ranks, int64_t tensors);
  std::string_view row;
  int64_t ranks;
  int64_t tensors;
};

/// In a process of its own. False if it failed.
bool run_alone(const Case& one, bool json) {
  const pid_t child = fork();
  if (child < 0) return false;
  if (child == 0) {
    try {
      print(one.run(one.ranks, one.tensors), json);
      _exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%.*s %lldx%lld: %s\n", static_cast<int>(one.row.size()), one.row.data(),
                   static_cast<long long>(one.ranks), static_cast<long long>(one.tensors), error.what());
      _exit(1);
    }
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int main(int argc, char** argv) {
  bool json = false;
  std::string_view row;
  int64_t ranks = 0;
  int64_t tensors = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const std::string_view value = i + 1 < argc ? argv[i + 1] : "";
    const auto number = [&](int64_t& out) {
      return std::from_chars(value.data(), value.data() + value.size(), out).ec == std::errc{} && out > 0;
    };
    bool ok = true;
    if (argument == "--json") {
      json = true;
      continue;
    }
    if (argument == "--row") {
      row = value;
    } else if (argument == "--metadata") {
      metadata_file() = value;
    } else if (argument == "--ranks") {
      ok = number(ranks);
    } else if (argument == "--tensors") {
      ok = number(tensors);
    } else {
      ok = false;
    }
    if (!ok || i + 1 == argc) {
      std::fprintf(stderr,
                   "usage: scale [--json] [--row plans|protocol|repeat] [--ranks R] [--tensors T] [--metadata FILE]\n");
      return 2;
    }
    ++i;
  }
  std::vector<Case> cases;
  if (ranks > 0) {
    cases = {{run_plans, "plans", ranks, tensors > 0 ? tensors : 1000},
             {run_one_save, "protocol", ranks, tensors > 0 ? tensors : 100},
             {run_second_save, "repeat", ranks, tensors > 0 ? tensors : 100}};
  } else {
    for (const int64_t r : {16, 64, 256, 1024, 4096, 10'000}) {
      cases.push_back({run_plans, "plans", r, tensors > 0 ? tensors : 1000});
    }
    for (const int64_t r : {16, 64, 256, 1024, 4096, 16'384}) {
      cases.push_back({run_one_save, "protocol", r, tensors > 0 ? tensors : 100});
      cases.push_back({run_second_save, "repeat", r, tensors > 0 ? tensors : 100});
    }
  }
  bool ok = true;
  for (const Case& one : cases) {
    if (row.empty() || row == one.row) ok &= run_alone(one, json);
  }
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace reshard

int main(int argc, char** argv) { return reshard::main(argc, argv); }
