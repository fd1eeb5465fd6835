// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// How many GPUs there are, asked before any rank starts and without LibTorch.

namespace reshard {

/// Number of NVIDIA GPUs that a process started now could use; asks the driver (libcuda.so.1) once a process. 0 where
/// there is no driver. CUDA_VISIBLE_DEVICES counts. RESHARD_TEST_GPU_COUNT, when set, is the answer instead, so that
/// the behaviour with other numbers can be tested; a value that is no count throws kInvalidArgument. Thread-safe.
int nvidia_gpu_count();

}  // namespace reshard
