// SPDX-License-Identifier: BSD-3-Clause
// The golden checkpoints through save and load: nested state dicts, tensors of every dtype, every kind of value.
#include "support/oracle.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include <bit>

#include "reshard/checkpoint/checkpoint.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/state_dict/flatten.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using nlohmann::json;

std::string hex_of(ByteSpan bytes) {
  std::string text;
  char pair[3];
  for (const std::byte b : bytes) {
    std::snprintf(pair, sizeof pair, "%02x", std::to_integer<unsigned>(b));
    text += pair;
  }
  return text;
}
ByteSpan bytes_of(const at::Tensor& contiguous) {
  return {static_cast<const std::byte*>(contiguous.const_data_ptr()), contiguous.nbytes()};
}

/// What a program that had saved this value would load into: the same containers, None for everything else.
StateValue target_of(const json& tagged) {
  const std::string& type = tagged.at("type").get_ref<const std::string&>();
  if (type == "list") {
    StateList list;
    for (const json& item : tagged.at("items")) list.push_back(target_of(item));
    return list;
  }
  if (type == "dict") {
    StateDict dict;
    for (const json& item : tagged.at("items")) {
      if (item[0].at("type") != "str") return None{};
      dict[item[0].at("value").get<std::string>()] = target_of(item[1]);
    }
    return dict;
  }
  return None{};
}

ObjectPath path_of(const json& path) {
  ObjectPath result;
  for (const json& element : path) {
    if (element.is_string()) {
      result.emplace_back(element.get<std::string>());
    } else {
      result.emplace_back(element.get<int64_t>());
    }
  }
  return result;
}

const StateValue& value_at(const StateDict& state, const ObjectPath& path) {
  const StateValue* value = &state.at(std::get<std::string>(path.at(0)));
  for (size_t i = 1; i < path.size(); ++i) {
    const auto* key = std::get_if<std::string>(&path[i]);
    value = key != nullptr ? &value->as<StateDict>().at(*key)
                           : &value->as<StateList>().at(static_cast<size_t>(std::get<int64_t>(path[i])));
  }
  return *value;
}

/// The tagged form of expected.json. An opaque value is said to be one.
json tagged(const StateValue& value) {
  const auto items = [](const std::vector<StateValue>& values) {
    json list = json::array();
    for (const StateValue& v : values) list.push_back(tagged(v));
    return list;
  };
  if (value.is<None>()) return {{"type", "none"}};
  if (value.is<bool>()) return {{"type", "bool"}, {"value", value.as<bool>()}};
  if (value.is<int64_t>()) return {{"type", "int"}, {"value", std::to_string(value.as<int64_t>())}};
  if (value.is<double>()) return {{"type", "float"}, {"bits", std::bit_cast<uint64_t>(value.as<double>())}};
  if (value.is<std::string>()) return {{"type", "str"}, {"value", value.as<std::string>()}};
  if (value.is<ByteString>()) return {{"type", "bytes"}, {"hex", hex_of(as_bytes(value.as<ByteString>().data))}};
  if (value.is<StateList>()) return {{"type", "list"}, {"items", items(value.as<StateList>())}};
  if (value.is<StateTuple>()) return {{"type", "tuple"}, {"items", items(value.as<StateTuple>().items)}};
  if (value.is<StateDict>()) {
    json list = json::array();
    for (const auto& [key, item] : value.as<StateDict>().items())
      list.push_back({{{"type", "str"}, {"value", key}}, tagged(item)});
    return {{"type", "dict"}, {"items", list}};
  }
  if (value.is<at::Tensor>()) {
    const at::Tensor tensor = value.as<at::Tensor>().contiguous();
    return {{"type", "tensor"},
            {"dtype", to_string(to_dtype(tensor.scalar_type()))},
            {"shape", tensor.sizes().vec()},
            {"hex", hex_of(bytes_of(tensor))}};
  }
  return {{"type", value.type_name()}};
}

