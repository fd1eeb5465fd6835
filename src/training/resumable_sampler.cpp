// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/training/resumable_sampler.h"

#include <torch/csrc/api/include/torch/serialize/archive.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

#include "reshard/core/error.h"

namespace reshard {
namespace {

int64_t as_int64(uint64_t value) { return static_cast<int64_t>(value); }

uint64_t number(const StateDict& state, const char* key) { return static_cast<uint64_t>(state.at(key).as<int64_t>()); }

}  // namespace

ResumableDistributedSampler::ResumableDistributedSampler(size_t size, const ResumableSamplerOptions& options)
    : options_(options), size_(size) {
  if (options_.rank >= options_.num_replicas) {
    throw Error(ErrorCode::kInvalidArgument, "no such rank to sample for",
                {.wanted = "0 to " + std::to_string(options_.num_replicas) + ", the end not included",
                 .found = std::to_string(options_.rank)});
  }
  shuffle();
}

void ResumableDistributedSampler::shuffle() {
  order_.resize(size_);
  std::iota(order_.begin(), order_.end(), size_t{0});
  // A shuffle of our own: std::shuffle may give another order with another standard library.
  std::seed_seq words{static_cast<uint32_t>(options_.seed), static_cast<uint32_t>(options_.seed >> 32),
                      static_cast<uint32_t>(epoch_), static_cast<uint32_t>(epoch_ >> 32)};
  std::mt19937_64 random(words);
  for (size_t i = size_; i > 1; --i) {
    const uint64_t limit = UINT64_MAX - UINT64_MAX % i;  // so that every remainder is equally likely
    uint64_t draw = random();
    while (draw >= limit) draw = random();
    std::swap(order_[i - 1], order_[static_cast<size_t>(draw % i)]);
  }
}

void ResumableDistributedSampler::reset(std::optional<size_t> new_size) {
  const bool resumed = std::exchange(resumed_, false);
  if (new_size && *new_size != size_) {
    size_ = *new_size;
    epoch_ += position_ == 0 ? 0 : 1;
    position_ = 0;
  } else if (position_ == 0 || resumed) {
    return;
  } else {
    ++epoch_;
    position_ = 0;
  }
  shuffle();
}

std::optional<std::vector<size_t>> ResumableDistributedSampler::next(size_t batch_size) {
  resumed_ = false;
  const size_t n = options_.num_replicas;
  const size_t left = size_ - position_;
  // Of each rank.
  const size_t count = std::min(batch_size, options_.allow_duplicates ? left / n + (left % n == 0 ? 0 : 1) : left / n);
  if (count == 0) {
    position_ = size_;
    return std::nullopt;
  }
  std::vector<size_t> samples(count);
  for (size_t i = 0; i < count; ++i) samples[i] = order_[(position_ + options_.rank * count + i) % size_];
  position_ = std::min(size_, position_ + n * count);
  return samples;
}

StateDict ResumableDistributedSampler::state_dict() const {
  return {{"epoch", as_int64(epoch_)},
          {"position", as_int64(position_)},
          {"size", as_int64(size_)},
          {"seed", as_int64(options_.seed)}};
}

void ResumableDistributedSampler::set(uint64_t epoch, size_t position, size_t size, uint64_t seed) {
  if (size != size_) {
    throw Error(ErrorCode::kInvalidArgument, "the position in a dataset of another size",
                {.key = "size", .wanted = std::to_string(size_), .found = std::to_string(size)});
  }
  if (position > size) {
    throw Error(ErrorCode::kInvalidArgument, "a position behind the end of the dataset",
                {.key = "position", .wanted = "at most " + std::to_string(size), .found = std::to_string(position)});
  }
  epoch_ = epoch;
  position_ = position;
  options_.seed = seed;
  resumed_ = true;
  shuffle();
}

void ResumableDistributedSampler::load_state_dict(const StateDict& state) {
  const uint64_t epoch = number(state, "epoch");
  const uint64_t position = number(state, "position");
  const uint64_t size = number(state, "size");
  set(epoch, static_cast<size_t>(position), static_cast<size_t>(size), number(state, "seed"));
}

void ResumableDistributedSampler::save(torch::serialize::OutputArchive& archive) const {
  const StateDict state = state_dict();
  for (const auto& [key, value] : state.items()) archive.write(key, c10::IValue(value.as<int64_t>()));
}

void ResumableDistributedSampler::load(torch::serialize::InputArchive& archive) {
  StateDict state = state_dict();
  for (auto& [key, value] : state.items()) {
    c10::IValue read;
    archive.read(key, read);
    value = read.toInt();
  }
  load_state_dict(state);
}

}  // namespace reshard
