// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/staging.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <system_error>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "core/stream_copy.h"
#include "reshard/core/error.h"
#include "reshard/core/hooks.h"

namespace reshard {
namespace {

constexpr uint64_t kAlignment = 64;
constexpr uint64_t kPieceBytes = uint64_t{256} << 20;  // between two signs of life
constexpr uint64_t kSmallBytes = 64 << 10;

/// Replaces each tensor by fn(tensor), in a fixed order.
template <class Fn>
void transform_tensors(StateValue& value, const Fn& fn);

template <class Fn>
void transform_tensors(StateDict& dict, const Fn& fn) {
  for (auto& [key, item] : dict.items()) transform_tensors(item, fn);
}

template <class Fn>
void transform_tensors(StateValue& value, const Fn& fn) {
  if (value.is<at::Tensor>()) {
    value = fn(value.as<at::Tensor>());
  } else if (value.is<ShardedTensor>()) {
    const auto& tensor = value.as<ShardedTensor>();
    std::vector<LocalShard> shards = tensor.shards();
    for (LocalShard& shard : shards) shard.tensor = fn(shard.tensor);
    value = ShardedTensor(tensor.size(), tensor.dtype(), std::move(shards), tensor.requires_grad());
  } else if (value.is<StateDict>()) {
    transform_tensors(value.as<StateDict>(), fn);
  } else if (value.is<StateList>()) {
    for (StateValue& item : value.as<StateList>()) transform_tensors(item, fn);
  } else if (value.is<StateTuple>()) {
    for (StateValue& item : value.as<StateTuple>().items) transform_tensors(item, fn);
  }
}

bool has_elements(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_meta();
}

/// Elements from the first to the last in memory.
int64_t span_of(const at::Tensor& tensor) {
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) span += (tensor.size(d) - 1) * tensor.stride(d);
  return span;
}

/// `n` of some position at or after `from` whose alignment is that of `like`.
uint64_t aligned_like(uint64_t like, uint64_t from) { return from + (like - from) % kAlignment; }

void copy_on_host(std::byte* to, const std::byte* from, uint64_t size, const std::function<void()>& alive) {
  if (size < kSmallBytes) {  // costs less than the tensors below
    std::memcpy(to, from, size);
    return alive();
  }
  for (uint64_t done = 0; done < size; done += kPieceBytes) {
    const uint64_t n = std::min(kPieceBytes, size - done);
    at::parallel_for(0, static_cast<int64_t>(n), kSmallBytes, [&](int64_t begin, int64_t end) {
      stream_copy(to + done + begin, from + done + begin, static_cast<size_t>(end - begin));
    });
    alive();
  }
}

at::Tensor view_of(const c10::Storage& storage, const at::TensorOptions& options, uint64_t byte_offset,
                   at::IntArrayRef sizes, at::IntArrayRef strides) {
  at::Tensor view = at::empty({0}, options);
  const auto offset = static_cast<int64_t>(byte_offset / view.element_size());
  return view.set_(storage, offset, sizes, strides);
}

std::vector<int64_t> dense_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

}  // namespace

namespace {

/// `size` bytes of a new file in memory, mapped.
at::Tensor shared_memory(uint64_t size, std::shared_ptr<const int>& file) {
  const int fd = memfd_create("reshard staging", MFD_CLOEXEC);
  if (fd >= 0) {
    file = std::shared_ptr<const int>(new int(fd), [](const int* held) {
      close(*held);
      delete held;
    });
  }
  void* data = fd >= 0 && ftruncate(fd, static_cast<off_t>(size)) == 0
                   ? mmap(nullptr, std::max<uint64_t>(size, 1), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                   : MAP_FAILED;
  if (data == MAP_FAILED) {
    throw Error(ErrorCode::kIo, "no shared memory to stage in: " + std::generic_category().message(errno),
                {.wanted = std::to_string(size) + " bytes"});
  }
  return at::from_blob(
      data, {static_cast<int64_t>(size)}, [size](void* mapped) { munmap(mapped, std::max<uint64_t>(size, 1)); },
      at::kByte);
}

}  // namespace

void StagingBuffer::reserve(uint64_t size, bool pinned) {
  pinned = pinned && !shared_;
  if (bytes_.defined() && bytes_.nbytes() >= size && (pinned_ || !pinned)) return;
  bytes_.reset();  // never both
  bytes_ = shared_ ? shared_memory(size, file_)
                   : at::empty({static_cast<int64_t>(size)}, at::TensorOptions(at::kByte).pinned_memory(pinned));
  pinned_ = pinned;
  totals_.bytes_allocated += size;
  ++totals_.allocations;
}

c10::Stream StagingBuffer::stream_for(c10::Device device) {
  for (const c10::Stream& stream : streams_) {
    if (stream.device() == device) return stream;
  }
  return streams_.emplace_back(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device));
}

/// Bytes of a storage that are copied as they lie, for one or several tensors; or one tensor whose elements are gathered.
struct StagingSource::Range {
  at::Tensor tensor;  // one that lies there
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t position = 0;  // in the buffer
  bool gathered = false;
};

StagingSource::StagingSource(const StateDict& state) : state_(state) {
  transform_tensors(state_, [&](const at::Tensor& tensor) {
    Source source;
    if (has_elements(tensor)) {
      source = {.tensor = tensor.detach(), .requires_grad = tensor.requires_grad()};
      const c10::Device device = tensor.device();
      if (!tensor.is_cpu() && std::ranges::find(devices_, device, &Device::device) == devices_.end()) {
        devices_.push_back({device, c10::Event(device.type())});
        devices_.back().ready.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
      }
    }
    sources_.push_back(std::move(source));
    return tensor;
  });
}

