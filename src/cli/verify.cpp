// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/storage/verify.h"

#include <cinttypes>
#include <cstdio>

#include "cli/commands.h"
#include "reshard/convert/open_checkpoint.h"

namespace reshard::cli {

int verify(const VerifyOptions& options) {
  FileSystem& files = file_system_at(options.path);
  const auto verified = [&] {
    switch (detect_checkpoint_kind(options.path, files)) {
      case CheckpointKind::kTorch:
        return verify_torch_save(options.path, files);
      case CheckpointKind::kSafetensors:
        return verify_safetensors(options.path, files);
      case CheckpointKind::kDcp:
        break;
    }
    return verify_checkpoint(options.path, files);
  };
  const VerifyReport report = verified();
  for (const Error& problem : report.problems) std::fprintf(stderr, "reshard: %s\n", printable(problem.what()).c_str());
  if (!options.quiet) {
    for (const std::string& note : report.notes) std::printf("note: %s\n", printable(note).c_str());
    std::printf("%s: %" PRIu64 " tensors and %" PRIu64 " values in %" PRIu64 " items, %" PRIu64 " files, %s",
                report.problems.empty() ? "whole" : "broken", report.tensors, report.values, report.items, report.files,
                readable_bytes(report.bytes).c_str());
    if (!report.problems.empty()) std::printf("; %zu problems", report.problems.size());
    std::printf("\n");
  }
  return report.problems.empty() ? 0 : 1;
}

}  // namespace reshard::cli
