// SPDX-License-Identifier: BSD-3-Clause
// One rank of the measurements of benchmarks/run: makes a state dict, then carries out the commands that come one a
// line, as JSON, from the FIFO `<pipes>/in.<rank>`, and answers each in `<pipes>/out.<rank>`.
//
//   reshard launch -n 2 -- bench_worker --pipes DIR --count 8 --rows 32768 --cols 1024 --dim 0
//
// All ranks get the same commands. Element k of tensor t is k + t as float32, so that a load can be checked, also of
// what PyTorch saved (benchmarks/peer.py makes the same tensors).
#include <fcntl.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <torch/csrc/api/include/torch/nn/modules/linear.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/remainder.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "reshard/checkpoint/async_save.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/format/crc32.h"
#include "reshard/fsdp/fully_sharded_data_parallel.h"
#include "reshard/storage/hugging_face.h"

namespace {

std::atomic<uint64_t> allocations = 0;

}  // namespace

// Counts what the library asks for; the memory of tensors is not allocated this way.
void* operator new(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using Json = nlohmann::json;

struct Layout {
  int64_t count = 8;
  int64_t rows = 0;
  int64_t cols = 0;
  int dim = 0;
};

[[noreturn]] void fail_os(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The number behind `name` in a file of /proc, 0 if there is none.
uint64_t proc_value(const char* file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(name, 0) == 0) return std::strtoull(line.c_str() + name.size(), nullptr, 10);
  }
  return 0;
}

/// What the process did and took, between two moments.
class Meter {
 public:
  Meter() {
    // The high-water mark of memory starts again.
    if (std::ofstream reset("/proc/self/clear_refs"); reset) reset << 5;
    memory_ = proc_value("/proc/self/status", "VmRSS:") - files();
    for (size_t i = 0; i < kNames.size(); ++i) before_[i] = proc_value("/proc/self/io", kNames[i].second);
    allocations_ = allocations;
    begin_ = now();
  }
  Json stop() const {
    const double seconds = now() - begin_;
    Json result{{"seconds", seconds}, {"allocations", allocations - allocations_}};
    const uint64_t peak = proc_value("/proc/self/status", "VmHWM:") - files();
    result["peak_bytes"] = 1024 * (peak - std::min(peak, memory_));
    for (size_t i = 0; i < kNames.size(); ++i) {
      result[kNames[i].first] = proc_value("/proc/self/io", kNames[i].second) - before_[i];
    }
    return result;
  }

 private:
  /// KiB of mapped files, the code of libraries above all: what is run for the first time is not memory that the work took.
  static uint64_t files() { return proc_value("/proc/self/status", "RssFile:"); }

  static constexpr std::array<std::pair<const char*, const char*>, 4> kNames = {
      {{"bytes_read", "rchar:"}, {"bytes_written", "wchar:"}, {"reads", "syscr:"}, {"writes", "syscw:"}}};
  std::array<uint64_t, 4> before_{};
  uint64_t allocations_ = 0;
  uint64_t memory_ = 0;
  double begin_ = 0;
};

/// `layers` times x + relu(linear(x)).
class NetImpl : public torch::nn::Module {
 public:
  NetImpl(int64_t layers, int64_t width) {
    for (int64_t i = 0; i < layers; ++i) {
      linears_.push_back(register_module("layer" + std::to_string(i), torch::nn::Linear(width, width)));
    }
    // Values that PyTorch makes too.
    const at::NoGradGuard no_grad;
    for (const at::Tensor& parameter : parameters()) {
      const at::Tensor k = at::arange(parameter.numel(), at::kLong);
      parameter.copy_((at::remainder(k * 7919, 2001) - 1000)
                          .to(at::kDouble)
                          .div_(1000 * std::sqrt(double(width)))
                          .view(parameter.sizes()));
    }
  }
  at::Tensor forward(at::Tensor x) {
    for (torch::nn::Linear& linear : linears_) x = x + linear(x).relu();
    return x;
  }

 private:
  std::vector<torch::nn::Linear> linears_;
};
TORCH_MODULE(Net);

