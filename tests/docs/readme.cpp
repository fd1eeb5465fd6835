// SPDX-License-Identifier: BSD-3-Clause
// The program of README.md.
#include "README_1.inc"
