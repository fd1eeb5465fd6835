// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// The one door to gloo.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

namespace reshard {

/// A gloo backend of `size` ranks that meet in `store`. Blocks until all have come.
c10::intrusive_ptr<c10d::Backend> make_gloo_backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                                                    std::chrono::milliseconds timeout);

}  // namespace reshard
