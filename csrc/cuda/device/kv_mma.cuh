// SPDX-License-Identifier: Apache-2.0
// m16n8k16 products (fragments as in mma.cuh) of numbers in the model's own 16-bit type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/mma.cuh"

namespace kvopt::cuda {

// bfloat16 from sm_80 on; the host sends it elsewhere on sm_75.
template <bool kBFloat>
__device__ __forceinline__ void mma_step(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBFloat) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    return;
  }
#endif
  mma_16x8x16(c, a, make_uint2(b0, b1));
}

}  // namespace kvopt::cuda
