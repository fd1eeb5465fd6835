// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Copies of state dicts in memory that is used again. Test points: stage.copy before each copy, stage.copied.

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "reshard/state_dict/state_dict.h"

namespace reshard {

/// Counts of all buffers of a stager.
struct StagingTotals {
  std::atomic<uint64_t> bytes_staged = 0;
  std::atomic<uint64_t> bytes_allocated = 0;
  std::atomic<uint64_t> allocations = 0;
};

/// The memory of one copy.
class StagingBuffer {
 public:
  /// `shared`: in a file in memory, for another process, and never pinned.
  explicit StagingBuffer(StagingTotals& totals, bool shared = false) : totals_(totals), shared_(shared) {}
  /// Grows to `size` bytes. What was in it is lost.
  void reserve(uint64_t size, bool pinned);
  /// The stream that copies from this device go over.
  c10::Stream stream_for(c10::Device device);
  /// uint8, 1-D.
  const at::Tensor& bytes() const { return bytes_; }
  StagingTotals& totals() { return totals_; }
  /// Of the file, while the buffer has this size; -1 where it is not shared.
  int file() const { return file_ ? *file_ : -1; }

 private:
  StagingTotals& totals_;
  bool shared_;
  std::shared_ptr<const int> file_;  // closes it
  at::Tensor bytes_;
  bool pinned_ = false;
  std::vector<c10::Stream> streams_;
};

/// A state dict at one moment: handles of its tensors, and how far the streams are that compute them.
class StagingSource {
 public:
  /// To be made on the thread that computes the tensors.
  explicit StagingSource(const StateDict& state);
  /// Copies all tensors to `buffer`; equal memory becomes equal memory. Any thread, once. Returns when nothing is read any more, also
  /// by an exception. Calls `alive` from time to time.
  void copy_to(StagingBuffer& buffer, const std::function<void()>& alive);
  /// Then, once: the state dict with these copies in place of all tensors, on the host. Tensors without dense elements are
  /// left for the planner to refuse.
  StateDict take(const StagingBuffer& buffer);

 private:
  struct Source {
    at::Tensor tensor;  // detached; undefined where it is left alone
    bool requires_grad = false;
    uint64_t position = 0;  // of its first element in the buffer
    bool dense = true;      // keeps its strides
  };
  struct Range;
  struct Device {
    c10::Device device;
    c10::Event ready;
  };

  std::vector<Range> lay_out(uint64_t& size);

  StateDict state_;
  std::vector<Source> sources_;  // in the order in which tensors are met
  std::vector<Device> devices_;
};

}  // namespace reshard
