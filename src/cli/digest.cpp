// SPDX-License-Identifier: BSD-3-Clause
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "reshard/convert/open_checkpoint.h"
#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/verify.h"

namespace reshard::cli {

int digest(const DigestOptions& options) {
  const auto reader = open_checkpoint(options.path, {}, file_system_at(options.path));
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  digest_tensors(CheckpointReader(*reader), [&](const std::string& fqn, const Sha256Digest& sum) {
    if (options.json) {
      json[fqn] = to_hex(sum);
    } else {
      std::printf("%s  %s\n", to_hex(sum).c_str(), printable(fqn).c_str());
    }
  });
  if (options.json) {
    std::printf("%s\n", json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace).c_str());
  }
  return 0;
}

}  // namespace reshard::cli
