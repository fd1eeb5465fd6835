// SPDX-License-Identifier: BSD-3-Clause
#include "cli/commands.h"
#ifdef RESHARD_WITH_S3
#include "reshard/s3/s3_file_system.h"
#endif

namespace reshard::cli {

FileSystem& file_system_at(const std::string& path) {
  if (!path.starts_with("s3://")) return local_file_system();
#ifdef RESHARD_WITH_S3
  static S3FileSystem s3;
  return s3;
#else
  throw Error(ErrorCode::kUnsupported, "this program was built without libcurl, which object stores need",
              {.file = path});
#endif
}

}  // namespace reshard::cli
