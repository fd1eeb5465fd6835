// SPDX-License-Identifier: BSD-3-Clause
#include "cli/commands.h"
#include "cli/output.h"
#include "reshard/convert/format_utils.h"

namespace reshard::cli {

int convert(const ConvertCommandOptions& options) {
  // A further kind that can be written is added here, in app.h (--to) and in convert/.
  const auto kind = options.to == to_string(CheckpointKind::kTorch)         ? CheckpointKind::kTorch
                    : options.to == to_string(CheckpointKind::kSafetensors) ? CheckpointKind::kSafetensors
                                                                            : CheckpointKind::kDcp;
  detect_checkpoint_kind(options.source);
  check_destination(options.source, options.destination, kind, options.force);
  catch_interrupts();
  ProgressBar bar;
  convert_checkpoint(options.source, options.destination, kind, options.ranks,
                     {.block_bytes = options.block_bytes,
                      .overwrite = options.force,
                      .verify_source = !options.no_verify,
                      .progress = bar.fn()});
  return 0;
}

}  // namespace reshard::cli
