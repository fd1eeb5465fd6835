// SPDX-License-Identifier: BSD-3-Clause
#include "checkpoint/replica_load_state.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <functional>

#include "reshard/core/error.h"

namespace reshard {
namespace {

bool reads(const ProcessGroup& replicas) { return replicas.rank() == 0; }

/// Keys and shapes; what a broadcast needs to be equal.
std::string describe(const StateDictLoadState& state) {
  std::string text;
  const auto& entries = state.entries(FlattenRule::kCurrent);
  for (size_t e = 0; e < entries.size(); ++e) {
    text += entries[e].fqn + "\n";
    const auto* tensor = std::get_if<TensorEntry>(&entries[e].value);
    if (tensor == nullptr) continue;
    text += to_string(tensor->size) + std::string(to_string(tensor->properties.dtype));
    for (size_t c = 0; c < tensor->chunks.size(); ++c) {
      text += to_string(tensor->chunks[c]) +
              c10::DeviceTypeName(state.chunk_tensor(FlattenRule::kCurrent, e, c).device().type());
    }
  }
  return text;
}

/// Fills `tensor` with that of the group's first rank.
void broadcast(const at::Tensor& tensor, ProcessGroup& replicas) {
  const at::NoGradGuard no_grad;
  if (tensor.numel() == 0) return;
  at::Tensor target = tensor.detach();  // shares memory and version counter
  const at::Tensor dense = target.contiguous();
  at::Tensor bytes = dense.view(-1).view(at::kByte);
  replicas.broadcast(bytes, 0);
  if (reads(replicas)) return;
  if (dense.is_same(target)) {
    tensor.unsafeGetTensorImpl()->bump_version();  // those who watch it must see what came behind autograd's back
  } else {
    target.copy_(dense);
  }
}

Bytes broadcast(const Bytes& bytes, ProcessGroup& replicas) {
  at::Tensor size = at::empty({1}, at::kLong);
  *size.mutable_data_ptr<int64_t>() = static_cast<int64_t>(bytes.size());
  replicas.broadcast(size, 0);
  at::Tensor data = at::empty({*size.const_data_ptr<int64_t>()}, at::kByte);
  if (reads(replicas)) std::memcpy(data.mutable_data_ptr(), bytes.data(), bytes.size());
  replicas.broadcast(data, 0);
  const auto* begin = static_cast<const std::byte*>(data.const_data_ptr());
  return {begin, begin + data.numel()};
}

}  // namespace

ReplicaLoadState::ReplicaLoadState(StateDict& state, ProcessGroup& replicas) : target_(state), replicas_(replicas) {
  std::string text;
  try {
    text = describe(target_);
  } catch (...) {
    error_ = std::current_exception();
  }
  const auto hash = static_cast<int64_t>(std::hash<std::string>()(text));
  at::Tensor extremes = at::empty({2}, at::kLong);
  auto* values = extremes.mutable_data_ptr<int64_t>();
  values[0] = hash;
  values[1] = ~hash;  // its largest is the complement of the smallest hash
  replicas.all_reduce_max(extremes);
  if (error_ || values[0] == ~values[1]) return;
  error_ = std::make_exception_ptr(Error(
      ErrorCode::kInvalidArgument,
      "the ranks of a group of replicas load into different states: keys, sizes, dtypes, shards or devices differ",
      {.found = std::to_string(target_.entries(FlattenRule::kCurrent).size()) + " keys here"}));
}

const std::vector<StateEntry>& ReplicaLoadState::entries(FlattenRule rule) const {
  static const std::vector<StateEntry> kNothing;
  if (error_) std::rethrow_exception(error_);
  return reads(replicas_) ? target_.entries(rule) : kNothing;
}

void ReplicaLoadState::commit_tensor(FlattenRule rule, size_t entry, size_t chunk, const Box& region,
                                     const MutableTensorView& view) {
  target_.commit_tensor(rule, entry, chunk, region, view);
  const std::lock_guard lock(mutex_);
  rule_ = rule;
  tensors_.insert(entry);
}

void ReplicaLoadState::load_bytes(FlattenRule rule, size_t entry, ByteSpan archive) {
  target_.load_bytes(rule, entry, archive);
  const std::lock_guard lock(mutex_);
  rule_ = rule;
  archives_.emplace_back(entry, Bytes(archive.begin(), archive.end()));
}

void ReplicaLoadState::distribute(LoadReport& report) {
  ByteWriter writer;
  if (reads(replicas_)) {
    writer.u8(static_cast<uint8_t>(rule_));
    writer.varint(tensors_.size());
    for (const size_t entry : tensors_) writer.varint(entry);
    writer.varint(archives_.size());
    for (const auto& [entry, archive] : archives_) {
      writer.varint(entry);
      writer.blob(archive);
    }
    for (const auto* list : {&report.missing, &report.unexpected, &report.cast, &report.shape}) {
      writer.varint(list->size());
      for (const std::string& text : *list) writer.string(text);
    }
  }
  const Bytes message = broadcast(writer.take(), replicas_);
  ByteReader reader(message, "what the first replica read");
  rule_ = static_cast<FlattenRule>(reader.u8());
  std::vector<size_t> tensors(reader.count());
  for (size_t& entry : tensors) entry = reader.varint();
  std::vector<std::pair<size_t, ByteSpan>> archives(reader.count());
  for (auto& [entry, archive] : archives) {
    entry = reader.varint();
    archive = reader.blob();
  }
  if (!reads(replicas_)) {
    for (auto* list : {&report.missing, &report.unexpected, &report.cast, &report.shape}) {
      list->resize(reader.count());
      for (std::string& text : *list) text = reader.string();
    }
  }
  // Tensors first: a value that is loaded may take the place of what holds others.
  const auto& entries = target_.entries(rule_);
  for (const size_t entry : tensors) {
    for (size_t c = 0; c < std::get<TensorEntry>(entries.at(entry).value).chunks.size(); ++c)
      broadcast(target_.chunk_tensor(rule_, entry, c), replicas_);
  }
  if (reads(replicas_)) return;
  for (const auto& [entry, archive] : archives) target_.load_bytes(rule_, entry, archive);
}

}  // namespace reshard
