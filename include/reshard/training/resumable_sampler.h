// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A random sampler whose place in the data can be saved: after a resume, on any number of ranks, the run sees the samples that it had not
// seen, in the order in which it would have seen them.

#include <torch/csrc/api/include/torch/data/samplers/base.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "reshard/state_dict/state_dict.h"

namespace reshard {

struct ResumableSamplerOptions {
  size_t num_replicas = 1;  // ranks, as in torch::data::samplers::DistributedRandomSampler
  size_t rank = 0;
  uint64_t seed = 0;  // equal on all ranks
  /// The last batch of an epoch is made full, equal on all ranks, with samples from its beginning. False: samples that do not make one
  /// more on every rank are left out.
  bool allow_duplicates = true;
};

/// All ranks together walk through one permutation of the dataset, which depends on seed and epoch alone; with batches of b on n ranks a step
/// takes the next n * b samples of it, the first b of them for rank 0. Used by a DataLoader, or by hand, on one thread. Every rank calls
/// next() with the same batch size and equally often. Linear in the size of the dataset for each epoch, 8 bytes of memory a sample.
class ResumableDistributedSampler : public torch::data::samplers::Sampler<> {
 public:
  explicit ResumableDistributedSampler(size_t size, const ResumableSamplerOptions& options = {});

  /// The beginning of the next epoch; of the current one if nothing of it was taken yet. (A DataLoader calls it before each epoch, the
  /// first and a resumed one too.) In the middle of an epoch it goes on there once after load_state_dict().
  void reset(std::optional<size_t> new_size = std::nullopt) override;
  /// This rank's samples of the next step, or nothing at the end of the epoch. Fewer than `batch_size` in the last step; as many on each rank.
  std::optional<std::vector<size_t>> next(size_t batch_size) override;

  uint64_t epoch() const { return epoch_; }
  /// Samples of this epoch that all ranks together have taken.
  size_t position() const { return position_; }

  /// {"epoch", "position", "size", "seed"}: equal on all ranks, so a checkpoint holds it once, for any number of ranks. A DataLoader with
  /// workers takes samples ahead: save what the training loop has consumed, with the position set back to that.
  StateDict state_dict() const;
  /// Throws kNotFound or kInvalidArgument naming the key, also for the state of a dataset of another size.
  void load_state_dict(const StateDict& state);

  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void shuffle();
  void set(uint64_t epoch, size_t position, size_t size, uint64_t seed);

  ResumableSamplerOptions options_;
  size_t size_;
  uint64_t epoch_ = 0;
  size_t position_ = 0;
  bool resumed_ = false;
  std::vector<size_t> order_;
};

}  // namespace reshard
