// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cstdio>
#include <functional>

#include "cli/commands.h"
#include "cli/elements.h"
#include "cli/output.h"
#include "cli/values.h"
#include "reshard/convert/open_checkpoint.h"
#include "reshard/storage/checkpoint_reader.h"

namespace reshard::cli {
namespace {

using Sink = std::function<void(ByteSpan)>;

/// The head of an .npy file: its length brings the elements to a multiple of 64.
std::string npy_head(const std::string& key, const TensorStorageMetadata& tensor) {
  const char* descr = numpy_descr(tensor.properties.dtype);
  if (descr == nullptr) {
    throw Error(ErrorCode::kUnsupported, "numpy has no such dtype; --raw gives the elements alone",
                {.key = key, .found = std::string(to_string(tensor.properties.dtype))});
  }
  std::string text = std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (";
  for (const int64_t n : tensor.size) text += std::to_string(n) + ", ";
  text += "), }";
  constexpr size_t kBefore = 10;  // magic, version, length
  constexpr size_t kAlignment = 64;
  text.append((kAlignment - (kBefore + text.size() + 1) % kAlignment) % kAlignment, ' ') += '\n';
  std::string head("\x93NUMPY\x01\x00", 8);
  head += static_cast<char>(text.size() & 0xFF);
  head += static_cast<char>(text.size() >> 8);
  return head + text;
}

void write_tensor(const CheckpointReader& checkpoint, const ExtractOptions& options, const Sink& sink) {
  const TensorStorageMetadata& tensor = checkpoint.tensor(options.key);
  if (!options.raw) sink(as_bytes(npy_head(options.key, tensor)));
  const int64_t size = element_size(tensor.properties.dtype);
  const auto total = static_cast<uint64_t>(volume(tensor.size) * size);
  ProgressBar bar;
  uint64_t done = 0;
  Bytes block;
  for (const Box& box : cut_into_blocks(whole_box(tensor.size),
                                        std::max<int64_t>(1, static_cast<int64_t>(options.block_bytes) / size))) {
    block.resize(static_cast<size_t>(volume(box.sizes) * size));
    checkpoint.read_box(options.key, box, block);
    sink(block);
    done += block.size();
    bar.show("extract", done, total);
  }
}

void write_value(const CheckpointReader& checkpoint, const ExtractOptions& options, const Sink& sink) {
  Bytes archive = checkpoint.read_value(options.key);
  if (options.raw) return sink(archive);
  const StoredValue value = with_error_context({.key = options.key}, [&] { return StoredValue(std::move(archive)); });
  sink(as_bytes(dump(to_json(value)) + "\n"));
}

}  // namespace

int extract(const ExtractOptions& options) {
  const auto reader = open_checkpoint(options.source, {}, file_system_at(options.source));
  const CheckpointReader checkpoint(*reader);
  const StorageMetadata* entry = checkpoint.metadata().state_dict_metadata.find(options.key);
  if (entry == nullptr) throw Error(ErrorCode::kNotFound, "the checkpoint has no such key", {.key = options.key});
  const bool is_tensor = std::holds_alternative<TensorStorageMetadata>(*entry);
  const auto write = [&](const Sink& sink) {
    is_tensor ? write_tensor(checkpoint, options, sink) : write_value(checkpoint, options, sink);
  };
  if (options.output.empty() && (is_tensor || options.raw)) {
    throw Error(ErrorCode::kInvalidArgument, "bytes go to a file: give -o FILE, or -o - for stdout",
                {.key = options.key});
  }
  if (options.output.empty() || options.output == "-") {
    write([](ByteSpan bytes) {
      if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size()) {
        throw Error(ErrorCode::kIo, "cannot write the output");
      }
    });
    return 0;
  }
  check_file_destination(options.source, options.output, options.force);
  catch_interrupts();
  write_file_atomically(options.output, write);
  return 0;
}

}  // namespace reshard::cli
