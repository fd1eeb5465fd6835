// SPDX-License-Identifier: BSD-3-Clause
#include "device/mapped_device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

namespace reshard::device_test {
namespace {

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "mapped device: %s\n", what.c_str());
  std::abort();
}

/// Device memory: `device` is what tensors see, `host` the same pages where they may be touched.
struct Block {
  std::byte* device;
  std::byte* host;
  size_t size;
  c10::DeviceIndex index;
};

struct Task {
  std::function<void()> run;
  std::vector<const void*> uses;  // device addresses
};

struct Queue {
  std::deque<Task> tasks;
  uint64_t done = 0;  // tasks that ran since the process began
  uint64_t issued() const { return done + tasks.size(); }
};

struct RecordedEvent {
  c10::Stream stream{c10::Stream::DEFAULT, c10::Device(kMapped, 0)};
  uint64_t at = 0;  // tasks of the stream that come before it
};

thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[kMappedDevices] = {};

class MappedDevice {
 public:
  static MappedDevice& get() {
    static auto* device = new MappedDevice;  // tensors outlive statics
    return *device;
  }

  void* allocate(size_t size, c10::DeviceIndex index) {
    std::lock_guard lock(mutex_);
    const int file = ::memfd_create("mapped", MFD_CLOEXEC);
    if (file < 0 || ::ftruncate(file, static_cast<off_t>(size)) != 0) die("no memory");
    void* device = ::mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
    void* host = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ::close(file);
    if (device == MAP_FAILED || host == MAP_FAILED) die("no memory");
    std::memset(host, 0xFF, size);
    blocks_[device] = {static_cast<std::byte*>(device), static_cast<std::byte*>(host), size, index};
    counters_.live_bytes += size;
    counters_.peak_bytes = std::max(counters_.peak_bytes, counters_.live_bytes);
    return device;
  }

  void free(void* device) {
    std::lock_guard lock(mutex_);
    const Block block = block_of(device);
    for (auto& [stream, queue] : queues_) {
      for (const Task& task : queue.tasks) {
        for (const void* used : task.uses) {
          if (used < block.device || used >= block.device + block.size) continue;
          if (stream != std::pair(block.index, current_streams[block.index]))
            die("memory was freed while stream " + std::to_string(stream.second) + " still had work on it");
          drain(queue, queue.issued());
          return free(device);
        }
      }
    }
    ::munmap(block.device, block.size);
    ::munmap(block.host, block.size);
    counters_.live_bytes -= block.size;
    blocks_.erase(device);
  }

  std::byte* host_address(const void* device) {
    std::lock_guard lock(mutex_);
    const Block block = block_of(device);
    return block.host + (static_cast<const std::byte*>(device) - block.device);
  }

  void enqueue(const c10::Stream& stream, Task task) {
    std::lock_guard lock(mutex_);
    queue(stream).tasks.push_back(std::move(task));
  }
  void synchronize(const c10::Stream& stream) {
    std::lock_guard lock(mutex_);
    drain(queue(stream), queue(stream).issued());
  }
  void synchronize_device(c10::DeviceIndex index) {
    std::lock_guard lock(mutex_);
    for (auto& [stream, queue] : queues_)
      if (stream.first == index) drain(queue, queue.issued());
  }
  bool is_idle(const c10::Stream& stream) {
    std::lock_guard lock(mutex_);
    return queue(stream).tasks.empty();
  }
  RecordedEvent record(const c10::Stream& stream) {
    std::lock_guard lock(mutex_);
    return {stream, queue(stream).issued()};
  }
  void synchronize(const RecordedEvent& event) {
    std::lock_guard lock(mutex_);
    drain(queue(event.stream), event.at);
  }
  bool happened(const RecordedEvent& event) {
    std::lock_guard lock(mutex_);
    return queue(event.stream).done >= event.at;
  }

  c10::StreamId new_stream() {
    std::lock_guard lock(mutex_);
    return ++streams_;
  }
  MappedCounters counters() {
    std::lock_guard lock(mutex_);
    MappedCounters result = counters_;
    for (const auto& [stream, queue] : queues_) result.pending_copies += queue.tasks.size();
    return result;
  }
  void count_deferred() {
    std::lock_guard lock(mutex_);
    ++counters_.deferred_copies;
  }

  void pin(void* begin, size_t size) {
    std::lock_guard lock(mutex_);
    pinned_[begin] = size;
  }
  void unpin(void* begin) {
    std::lock_guard lock(mutex_);
    pinned_.erase(begin);
  }
  bool is_pinned(const void* data) {
    std::lock_guard lock(mutex_);
    auto it = pinned_.upper_bound(const_cast<void*>(data));
    if (it == pinned_.begin()) return false;
    --it;
    return data < static_cast<std::byte*>(it->first) + it->second;
  }

