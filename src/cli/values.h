// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Values of a checkpoint that are no tensors: as JSON for people, and whether two are the same.

#include <nlohmann/json.hpp>
#include <string>

#include "reshard/format/torch_archive.h"

namespace reshard::cli {

/// A value with the bytes that it was read from.
struct StoredValue {
  explicit StoredValue(Bytes archive_bytes)
      : bytes(std::move(archive_bytes)), archive(decode_value_archive(MemorySource(bytes))) {}
  Bytes bytes;
  ValueArchive archive;
};

/// None, bools, numbers, text, lists and tuples as one would write them; dicts as objects, or as lists of pairs where a key is
/// no text. What JSON has no form for is an object with one key that says what it is: "bytes" (hexadecimal), "set", "tensor"
/// (dtype and shape), "float" (nan, inf), "int" (of more than 64 bits, hexadecimal), "object" (a class or a call, which is not
/// carried out).
nlohmann::ordered_json to_json(const StoredValue& value);
/// JSON on one line; what is no UTF-8 is replaced.
std::string dump(const nlohmann::ordered_json& json);

/// The same types and contents, tensors inside by their elements. The order of the keys of a dict does not count.
bool is_same(const StoredValue& a, const StoredValue& b);

}  // namespace reshard::cli
