// SPDX-License-Identifier: Apache-2.0
// Double-quantised scales back to the fp16 ones that a product reads. Same conventions as
// qlinear.h.
#pragma once

#include "common/dynamic_map.h"

namespace kvopt::cuda {

int wquant_expand_scales(const ExpandScalesParams& p, void* stream);

}  // namespace kvopt::cuda
