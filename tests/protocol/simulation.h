// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Saves and loads by simulated ranks over a ThreadHub into a MemoryStore, with a hook at every stage of every rank.

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reshard/planner/default_planner.h"
#include "reshard/protocol/protocol.h"
#include "reshard/protocol/thread_transport.h"
#include "support/memory_state.h"
#include "support/memory_storage.h"
#include "support/rank_threads.h"

namespace reshard {

/// Called on a rank's thread at each stage of its storage ("write_data"), of its planner ("create_local_plan") and at
/// each test point ("save.planned").
using RankHook = std::function<void(int rank, std::string_view stage)>;

/// The hook of the rank that this thread plays, for the process-wide test point handler.
inline const RankHook*& thread_hook() {
  thread_local const RankHook* hook = nullptr;
  return hook;
}

/// While it lives, test points reach the hook of the thread that passes them, so that simulations can run side by side.
class TestPointsToHooks {
 public:
  TestPointsToHooks() {
    set_test_point_handler([](std::string_view name) {
      if (thread_hook() != nullptr && *thread_hook()) (*thread_hook())(current_rank(), name);
    });
  }
  ~TestPointsToHooks() { set_test_point_handler({}); }
};

/// Hooks called test points run by one thread: the writer's or the reader's. Planner stages come from this wrapper.
class HookedSavePlanner final : public SavePlanner {
 public:
  HookedSavePlanner(SavePlanner& planner, StageHook hook) : planner_(planner), hook_(std::move(hook)) {}
  void set_up_planner(const SaveState& state, bool is_coordinator) override {
    hook_("set_up_planner");
    planner_.set_up_planner(state, is_coordinator);
  }
  SavePlan create_local_plan() override {
    hook_("create_local_plan");
    return planner_.create_local_plan();
  }
  GlobalSavePlan create_global_plan(std::vector<SavePlan> plans) override {
    hook_("create_global_plan");
    return planner_.create_global_plan(std::move(plans));
  }
  SavePlan finish_plan(SavePlan plan) override {
    hook_("finish_plan");
    return planner_.finish_plan(std::move(plan));
  }
  TensorView resolve_tensor(const WriteItem& item) const override {
    hook_("resolve_tensor");
    return planner_.resolve_tensor(item);
  }
  ByteSpan resolve_bytes(const WriteItem& item) const override { return planner_.resolve_bytes(item); }

 private:
  SavePlanner& planner_;
  StageHook hook_;
};

class HookedLoadPlanner final : public LoadPlanner {
 public:
  HookedLoadPlanner(LoadPlanner& planner, StageHook hook) : planner_(planner), hook_(std::move(hook)) {}
  void set_up_planner(LoadState& state, const Metadata& metadata, bool is_coordinator) override {
    hook_("set_up_planner");
    planner_.set_up_planner(state, metadata, is_coordinator);
  }
  LoadPlan create_local_plan() override {
    hook_("create_local_plan");
    return planner_.create_local_plan();
  }
  const LoadReport& report() const override { return planner_.report(); }
  MutableTensorView resolve_tensor(const ReadItem& item) override { return planner_.resolve_tensor(item); }
  void commit_tensor(const ReadItem& item, const MutableTensorView& view) override {
    hook_("commit_tensor");
    planner_.commit_tensor(item, view);
  }
  void load_bytes(const ReadItem& item, ByteSpan archive) override { planner_.load_bytes(item, archive); }

 private:
  LoadPlanner& planner_;
  StageHook hook_;
};

/// What a save or load was for one rank.
struct Outcome {
  std::optional<SaveResult> saved;
  std::optional<LoadReport> loaded;
  std::shared_ptr<const CheckpointError> error;
  std::string other_error;  // anything but a CheckpointError, which must not happen
  int abandoned = 0;

  bool ok() const { return saved.has_value() || loaded.has_value(); }
  std::set<int> failed_ranks() const {
    std::set<int> ranks;
    if (error) {
      for (const auto& [rank, failure] : error->failures()) ranks.insert(rank);
    }
    return ranks;
  }
};

class Simulation {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Simulation(int world_size, std::chrono::milliseconds silence = std::chrono::seconds(60))
      : hub(world_size, silence), world_size_(world_size) {
    for (int rank = 0; rank < world_size; ++rank) transports.push_back(hub.transport(rank));
  }

  int world_size() const { return world_size_; }

