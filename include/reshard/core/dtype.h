// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Element types: every dtype that c10 has, under PyTorch's canonical names, so that the rooms without LibTorch can
// speak of tensors.

#include <cstdint>
#include <optional>
#include <string_view>

namespace reshard {

// clang-format off
// name in this library, name in PyTorch, bytes of one element, order as in c10
#define RESHARD_FOR_EACH_DTYPE(X)                                                                                       \
  X(kUInt8, "uint8", 1) X(kInt8, "int8", 1) X(kInt16, "int16", 2) X(kInt32, "int32", 4) X(kInt64, "int64", 8)           \
  X(kFloat16, "float16", 2) X(kFloat32, "float32", 4) X(kFloat64, "float64", 8) X(kComplex32, "complex32", 4)           \
  X(kComplex64, "complex64", 8) X(kComplex128, "complex128", 16) X(kBool, "bool", 1) X(kQInt8, "qint8", 1)              \
  X(kQUInt8, "quint8", 1) X(kQInt32, "qint32", 4) X(kBFloat16, "bfloat16", 2) X(kQUInt4x2, "quint4x2", 1)               \
  X(kQUInt2x4, "quint2x4", 1) X(kBits1x8, "bits1x8", 1) X(kBits2x4, "bits2x4", 1) X(kBits4x2, "bits4x2", 1)             \
  X(kBits8, "bits8", 1) X(kBits16, "bits16", 2) X(kFloat8E5M2, "float8_e5m2", 1) X(kFloat8E4M3FN, "float8_e4m3fn", 1)   \
  X(kFloat8E5M2FNUZ, "float8_e5m2fnuz", 1) X(kFloat8E4M3FNUZ, "float8_e4m3fnuz", 1) X(kUInt16, "uint16", 2)             \
  X(kUInt32, "uint32", 4) X(kUInt64, "uint64", 8) X(kUInt1, "uint1", 1) X(kUInt2, "uint2", 1) X(kUInt3, "uint3", 1)     \
  X(kUInt4, "uint4", 1) X(kUInt5, "uint5", 1) X(kUInt6, "uint6", 1) X(kUInt7, "uint7", 1) X(kInt1, "int1", 1)           \
  X(kInt2, "int2", 1) X(kInt3, "int3", 1) X(kInt4, "int4", 1) X(kInt5, "int5", 1) X(kInt6, "int6", 1)                   \
  X(kInt7, "int7", 1) X(kFloat8E8M0FNU, "float8_e8m0fnu", 1) X(kFloat4E2M1FNx2, "float4_e2m1fn_x2", 1)                  \
  X(kBComplex32, "bcomplex32", 4)
// clang-format on

enum class DType : uint8_t {
#define RESHARD_DTYPE_ENUM(id, name, bytes) id,
  RESHARD_FOR_EACH_DTYPE(RESHARD_DTYPE_ENUM)
#undef RESHARD_DTYPE_ENUM
};

/// Bytes of one element. float4_e2m1fn_x2 counts pairs: one element is one byte that holds two values.
int64_t element_size(DType dtype);

/// PyTorch's name without the "torch." prefix: "bfloat16".
std::string_view to_string(DType dtype);

/// The dtype of that canonical name, or nothing. Aliases ("half") are not names.
std::optional<DType> dtype_from_string(std::string_view name);

}  // namespace reshard
