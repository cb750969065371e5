// SPDX-License-Identifier: Apache-2.0
// Quantising, packing and unpacking weights on the CPU. Each call works on the rows [row_begin,
// row_end), which start at a multiple of tile32::kRows; rows of different tiles can be done by
// different threads.
#pragma once

#include "common/params.h"

namespace kvopt::cpu {

void wquant_rtn(const RtnParams& p, int64_t row_begin, int64_t row_end);
void wquant_pack(const PackParams& p, int64_t row_begin,
                 int64_t row_end);  // writes the padding rows too
void wquant_unpack(const PackParams& p, int64_t row_begin, int64_t row_end);
void wquant_dequantize(const DequantizeParams& p, int64_t row_begin, int64_t row_end);

}  // namespace kvopt::cpu
