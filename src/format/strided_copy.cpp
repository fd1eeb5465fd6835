// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/format/strided_copy.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace reshard {
namespace {

struct Axis {
  int64_t size;
  int64_t source;  // strides in bytes
  int64_t target;
};

template <size_t kWidth>
void copy_row(const std::byte* source, std::byte* target, const Axis& axis) {
  for (int64_t i = 0; i < axis.size; ++i) std::memcpy(target + i * axis.target, source + i * axis.source, kWidth);
}
void copy_row_any(const std::byte* source, std::byte* target, const Axis& axis, size_t width) {
  for (int64_t i = 0; i < axis.size; ++i) std::memcpy(target + i * axis.target, source + i * axis.source, width);
}

bool is_complex(DType dtype) {
  return dtype == DType::kComplex32 || dtype == DType::kBComplex32 || dtype == DType::kComplex64 ||
         dtype == DType::kComplex128;
}
bool is_signed_float(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32 || dtype == DType::kFloat64;
}
bool is_integer(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64:
    case DType::kUInt16:
    case DType::kUInt32:
    case DType::kUInt64:
      return true;
    default:
      return false;
  }
}

// Flips the top bit of every `step`-th component of `width` bytes, from `first` on.
void flip_signs(MutableByteSpan elements, size_t width, size_t first, size_t step) {
  for (size_t i = first * width + width - 1; i < elements.size(); i += step * width) elements[i] ^= std::byte{0x80};
}

template <class T>
void negate(MutableByteSpan elements) {
  for (size_t i = 0; i + sizeof(T) <= elements.size(); i += sizeof(T)) {
    T v;
    std::memcpy(&v, &elements[i], sizeof(T));
    v = static_cast<T>(T{0} - v);
    std::memcpy(&elements[i], &v, sizeof(T));
  }
}

void check_region(const TensorItem& item, const Box& region) {
  if (!is_inside(region, item.sizes)) {
    throw Error(ErrorCode::kInvalidArgument, "region is not inside the stored tensor",
                {.wanted = to_string(item.sizes), .found = to_string(region)});
  }
}

// First element of the region, counted from the start of the storage. The item's reach was checked when it was read.
int64_t first_element(const TensorItem& item, const Box& region) {
  int64_t first = item.storage_offset;
  for (size_t i = 0; i < region.offsets.size(); ++i) first += region.offsets[i] * item.strides[i];
  return first;
}

}  // namespace

void copy_strided(const std::byte* source, const Dims& source_strides, std::byte* target, const Dims& target_strides,
                  const Dims& sizes, int64_t element_size) {
  // Innermost first; dimensions that run on in both layouts are one.
  std::vector<Axis> axes;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] == 0) return;
    if (sizes[i] == 1) continue;
    const Axis axis{sizes[i], source_strides[i] * element_size, target_strides[i] * element_size};
    if (!axes.empty() && axis.source == axes.back().size * axes.back().source &&
        axis.target == axes.back().size * axes.back().target) {
      axes.back().size *= axis.size;
    } else {
      axes.push_back(axis);
    }
  }
  auto width = static_cast<size_t>(element_size);
  if (!axes.empty() && axes[0].source == element_size &&
      axes[0].target == element_size) {  // a run of memory is one wide element
    width *= static_cast<size_t>(axes[0].size);
    axes.erase(axes.begin());
  }
  if (axes.empty()) {
    std::memcpy(target, source, width);
    return;
  }
  std::vector<int64_t> position(axes.size(), 0);
  while (true) {
    switch (width) {
      case 1:
        copy_row<1>(source, target, axes[0]);
        break;
      case 2:
        copy_row<2>(source, target, axes[0]);
        break;
      case 4:
        copy_row<4>(source, target, axes[0]);
        break;
      case 8:
        copy_row<8>(source, target, axes[0]);
        break;
      case 16:
        copy_row<16>(source, target, axes[0]);
        break;
      default:
        copy_row_any(source, target, axes[0], width);
        break;
    }
    size_t d = 1;
    for (; d < axes.size(); ++d) {
      source += axes[d].source;
      target += axes[d].target;
      if (++position[d] < axes[d].size) break;
      source -= axes[d].size * axes[d].source;
      target -= axes[d].size * axes[d].target;
      position[d] = 0;
    }
    if (d == axes.size()) return;
  }
}

void resolve_flags(MutableByteSpan elements, DType dtype, bool conj, bool neg) {
  const auto refuse = [&](const char* flag) {
    throw Error(ErrorCode::kUnsupported, "tensor: " + std::string(to_string(dtype)) + " elements have no " + flag);
  };
  const auto width = static_cast<size_t>(element_size(dtype));
  const bool complex = is_complex(dtype);
  if (conj && !complex) refuse("conjugate");
  if (conj) flip_signs(elements, width / 2, 1, 2);
  if (!neg) return;
  if (complex) {
    flip_signs(elements, width / 2, 0, 1);
  } else if (is_signed_float(dtype)) {
    flip_signs(elements, width, 0, 1);
  } else if (is_integer(dtype)) {
    switch (width) {
      case 1:
        negate<uint8_t>(elements);
        break;
      case 2:
        negate<uint16_t>(elements);
        break;
      case 4:
        negate<uint32_t>(elements);
        break;
      default:
        negate<uint64_t>(elements);
        break;
    }
  } else {
    refuse("negation");
  }
}

void normalize_bools(MutableByteSpan elements) {
  for (std::byte& b : elements) b = static_cast<std::byte>(b != std::byte{0});
}

ByteRange payload_range(const TensorItem& item, const Box& region) {
  check_region(item, region);
  if (volume(region.sizes) == 0) return {};
  const int64_t first = first_element(item, region);
  int64_t last = first;
  for (size_t i = 0; i < region.sizes.size(); ++i) last += (region.sizes[i] - 1) * item.strides[i];
  const auto width = static_cast<uint64_t>(element_size(item.dtype));
  return {static_cast<uint64_t>(first) * width, (static_cast<uint64_t>(last) + 1) * width};
}

void copy_region(const TensorItem& item, ByteSpan payload, const Box& region, MutableByteSpan out) {
  const ByteRange range = payload_range(item, region);
  const int64_t width = element_size(item.dtype);
  const auto wanted = static_cast<uint64_t>(volume(region.sizes) * width);
  if (payload.size() != range.end - range.begin || out.size() != wanted) {
    throw Error(ErrorCode::kInvalidArgument, "buffers do not fit the region " + to_string(region),
                {.wanted = std::to_string(range.end - range.begin) + " and " + std::to_string(wanted) + " bytes",
                 .found = std::to_string(payload.size()) + " and " + std::to_string(out.size())});
  }
  if (out.empty()) return;
  copy_strided(payload.data(), item.strides, out.data(), contiguous_strides(region.sizes), region.sizes, width);
  if (item.conj || item.neg) resolve_flags(out, item.dtype, item.conj, item.neg);
  if (item.dtype == DType::kBool) normalize_bools(out);
}

}  // namespace reshard
