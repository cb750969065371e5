// SPDX-License-Identifier: Apache-2.0
// Reductions over the 32 lanes of a warp; every lane gets the result.
#pragma once

namespace kvopt::cuda {

__device__ __forceinline__ float warp_min(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    v = fminf(v, __shfl_xor_sync(0xFFFFFFFF, v, offset));
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFF, v, offset));
  return v;
}

}  // namespace kvopt::cuda