class Worker {
 public:
  Worker(std::shared_ptr<reshard::ProcessGroup> group, const Layout& layout)
      : group_(std::move(group)), layout_(layout) {
    reshard::StateDict model;
    const std::vector<int64_t> whole{layout.rows, layout.cols};
    const auto dim = static_cast<size_t>(layout.dim);
    const int64_t part = whole[dim] / group_->size();
    reshard::Box box{{0, 0}, {layout.rows, layout.cols}};
    box.sizes[dim] = part;
    box.offsets[dim] = part * group_->rank();
    for (int64_t t = 0; t < layout.count; ++t) {
      const at::Tensor tensor = at::empty({box.sizes[0], box.sizes[1]});
      tensors_.push_back(tensor);
      model["layer" + std::to_string(t) + ".weight"] =
          reshard::ShardedTensor({layout.rows, layout.cols}, at::kFloat, {{box, tensor}});
    }
    box_ = box;
    state_ = std::move(model);
    for_each_element([](float& value, float wanted) { value = wanted; });
  }

  Json carry_out(const Json& command) {
    const std::string what = command.at("do");
    if (what == "save" || what == "load") return transfer(command);
    if (what == "clear") {
      for (at::Tensor& tensor : tensors_) tensor.zero_();
      return Json::object();
    }
    if (what == "check") {
      uint64_t wrong = 0;
      for_each_element([&](float& value, float wanted) { wrong += value != wanted; });
      return {{"wrong", wrong}};
    }
    if (what == "async_save") return save_in_background(command);
    if (what == "train") return train(command);
    if (what == "probe") return {{"seconds", probe(command.at("probe"), command.at("dir"))}};
    throw std::invalid_argument("unknown command " + what);
  }

