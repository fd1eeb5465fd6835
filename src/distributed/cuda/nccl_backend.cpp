// SPDX-License-Identifier: BSD-3-Clause
// libreshard_cuda.so: the only translation unit that needs CUDA and NCCL headers.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "distributed/cuda_module.h"

extern "C" __attribute__((visibility("default"))) void reshard_make_nccl_backend(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::chrono::milliseconds timeout,
    c10::intrusive_ptr<c10d::Backend>* out) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  *out = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, std::move(options));
}

// The declared type and the definition must stay one.
static_assert(std::is_same_v<decltype(&reshard_make_nccl_backend), reshard::MakeNcclBackendFn>);
