// SPDX-License-Identifier: Apache-2.0
// Double-quantised scales back to the fp16 ones that a product reads.
#pragma once

#include "common/dynamic_map.h"
#include "cpu/isa.h"

namespace kvopt::cpu {

// Rows [row_begin, row_end); row_begin is a multiple of tile32::kRows. Writes the padding rows too.
using ExpandScales = void (*)(const ExpandScalesParams& p, int64_t row_begin, int64_t row_end);

void wquant_expand_scales_scalar(const ExpandScalesParams& p, int64_t row_begin, int64_t row_end);
void wquant_expand_scales_avx2(const ExpandScalesParams& p, int64_t row_begin, int64_t row_end);

ExpandScales wquant_expand_scales(Isa isa);

}  // namespace kvopt::cpu
