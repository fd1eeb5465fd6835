// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What needs CUDA, loaded at run time from libreshard_cuda.so when a GPU is first asked for.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

namespace reshard {

/// Loads the module (once). Throws kUnavailable, with every place that was tried, when it is not there or does not
/// load.
void load_cuda_module();

/// An NCCL backend of `size` ranks that meet in `store`. Loads the module.
c10::intrusive_ptr<c10d::Backend> make_nccl_backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                                    std::chrono::milliseconds timeout);

/// The module's one entry, exported by libreshard_cuda.so under this name.
inline constexpr const char* kMakeNcclBackendSymbol = "reshard_make_nccl_backend";
using MakeNcclBackendFn = void (*)(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                   std::chrono::milliseconds timeout, c10::intrusive_ptr<c10d::Backend>* out);

}  // namespace reshard
