// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/core/dtype.h"

#include <string>

#include "reshard/core/error.h"

namespace reshard {
namespace {

struct DTypeInfo {
  std::string_view name;
  int64_t bytes;
};

constexpr DTypeInfo kInfo[] = {
#define RESHARD_DTYPE_INFO(id, name, bytes) {name, bytes},
    RESHARD_FOR_EACH_DTYPE(RESHARD_DTYPE_INFO)
#undef RESHARD_DTYPE_INFO
};

const DTypeInfo& info(DType dtype) {
  const auto i = static_cast<size_t>(dtype);
  if (i >= std::size(kInfo)) throw Error(ErrorCode::kInvalidArgument, "no dtype has number " + std::to_string(i));
  return kInfo[i];
}

}  // namespace

int64_t element_size(DType dtype) { return info(dtype).bytes; }

std::string_view to_string(DType dtype) { return info(dtype).name; }

std::optional<DType> dtype_from_string(std::string_view name) {
  for (size_t i = 0; i < std::size(kInfo); ++i) {
    if (kInfo[i].name == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

}  // namespace reshard