/// As expected.json has it, floats by their bits.
json with_float_bits(json value) {
  if (value.is_object() && value.value("type", "") == "float") {
    const std::string hex = value.at("hex");
    return {{"type", "float"}, {"bits", std::bit_cast<uint64_t>(std::strtod(hex.c_str(), nullptr))}};
  }
  if (value.is_structured()) {
    for (auto& part : value) part = with_float_bits(part);
  }
  return value;
}

/// The same containers and tensors, with other contents.
StateValue blank(const StateValue& value) {
  if (value.is<StateList>()) {
    StateList list;
    for (const StateValue& item : value.as<StateList>()) list.push_back(blank(item));
    return list;
  }
  if (value.is<StateDict>()) {
    StateDict dict;
    for (const auto& [key, item] : value.as<StateDict>().items()) dict[key] = blank(item);
    return dict;
  }
  return value.is<at::Tensor>() ? StateValue(at::empty_like(value.as<at::Tensor>())) : StateValue(None{});
}

class OracleCheckpointTest : public ::testing::TestWithParam<std::string> {
 protected:
  OracleCheckpointTest() : oracle_(GetParam()) {}

  /// A state dict as the program had that saved the checkpoint, without its contents.
  StateDict empty_state() const {
    StateDict state;
    for (const auto& [fqn, path] : oracle_.expected().at("paths").items()) {
      const json& tensors = oracle_.expected().at("tensors");
      if (const auto it = tensors.find(fqn); it != tensors.end()) {
        const auto shape = it->at("shape").get<std::vector<int64_t>>();
        const auto dtype = dtype_from_string(it->at("dtype").get_ref<const std::string&>());
        set_at_path(state, path_of(path), at::empty(shape, at::TensorOptions(to_scalar_type(dtype.value()))));
      } else {
        set_at_path(state, path_of(path), target_of(oracle_.expected().at("values").at(fqn)));
      }
    }
    return state;
  }

  void expect_contents(const StateDict& state) const {
    for (const auto& [fqn, path] : oracle_.expected().at("paths").items()) {
      SCOPED_TRACE(fqn);
      const StateValue& value = value_at(state, path_of(path));
      if (oracle_.expected().at("tensors").contains(fqn)) {
        EXPECT_TRUE(std::ranges::equal(bytes_of(value.as<at::Tensor>()), oracle_.tensor(fqn)));
      } else if (value.is<OpaqueValue>()) {  // integers of more than 64 bits: the very bytes that PyTorch wrote
        EXPECT_EQ(*value.as<OpaqueValue>().archive, item(fqn));
      } else {
        EXPECT_EQ(tagged(value), with_float_bits(oracle_.expected().at("values").at(fqn)));
      }
    }
  }

  Bytes item(const std::string& fqn) const {
    const json& place = oracle_.expected().at("catalogue").at("bytes").at(fqn);
    const Bytes file = oracle_.file(place.at("file"));
    const ByteSpan bytes = ByteSpan(file).subspan(place.at("offset").get<size_t>(), place.at("length").get<size_t>());
    return {bytes.begin(), bytes.end()};
  }
  OracleCase oracle_;
};

INSTANTIATE_TEST_SUITE_P(Checkpoints, OracleCheckpointTest, ::testing::ValuesIn(OracleCase::names()),
                         [](const auto& test) {
                           std::string name = "Torch" + test.param;
                           std::erase_if(name, [](char c) { return c == '.' || c == '_' || c == '/'; });
                           return name;
                         });

// Into the nested dict that was saved, also where that release flattened it otherwise; then saved by this library, and loaded again.
TEST_P(OracleCheckpointTest, LoadsAndSurvivesSavingAgain) {
  StateDict state = empty_state();
  const LoadReport report = load(state, FileSystemReader(oracle_.directory().string()));
  EXPECT_TRUE(report.missing.empty() && report.unexpected.empty() && report.cast.empty());
  expect_contents(state);

  const TemporaryDirectory directory;
  save(state, FileSystemWriter(directory.path(), {.sync_files = false}));
  StateDict again = blank(state).as<StateDict>();
  load(again, FileSystemReader(directory.path()));
  expect_contents(again);
}

}  // namespace
}  // namespace reshard
