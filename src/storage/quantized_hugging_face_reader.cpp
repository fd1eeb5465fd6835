// SPDX-License-Identifier: BSD-3-Clause
// The catalogue says of a quantized tensor what is loaded, not what is stored. What all ranks need to know of the latter is
// the item's transform: kBlockTransform and the dtype of the values, or kMxfp4Transform.
#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <string_view>
#include <tuple>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/format/strided_copy.h"
#include "reshard/storage/hugging_face.h"
#include "storage/direct_reader.h"
#include "storage/hugging_face_files.h"
#include "storage/parallel.h"
#include "storage/small_floats.h"
#include "storage/stored_items.h"

namespace reshard {
namespace {

constexpr std::string_view kBlockTransform = "reshard.dequantize.block/";
constexpr std::string_view kMxfp4Transform = "reshard.dequantize.mxfp4/1";
constexpr std::string_view kBlockScales = "_scale_inv";
constexpr std::string_view kMxfp4Values = "_blocks";
constexpr std::string_view kMxfp4Scales = "_scales";
constexpr int64_t kPieceElements = 1 << 20;  // dequantized at once, in whole rows

const TensorStorageMetadata* find_tensor(const Metadata& metadata, const std::string& fqn) {
  const StorageMetadata* entry = metadata.state_dict_metadata.find(fqn);
  return entry != nullptr ? std::get_if<TensorStorageMetadata>(entry) : nullptr;
}

std::string without_suffix(const std::string& text, std::string_view suffix) {
  return text.substr(0, text.size() - suffix.size());
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

/// A quantized tensor: whole, as all its ranges are.
struct Quantized {
  std::string fqn;
  DenseElements values;  // as stored
  std::string values_file;
  DenseElements scales;
  std::string scales_file;
  bool is_mxfp4 = false;
  Dims size;  // of what is loaded

  /// The parts that `region` of what is loaded needs.
  Box values_of(const Box& region) const {
    if (!is_mxfp4) return region;
    const Box groups = scales_of(region, 0);
    Box box = groups;
    box.offsets.push_back(0);
    box.sizes.push_back(values.sizes[values.sizes.size() - 1]);
    return box;
  }
  Box scales_of(const Box& region, int64_t block_size) const {
    Box box = region;
    const auto divide = [&](size_t d, int64_t by) {
      const int64_t end = divide_up(region.offsets[d] + region.sizes[d], by);
      box.offsets[d] = region.offsets[d] / by;
      box.sizes[d] = end - box.offsets[d];
    };
    const size_t last = region.sizes.size() - 1;
    if (is_mxfp4) {
      divide(last, group());
    } else {
      divide(last - 1, block_size);
      divide(last, block_size);
    }
    return box;
  }
  /// Values that share a scale in MXFP4.
  int64_t group() const { return 2 * values.sizes[values.sizes.size() - 1]; }
};

struct WholeTensor {
  const StorageInfo* place = nullptr;
  DenseElements elements;
};

/// A tensor that is one chunk.
WholeTensor whole_tensor(const Metadata& metadata, const std::string& fqn) {
  const TensorStorageMetadata* tensor = find_tensor(metadata, fqn);
  if (tensor == nullptr) throw Error(ErrorCode::kCorruptData, "the catalogue lacks a tensor", {.key = fqn});
  if (tensor->chunks.size() != 1 || tensor->chunks[0] != whole_box(tensor->size)) {
    throw Error(ErrorCode::kUnsupported, "a quantized tensor or its scales are stored in several chunks", {.key = fqn});
  }
  const StorageInfo* place = metadata.storage_data.find({fqn, tensor->chunks[0].offsets, {}});
  static const StorageInfo none;  // without elements
  if (place == nullptr) place = &none;
  return {place, {place->offset, tensor->properties.dtype, tensor->size}};
}

/// How `fqn` is quantized in a catalogue of what is stored, if it is; throws where it cannot be loaded.
std::optional<Quantized> find_quantized(const Metadata& stored, const std::string& fqn, int64_t block_size) {
  Quantized result;
  std::string scales = fqn + std::string(kBlockScales);
  if (find_tensor(stored, scales) == nullptr) {
    if (!fqn.ends_with(kMxfp4Values)) return std::nullopt;
    scales = without_suffix(fqn, kMxfp4Values) + std::string(kMxfp4Scales);
    result.is_mxfp4 = true;
    const auto is_bytes = [&](const std::string& name) {
      const TensorStorageMetadata* tensor = find_tensor(stored, name);
      return tensor != nullptr && tensor->properties.dtype == DType::kUInt8;
    };
    if (!is_bytes(fqn) || !is_bytes(scales)) return std::nullopt;  // something else of these names
  }
  const WholeTensor values_item = whole_tensor(stored, fqn);
  const WholeTensor scales_item = whole_tensor(stored, scales);
  result.fqn = fqn;
  result.values = values_item.elements;
  result.values_file = values_item.place->relative_path;
  result.scales = scales_item.elements;
  result.scales_file = scales_item.place->relative_path;

  const Dims& shape = result.values.sizes;
  const size_t rank = shape.size();
  if (rank < 2) {
    throw Error(ErrorCode::kUnsupported, "a tensor of less than two dimensions has scales",
                {.key = fqn, .found = to_string(shape)});
  }
  Dims wanted = shape;
  result.size = shape;
  if (result.is_mxfp4) {
    wanted = Dims(shape.span().first(rank - 1));
    result.size = wanted;
    const int64_t group = checked_mul(shape[rank - 1], int64_t{2}, "size of a group");
    result.size[rank - 2] = checked_mul(shape[rank - 2], group, "size of a tensor");
    if (group == 0) throw Error(ErrorCode::kUnsupported, "a tensor in MXFP4 has groups without values", {.key = fqn});
  } else {
    wanted[rank - 2] = divide_up(shape[rank - 2], block_size);
    wanted[rank - 1] = divide_up(shape[rank - 1], block_size);
    for (const auto& [name, dtype] : {std::pair(fqn, result.values.dtype), std::pair(scales, result.scales.dtype)}) {
      if (is_convertible_to_float(dtype)) continue;
      throw Error(ErrorCode::kUnsupported, "a quantized tensor or its scales have a dtype that is not dequantized here",
                  {.key = name, .found = std::string(to_string(dtype))});
    }
  }
  if (result.scales.sizes != wanted) {
    throw Error(ErrorCode::kUnsupported, "the scales do not fit their tensor: is block_size right?",
                {.key = scales, .wanted = to_string(wanted), .found = to_string(result.scales.sizes)});
  }
  static_cast<void>(checked_mul(volume(result.size), int64_t{4}, "size of a tensor"));
  return result;
}

/// What is stored for an item whose transform says so; nothing for items without one.
std::optional<Quantized> quantized_item(const Metadata& loaded, const MetadataIndex& index, int64_t block_size) {
  const StorageInfo* place = loaded.storage_data.find(index);
  if (place == nullptr || place->transform_descriptors.size() != 1) return std::nullopt;
  const std::string& transform = place->transform_descriptors[0];
  Quantized result;
  result.fqn = index.fqn;
  result.is_mxfp4 = transform == kMxfp4Transform;
  if (!result.is_mxfp4 && !transform.starts_with(kBlockTransform)) return std::nullopt;
  const WholeTensor values = whole_tensor(loaded, result.fqn);
  const std::string scales_name = result.is_mxfp4 ? without_suffix(result.fqn, kMxfp4Values) + std::string(kMxfp4Scales)
                                                  : result.fqn + std::string(kBlockScales);
  const WholeTensor scales = whole_tensor(loaded, scales_name);
  result.values = values.elements;
  result.values_file = place->relative_path;
  result.scales = scales.elements;
  result.scales_file = scales.place->relative_path;
  result.size = values.elements.sizes;
  const size_t rank = result.size.size();
  const auto fail = [&] {
    throw Error(ErrorCode::kCorruptData, "the catalogue does not say how a tensor is quantized",
                {.key = result.fqn, .found = transform});
  };
  if (rank == 0 || result.scales.sizes.size() != rank) fail();
  if (result.is_mxfp4) {
    const int64_t groups = result.scales.sizes[rank - 1];
    if (groups == 0 || result.size[rank - 1] % (2 * groups) != 0) fail();
    result.values.dtype = DType::kUInt8;
    result.values.sizes = result.scales.sizes;
    result.values.sizes.push_back(result.size[rank - 1] / (2 * groups));
  } else {
    const auto dtype = dtype_from_string(std::string_view(transform).substr(kBlockTransform.size()));
    if (!dtype || rank < 2) fail();
    result.values.dtype = *dtype;
  }
  if (!is_inside(result.scales_of(whole_box(result.size), block_size), result.scales.sizes)) fail();
  return result;
}

/// Reads boxes of one file after the other.
class BoxReader {
 public:
  BoxReader(FileSystem& file_system, const std::string& directory, const HuggingFaceReaderOptions& options,
            ReadCounters& counters)
      : file_system_(file_system), directory_(directory), options_(options), counters_(counters) {}

  /// The elements of `box`, dense.
  Bytes read(const std::string& name, const DenseElements& elements, const Box& box) {
    return with_error_context({.file = name}, [&] {
      if (name != name_) {
        file_ = open_following(file_system_, directory_, name);
        name_ = name;
      }
      const CountedFile file(*file_, nullptr, counters_);
      Bytes bytes(static_cast<size_t>(
          checked_mul(volume(box.sizes), element_size(elements.dtype), "size of a part of a tensor")));
      add_to(counters_.bytes_needed, bytes.size());
      DirectReader reader(file, options_.coalesce_gap, nullptr, counters_, on_read_);
      reader.add(elements, box, {bytes.data(), elements.dtype, box.sizes, contiguous_strides(box.sizes), nullptr});
      reader.flush();
      add_to(counters_.bytes_staged, bytes.size());
      return bytes;
    });
  }

 private:
  FileSystem& file_system_;
  const std::string& directory_;
  const HuggingFaceReaderOptions& options_;
  ReadCounters& counters_;
  const std::function<void(uint64_t)> on_read_ = [](uint64_t) {};
  std::unique_ptr<RandomAccessFile> file_;
  std::string name_;
};

/// The values of `region`, row-major, from what is stored of it.
std::vector<float> dequantize(const Quantized& tensor, const Box& region, int64_t block_size, ByteSpan values,
                              ByteSpan scale_bytes) {
  const Box scale_box = tensor.scales_of(region, block_size);
  const size_t last = region.sizes.size() - 1;
  const auto columns = static_cast<size_t>(region.sizes[last]);
  std::vector<float> result(static_cast<size_t>(volume(region.sizes)));
  const size_t rows = result.size() / columns;
  const auto scale_columns = static_cast<size_t>(scale_box.sizes[last]);
  if (tensor.is_mxfp4) {
    const auto group = static_cast<size_t>(tensor.group());
    const size_t skipped = static_cast<size_t>(region.offsets[last]) % group;
    for (size_t row = 0; row < rows; ++row) {
      for (size_t column = 0; column < columns; ++column) {
        const size_t at = skipped + column;
        const auto pair = std::to_integer<unsigned>(values[(row * scale_columns * group + at) / 2]);
        const auto exponent = std::to_integer<uint8_t>(scale_bytes[row * scale_columns + at / group]);
        result[row * columns + column] = float4_value(at % 2 == 0 ? pair & 0xF : pair >> 4) * exponent_value(exponent);
      }
    }
    return result;
  }
  to_floats(values, tensor.values.dtype, result);
  std::vector<float> scales(static_cast<size_t>(volume(scale_box.sizes)));
  to_floats(scale_bytes, tensor.scales.dtype, scales);
  const auto block = static_cast<size_t>(block_size);
  const auto rows_of_matrix = static_cast<size_t>(region.sizes[last - 1]);
  const auto scale_rows = static_cast<size_t>(scale_box.sizes[last - 1]);
  const size_t first_row = static_cast<size_t>(region.offsets[last - 1]) % block;
  const size_t first_column = static_cast<size_t>(region.offsets[last]) % block;
  for (size_t row = 0; row < rows; ++row) {
    const size_t matrix = row / rows_of_matrix;
    const size_t scale_row = (first_row + row % rows_of_matrix) / block;
    const float* of_row = scales.data() + (matrix * scale_rows + scale_row) * scale_columns;
    for (size_t column = 0; column < columns; ++column) {
      result[row * columns + column] *= of_row[(first_column + column) / block];
    }
  }
  return result;
}

/// `region` in pieces of whole rows.
std::vector<Box> pieces_of(const Box& region) {
  const size_t last = region.sizes.size() - 1;
  const Dims leading(region.sizes.span().first(last));
  const int64_t rows = volume(leading);
  const int64_t step = std::max<int64_t>(1, kPieceElements / region.sizes[last]);
  std::vector<Box> pieces;
  for (int64_t begin = 0; begin < rows; begin += step) {
    for (const Box& part : flat_range_to_boxes(leading, begin, std::min(begin + step, rows))) {
      Box piece = region;
      for (size_t d = 0; d < last; ++d) {
        piece.offsets[d] += part.offsets[d];
        piece.sizes[d] = part.sizes[d];
      }
      pieces.push_back(std::move(piece));
    }
  }
  return pieces;
}

}  // namespace

QuantizedHuggingFaceStorageReader::QuantizedHuggingFaceStorageReader(std::string directory,
                                                                     QuantizedHuggingFaceReaderOptions options,
                                                                     FileSystem& file_system)
    : directory_(std::move(directory)),
      options_(options),
      file_system_(file_system),
      plain_(directory_, options.files, file_system) {
  if (options_.block_size < 1) {
    throw Error(ErrorCode::kInvalidArgument, "block_size of a QuantizedHuggingFaceStorageReader",
                {.wanted = "1 or more", .found = std::to_string(options_.block_size)});
  }
  if (options_.target_dtype != DType::kFloat32 && options_.target_dtype != DType::kBFloat16 &&
      options_.target_dtype != DType::kFloat16) {
    throw Error(ErrorCode::kInvalidArgument, "target_dtype of a QuantizedHuggingFaceStorageReader",
                {.wanted = "float32, bfloat16 or float16", .found = std::string(to_string(options_.target_dtype))});
  }
}

Metadata QuantizedHuggingFaceStorageReader::read_metadata() {
  const Metadata stored = plain_.read_metadata();
  Metadata loaded;
  OrderedMap<std::string, Quantized> quantized;
  for (const auto& [fqn, entry] : stored.state_dict_metadata) {
    auto found = find_quantized(stored, fqn, options_.block_size);
    if (!found) {
      loaded.state_dict_metadata.insert(fqn, entry);
      continue;
    }
    auto tensor = std::get<TensorStorageMetadata>(entry);
    tensor.properties.dtype = options_.target_dtype;
    tensor.size = found->size;
    tensor.chunks = {whole_box(found->size)};
    loaded.state_dict_metadata.insert(fqn, std::move(tensor));
    quantized.insert(fqn, *std::move(found));
  }
  for (const auto& [index, place] : stored.storage_data) {
    const Quantized* tensor = quantized.find(index.fqn);
    if (tensor == nullptr) {
      loaded.storage_data.insert(index, place);
      continue;
    }
    StorageInfo changed = place;
    changed.transform_descriptors = {tensor->is_mxfp4
                                         ? std::string(kMxfp4Transform)
                                         : std::string(kBlockTransform) + std::string(to_string(tensor->values.dtype))};
    loaded.storage_data.insert({index.fqn, Dims(tensor->size.size(), 0), 0}, std::move(changed));
  }
  validate(loaded);
  return loaded;
}

void QuantizedHuggingFaceStorageReader::set_up_storage_reader(const Metadata& metadata) {
  metadata_ = &metadata;
  counters_ = {};
  plain_.set_up_storage_reader(metadata);
}

void QuantizedHuggingFaceStorageReader::read_data(const LoadPlan& plan, LoadPlanner& planner,
                                                  const StorageContext& context) {
  if (metadata_ == nullptr) {
    throw Error(ErrorCode::kFailedPrecondition, "read_data before set_up_storage_reader", {.rank = context.rank});
  }
  struct Want {
    const ReadItem* item;
    Quantized tensor;
  };
  LoadPlan plain;
  std::vector<Want> wants;
  uint64_t total = 0;  // of what is dequantized
  for (const ReadItem& item : plan.items) {
    auto tensor = item.is_bytes || volume(item.lengths) == 0
                      ? std::nullopt
                      : quantized_item(*metadata_, item.storage_index, options_.block_size);
    if (!tensor) {
      plain.items.push_back(item);
      continue;
    }
    if (!is_inside({item.storage_offsets, item.lengths}, tensor->size)) {
      throw Error(ErrorCode::kInternal, "the plan wants a region outside its stored chunk", {.key = tensor->fqn});
    }
    total += static_cast<uint64_t>(volume(item.lengths) * element_size(options_.target_dtype));
    wants.push_back({&item, *std::move(tensor)});
  }
  uint64_t plain_total = 0;
  StorageContext with_total = context;
  with_total.progress = [&](const Progress& progress) {
    plain_total = progress.total;
    if (context.progress) context.progress({progress.step, progress.done, progress.total + total});
  };
  plain_.read_data(plain, planner, with_total);

  with_error_context({.rank = context.rank}, [&] {
    std::ranges::stable_sort(wants, [](const Want& a, const Want& b) {
      return std::tie(a.tensor.values_file, a.tensor.values.begin) <
             std::tie(b.tensor.values_file, b.tensor.values.begin);
    });
    const DType dtype = options_.target_dtype;
    uint64_t done = 0;
    std::mutex progress;
    const auto read = [&](const Want& want, BoxReader& values, BoxReader& scales) {
      const ReadItem* item = want.item;
      const Quantized& tensor = want.tensor;
      with_error_context(
          [&] { return ErrorContext{.key = tensor.fqn}; },
          [&] {
            const MutableTensorView view = resolve_destination(planner, *item, dtype);
            for (const Box& piece : pieces_of({item->storage_offsets, item->lengths})) {
              const Bytes stored = values.read(tensor.values_file, tensor.values, tensor.values_of(piece));
              const Bytes stored_scales =
                  scales.read(tensor.scales_file, tensor.scales, tensor.scales_of(piece, options_.block_size));
              const std::vector<float> floats = dequantize(tensor, piece, options_.block_size, stored, stored_scales);
              Bytes dense(floats.size() * static_cast<size_t>(element_size(dtype)));
              from_floats(floats, dtype, dense);
              int64_t first = 0;
              for (size_t d = 0; d < piece.offsets.size(); ++d) {
                first += (piece.offsets[d] - item->storage_offsets[d]) * view.strides[d];
              }
              copy_strided(dense.data(), contiguous_strides(piece.sizes), view.data + first * element_size(dtype),
                           view.strides, piece.sizes, element_size(dtype));
              const std::lock_guard lock(progress);
              done += dense.size();
              if (context.progress) context.progress({"read", plain_total + done, plain_total + total});
            }
            planner.commit_tensor(*item, view);
          });
    };
    const auto threads = static_cast<size_t>(options_.files.thread_count);
    const size_t batches = threads == 1 ? 1 : std::min(wants.size(), 4 * threads);
    std::atomic<bool> failed = false;
    run_parallel(batches, threads, failed, [&](size_t batch) {
      BoxReader values(file_system_, directory_, options_.files, counters_);
      BoxReader scales(file_system_, directory_, options_.files, counters_);
      const size_t end = wants.size() * (batch + 1) / batches;
      for (size_t i = wants.size() * batch / batches; i < end && !failed; ++i) read(wants[i], values, scales);
    });
  });
}

ReadCounters QuantizedHuggingFaceStorageReader::counters() const {
  ReadCounters sum = counters_;
  const ReadCounters& plain = plain_.counters();
  sum.bytes_needed += plain.bytes_needed;
  sum.bytes_payload += plain.bytes_payload;
  sum.bytes_read += plain.bytes_read;
  sum.reads += plain.reads;
  sum.bytes_staged += plain.bytes_staged;
  return sum;
}

}  // namespace reshard
