// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// A drawing of a checkpoint: each tensor as a rectangle, each chunk in the colour of the file that holds it.

#include <string>

#include "reshard/metadata/metadata.h"

namespace reshard::cli {

/// An SVG document. A tensor of more than two dimensions is seen along the two that are cut most.
std::string map_of(const Metadata& metadata);

}  // namespace reshard::cli
