// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Process groups: the meeting of N ranks, set up from torchrun's environment variables. CPU tensors travel over gloo,
// CUDA tensors over NCCL, as with PyTorch's "cpu:gloo,cuda:nccl". Control data (plans, votes, errors) never touches a
// device: see distributed/store_transport.h.

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace reshard {

class StoreThreads;

/// What went over a group since it was made. Exact on every machine, so that tests can gate on it.
struct TrafficCounters {
  uint64_t collectives = 0;
  uint64_t bytes = 0;  // bytes of this rank's inputs to collectives
};

/// A collective on its way. Its tensors must not be touched until wait() is done.
class PendingCollective {
 public:
  PendingCollective() = default;
  /// Of the groups' own use: `finish` blocks until the result is there.
  explicit PendingCollective(std::function<void()> finish) : finish_(std::move(finish)) {}
  PendingCollective(PendingCollective&&) = default;
  PendingCollective& operator=(PendingCollective&&) = default;
  bool is_pending() const { return finish_ != nullptr; }
  /// Blocks, and throws, as the collective itself does. Does nothing where nothing is pending.
  void wait() {
    if (finish_) std::exchange(finish_, nullptr)();
  }

 private:
  std::function<void()> finish_;
};

/// A group of ranks. Every member calls the same collectives in the same order; none of them is thread-safe. All
/// collectives block until the result is there (on CUDA: until it is ordered on the current stream), and throw kTimeout
/// or kUnavailable, naming the group and the collective, when a peer is silent past timeout() or gone. Held by
/// shared_ptr; destroyed last user last.
class ProcessGroup {
 public:
  using BackendMap = std::map<c10::DeviceType, c10::intrusive_ptr<c10d::Backend>>;

  /// Use init_process_group or new_group. `rank` is -1 on a rank that is not a member.
  ProcessGroup(std::string name, int rank, std::vector<int> ranks, c10::intrusive_ptr<c10d::Store> store,
               BackendMap backends, std::chrono::milliseconds timeout);

  const std::string& name() const { return name_; }
  /// Rank of this process in the group. Throws kInvalidArgument, naming the group's ranks, where this process is not a
  /// member.
  int rank() const;
  int size() const { return static_cast<int>(ranks_.size()); }
  bool is_member() const { return rank_ >= 0; }
  /// Global ranks of the members, in group order.
  const std::vector<int>& ranks() const { return ranks_; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  /// The group's own key-value store (keys of other groups cannot collide).
  const c10::intrusive_ptr<c10d::Store>& store() const { return store_; }
  /// Connections to it for calls with a deadline; of this library's own use.
  const std::shared_ptr<StoreThreads>& store_threads() const { return store_threads_; }
  /// The backend for tensors on `device`. Throws kUnsupported if the group has none.
  c10d::Backend& backend(c10::DeviceType device) const;
  bool has_backend(c10::DeviceType device) const { return backends_.contains(device); }

  /// output (1-D, size() * n elements) = inputs (n elements) of rank 0, 1, ... one after the other. Both dense, on one
  /// device.
  void all_gather_into(at::Tensor& output, at::Tensor& input);
  /// The same, begun: other collectives may come before its wait(). (Over gloo, tensors of a device are waited for here.)
  PendingCollective begin_all_gather_into(at::Tensor& output, at::Tensor& input);
  /// output (n elements) = this rank's part of the elementwise sum over ranks of input (size() * n elements); divided
  /// by size() if `average`.
  void reduce_scatter_into(at::Tensor& output, at::Tensor& input, bool average);
  void all_reduce_sum(at::Tensor& tensor);
  void all_reduce_max(at::Tensor& tensor);
  /// `root` is a rank of the group.
  void broadcast(at::Tensor& tensor, int root);
  /// To and from one other rank of the group, which calls the other of the two; pairs of calls match in order. Block until the tensor may
  /// be changed (send) or has its elements (recv). Dense tensors of equal sizes and dtypes. `timeout` replaces the group's.
  void send(at::Tensor& tensor, int to, std::chrono::milliseconds timeout);
  void recv(at::Tensor& tensor, int from, std::chrono::milliseconds timeout);
  /// Waits for every member; travels over the store, so it needs no device.
  void barrier();

  const TrafficCounters& traffic() const { return traffic_; }
  /// Number of the next save or load on this group: equal on every member, because they come in the same order.
  uint64_t next_operation() { return operations_++; }

 private:
  using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;
  using Launch = std::function<Works(c10d::Backend&, at::Tensor& output, at::Tensor& input)>;
  PendingCollective begin(const char* what, at::Tensor& output, at::Tensor& input, const Launch& launch,
                          std::chrono::milliseconds timeout);
  void run(const char* what, at::Tensor& output, at::Tensor& input, const Launch& launch,
           std::chrono::milliseconds timeout = std::chrono::milliseconds(0));

  std::string name_;
  int rank_;
  std::vector<int> ranks_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::shared_ptr<StoreThreads> store_threads_;
  BackendMap backends_;
  std::chrono::milliseconds timeout_;
  TrafficCounters traffic_;
  uint64_t barriers_ = 0;
  uint64_t operations_ = 0;
};

struct ProcessGroupOptions {
  /// "gloo", "nccl", or a list "cpu:gloo,cuda:nccl". In a list, "cuda:nccl" is left out where there is no GPU or no
  /// NCCL; asked for alone it is an error there. "cuda:gloo" lets several ranks share one GPU.
  std::string backend = "cpu:gloo,cuda:nccl";
  /// Deadline of every collective and of the rendezvous.
  std::chrono::milliseconds timeout = std::chrono::minutes(5);
};

/// Joins the default group. Reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (and LOCAL_RANK,
/// TORCHELASTIC_USE_AGENT_STORE, RESHARD_MASTER_LISTEN_FD, see launch/environment.h); a missing or wrong one is
/// kInvalidArgument naming it and its value. With none of them set it makes a group of one rank, so that a program runs
/// alone. Collective over all ranks; call once a process, from one thread.
std::shared_ptr<ProcessGroup> init_process_group(const ProcessGroupOptions& options = {});

/// The default group; throws kFailedPrecondition before init_process_group.
std::shared_ptr<ProcessGroup> default_process_group();

/// The default group, or null before init_process_group.
std::shared_ptr<ProcessGroup> try_default_process_group();

/// Makes a group of the given global ranks. Collective over the default group: every rank calls it with the same list,
/// in the same order of calls, also ranks that are not in the list (they get a handle whose is_member() is false).
/// Duplicate, negative or too large ranks are kInvalidArgument.
std::shared_ptr<ProcessGroup> new_group(const std::vector<int>& ranks);

/// Leaves all groups; after it init_process_group may be called again. Called without it at exit, the process just
/// ends. No communication.
void destroy_process_group();

/// Device of this rank: cuda:(LOCAL_RANK % GPUs) if `want_cuda`, cpu otherwise. Throws kUnavailable when there is no
/// usable GPU.
c10::Device rank_device(bool want_cuda);

}  // namespace reshard