/// Gives every source its place. Tensors of one storage that overlap or touch are one range; those with holes are gathered. The places
/// follow from the state dict alone and not from where its memory happens to lie: equal ones need equal sizes.
std::vector<StagingSource::Range> StagingSource::lay_out(uint64_t& size) {
  struct Extent {
    Source* source;
    size_t storage;  // in the order in which storages are met
    uint64_t begin, end;
  };
  std::unordered_map<const void*, size_t> storages;
  std::vector<Extent> extents;
  using Identity = std::tuple<const void*, at::ScalarType, bool, bool, std::vector<int64_t>, std::vector<int64_t>>;
  std::map<Identity, uint64_t> gathered;
  std::vector<Range> ranges;
  for (Source& source : sources_) {
    const at::Tensor& tensor = source.tensor;
    if (!tensor.defined() || tensor.numel() == 0) continue;
    const int64_t span = span_of(tensor);
    source.dense = span <= tensor.numel() && !tensor.is_conj() && !tensor.is_neg();
    if (source.dense) {
      const auto begin = static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size();
      const size_t storage =
          storages.try_emplace(tensor.storage().unsafeGetStorageImpl(), storages.size()).first->second;
      extents.push_back({&source, storage, begin, begin + static_cast<uint64_t>(span) * tensor.element_size()});
      continue;
    }
    const auto [place, added] =
        gathered.try_emplace(Identity(tensor.const_data_ptr(), tensor.scalar_type(), tensor.is_conj(), tensor.is_neg(),
                                      tensor.sizes().vec(), tensor.strides().vec()),
                             aligned_like(0, size));
    source.position = place->second;
    if (!added) continue;
    ranges.push_back({.tensor = tensor, .position = source.position, .gathered = true});
    size = source.position + tensor.nbytes();
  }

  std::ranges::stable_sort(extents, [](const Extent& a, const Extent& b) {
    return std::tuple(a.storage, a.begin) < std::tuple(b.storage, b.begin);
  });
  std::optional<size_t> storage;
  for (const Extent& extent : extents) {
    if (extent.storage != storage || extent.begin > ranges.back().end) {
      // Every element keeps its alignment.
      ranges.push_back({extent.source->tensor, extent.begin, extent.end, aligned_like(extent.begin, size)});
      storage = extent.storage;
    }
    Range& range = ranges.back();
    range.end = std::max(range.end, extent.end);
    extent.source->position = range.position + (extent.begin - range.begin);
    size = std::max(size, range.position + (range.end - range.begin));
  }
  return ranges;
}

void StagingSource::copy_to(StagingBuffer& buffer, const std::function<void()>& alive) {
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  uint64_t size = 0;
  const std::vector<Range> ranges = lay_out(size);
  buffer.reserve(size, !devices_.empty());
  const at::Tensor& bytes = buffer.bytes();
  const auto bytes_at = [&](const c10::Storage& storage, c10::Device device, uint64_t begin, uint64_t length) {
    return view_of(storage, at::TensorOptions(at::kByte).device(device), begin, {static_cast<int64_t>(length)}, {1});
  };
  const auto gather = [&](const Range& range) {
    view_of(bytes.storage(), range.tensor.options().device(c10::kCPU), range.position, range.tensor.sizes(),
            dense_strides(range.tensor.sizes()))
        .copy_(range.tensor, /*non_blocking=*/true);
    buffer.totals().bytes_staged += range.tensor.nbytes();
  };

  std::vector<c10::Stream> streams;
  try {
    for (Device& device : devices_) {
      const c10::Stream stream = streams.emplace_back(buffer.stream_for(device.device));
      const c10::StreamGuard guard(stream);
      device.ready.block(stream);
      for (const Range& range : ranges) {
        if (range.tensor.device() != device.device) continue;
        test_point("stage.copy");
        if (range.gathered) {
          gather(range);
        } else {
          const uint64_t length = range.end - range.begin;
          bytes_at(bytes.storage(), c10::kCPU, range.position, length)
              .copy_(bytes_at(range.tensor.storage(), device.device, range.begin, length), /*non_blocking=*/true);
          buffer.totals().bytes_staged += length;
        }
        alive();
      }
    }
    auto* to = static_cast<std::byte*>(bytes.mutable_data_ptr());
    for (const Range& range : ranges) {
      if (!range.tensor.is_cpu()) continue;
      test_point("stage.copy");
      if (range.gathered) {
        gather(range);
        alive();
      } else {
        const auto* from = static_cast<const std::byte*>(range.tensor.storage().data());
        const uint64_t length = range.end - range.begin;
        copy_on_host(to + range.position, from + range.begin, length, alive);
        buffer.totals().bytes_staged += length;
      }
    }
  } catch (...) {
    for (const c10::Stream& stream : streams) stream.synchronize();
    throw;
  }
  for (const c10::Stream& stream : streams) stream.synchronize();

  test_point("stage.copied");
}

StateDict StagingSource::take(const StagingBuffer& buffer) {
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  auto source = sources_.begin();
  transform_tensors(state_, [&](const at::Tensor& tensor) {
    const Source& from = *source++;
    if (!from.tensor.defined()) return tensor;
    const at::IntArrayRef sizes = from.tensor.sizes();
    at::Tensor copy = view_of(buffer.bytes().storage(), from.tensor.options().device(c10::kCPU), from.position, sizes,
                              from.dense ? from.tensor.strides().vec() : dense_strides(sizes));
    return copy.set_requires_grad(from.requires_grad);
  });
  sources_.clear();
  return std::move(state_);
}

}  // namespace reshard