 private:
  const Block& block_of(const void* device) {
    auto it = blocks_.upper_bound(const_cast<void*>(device));
    if (it == blocks_.begin()) die("an address that is not on the device");
    --it;
    if (device > it->second.device + it->second.size) die("an address that is not on the device");
    return it->second;
  }
  Queue& queue(const c10::Stream& stream) { return queues_[{stream.device_index(), stream.id()}]; }
  static void drain(Queue& queue, uint64_t until) {
    while (queue.done < until && !queue.tasks.empty()) {
      const Task task = std::move(queue.tasks.front());
      queue.tasks.pop_front();
      ++queue.done;
      task.run();
    }
  }

  std::recursive_mutex mutex_;
  std::map<void*, Block> blocks_;
  std::map<void*, size_t> pinned_;
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Queue> queues_;
  c10::StreamId streams_ = 0;
  MappedCounters counters_;
};

c10::Stream current_stream(c10::DeviceIndex index) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kMapped, index), current_streams[index]);
}

// --- memory ----------------------------------------------------------------------------------------------------------

void free_device_memory(void* device) { MappedDevice::get().free(device); }

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(kMapped, current_device);
    if (size == 0) return {nullptr, device};
    void* data = MappedDevice::get().allocate(size, current_device);
    return {data, data, &free_device_memory, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device_memory; }
  void copy_data(void* target, const void* source, size_t size) const override {
    auto& device = MappedDevice::get();
    std::memcpy(device.host_address(target), device.host_address(source), size);
  }
};

