// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Store calls with a deadline. c10d's own block for good when the process that serves the store is stopped, so they run
// on threads that can be left behind. Opening a connection may take seconds (c10d looks up the name of its other end), so
// connections are kept.

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace reshard {

/// Runs calls one after the other over a connection of its own, a clone of `store` that the first call opens.
/// Thread-safe.
class StoreThread {
 public:
  explicit StoreThread(c10::intrusive_ptr<c10d::Store> store)
      : state_(std::make_shared<State>(std::move(store))), thread_([state = state_] { state->run(); }) {}
  StoreThread(const StoreThread&) = delete;
  StoreThread& operator=(const StoreThread&) = delete;
  /// Leaves a call behind that does not come back at once; its thread ends when it does, or with the process.
  ~StoreThread() {
    {
      const std::lock_guard lock(state_->mutex);
      state_->ending = true;
      state_->calls.clear();
    }
    state_->changed.notify_all();
    becomes_idle() ? thread_.join() : thread_.detach();
  }

  /// `call(c10d::Store&)` holds what it needs by value: it may run when the caller has given up.
  template <class Call>
  std::future<std::invoke_result_t<Call, c10d::Store&>> submit(Call call) {
    using Task = std::packaged_task<std::invoke_result_t<Call, c10d::Store&>()>;
    const auto task =
        std::make_shared<Task>([call = std::move(call), state = state_.get()] { return call(state->connection()); });
    auto result = task->get_future();
    {
      const std::lock_guard lock(state_->mutex);
      state_->calls.push_back([task] { (*task)(); });
    }
    state_->changed.notify_all();
    return result;
  }

  bool is_idle() const {
    const std::lock_guard lock(state_->mutex);
    return state_->is_idle();
  }
  /// Waits a moment for it.
  bool becomes_idle() const {
    std::unique_lock lock(state_->mutex);
    return state_->changed.wait_for(lock, kMoment, [&] { return state_->is_idle(); });
  }

 private:
  static constexpr std::chrono::milliseconds kMoment{100};

  struct State {
    explicit State(c10::intrusive_ptr<c10d::Store> given) : parent(std::move(given)) {}

    bool is_idle() const { return !busy && calls.empty(); }
    void run() {
      std::unique_lock lock(mutex);
      while (true) {
        changed.wait(lock, [&] { return ending || !calls.empty(); });
        if (ending) return;
        auto call = std::move(calls.front());
        calls.pop_front();
        busy = true;
        lock.unlock();
        call();
        call = nullptr;
        lock.lock();
        busy = false;
        changed.notify_all();
      }
    }
    c10d::Store& connection() {  // on the thread only
      if (!store) store = parent->clone();
      return *store;
    }

    const c10::intrusive_ptr<c10d::Store> parent;
    c10::intrusive_ptr<c10d::Store> store;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> calls;
    bool busy = false;
    bool ending = false;
  };

  std::shared_ptr<State> state_;
  std::thread thread_;
};

/// The connections of a group that nobody uses at the moment. Thread-safe.
class StoreThreads {
 public:
  explicit StoreThreads(c10::intrusive_ptr<c10d::Store> store) : store_(std::move(store)) {}
  std::unique_ptr<StoreThread> take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return std::make_unique<StoreThread>(store_);
    auto thread = std::move(idle_.back());
    idle_.pop_back();
    return thread;
  }
  /// Only one that answers.
  void give_back(std::unique_ptr<StoreThread> thread) {
    if (!thread->becomes_idle()) return;
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(thread));
  }

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<StoreThread>> idle_;
};

}  // namespace reshard