 private:
  template <class Body>
  void for_each_element(const Body& body) {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      auto* values = tensors_[t].mutable_data_ptr<float>();
      for (int64_t r = 0; r < box_.sizes[0]; ++r) {
        int64_t k = (box_.offsets[0] + r) * layout_.cols + box_.offsets[1] + static_cast<int64_t>(t);
        for (int64_t c = 0; c < box_.sizes[1]; ++c) body(*values++, static_cast<float>(k++));
      }
    }
  }

  Json transfer(const Json& command) {
    const std::string directory = command.at("dir");
    group_->barrier();
    const auto collectives = group_->traffic().collectives;
    Json result;
    if (command.value("format", "dcp") == "safetensors") {
      const Meter meter;
      if (command.at("do") == "save") {
        reshard::save(state_, reshard::HuggingFaceStorageWriter(directory));
      } else {
        reshard::load(state_,
                      reshard::HuggingFaceStorageReader(directory, {.thread_count = command.value("threads", 1)}));
      }
      result = meter.stop();
    } else if (command.at("do") == "save") {
      const reshard::FileSystemWriterOptions options{.thread_count = command.value("threads", 1),
                                                     .sync_files = command.value("sync", true),
                                                     .storage_alignment = command.value("alignment", 64u)};
      const Meter meter;
      reshard::save(state_, reshard::FileSystemWriter(directory, options));
      result = meter.stop();
    } else {
      reshard::FileSystemReader reader(
          directory, {.verify_checksums = command.value("verify", true), .thread_count = command.value("threads", 1)});
      const Meter meter;
      reshard::load(state_, reader);
      result = meter.stop();
      result["bytes_needed"] = reader.counters().bytes_needed;
      result["data_bytes_read"] = reader.counters().bytes_read;
    }
    result["collectives"] = group_->traffic().collectives - collectives;
    return result;
  }

  /// How long the caller is blocked, and how long the rest takes.
  Json save_in_background(const Json& command) {
    const std::string directory = command.at("dir");
    group_->barrier();
    const reshard::StagingCounters before = stager_->counters();
    const Meter meter;
    const auto saved = reshard::async_save(state_, reshard::FileSystemWriter(directory), {.stager = stager_});
    Json result = meter.stop();
    const double begin = now();
    saved.upload_completion.get();
    result["background"] = now() - begin;
    result["staged_bytes_allocated"] = stager_->counters().bytes_allocated - before.bytes_allocated;
    return result;
  }

  /// Steps of sharded training, timed after one that is not, and a sharded state dict.
  Json train(const Json& command) {
    const int64_t width = command.at("width");
    group_->barrier();
    ::malloc_trim(0);  // what earlier trainings left behind would hide what this one takes
    const Meter whole;
    reshard::FullyShardedDataParallel<Net> model(
        Net(command.at("layers").get<int64_t>(), width),
        {.process_group = group_, .wrap_policy = reshard::wrap_by_type<torch::nn::LinearImpl>()});
    torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(1e-3));
    const at::Tensor input =
        at::arange(command.at("batch").get<int64_t>() * width, at::kFloat).remainder_(17).view({-1, width}) / 17;
    double loss = 0;
    const auto step = [&] {
      optimizer.zero_grad();
      const at::Tensor result = model(input).square().mean();
      result.backward();
      optimizer.step();
      loss = result.item<double>();
    };
    step();
    group_->barrier();
    const double begin = now();
    for (int i = command.at("steps"); i > 0; --i) step();
    const double seconds = now() - begin;
    Json result = whole.stop();
    result["seconds"] = seconds;
    result["loss"] = loss;
    const uint64_t sent = group_->traffic().bytes;
    const double before = now();
    const reshard::StateDict state = model.state_dict(reshard::StateDictType::kSharded);
    result["state_dict_seconds"] = now() - before;
    result["state_dict_bytes_sent"] = group_->traffic().bytes - sent;
    group_->barrier();
    return result;
  }

  // --- what the machine can do with the bytes of the state

  static void write_all(int fd, const at::Tensor& tensor, int64_t offset) {
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    const auto size = static_cast<int64_t>(tensor.nbytes());
    for (int64_t at = 0; at < size;) {
      const ssize_t n =
          ::pwrite(fd, data + at, static_cast<size_t>(std::min<int64_t>(size - at, 4 << 20)), offset + at);
      if (n <= 0) fail_os("pwrite");
      at += n;
    }
  }
  static void read_all(int fd, const at::Tensor& tensor, int64_t offset) {
    auto* data = static_cast<char*>(tensor.mutable_data_ptr());
    const auto size = static_cast<int64_t>(tensor.nbytes());
    for (int64_t at = 0; at < size;) {
      const ssize_t n = ::pread(fd, data + at, static_cast<size_t>(std::min<int64_t>(size - at, 8 << 20)), offset + at);
      if (n <= 0) fail_os("pread");
      at += n;
    }
  }

  /// `threads` files, each with its share of the tensors.
  template <class Body>
  void over_files(const std::string& directory, size_t threads, int flags, const Body& body) {
    std::vector<std::jthread> pool;
    for (size_t f = 0; f < threads; ++f) {
      pool.emplace_back([&, f] {
        const std::string path = directory + "/probe." + std::to_string(group_->rank()) + "." + std::to_string(f);
        const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
        if (fd < 0) fail_os(path);
        int64_t offset = 0;
        for (size_t t = f; t < tensors_.size(); t += threads) {
          body(fd, tensors_[t], offset);
          offset += static_cast<int64_t>(tensors_[t].nbytes());
        }
        ::close(fd);
      });
    }
  }

  double probe(const std::string& name, const std::string& directory) {
    if (name.rfind("write", 0) == 0) {
      for (const auto& entry : std::filesystem::directory_iterator(directory)) std::filesystem::remove(entry.path());
    }
    group_->barrier();
    const double begin = now();
    if (name == "memcpy" || name == "memcpy fresh") {
      const bool fresh_pages = name == "memcpy fresh";
      if (!fresh_pages && copies_.empty()) {  // as large as the state: less would stay in the cache
        for (const at::Tensor& from : tensors_) copies_.push_back(from.clone());
        return probe(name, directory);
      }
      for (size_t t = 0; t < tensors_.size(); ++t) {
        const at::Tensor& from = tensors_[t];
        if (!fresh_pages) {
          std::memcpy(copies_[t].mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
          continue;
        }
        void* fresh = ::mmap(nullptr, from.nbytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fresh == MAP_FAILED) fail_os("mmap");
        std::memcpy(fresh, from.const_data_ptr(), from.nbytes());
        ::munmap(fresh, from.nbytes());
      }
    } else if (name == "crc") {
      uint32_t sum = 0;
      for (const at::Tensor& t : tensors_) {
        sum = reshard::crc32({static_cast<const std::byte*>(t.const_data_ptr()), t.nbytes()}, sum);
      }
      if (sum == 1) std::fputc('\n', stderr);  // so that it is computed
    } else if (name == "write" || name == "write 2") {
      over_files(directory, name == "write" ? 1 : 2, O_WRONLY | O_CREAT | O_EXCL, write_all);
    } else if (name == "overwrite") {
      over_files(directory, 1, O_WRONLY | O_CREAT, write_all);
    } else if (name == "read" || name == "read 2") {
      over_files(directory, name == "read" ? 1 : 2, O_RDONLY, read_all);
    } else if (name == "write sync") {
      over_files(directory, 1, O_WRONLY | O_CREAT | O_EXCL, [&](int fd, const at::Tensor& tensor, int64_t offset) {
        write_all(fd, tensor, offset);
        ::sync_file_range(fd, offset, static_cast<int64_t>(tensor.nbytes()), SYNC_FILE_RANGE_WRITE);
        if (&tensor == &tensors_.back() && ::fdatasync(fd) != 0) fail_os("fdatasync");
      });
    } else if (name == "write direct") {
      over_files(
          directory, 1, O_WRONLY | O_CREAT | O_EXCL | O_DIRECT, [](int fd, const at::Tensor& tensor, int64_t offset) {
            constexpr size_t kPiece = 8 << 20;
            thread_local auto* buffer = static_cast<char*>(std::aligned_alloc(4096, kPiece));
            for (size_t at = 0; at < tensor.nbytes(); at += kPiece) {
              const size_t n = std::min(kPiece, tensor.nbytes() - at);
              std::memcpy(buffer, static_cast<const char*>(tensor.const_data_ptr()) + at, n);
              const size_t whole = (n + 4095) / 4096 * 4096;
              if (::pwrite(fd, buffer, whole, offset + static_cast<int64_t>(at)) != static_cast<ssize_t>(whole)) {
                fail_os("pwrite (direct)");
              }
            }
            if (::fdatasync(fd) != 0) fail_os("fdatasync");
          });
    } else {
      throw std::invalid_argument("unknown probe " + name);
    }
    return now() - begin;
  }

  std::shared_ptr<reshard::ProcessGroup> group_;
  Layout layout_;
  reshard::Box box_;
  std::vector<at::Tensor> tensors_;
  reshard::StateDict state_;
  std::vector<at::Tensor> copies_;
  std::shared_ptr<reshard::DefaultStager> stager_ = std::make_shared<reshard::DefaultStager>();
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("One rank of the measurements of benchmarks/run.");
  Layout layout;
  std::string pipes;
  app.add_option("--pipes", pipes, "directory of the FIFOs in.<rank> and out.<rank>")->required();
  app.add_option("--count", layout.count, "tensors");
  app.add_option("--rows", layout.rows)->required();
  app.add_option("--cols", layout.cols)->required();
  app.add_option("--dim", layout.dim, "the dimension that is sharded");
  CLI11_PARSE(app, argc, argv);
  try {
    const auto group = reshard::init_process_group();
    const std::string rank = std::to_string(group->rank());
    std::ifstream in(pipes + "/in." + rank);
    std::ofstream out(pipes + "/out." + rank);
    Worker worker(group, layout);
    out << Json{{"ready", true}} << std::endl;
    for (std::string line; std::getline(in, line);) out << worker.carry_out(Json::parse(line)) << std::endl;
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "bench_worker: " << error.what() << "\n";
    return 1;
  }
}
