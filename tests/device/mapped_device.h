// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A device that a machine without a GPU has: two "mapped" devices on LibTorch's PrivateUse1 key, with the traps of a GPU and none of its speed.
//
// - Its memory is mapped twice: where a tensor's data_ptr() points, nothing may be read or written (SIGSEGV), and only this file knows the other
//   place. Code that reads device memory from the host, or takes a tensor for a CPU one, dies on the spot.
// - Copies that were asked for with non_blocking happen when their stream is synchronised (or waited for) and not before; what they will
//   write to on the host holds 0xFF until then. Streams do not wait for each other unless an event says so.
// - Memory that is freed while another stream still has work on it ends the process with a message.
// - Collectives give their result to the stream that waits for them.
//
// Operators run on the CPU's kernels with the tensors copied to and fro, so values equal those of the CPU bit for bit. One process, any
// number of threads. It shows staging and synchronisation; it does not show NCCL.

#include <c10/core/Device.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstdint>

namespace reshard::device_test {

constexpr c10::DeviceType kMapped = c10::DeviceType::PrivateUse1;
constexpr int kMappedDevices = 2;

/// Registers the device with LibTorch under the name "mapped". May be called again.
void register_mapped_device();

/// What the device did since the process began.
struct MappedCounters {
  uint64_t live_bytes = 0;       // allocated now
  uint64_t peak_bytes = 0;       // most of it at any time
  uint64_t deferred_copies = 0;  // asked for with non_blocking
  uint64_t pending_copies = 0;   // of them, not yet done
};
MappedCounters mapped_counters();

/// Collectives of mapped tensors over `host`, a backend for CPU tensors of the same ranks.
c10::intrusive_ptr<c10d::Backend> make_mapped_backend(c10::intrusive_ptr<c10d::Backend> host);

}  // namespace reshard::device_test
