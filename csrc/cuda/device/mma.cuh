// SPDX-License-Identifier: Apache-2.0
// D = A * B + D on the tensor cores: A 16 x 16 (rows of the weight), B 16 x 8 (its columns are rows
// of x), fp16 with fp32 sums.
//
// Lane = 4 * g + t holds, of one 16-column step (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//     a[0] = A[g][2t, 2t+1]         a[1] = A[g+8][2t, 2t+1]
//     a[2] = A[g][2t+8, 2t+9]       a[3] = A[g+8][2t+8, 2t+9]
//     b.x  = B[2t, 2t+1][g]         b.y  = B[2t+8, 2t+9][g]
//     c[0], c[1] = C[g][2t, 2t+1]   c[2], c[3] = C[g+8][2t, 2t+1]
//
// sm_75 has m16n8k8 only; the two halves of the step are its two operands.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvopt::cuda {

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
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

// B of two neighbouring groups of eight rows of x. `row` is the address of row lane % 8 of group
// lane / 16, column 8 * (lane / 8 % 2) of the step: ldmatrix hands lane (g, t) columns 2t, 2t + 1
// of row g of each 8 x 8 matrix, in the order of the eight lanes that gave its rows.
__device__ __forceinline__ void load_fragments(uint2& first, uint2& second, uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(first.x), "=r"(first.y), "=r"(second.x), "=r"(second.y)
               : "r"(row)
               : "memory");
}

}  // namespace kvopt::cuda
