// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Reading parts of tensors without a state dict.

#include "reshard/core/box.h"
#include "reshard/planner/planner.h"

namespace reshard {

/// Reads boxes of tensors into one buffer; a load planner without a state dict.
class BoxPlanner final : public LoadPlanner {
 public:
  BoxPlanner(DType dtype, const Box& box, MutableByteSpan out)
      : dtype_(dtype), strides_(contiguous_strides(box.sizes)), out_(out) {}
  void set_up_planner(LoadState&, const Metadata&, bool) override {}
  LoadPlan create_local_plan() override { return {}; }
  const LoadReport& report() const override { return report_; }
  MutableTensorView resolve_tensor(const ReadItem& item) override {
    int64_t first = 0;
    for (size_t d = 0; d < strides_.size(); ++d) first += item.dest_offsets[d] * strides_[d];
    return {out_.data() + first * element_size(dtype_), dtype_, item.lengths, strides_, nullptr};
  }
  void commit_tensor(const ReadItem&, const MutableTensorView&) override {}
  void load_bytes(const ReadItem&, ByteSpan) override {}

 private:
  DType dtype_;
  Dims strides_;
  MutableByteSpan out_;
  LoadReport report_;
};

}  // namespace reshard
