// SPDX-License-Identifier: Apache-2.0
// The product of one row of x (qlinear_gemv_row.cuh): what a warp makes of a unit of codes that
// lies in shared memory.
#pragma once

#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemv_row_x.cuh"

namespace kvopt::cuda::gemv {

#if __CUDA_ARCH__ >= 900

// D = A * B + D, A 16 x 32 unsigned bytes, B 32 x 8 signed ones. Lane = 4 g + t holds of A rows g
// (a[0], a[2]) and g + 8, of B column g, four bytes of K at 4t (a[0], a[1], b.x) and 16 + 4t.
__device__ __forceinline__ void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Reads of shared memory by its own 32-bit addresses, in the order of the barriers around them.
__device__ __forceinline__ uint4 shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

// Codes of rows g and g + 8 of 128 columns, as bytes: a[step / 2] is operand A of two steps.
template <int kBits>
__device__ __forceinline__ void byte_operands(uint32_t (&a)[4][4], uint32_t codes, int segment) {
  const auto load = [&](int i) { return shared_16(codes + i * 512); };
  if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 q = load(segment * 2 + i);
      const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[2 * i + j / 2][j % 2 * 2] = words[j] & 0x0F0F0F0F;
        a[2 * i + j / 2][j % 2 * 2 + 1] = words[j] & 0xF0F0F0F0;
      }
    }
  } else if constexpr (kBits == 2) {
    const uint4 q = load(segment);
    const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = words[j] & (0x03030303u << 2 * i);
    }
  } else if constexpr (kBits == 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 q = load(segment * 4 + j);
      a[j][0] = __byte_perm(q.x, q.y, 0x6240);
      a[j][1] = __byte_perm(q.x, q.y, 0x7351);
      a[j][2] = __byte_perm(q.z, q.w, 0x6240);
      a[j][3] = __byte_perm(q.z, q.w, 0x7351);
    }
  } else {
    // Two times three words for 64 columns: words 6 * segment.. of the lane's twelve.
    uint32_t words[12];
#pragma unroll
    for (int i = segment * 6 / 4; i <= (segment * 6 + 5) / 4; ++i) {
      const uint4 q = load(i);
      words[4 * i] = q.x;
      words[4 * i + 1] = q.y;
      words[4 * i + 2] = q.z;
      words[4 * i + 3] = q.w;
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t* const w = words + segment * 6 + b * 3;
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        a[2 * b + s / 2][s % 2 * 2] = w[s] << 2 & 0x071C071C;
        a[2 * b + s / 2][s % 2 * 2 + 1] = w[s] & 0x0E380E38;
      }
      // Step 3. Bits 13 to 15: the code of row g, columns 8..15.
      const uint32_t shifted = w[0] >> 1;
      const uint32_t two = (shifted & 0x7FFF7FFF) | (w[1] & 0x80008000);
      const uint32_t three = (two >> 1 & 0x7FFF7FFF) | (w[2] & 0x80008000);
      a[2 * b + 1][2] = __byte_perm(shifted, three >> 2, 0x7351) & 0x38383838;
      a[2 * b + 1][3] = __byte_perm(w[1], w[2], 0x7351) & 0x70707070;
    }
  }
}

// Where a lane of a multiplying warp reads; addresses in shared memory.
template <typename K>
struct RowLane {
  uint32_t codes, meta;    // of the stage at the ring's beginning
  uint32_t x, records;     // of the warp's first unit
  uint32_t table, select;  // code books
};

// sums of rows g and g + 8 += the product of a unit: the stage `at` bytes from the ring's
// beginning, x and records `x` and `records` bytes from the warp's first. `left`: segments of the
// row from here on; behind them x is 0 and any parameters will do.
template <typename K>
__device__ __forceinline__ void multiply_unit(float& sum0, float& sum8, const RowLane<K>& lane,
                                              uint32_t at, uint32_t x, uint32_t records, int left,
                                              int group_shift) {
#pragma unroll
  for (int s = 0; s < K::kSegments; ++s) {
    // The first segments of a unit and of a group are powers of two apart.
    const uint32_t meta =
        lane.meta + at + (s == 0 || s >= left ? 0 : (s >> group_shift) * K::kStride);
    float scale0, scale8, zero0 = 0, zero8 = 0;
    if constexpr (K::kZeros) {
      const uint2 m = shared_8(meta);
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&m.x));
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&m.y));
      scale0 = low.x;
      zero0 = low.y;
      scale8 = high.x;
      zero8 = high.y;
    } else {
      const uint32_t m = shared_4(meta);
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&m));
      scale0 = both.x;
      scale8 = both.y;
    }
    if constexpr (K::kBook) {
      const uint4 q = shared_16(lane.codes + at + s * 512);
      const uint32_t words[4] = {q.x, q.y, q.z, q.w};
      float c[2][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 b = shared_16(lane.x + x + (2 * s + i) * 64);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int byte = 0; byte < 4; ++byte) {
            // Bytes: columns 2t, 2t + 8, 2t + 1, 2t + 9, each of rows g and g + 8.
            const int place = byte % 2 * 2 + byte / 2;
            a[place] = shared_4(__dp4a(words[2 * i + j], 0x80u << 8 * byte, lane.table));
          }
          const uint2 operand = make_uint2(__byte_perm(j == 0 ? b.x : b.z, 0, lane.select),
                                           __byte_perm(j == 0 ? b.y : b.w, 0, lane.select));
          mma_16x8x16(c[j], a, operand);
        }
      }
      const float unit = __uint_as_float(shared_4(lane.records + records + s * K::kRecord));
      const bool odd = threadIdx.x & 1;
      const float value0 = odd ? c[0][2] + c[1][2] : c[0][0] + c[1][0];
      const float value8 = odd ? c[0][3] + c[1][3] : c[0][1] + c[1][1];
      sum0 = fmaf(scale0, value0 * unit, sum0);
      sum8 = fmaf(scale8, value8 * unit, sum8);
    } else {
      uint32_t a[4][4];
      byte_operands<K::kBits>(a, lane.codes + at, s);
      int c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 b = shared_16(lane.x + x + (2 * s + i) * K::kBlockX);
        mma_16x8x32(c, a[2 * i], b.x, b.y);
        mma_16x8x32(c, a[2 * i + 1], b.z, b.w);
      }
      const uint4 bits = shared_16(lane.records + records + s * K::kRecord);
      const float factor0 = __uint_as_float(bits.x), factor8 = __uint_as_float(bits.y);
      const float sum_x = __uint_as_float(bits.z);
      constexpr float kBoth = kMagic + kMagic / 256;
      const float value0 = fmaf(__int_as_float(c[0]) - kBoth, 256.0f, __int_as_float(c[1]));
      const float value8 = fmaf(__int_as_float(c[2]) - kBoth, 256.0f, __int_as_float(c[3]));
      if constexpr (K::kZeros) {
        sum0 = fmaf(scale0, fmaf(-zero0, sum_x, value0 * factor0), sum0);
        sum8 = fmaf(scale8, fmaf(-zero8, sum_x, value8 * factor8), sum8);
      } else {
        sum0 = fmaf(scale0, fmaf(value0, factor0, -sum_x), sum0);
        sum8 = fmaf(scale8, fmaf(value8, factor8, -sum_x), sum8);
      }
    }
  }
}

#endif

}  // namespace kvopt::cuda::gemv
