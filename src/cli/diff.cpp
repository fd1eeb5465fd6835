// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/elements.h"
#include "cli/output.h"
#include "cli/values.h"
#include "reshard/convert/open_checkpoint.h"
#include "reshard/storage/checkpoint_reader.h"

namespace reshard::cli {
namespace {

using Json = nlohmann::ordered_json;

/// One line of the result.
struct Difference {
  char sign = '~';  // '-': only in a, '+': only in b, '~': in both
  std::string key;
  std::string what;
  Json json;
};

std::string number(long double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.6Lg", value);
  return text;
}

std::string text_of(const TensorStorageMetadata& tensor) {
  return std::string(to_string(tensor.properties.dtype)) + " " + to_string(tensor.size);
}

uint64_t tensor_bytes(const TensorStorageMetadata& tensor) {
  return static_cast<uint64_t>(volume(tensor.size) * element_size(tensor.properties.dtype));
}

/// Compares the elements of two tensors, block by block.
class ElementComparison {
 public:
  ElementComparison(DType dtype, const DiffOptions& options)
      : dtype_(dtype), size_(element_size(dtype)), parts_(parts_of(dtype)), options_(options) {}

  void add(const Box& box, const Bytes& a, const Bytes& b) {
    const int64_t elements = volume(box.sizes);
    elements_ += static_cast<uint64_t>(elements);
    if (a == b) return;
    for (int64_t i = 0; i < elements; ++i) {
      const std::byte* x = a.data() + i * size_;
      const std::byte* y = b.data() + i * size_;
      if (std::memcmp(x, y, static_cast<size_t>(size_)) == 0) continue;
      const long double distance = distance_of(x, y);
      if (is_near(x, y, distance)) continue;
      ++different_;
      // A NaN on one side is farther away than anything.
      if (different_ == 1 || distance > largest_ || (std::isnan(distance) && !std::isnan(largest_))) {
        largest_ = distance;
        at_ = box.offsets;
        int64_t left = i;
        for (size_t d = box.sizes.size(); d-- > 0; left /= box.sizes[d]) at_[d] += left % box.sizes[d];
      }
    }
  }

  std::optional<Difference> result(const std::string& key) const {
    if (different_ == 0) return std::nullopt;
    Json json{{"elements", elements_}, {"different", different_}, {"at", std::vector<int64_t>(at_.begin(), at_.end())}};
    std::string what = std::to_string(different_) + " of " + std::to_string(elements_) + " elements differ";
    if (parts_ > 0) {
      what += ", most at " + to_string(at_) + ": by " + number(largest_);
      json["largest"] = std::isfinite(largest_) ? Json(static_cast<double>(largest_)) : Json(number(largest_));
    }
    return Difference{'~', key, std::move(what), {{"values", std::move(json)}}};
  }

 private:
  /// Of complex numbers, the largest of their parts.
  long double distance_of(const std::byte* a, const std::byte* b) const {
    long double distance = 0;
    for (int part = 0; part < parts_; ++part) {
      const long double x = part_value(dtype_, a, part);
      const long double y = part_value(dtype_, b, part);
      if (x == y || (std::isnan(x) && std::isnan(y))) continue;
      const long double d = std::fabs(x - y);
      if (std::isnan(d)) return d;
      distance = std::max(distance, d);
    }
    return distance;
  }
  bool is_near(const std::byte*, const std::byte* b, long double distance) const {
    if (parts_ == 0 || (options_.atol == 0 && options_.rtol == 0)) return false;  // bit for bit
    if (std::isnan(distance)) return false;
    if (distance == 0) return true;
    long double reach = 0;
    for (int part = 0; part < parts_; ++part) reach = std::max(reach, std::fabs(part_value(dtype_, b, part)));
    if (std::isinf(distance) || std::isinf(reach)) return false;
    return distance <= options_.atol + static_cast<long double>(options_.rtol) * reach;
  }

  DType dtype_;
  int64_t size_;
  int parts_;
  const DiffOptions& options_;
  uint64_t elements_ = 0;
  uint64_t different_ = 0;
  long double largest_ = 0;
  Dims at_;
};

class Diff {
 public:
  Diff(const CheckpointReader& a, const CheckpointReader& b, const DiffOptions& options)
      : a_(a), b_(b), options_(options) {}

