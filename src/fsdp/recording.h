// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Recording: the operations of one on_meta build, and their replay.
//
// Tensors are known by their storage: each storage is created by one recorded operation (or existed before) and written
// by others. An argument is kept as a place in a storage (offset, sizes, strides, dtype), so views need no record. The
// values of some tensors are computed by replaying, in program order, the operations that their storages depend on,
// each random one from the generator state that it had in program order.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace reshard {

class Recording {
 public:
  /// A tensor as a place in a recorded storage.
  struct Place {
    size_t storage;
    int64_t offset;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    at::ScalarType dtype;
  };
  struct Operation {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;  // tensors of recorded storages are replaced by None, see places
    struct Argument {
      size_t index;                // into arguments
      std::optional<size_t> item;  // of a tensor list
      Place place;
    };
    std::vector<Argument> places{};
    std::vector<size_t> reads{};  // storages
    std::vector<size_t> writes{};
    std::vector<std::pair<size_t, Place>>
        creates{};                 // index of the result (counting list items), and what it was on meta
    at::Tensor random_state{};     // CPU generator before a random operation; undefined otherwise
    bool overwrites_self = false;  // a random in-place initialiser: old values do not matter
  };

  // Called while recording, by the fallback.
  void record(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);
  /// Advances the CPU generator as the recorded operations would have, noting the state before each random one. Called
  /// once, at the end.
  void replay_randomness();

  /// True if the tensor lives on the meta device and its values can be computed.
  bool knows(const at::Tensor& tensor) const;
  /// Values of known tensors, dense and on the CPU, in the same order. Leaves the generator as it was. Memory beyond
  /// the results is freed.
  std::vector<at::Tensor> materialize(const std::vector<at::Tensor>& tensors) const;
  /// Recorded tensors that somebody still holds: members that a module did not register are among them.
  std::vector<at::Tensor> alive() const;

 private:
  using Values = std::unordered_map<size_t, c10::Storage>;
  /// Computes the storages as they are before operation `end`.
  Values replay(const std::vector<size_t>& storages, size_t end) const;
  void execute(const Operation& operation, Values& values) const;
  static at::Tensor tensor_at(const Place& place, const Values& values);
  Place place_of(const at::Tensor& tensor) const;
  size_t storage_id(const at::Tensor& tensor, bool* created);

  std::vector<Operation> operations_;
  std::vector<c10::Storage> storages_;  // keeps addresses unique
  std::unordered_map<const c10::StorageImpl*, size_t> ids_;
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> results_;
  at::Tensor last_seed_state_;
};

}  // namespace reshard
