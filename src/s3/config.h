// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// What S3Options leave open, from the environment and the files of the AWS tools.

#include "reshard/s3/s3_file_system.h"

namespace reshard::s3 {

/// `options` with credentials, region and, if there is one, endpoint filled in. Throws as S3FileSystem's constructor.
S3Options resolve(S3Options options);

}  // namespace reshard::s3
