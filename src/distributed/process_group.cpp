// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/distributed/process_group.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <cstdlib>
#include <future>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "distributed/cuda_module.h"
#include "distributed/gloo_backend.h"
#include "distributed/store_thread.h"
#include "reshard/core/error.h"
#include "reshard/core/hooks.h"
#include "reshard/launch/environment.h"
#include "reshard/launch/gpu.h"

namespace reshard {
namespace {

constexpr std::chrono::milliseconds kStoreGrace{500};  // from the end of a wait to the store's word on it
constexpr int kAllGatherTag = 0x5a6;                   // of the messages that make up an all-gather
constexpr int kPairTag = 0x5a7;                        // of send and recv

std::string join(const std::vector<int>& values) {
  std::string text;
  for (int v : values) text += (text.empty() ? "" : ", ") + std::to_string(v);
  return text;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

/// True where a text of c10d or gloo speaks of a deadline that passed; they have no common type for it.
bool is_timeout(const std::string& text) {
  return text.find("imed out") != std::string::npos || text.find("timeout") != std::string::npos;
}

struct BackendSpec {
  c10::DeviceType device;
  std::string name;
  bool optional;  // named in a list: left out where it cannot work
};

std::vector<BackendSpec> parse_backends(const std::string& text) {
  const auto wrong = [&](const std::string& part) {
    return Error(ErrorCode::kInvalidArgument, "unknown backend",
                 {.wanted = "gloo, nccl, or a list such as cpu:gloo,cuda:nccl",
                  .found = "\"" + part + "\" in \"" + text + "\""});
  };
  if (text == "gloo") return {{c10::kCPU, "gloo", false}};
  if (text == "nccl") return {{c10::kCUDA, "nccl", false}};
  std::vector<BackendSpec> specs;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    if (part == "cpu:gloo") {
      specs.push_back({c10::kCPU, "gloo", false});
    } else if (part == "cuda:nccl" || part == "cuda:gloo") {
      specs.push_back({c10::kCUDA, part.substr(5), true});
    } else {
      throw wrong(part);
    }
  }
  if (specs.empty()) throw wrong(text);
  return specs;
}

ProcessGroup::BackendMap make_backends(const std::string& backend, const c10::intrusive_ptr<c10d::Store>& store,
                                       int rank, int size, std::chrono::milliseconds timeout) {
  ProcessGroup::BackendMap backends;
  for (const BackendSpec& spec : parse_backends(backend)) {
    if (spec.device == c10::kCUDA && spec.optional && nvidia_gpu_count() == 0) continue;
    if (spec.name == "nccl") {
      backends[spec.device] =
          make_nccl_backend(c10::make_intrusive<c10d::PrefixStore>("nccl", store), rank, size, timeout);
    } else if (backends.contains(c10::kCPU)) {
      backends[spec.device] = backends[c10::kCPU];  // cuda:gloo: the same connections
    } else {
      backends[spec.device] =
          make_gloo_backend(c10::make_intrusive<c10d::PrefixStore>("gloo", store), rank, size, timeout);
    }
    if (spec.device == c10::kCUDA) load_cuda_module();
  }
  return backends;
}

/// make_backends, with what goes wrong as errors of a group.
ProcessGroup::BackendMap meet(const std::string& group, const std::string& backend,
                              const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                              std::chrono::milliseconds timeout) {
  try {
    return make_backends(backend, store, rank, size, timeout);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string text = first_line(error.what());
    throw Error(is_timeout(text) ? ErrorCode::kTimeout : ErrorCode::kUnavailable,
                "the " + std::to_string(size) + " ranks of process group \"" + group + "\" did not meet: " + text,
                {.rank = rank});
  }
}

/// What init_process_group made, until destroy_process_group.
struct World {
  std::shared_ptr<ProcessGroup> group;
  std::string backend;
  int new_groups = 0;
};
World& world() {
  // Never destroyed: at exit gloo's threads and LibTorch's statics would race with it.
  static World* instance = new World();
  return *instance;
}

/// The rendezvous store. Served and connected once a process and kept to its end, also over destroy_process_group: a rank that
/// joins again must not meet a server that is about to go, and the listening socket can be used only once.
struct Rendezvous {
  std::string address;
  c10::intrusive_ptr<c10d::Store> store;
  int joins = 0;
};

/// A client asks the server for a sign of life while it is made, and waits for that without a limit: so on a thread that can
/// be left behind.
c10::intrusive_ptr<c10d::Store> make_store(const std::string& host, const c10d::TCPStoreOptions& options) {
  std::packaged_task<c10::intrusive_ptr<c10d::Store>()> task(
      [host, options] { return c10::make_intrusive<c10d::TCPStore>(host, options); });
  auto made = task.get_future();
  std::thread thread(std::move(task));
  if (made.wait_for(options.timeout + kStoreGrace) != std::future_status::ready) {
    thread.detach();
    throw std::runtime_error("timed out: it does not answer; the process that hosts it is stopped or stuck");
  }
  thread.join();
  return made.get();
}

c10::intrusive_ptr<c10d::Store> connect_store(const RankEnvironment& env, std::chrono::milliseconds timeout) {
  static Rendezvous& rendezvous = *new Rendezvous();  // never destroyed, as world()
  const std::string address = env.master_addr + ":" + std::to_string(env.master_port);
  c10d::TCPStoreOptions options;
  options.port = env.master_port;
  // Under torchrun the agent hosts the store already: everyone is a client.
  options.isServer = env.rank == 0 && !env.agent_store;
  options.numWorkers = std::nullopt;
  options.waitWorkers = false;
  options.timeout = timeout;
  if (options.isServer && env.master_listen_fd) options.masterListenFd = env.master_listen_fd;
  try {
    if (!rendezvous.store || rendezvous.address != address) {
      rendezvous = {address, make_store(env.master_addr, options), 0};
      if (options.masterListenFd) unsetenv(kMasterListenFdVariable);  // it is the store's now
    }
    rendezvous.store->setTimeout(timeout);
    const char* restart = std::getenv("TORCHELASTIC_RESTART_COUNT");
    // A group must not read the addresses that an earlier one left.
    return c10::make_intrusive<c10d::PrefixStore>(
        std::string("reshard/") + (restart ? restart : "0") + "/" + std::to_string(rendezvous.joins++),
        rendezvous.store);
  } catch (const std::exception& error) {
    const std::string text = first_line(error.what());
    throw Error(is_timeout(text) ? ErrorCode::kTimeout : ErrorCode::kUnavailable,
                std::string(options.isServer ? "cannot serve" : "cannot reach") +
                    " the store of the rendezvous (MASTER_ADDR " + env.master_addr + ", MASTER_PORT " +
                    std::to_string(env.master_port) + "): " + text,
                {.rank = env.rank});
  }
}

}  // namespace

ProcessGroup::ProcessGroup(std::string name, int rank, std::vector<int> ranks, c10::intrusive_ptr<c10d::Store> store,
                           BackendMap backends, std::chrono::milliseconds timeout)
    : name_(std::move(name)),
      rank_(rank),
      ranks_(std::move(ranks)),
      store_(std::move(store)),
      store_threads_(std::make_shared<StoreThreads>(store_)),
      backends_(std::move(backends)),
      timeout_(timeout) {}

int ProcessGroup::rank() const {
  if (rank_ < 0) {
    throw Error(ErrorCode::kInvalidArgument, "this process is not a member of process group \"" + name_ + "\"",
                {.wanted = "one of the global ranks " + join(ranks_),
                 .found = world().group ? "global rank " + std::to_string(world().group->rank_) : "no default group"});
  }
  return rank_;
}

c10d::Backend& ProcessGroup::backend(c10::DeviceType device) const {
  rank();
  const auto it = backends_.find(device);
  if (it == backends_.end()) {
    throw Error(ErrorCode::kUnsupported, "process group \"" + name_ + "\" has no backend for " +
                                             c10::DeviceTypeName(device, true) +
                                             " tensors (no GPU, no NCCL, or not asked for)");
  }
  return *it->second;
}

PendingCollective ProcessGroup::begin(const char* what, at::Tensor& output, at::Tensor& input, const Launch& launch,
                                      std::chrono::milliseconds timeout) {
  c10d::Backend& used = backend(input.device().type());
  ++traffic_.collectives;
  traffic_.bytes += input.nbytes();
  const auto with_name = [this, name = std::string(what)](const auto& body) {
    try {
      body();
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      const std::string text = first_line(error.what());
      throw Error(is_timeout(text) ? ErrorCode::kTimeout : ErrorCode::kUnavailable,
                  name + " on process group \"" + name_ + "\" (global ranks " + join(ranks_) + ") failed: " + text,
                  {.rank = rank_});
    }
  };
  Works works;
  with_name([&] {
    // Gloo works on host memory; several ranks that share a GPU talk through it.
    if (!input.is_cpu() && used.getBackendName() == "gloo") {
      const bool in_place = output.is_same(input);
      at::Tensor host_input = input.cpu();
      at::Tensor host_output = in_place ? host_input : at::empty_like(output, output.options().device(c10::kCPU));
      for (const auto& work : launch(used, host_output, host_input)) work->wait(timeout);
      output.copy_(host_output);
    } else {
      works = launch(used, output, input);
    }
  });
  return PendingCollective([works = std::move(works), with_name, timeout, output, input] {
    with_name([&] {
      for (const auto& work : works) work->wait(timeout);  // none given: the group's
    });
  });
}

void ProcessGroup::run(const char* what, at::Tensor& output, at::Tensor& input, const Launch& launch,
                       std::chrono::milliseconds timeout) {
  begin(what, output, input, launch, timeout).wait();
}

PendingCollective ProcessGroup::begin_all_gather_into(at::Tensor& output, at::Tensor& input) {
  TORCH_CHECK(output.numel() == input.numel() * size(), "all_gather_into: output holds ", output.numel(),
              " elements, wanted ", input.numel() * size());
  const Launch launch = [this](c10d::Backend& b, at::Tensor& out, at::Tensor& in) -> Works {
    if (size() == 1 || in.numel() == 0 || b.getBackendName() != "gloo") return {b.all_gather_single(out, in)};
    // Gloo's own all-gather collects into a second buffer as large as the output. Messages land in place.
    Works messages;
    for (int peer = 0; peer < size(); ++peer) {
      at::Tensor part = out.narrow(0, peer * in.numel(), in.numel());
      std::vector<at::Tensor> tensors{part};
      if (peer != rank_) {
        messages.push_back(b.recv(tensors, peer, kAllGatherTag));
      } else {
        part.copy_(in);
      }
    }
    for (int step = 1; step < size(); ++step) {
      std::vector<at::Tensor> tensors{in};
      messages.push_back(b.send(tensors, (rank_ + step) % size(), kAllGatherTag));
    }
    return messages;
  };
  return begin("all_gather", output, input, launch, std::chrono::milliseconds(0));
}

void ProcessGroup::all_gather_into(at::Tensor& output, at::Tensor& input) {
  begin_all_gather_into(output, input).wait();
}

void ProcessGroup::reduce_scatter_into(at::Tensor& output, at::Tensor& input, bool average) {
  TORCH_CHECK(input.numel() == output.numel() * size(), "reduce_scatter_into: input holds ", input.numel(),
              " elements, wanted ", output.numel() * size());
  c10d::ReduceScatterOptions options;
  options.reduceOp = average ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM;
  run("reduce_scatter", output, input, [&](c10d::Backend& b, at::Tensor& out, at::Tensor& in) {
    return Works{b.reduce_scatter_single(out, in, options)};
  });
}

void ProcessGroup::all_reduce_sum(at::Tensor& tensor) {
  run("all_reduce", tensor, tensor, [](c10d::Backend& b, at::Tensor& out, at::Tensor&) {
    std::vector<at::Tensor> tensors{out};
    return Works{b.allreduce(tensors)};
  });
}

void ProcessGroup::all_reduce_max(at::Tensor& tensor) {
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MAX;
  run("all_reduce", tensor, tensor, [&](c10d::Backend& b, at::Tensor& out, at::Tensor&) {
    std::vector<at::Tensor> tensors{out};
    return Works{b.allreduce(tensors, options)};
  });
}

void ProcessGroup::broadcast(at::Tensor& tensor, int root) {
  TORCH_CHECK(root >= 0 && root < size(), "broadcast: root ", root, " is not a rank of a group of ", size());
  c10d::BroadcastOptions options;
  options.rootRank = root;
  run("broadcast", tensor, tensor, [&](c10d::Backend& b, at::Tensor& out, at::Tensor&) {
    std::vector<at::Tensor> tensors{out};
    return Works{b.broadcast(tensors, options)};
  });
}

void ProcessGroup::send(at::Tensor& tensor, int to, std::chrono::milliseconds timeout) {
  const std::string what = "send to rank " + std::to_string(to);
  run(
      what.c_str(), tensor, tensor,
      [&](c10d::Backend& b, at::Tensor&, at::Tensor& in) {
        std::vector<at::Tensor> tensors{in};
        return Works{b.send(tensors, to, kPairTag)};
      },
      timeout);
}

void ProcessGroup::recv(at::Tensor& tensor, int from, std::chrono::milliseconds timeout) {
  const std::string what = "receive from rank " + std::to_string(from);
  run(
      what.c_str(), tensor, tensor,
      [&](c10d::Backend& b, at::Tensor& out, at::Tensor&) {
        std::vector<at::Tensor> tensors{out};
        return Works{b.recv(tensors, from, kPairTag)};
      },
      timeout);
}

void ProcessGroup::barrier() {
  rank();
  if (size() == 1) return;
  const auto fail = [this](ErrorCode code, const std::string& why) {
    throw Error(code, "barrier on process group \"" + name_ + "\" (global ranks " + join(ranks_) + ") failed: " + why,
                {.rank = rank_});
  };
  auto thread = store_threads_->take();
  auto met = thread->submit(
      [key = "barrier/" + std::to_string(barriers_++), n = size(), limit = timeout_](c10d::Store& store) {
        if (store.add(key, 1) == n) store.set(key + "/done", std::vector<uint8_t>{1});
        store.wait({key + "/done"}, limit);
      });
  if (met.wait_for(timeout_ + kStoreGrace) != std::future_status::ready) {
    fail(ErrorCode::kTimeout, "the store does not answer; the process that hosts it is stopped or stuck");
  }
  try {
    met.get();
    store_threads_->give_back(std::move(thread));
  } catch (const std::exception& error) {
    const std::string text = first_line(error.what());
    fail(is_timeout(text) ? ErrorCode::kTimeout : ErrorCode::kUnavailable, text);
  }
}

std::shared_ptr<ProcessGroup> init_process_group(const ProcessGroupOptions& options) {
  if (world().group) throw Error(ErrorCode::kFailedPrecondition, "the default process group exists already");
  parse_backends(options.backend);  // a wrong name fails before anyone waits
  const std::optional<RankEnvironment> env = read_rank_environment();
  c10::intrusive_ptr<c10d::Store> store;
  int rank = 0;
  int size = 1;
  if (env) {
    rank = env->rank;
    size = env->world_size;
    store = connect_store(*env, options.timeout);
  } else {
    store = c10::make_intrusive<c10d::HashStore>();
    store->setTimeout(options.timeout);
  }
  std::vector<int> ranks(static_cast<size_t>(size));
  for (int i = 0; i < size; ++i) ranks[static_cast<size_t>(i)] = i;
  ProcessGroup::BackendMap backends = meet("default", options.backend, store, rank, size, options.timeout);
  world().group = std::make_shared<ProcessGroup>("default", rank, std::move(ranks),
                                                 c10::make_intrusive<c10d::PrefixStore>("default", store),
                                                 std::move(backends), options.timeout);
  world().backend = options.backend;
  world().new_groups = 0;
  return world().group;
}

std::shared_ptr<ProcessGroup> default_process_group() {
  if (!world().group) throw Error(ErrorCode::kFailedPrecondition, "no process group: call init_process_group first");
  return world().group;
}

std::shared_ptr<ProcessGroup> try_default_process_group() { return world().group; }

std::shared_ptr<ProcessGroup> new_group(const std::vector<int>& ranks) {
  const auto parent = default_process_group();
  std::vector<int> sorted = ranks;
  std::sort(sorted.begin(), sorted.end());
  if (sorted.empty() || sorted.front() < 0 || sorted.back() >= parent->size() ||
      std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    throw Error(ErrorCode::kInvalidArgument, "new_group needs distinct ranks of the default group",
                {.wanted = "some of 0.." + std::to_string(parent->size() - 1), .found = "[" + join(ranks) + "]"});
  }
  const std::string name = "group" + std::to_string(world().new_groups++);
  auto store = c10::make_intrusive<c10d::PrefixStore>(name, parent->store());
  const auto self = std::find(ranks.begin(), ranks.end(), parent->rank());
  const int rank = self == ranks.end() ? -1 : static_cast<int>(self - ranks.begin());
  ProcessGroup::BackendMap backends;
  if (rank >= 0) backends = meet(name, world().backend, store, rank, static_cast<int>(ranks.size()), parent->timeout());
  return std::make_shared<ProcessGroup>(name, rank, ranks, store, std::move(backends), parent->timeout());
}

void destroy_process_group() { world() = World{}; }

c10::Device rank_device(bool want_cuda) {
  if (!want_cuda) return c10::Device(c10::kCPU);
  const int gpus = nvidia_gpu_count();
  if (gpus == 0) throw Error(ErrorCode::kUnavailable, "no usable GPU on this machine");
  load_cuda_module();
  const auto env = read_rank_environment();
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>((env ? env->local_rank : 0) % gpus));
}

}  // namespace reshard