  /// One rank's save; for calls where ranks do different things.
  void save_rank(int rank, MemorySaveState& state, const RankHook& hook, Outcome& outcome) {
    const StageHook at = [&](std::string_view stage) {
      if (hook) hook(rank, stage);
    };
    DefaultSavePlanner planner;
    HookedSavePlanner hooked(planner, at);
    MemoryWriter writer(store, at);
    guard(outcome, hook,
          [&] { outcome.saved = run_save(*transports[static_cast<size_t>(rank)], state, hooked, writer); });
    outcome.abandoned = writer.abandoned();
  }
  void load_rank(int rank, MemoryLoadState& state, const RankHook& hook, Outcome& outcome,
                 DefaultLoadPlannerOptions options = {}) {
    const StageHook at = [&](std::string_view stage) {
      if (hook) hook(rank, stage);
    };
    DefaultLoadPlanner planner(options);
    HookedLoadPlanner hooked(planner, at);
    MemoryReader reader(store, at);
    guard(outcome, hook,
          [&] { outcome.loaded = run_load(*transports[static_cast<size_t>(rank)], state, hooked, reader); });
  }

  std::vector<Outcome> save(const std::function<MemorySaveState(int)>& state_of, const RankHook& hook = {}) {
    std::vector<Outcome> outcomes(transports.size());
    run_ranks(world_size_, [&](int rank) {
      MemorySaveState state = state_of(rank);
      save_rank(rank, state, hook, outcomes[static_cast<size_t>(rank)]);
    });
    return outcomes;
  }
  /// `states`: one a rank.
  std::vector<Outcome> load(std::vector<MemoryLoadState>& states, const RankHook& hook = {},
                            DefaultLoadPlannerOptions options = {}) {
    std::vector<Outcome> outcomes(transports.size());
    run_ranks(world_size_, [&](int rank) {
      const auto r = static_cast<size_t>(rank);
      load_rank(rank, states[r], hook, outcomes[r], options);
    });
    return outcomes;
  }

  ThreadHub hub;
  MemoryStore store;
  std::vector<std::unique_ptr<Transport>> transports;

 private:
  template <class Body>
  static void guard(Outcome& outcome, const RankHook& hook, Body&& body) {
    thread_hook() = &hook;
    try {
      body();
    } catch (const CheckpointError& error) {
      outcome.error = std::make_shared<const CheckpointError>(error);
    } catch (const std::exception& error) {
      outcome.other_error = error.what();
    } catch (...) {
      outcome.other_error = "not a std::exception";
    }
    thread_hook() = nullptr;
  }

  int world_size_;
};

/// {"w": 6x4 in rows, "r": replicated 5, "b": value `content`} on each rank.
inline std::vector<StateEntry> usual_entries(int rank, int world_size) {
  return {tensor_entry("w", {6, 4}, {split_evenly(whole_box({6, 4}), 0, world_size, rank)}), replica_entry("r", {5})};
}
inline MemorySaveState usual_state(int rank, int world_size, std::string_view content = "first") {
  MemorySaveState state(usual_entries(rank, world_size));
  state.add_value("b", content);
  return state;
}
inline std::vector<MemoryLoadState> usual_destinations(int world_size) {
  std::vector<MemoryLoadState> states;
  for (int rank = 0; rank < world_size; ++rank) {
    auto entries = usual_entries(rank, world_size);
    entries.push_back(bytes_entry("b", 0));
    states.emplace_back(std::move(entries));
  }
  return states;
}

/// What the store holds, loaded by one process: the value of "b", or what is wrong with it; "nothing" if nothing was
/// ever committed.
inline std::string content_of(const MemoryStore& store) {
  if (!store.committed()) return "nothing";
  MemoryLoadState state(usual_destinations(1)[0]);
  DefaultLoadPlanner planner;
  MemoryReader reader(store);
  try {
    run_load(*solo_transport(), state, planner, reader);
  } catch (const Error& error) {
    return error.what();
  }
  return state.first_difference().empty() ? state.value(2) : "wrong: " + state.first_difference();
}

/// All ranks failed, with the same error.
inline void expect_one_error(const std::vector<Outcome>& outcomes, const std::set<int>& failed_ranks,
                             std::string_view step, Committed committed) {
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    SCOPED_TRACE("on rank " + std::to_string(rank));
    const Outcome& outcome = outcomes[rank];
    EXPECT_EQ(outcome.other_error, "");
    ASSERT_NE(outcome.error, nullptr);
    EXPECT_STREQ(outcome.error->what(), outcomes[0].error->what());
    EXPECT_EQ(outcome.failed_ranks(), failed_ranks) << outcome.error->what();
    EXPECT_EQ(outcome.error->step(), step);
    EXPECT_EQ(outcome.error->committed(), committed) << outcome.error->what();
  }
}
inline void expect_all_ok(const std::vector<Outcome>& outcomes) {
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_TRUE(outcomes[rank].ok()) << "rank " << rank << ": "
                                     << (outcomes[rank].error ? outcomes[rank].error->what()
                                                              : outcomes[rank].other_error);
  }
}

}  // namespace reshard