  std::vector<Difference> run() {
    const auto& left = a_.metadata().state_dict_metadata;
    const auto& right = b_.metadata().state_dict_metadata;
    uint64_t total = 0;
    for (const auto& [key, entry] : left) {
      const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
      if (tensor != nullptr && right.contains(key)) total += tensor_bytes(*tensor);
    }
    uint64_t done = 0;
    for (const auto& [key, entry] : left) {
      const StorageMetadata* other = right.find(key);
      if (other == nullptr) {
        found_.push_back({'-', key, described(entry), {{"only_in", "a"}}});
        continue;
      }
      const auto* x = std::get_if<TensorStorageMetadata>(&entry);
      const auto* y = std::get_if<TensorStorageMetadata>(other);
      if ((x == nullptr) != (y == nullptr)) {
        changed(key, "kind", described(entry), described(*other));
      } else if (x == nullptr) {
        compare_values(key);
      } else {
        if (x->properties.dtype != y->properties.dtype || x->size != y->size) {
          changed(key, "tensor", text_of(*x), text_of(*y));
        } else {
          compare_tensors(key, *x, done, total);
        }
        done += tensor_bytes(*x);
      }
      if (options_.quiet && !found_.empty()) return std::move(found_);
    }
    for (const auto& [key, entry] : right) {
      if (!left.contains(key)) found_.push_back({'+', key, described(entry), {{"only_in", "b"}}});
    }
    return std::move(found_);
  }

 private:
  static std::string described(const StorageMetadata& entry) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    return tensor != nullptr ? text_of(*tensor) : "value";
  }
  void changed(const std::string& key, const char* what, const std::string& from, const std::string& to) {
    found_.push_back({'~', key, from + " -> " + to, {{what, {from, to}}}});
  }
  void compare_values(const std::string& key) {
    const StoredValue x = with_error_context({.key = key}, [&] { return StoredValue(a_.read_value(key)); });
    const StoredValue y = with_error_context({.key = key}, [&] { return StoredValue(b_.read_value(key)); });
    if (is_same(x, y)) return;
    const Json from = to_json(x);
    const Json to = to_json(y);
    const auto shortened = [](const std::string& text) {
      constexpr size_t kMost = 60;
      return text.size() <= kMost ? text : text.substr(0, kMost) + "...";
    };
    found_.push_back({'~', key, shortened(dump(from)) + " -> " + shortened(dump(to)), {{"value", {from, to}}}});
  }
  void compare_tensors(const std::string& key, const TensorStorageMetadata& tensor, uint64_t done, uint64_t total) {
    const int64_t size = element_size(tensor.properties.dtype);
    ElementComparison comparison(tensor.properties.dtype, options_);
    Bytes x;
    Bytes y;
    for (const Box& box : cut_into_blocks(whole_box(tensor.size),
                                          std::max<int64_t>(1, static_cast<int64_t>(options_.block_bytes) / size))) {
      x.resize(static_cast<size_t>(volume(box.sizes) * size));
      y.resize(x.size());
      a_.read_box(key, box, x);
      b_.read_box(key, box, y);
      comparison.add(box, x, y);
      done += x.size();
      bar_.show("diff", done, total);
    }
    if (auto difference = comparison.result(key)) found_.push_back(*std::move(difference));
  }

  const CheckpointReader& a_;
  const CheckpointReader& b_;
  const DiffOptions& options_;
  ProgressBar bar_;
  std::vector<Difference> found_;
};

}  // namespace

int diff(const DiffOptions& options) {
  const auto a = open_checkpoint(options.a, {}, file_system_at(options.a));
  const auto b = open_checkpoint(options.b, {}, file_system_at(options.b));
  const CheckpointReader left(*a);
  const CheckpointReader right(*b);
  const std::vector<Difference> found = Diff(left, right, options).run();
  if (!options.quiet && options.json) {
    Json json = Json::object();
    for (const Difference& difference : found) json[difference.key] = difference.json;
    std::printf("%s\n", json.dump(1, ' ', false, Json::error_handler_t::replace).c_str());
  } else if (!options.quiet) {
    for (const Difference& difference : found) {
      std::printf("%c %s: %s\n", difference.sign, printable(difference.key).c_str(),
                  printable(difference.what).c_str());
    }
  }
  return found.empty() ? 0 : 1;
}

}  // namespace reshard::cli
