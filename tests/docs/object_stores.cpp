// SPDX-License-Identifier: BSD-3-Clause
// The statements of docs/object-stores.md: compiled, not run, since they want a bucket.
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/s3/s3_file_system.h"

void save_and_load(reshard::StateDict& state);
void save_and_load(reshard::StateDict& state) {
#include "object-stores_1.inc"
}
