// SPDX-License-Identifier: BSD-3-Clause
// The distributed case of docs/testing.md.
#include <ATen/ops/ones.h>

#include "testing_1.inc"
