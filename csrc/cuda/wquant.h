// SPDX-License-Identifier: Apache-2.0
// Quantising, packing and unpacking weights on CUDA, bit for bit as on the CPU. Same conventions as
// qlinear.h.
#pragma once

#include "common/params.h"

namespace kvopt::cuda {

// Whether the layouts and kernels of this folder know the format at this size.
bool is_valid_weight(const QuantFormat& f, int64_t n, int64_t k);

// An ordinary launch of nothing, behind every kernel that writes what products read as weights.
// Products are launched with programmatic overlap and read weights before they wait for the kernel
// in front; they may start when its blocks have left, which is before its writes are sure to be
// seen. This kernel starts when they are, so a product behind it may read ahead.
int settle_weights(void* stream);

int wquant_rtn(const RtnParams& p, void* stream);
int wquant_pack(const PackParams& p, void* stream);
int wquant_unpack(const PackParams& p, void* stream);
int wquant_dequantize(const DequantizeParams& p, void* stream);

}  // namespace kvopt::cuda