void free_pinned_memory(void* data) {
  MappedDevice::get().unpin(data);
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* data = std::malloc(size);
    if (data == nullptr) die("no memory");
    MappedDevice::get().pin(data, size);
    return {data, data, &free_pinned_memory, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned_memory; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

/// The same elements where the host may touch them. Not owned, and only for code that has drained the streams.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor.detach();
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  void* data = MappedDevice::get().host_address(tensor.const_data_ptr());
  at::Tensor host = at::from_blob(data, tensor.sizes(), tensor.strides(), options);
  if (tensor.is_conj()) host = host.conj();
  return tensor.is_neg() ? host._neg_view() : host;
}

c10::DeviceIndex index_of(const at::Tensor& tensor) { return tensor.device().index(); }

// --- operators -------------------------------------------------------------------------------------------------------

c10::DispatchKeySet device_keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

class WithDevice {
 public:
  explicit WithDevice(std::optional<c10::Device> device) : before_(current_device) {
    if (device && device->has_index()) current_device = device->index();
  }
  ~WithDevice() { current_device = before_; }
  WithDevice(const WithDevice&) = delete;
  WithDevice& operator=(const WithDevice&) = delete;

 private:
  c10::DeviceIndex before_;
};

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const WithDevice with(device);
  return at::detail::empty_generic(size, &device_allocator, device_keys(), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const WithDevice with(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, device_keys(),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  auto& device = MappedDevice::get();
  if (target.numel() == 0) return target;
  const c10::Stream stream = current_stream(index_of(source.is_cpu() ? target : source));
  const at::Tensor from = on_host(source), to = on_host(target);
  const auto copy = [from, to] {
    const at::NoGradGuard no_grad;
    to.copy_(from);
  };
  const bool from_pageable = source.is_cpu() && !device.is_pinned(source.const_data_ptr());
  if (non_blocking && !from_pageable) {
    device.count_deferred();
    if (target.is_cpu()) {
      at::Tensor bytes = to.is_contiguous() ? to : at::Tensor();
      if (bytes.defined()) std::memset(bytes.mutable_data_ptr(), 0xFF, bytes.nbytes());
    }
    std::vector<const void*> uses;
    for (const at::Tensor& tensor : {source, target})
      if (!tensor.is_cpu()) uses.push_back(tensor.const_data_ptr());
    device.enqueue(stream, {copy, std::move(uses)});
    return target;
  }
  device.synchronize(stream);
  copy();
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (source.sizes() != target.sizes()) {
    const size_t bytes = static_cast<size_t>(source.numel()) * source.element_size();
    c10::StorageImpl* storage = target.storage().unsafeGetStorageImpl();
    if (storage->nbytes() < bytes) {
      const WithDevice with(target.device());
      storage->set_data_ptr_noswap(device_allocator.allocate(bytes));
      storage->set_nbytes(bytes);
    }
    target.unsafeGetTensorImpl()->set_sizes_contiguous(source.sizes());
  }
  return copy_from(source, target, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("as_strided", &as_strided);
  m.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
}
// The copy itself resolves what is lazily conjugated or negated; the fallbacks of these keys would copy in order to copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

// --- guard, streams, events ------------------------------------------------------------------------------------------

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kMapped;
  GuardImpl() = default;
  explicit GuardImpl(c10::DeviceType) {}
  c10::DeviceType type() const override { return kMapped; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kMapped, current_device}; }
  void setDevice(c10::Device device) const override {
    if (!device.has_index()) return;
    if (device.index() >= kMappedDevices) die("no such device");
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(c10::Device device) const override { return current_stream(with_index(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kMapped, with_index(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kMapped, with_index(device)), MappedDevice::get().new_stream());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = current_stream(stream.device_index());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kMappedDevices; }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new RecordedEvent;
    *static_cast<RecordedEvent*>(*event) = MappedDevice::get().record(stream);
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr) return;
    const RecordedEvent awaited = *static_cast<RecordedEvent*>(event);
    MappedDevice::get().enqueue(stream, {[awaited] { MappedDevice::get().synchronize(awaited); }, {}});
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || MappedDevice::get().happened(*static_cast<RecordedEvent*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<RecordedEvent*>(event);
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) MappedDevice::get().synchronize(*static_cast<RecordedEvent*>(event));
  }
  bool queryStream(const c10::Stream& stream) const override { return MappedDevice::get().is_idle(stream); }
  void synchronizeStream(const c10::Stream& stream) const override { MappedDevice::get().synchronize(stream); }
  void synchronizeDevice(c10::DeviceIndex index) const override { MappedDevice::get().synchronize_device(index); }

 private:
  static c10::DeviceIndex with_index(c10::Device device) {
    return device.has_index() ? device.index() : current_device;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();  // so that values equal the CPU's
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return MappedDevice::get().is_pinned(data); }
  c10::DeviceIndex deviceCount() const override { return kMappedDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
};

// --- collectives -----------------------------------------------------------------------------------------------------

/// A collective that ran into host memory; the stream that waits for it gets the result.
class MappedWork final : public c10d::Work {
 public:
  MappedWork(c10::intrusive_ptr<c10d::Work> host, std::vector<std::pair<at::Tensor, at::Tensor>> results)
      : host_(std::move(host)), results_(std::move(results)) {}
  bool wait(std::chrono::milliseconds timeout) override {
    host_->wait(timeout);
    for (const auto& [from, target] : results_) {
      MappedDevice::get().enqueue(current_stream(index_of(target)), {[from = from, to = on_host(target)] {
                                                                       const at::NoGradGuard no_grad;
                                                                       to.copy_(from);
                                                                     },
                                                                     {target.const_data_ptr()}});
    }
    return true;
  }

 private:
  c10::intrusive_ptr<c10d::Work> host_;
  std::vector<std::pair<at::Tensor, at::Tensor>> results_;
};

class MappedBackend final : public c10d::Backend {
 public:
  explicit MappedBackend(c10::intrusive_ptr<c10d::Backend> host)
      : Backend(host->getRank(), host->getSize()), host_(std::move(host)) {}
  const std::string getBackendName() const override { return "mapped"; }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    return in_place(tensors, [&](std::vector<at::Tensor>& host) { return host_->broadcast(host, options); });
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    return in_place(tensors, [&](std::vector<at::Tensor>& host) { return host_->allreduce(host, options); });
  }
  c10::intrusive_ptr<c10d::Work> all_gather_single(at::Tensor& output, at::Tensor& input,
                                                   const c10d::AllgatherOptions& options) override {
    at::Tensor from = input.cpu(), to = at::empty(output.sizes(), from.options());
    auto work = host_->all_gather_single(to, from, options);
    return c10::make_intrusive<MappedWork>(std::move(work), std::vector{std::pair(to, output)});
  }
  c10::intrusive_ptr<c10d::Work> reduce_scatter_single(at::Tensor& output, at::Tensor& input,
                                                       const c10d::ReduceScatterOptions& options) override {
    at::Tensor from = input.cpu(), to = at::empty(output.sizes(), from.options());
    auto work = host_->reduce_scatter_single(to, from, options);
    return c10::make_intrusive<MappedWork>(std::move(work), std::vector{std::pair(to, output)});
  }

 private:
  c10::intrusive_ptr<c10d::Work> in_place(
      std::vector<at::Tensor>& tensors,
      const std::function<c10::intrusive_ptr<c10d::Work>(std::vector<at::Tensor>&)>& launch) {
    std::vector<at::Tensor> host;
    std::vector<std::pair<at::Tensor, at::Tensor>> results;
    for (const at::Tensor& tensor : tensors) {
      host.push_back(tensor.cpu());
      results.emplace_back(host.back(), tensor);
    }
    auto work = launch(host);
    return c10::make_intrusive<MappedWork>(std::move(work), std::move(results));
  }

  c10::intrusive_ptr<c10d::Backend> host_;
};

}  // namespace

void register_mapped_device() {
  [[maybe_unused]] static const bool once = [] {
    c10::register_privateuse1_backend("mapped");
    c10::SetAllocator(kMapped, &device_allocator);
    at::RegisterPrivateUse1HooksInterface(new Hooks);  // LibTorch keeps it to the end
    return true;
  }();
}

MappedCounters mapped_counters() { return MappedDevice::get().counters(); }

c10::intrusive_ptr<c10d::Backend> make_mapped_backend(c10::intrusive_ptr<c10d::Backend> host) {
  return c10::make_intrusive<MappedBackend>(std::move(host));
}

}  // namespace reshard::device_test
