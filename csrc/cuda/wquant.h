// SPDX-License-Identifier: Apache-2.0
// Quantising, packing and unpacking weights on CUDA, bit for bit as on the CPU. Same conventions as
// qlinear.h.
#pragma once

#include "common/params.h"

namespace kvopt::cuda {

int wquant_rtn(const RtnParams& p, void* stream);
int wquant_pack(const PackParams& p, void* stream);
int wquant_unpack(const PackParams& p, void* stream);
int wquant_dequantize(const DequantizeParams& p, void* stream);

}  // namespace kvopt::cuda
