// SPDX-License-Identifier: Apache-2.0
// D = A * B + D on the tensor cores: A 16 x 16 (rows of the weight), B 16 x 8 (its columns are rows
// of x), fp32 sums.
//
// Lane = 4 * g + t holds, of one 16-column step (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//     a[0] = A[g][2t, 2t+1]         a[1] = A[g+8][2t, 2t+1]
//     a[2] = A[g][2t+8, 2t+9]       a[3] = A[g+8][2t+8, 2t+9]
//     b.x  = B[2t, 2t+1][g]         b.y  = B[2t+8, 2t+9][g]
//     c[0], c[1] = C[g][2t, 2t+1]   c[2], c[3] = C[g+8][2t, 2t+1]
//
// The product does not mind which column of the weight is called 2t + 8, as long as A and B agree:
// the packed layout calls columns 4t .. 4t+3 of a step (2t, 2t+1, 2t+8, 2t+9), so b is four
// consecutive activations. sm_75 has m16n8k8 only; the two halves of the step are its two operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvopt::cuda {

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint2 b,
                                            __half /*tag*/) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b.x));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b.y));
#endif
}

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint2 b,
                                            __nv_bfloat16 /*tag*/) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#else
  __trap();  // sm_75 has no bf16 mma; the dispatch sends bf16 to the fp32 kernel there
#endif
}

}  // namespace kvopt::cuda
