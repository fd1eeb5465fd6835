// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/state_dict/sharded_tensor.h"

#include "reshard/core/error.h"
#include "reshard/state_dict/checkpointable.h"

namespace reshard {
namespace {

// One line a dtype: ours and c10's. Both enums list the same types in c10's order.
constexpr std::pair<DType, at::ScalarType> kScalarTypes[] = {
    {DType::kUInt8, at::ScalarType::Byte},
    {DType::kInt8, at::ScalarType::Char},
    {DType::kInt16, at::ScalarType::Short},
    {DType::kInt32, at::ScalarType::Int},
    {DType::kInt64, at::ScalarType::Long},
    {DType::kFloat16, at::ScalarType::Half},
    {DType::kFloat32, at::ScalarType::Float},
    {DType::kFloat64, at::ScalarType::Double},
    {DType::kComplex32, at::ScalarType::ComplexHalf},
    {DType::kComplex64, at::ScalarType::ComplexFloat},
    {DType::kComplex128, at::ScalarType::ComplexDouble},
    {DType::kBool, at::ScalarType::Bool},
    {DType::kQInt8, at::ScalarType::QInt8},
    {DType::kQUInt8, at::ScalarType::QUInt8},
    {DType::kQInt32, at::ScalarType::QInt32},
    {DType::kBFloat16, at::ScalarType::BFloat16},
    {DType::kQUInt4x2, at::ScalarType::QUInt4x2},
    {DType::kQUInt2x4, at::ScalarType::QUInt2x4},
    {DType::kBits1x8, at::ScalarType::Bits1x8},
    {DType::kBits2x4, at::ScalarType::Bits2x4},
    {DType::kBits4x2, at::ScalarType::Bits4x2},
    {DType::kBits8, at::ScalarType::Bits8},
    {DType::kBits16, at::ScalarType::Bits16},
    {DType::kFloat8E5M2, at::ScalarType::Float8_e5m2},
    {DType::kFloat8E4M3FN, at::ScalarType::Float8_e4m3fn},
    {DType::kFloat8E5M2FNUZ, at::ScalarType::Float8_e5m2fnuz},
    {DType::kFloat8E4M3FNUZ, at::ScalarType::Float8_e4m3fnuz},
    {DType::kUInt16, at::ScalarType::UInt16},
    {DType::kUInt32, at::ScalarType::UInt32},
    {DType::kUInt64, at::ScalarType::UInt64},
    {DType::kUInt1, at::ScalarType::UInt1},
    {DType::kUInt2, at::ScalarType::UInt2},
    {DType::kUInt3, at::ScalarType::UInt3},
    {DType::kUInt4, at::ScalarType::UInt4},
    {DType::kUInt5, at::ScalarType::UInt5},
    {DType::kUInt6, at::ScalarType::UInt6},
    {DType::kUInt7, at::ScalarType::UInt7},
    {DType::kInt1, at::ScalarType::Int1},
    {DType::kInt2, at::ScalarType::Int2},
    {DType::kInt3, at::ScalarType::Int3},
    {DType::kInt4, at::ScalarType::Int4},
    {DType::kInt5, at::ScalarType::Int5},
    {DType::kInt6, at::ScalarType::Int6},
    {DType::kInt7, at::ScalarType::Int7},
    {DType::kFloat8E8M0FNU, at::ScalarType::Float8_e8m0fnu},
    {DType::kFloat4E2M1FNx2, at::ScalarType::Float4_e2m1fn_x2},
    {DType::kBComplex32, at::ScalarType::BComplex32},
};

}  // namespace

DType to_dtype(at::ScalarType type) {
  for (const auto& [ours, theirs] : kScalarTypes) {
    if (theirs == type) return ours;
  }
  throw Error(ErrorCode::kUnsupported, std::string("no such dtype here: ") + c10::toString(type));
}

at::ScalarType to_scalar_type(DType dtype) {
  for (const auto& [ours, theirs] : kScalarTypes) {
    if (ours == dtype) return theirs;
  }
  throw Error(ErrorCode::kUnsupported, "LibTorch has no dtype " + std::string(to_string(dtype)));
}

Dims to_dims(at::IntArrayRef values) { return Dims(std::span<const int64_t>(values.data(), values.size())); }

ShardedTensor::ShardedTensor(Dims size, at::ScalarType dtype, std::vector<LocalShard> shards, bool requires_grad)
    : size_(std::move(size)), dtype_(dtype), requires_grad_(requires_grad), shards_(std::move(shards)) {
  for (size_t i = 0; i < shards_.size(); ++i) {
    const LocalShard& shard = shards_[i];
    const std::string which = "shard " + to_string(shard.box) + " of a sharded tensor";
    if (!is_inside(shard.box, size_)) {
      throw Error(ErrorCode::kInvalidArgument, which + " does not lie inside the tensor",
                  {.wanted = "inside " + to_string(size_)});
    }
    if (!shard.tensor.defined()) throw Error(ErrorCode::kInvalidArgument, which + " has no tensor");
    if (to_dims(shard.tensor.sizes()) != shard.box.sizes) {
      throw Error(ErrorCode::kInvalidArgument, which + " has a tensor of another shape",
                  {.wanted = to_string(shard.box.sizes), .found = to_string(to_dims(shard.tensor.sizes()))});
    }
    if (shard.tensor.scalar_type() != dtype_) {
      throw Error(ErrorCode::kInvalidArgument, which + " has another dtype",
                  {.wanted = c10::toString(dtype_), .found = c10::toString(shard.tensor.scalar_type())});
    }
    for (size_t j = 0; j < i; ++j) {
      if (volume(shard.box.sizes) > 0 && volume(shards_[j].box.sizes) > 0 && intersect(shard.box, shards_[j].box)) {
        throw Error(ErrorCode::kInvalidArgument, which + " overlaps shard " + to_string(shards_[j].box));
      }
    }
  }
}

int64_t ShardedTensor::local_numel() const {
  int64_t n = 0;
  for (const LocalShard& shard : shards_) n += shard.tensor.numel();
  return n;
}

ShardedTensor Checkpointable::as_sharded_tensor() const {
  std::vector<LocalShard> shards;
  for (const Box& chunk : chunk_list()) shards.push_back({chunk, tensor_shard(chunk)});
  return ShardedTensor(size(), dtype(), std::move(shards), requires_grad());
}

}  // namespace reshard
