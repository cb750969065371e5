// SPDX-License-Identifier: Apache-2.0
// Codes to tensor-core operands, in fp16 for every activation type (bf16 activations are brought to
// fp16 by a power of two per row, which is exact).
//
// A code in the low bits of an fp16 *is* a number already: the bits v < 2048 mean v * 2^-24 (the
// first binade continues the subnormals without a seam), tensor cores and fma take them at full
// speed. So one AND with a mask makes a pair of codes a pair of operands, and what the position of
// the field multiplies it by (1, 4, 8, 16 or 64) is the same for all of a row:
//
//   raw      a = factor * q * 2^-24. The caller sums raw products of a group and then adds
//            scale * (sum * 2^24 / factor - zero * sum of x). Exact but for the fp32 sums. Half to
//            one instruction a weight.
//   weights  a = fp16(scale * (q - zero)), what a dequantised fp16 weight holds: one fma for
//            (q - zero) * 2^-9, exact for integer zero points, one multiplication by scale * 2^9.
//
// Code books: a byte of two codes is looked up in a table of 256 fp16 pairs in shared memory.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/quant_format.h"

namespace kvopt::cuda {

constexpr float kRawUnit = 16777216.0f;  // 2^24

// One lane's words of 64 columns (four 16-column steps) of a tile of 16 rows.
template <int kBits>
struct Words {
  static constexpr int kCount = 2 * kBits / 2;  // 64 columns * 16 rows * bits / 32 lanes / 32
  uint32_t word[kCount];
};

// What the position of the fields multiplies codes of row g (kUpper false) or g + 8 (true) by.
template <int kBits>
__host__ __device__ constexpr int raw_factor(int step, bool upper) {
  if (kBits == 8) return 1;
  if (kBits == 4) return upper ? 16 : 1;
  if (kBits == 3) return upper ? 8 : 1;
  return (upper ? 4 : 1) * (step % 2 == 1 ? 16 : 1);
}

// a[0..3] = factor * q * 2^-24 in fp16 pairs. `step` (0..3 of the 64 columns) must be a
// compile-time constant after unrolling.
template <int kBits>
__device__ __forceinline__ void raw_operand(uint32_t (&a)[4], const Words<kBits>& w, int step) {
  if constexpr (kBits == 8) {
    const uint32_t low = w.word[2 * step], high = w.word[2 * step + 1];
    a[0] = low & 0x00FF00FF;
    a[1] = (low >> 8) & 0x00FF00FF;
    a[2] = high & 0x00FF00FF;
    a[3] = (high >> 8) & 0x00FF00FF;
  } else if constexpr (kBits == 4) {
    const uint32_t low = w.word[step], high = low >> 8;
    a[0] = low & 0x000F000F;
    a[1] = low & 0x00F000F0;
    a[2] = high & 0x000F000F;
    a[3] = high & 0x00F000F0;
  } else if constexpr (kBits == 2) {
    const uint32_t low = w.word[step / 2], high = low >> 8;
    const uint32_t mask = step % 2 == 1 ? 0x00300030 : 0x00030003;
    a[0] = low & mask;
    a[1] = low & (mask << 2);
    a[2] = high & mask;
    a[3] = high & (mask << 2);
  } else {
    static_assert(kBits == 3);
    if (step < 3) {
      const uint32_t low = w.word[step], high = low >> 6;
      a[0] = low & 0x00070007;
      a[1] = low & 0x00380038;
      a[2] = high & 0x00070007;
      a[3] = high & 0x00380038;
    } else {
      a[0] = (w.word[0] >> 12) & 0x00070007;
      a[1] = (w.word[1] >> 9) & 0x00380038;
      a[2] = ((w.word[0] >> 15) & 0x00010001) | ((w.word[1] >> 14) & 0x00020002) |
             ((w.word[2] >> 13) & 0x00040004);
      a[3] = (w.word[2] >> 9) & 0x00380038;
    }
  }
}

// The table of a code book: entry b holds {book[b & 15], book[b >> 4]}. Called by all threads of a
// block, which must synchronise before use.
__device__ __forceinline__ void fill_book(uint32_t (&table)[256], Scheme scheme) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    const __half2 pair = __floats2half2_rn(book_value(scheme, i & 15), book_value(scheme, i >> 4));
    table[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ uint32_t pair_of(__half v) {
  const __half2 p = __half2half2(v);
  return *reinterpret_cast<const uint32_t*>(&p);
}

__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t mul_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The parameters of one row and group for `weights_operand`.
struct RowScale {
  uint32_t offset;  // pair of -zero * 2^-9
  uint32_t scale;   // pair of scale * 2^9, or of scale where that overflows (see `wide`)
};

// Whether scale * 2^9 leaves the range of fp16; a warp that meets one multiplies in two steps.
__device__ __forceinline__ bool is_wide(__half scale) { return __half2float(scale) >= 127.0f; }

__device__ __forceinline__ RowScale make_row_scale(__half scale, __half zero, bool wide) {
  RowScale row;
  row.offset = pair_of(__hmul(zero, __ushort_as_half(0x9800)));                 // -2^-9
  row.scale = pair_of(wide ? scale : __hmul(scale, __ushort_as_half(0x6000)));  // 2^9
  return row;
}

constexpr uint32_t kPairOf512 = 0x60006000;

// raw operands -> fp16(scale * (q - zero)).
template <int kBits>
__device__ __forceinline__ void weights_operand(uint32_t (&a)[4], const Words<kBits>& w, int step,
                                                const RowScale& row0, const RowScale& row8,
                                                bool wide) {
  raw_operand<kBits>(a, w, step);
  // 2^15 / factor as fp16: exponent field 30 - log2(factor).
  const auto multiplier = [](int factor) {
    uint32_t e = 30;
    for (; factor > 1; factor /= 2) --e;
    return (e << 10) * 0x00010001u;
  };
  const uint32_t low = multiplier(raw_factor<kBits>(step, false));
  const uint32_t high = multiplier(raw_factor<kBits>(step, true));
  a[0] = fma_pair(a[0], low, row0.offset);
  a[1] = fma_pair(a[1], high, row8.offset);
  a[2] = fma_pair(a[2], low, row0.offset);
  a[3] = fma_pair(a[3], high, row8.offset);
  if (wide) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = mul_pair(a[i], kPairOf512);
  }
  a[0] = mul_pair(a[0], row0.scale);
  a[1] = mul_pair(a[1], row8.scale);
  a[2] = mul_pair(a[2], row0.scale);
  a[3] = mul_pair(a[3], row8.scale);
}

}  // namespace kvopt::cuda
