// SPDX-License-Identifier: Apache-2.0
// Codes to tensor-core operands: q - z, exact to one rounding of the operand type, in one mask and
// one fma a pair.
//
// A code in the low bits of a 16-bit float *is* a subnormal number: as fp16 the bits v < 2048 mean
// v * 2^-24, as bf16 the bits v < 256 mean v * 2^-133 (the first binade continues the subnormals
// without a seam). So, with unit = 2^-9 (fp16) or 2^-6 (bf16),
//
//     fma(bits of q << s, 2^(big - s), -z * unit) = (q - z) * unit
//
// with one rounding, of the result. fp16 and bf16 fma keep subnormals at full speed on every chip
// since sm_75 / sm_80. The usual 0x6400 trick would need z to be an integer; this one takes any z,
// and costs the same. `unit` joins the scale, in fp32.
//
// bf16 cannot hold every fp16 zero point, so z = z_hi + z_lo with z_hi an integer: q - z_hi is
// exact, and z_lo (zero for integer zero points, which is the usual case; then the step is skipped)
// is subtracted with the one rounding. All q - z of a row have the same fraction and would all be
// rounded the same way, which activations with a mean would notice; so that step also multiplies by
// an odd factor (taken back in the scale), and the roundings scatter as those of scale * (q - z) do
// in a dequantised weight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvopt::cuda {

// What a lane knows of one row of a group.
struct RowQuant {
  uint32_t low;          // pair of multipliers for codes at bit 0
  uint32_t high;         // and at bit 4
  uint32_t offset;       // pair of -z_hi * unit
  uint32_t offset_rest;  // pair of -z_lo * unit * factor (bf16 only)
  float scale;           // scale / unit
};

__device__ __forceinline__ uint32_t pair_of(__half v) {
  const __half2 p = __half2half2(v);
  return *reinterpret_cast<const uint32_t*>(&p);
}

__device__ __forceinline__ uint32_t pair_of(__nv_bfloat16 v) {
  const __nv_bfloat162 p(v, v);
  return *reinterpret_cast<const uint32_t*>(&p);
}

template <typename T>
struct Operand;

template <>
struct Operand<__half> {
  static constexpr uint32_t kLow = 0x78007800;   // 2^15
  static constexpr uint32_t kHigh = 0x68006800;  // 2^11
  static constexpr float kScale = 512.0f;        // 1 / unit
  static constexpr bool kSplitZero = false;
  static constexpr bool kNeedsSm80 = false;

  static __device__ __forceinline__ void set_zero(RowQuant& row, __half z) {
    row.offset = pair_of(__hmul(z, __ushort_as_half(0x9800)));  // -2^-9
    row.offset_rest = 0;
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

template <>
struct Operand<__nv_bfloat16> {
  static constexpr uint32_t kLow = 0x7F007F00;         // 2^127
  static constexpr uint32_t kHigh = 0x7D007D00;        // 2^123
  static constexpr uint32_t kRestFactor = 0x3FAB3FAB;  // 171 / 128
  static constexpr float kRestScale = 128.0f / 171.0f;
  static constexpr float kScale = 64.0f;  // 1 / unit
  static constexpr bool kSplitZero = true;
  static constexpr bool kNeedsSm80 = true;

  static __device__ __forceinline__ void set_zero(RowQuant& row, __half z) {
    const float value = __half2float(z);
    const __nv_bfloat16 whole = __float2bfloat16_rn(rintf(value) * (-1.0f / 64.0f));
    const float rest = value * (-1.0f / 64.0f) - __bfloat162float(whole);
    row.offset = pair_of(whole);
    row.offset_rest = pair_of(__float2bfloat16_rn(rest * (171.0f / 128.0f)));
  }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
  }
};

template <typename T>
__device__ __forceinline__ RowQuant make_row_quant(__half scale, __half zero) {
  RowQuant row;
  row.low = Operand<T>::kLow;
  row.high = Operand<T>::kHigh;
  row.scale = __half2float(scale) * Operand<T>::kScale;
  Operand<T>::set_zero(row, zero);
  return row;
}

// One step's A operand of a lane (rows g and g + 8) from its 4-bit word.
template <typename T>
__device__ __forceinline__ void dequant_4bit(uint32_t (&a)[4], uint32_t word, const RowQuant& row0,
                                             const RowQuant& row8) {
  const uint32_t upper = word >> 8;
  a[0] = Operand<T>::fma(word & 0x000F000F, row0.low, row0.offset);
  a[1] = Operand<T>::fma(word & 0x00F000F0, row8.high, row8.offset);
  a[2] = Operand<T>::fma(upper & 0x000F000F, row0.low, row0.offset);
  a[3] = Operand<T>::fma(upper & 0x00F000F0, row8.high, row8.offset);
}

// The same from its two 8-bit words.
template <typename T>
__device__ __forceinline__ void dequant_8bit(uint32_t (&a)[4], uint32_t word0, uint32_t word1,
                                             const RowQuant& row0, const RowQuant& row8) {
  a[0] = Operand<T>::fma(__byte_perm(word0, 0, 0x4140), row0.low, row0.offset);
  a[1] = Operand<T>::fma(__byte_perm(word0, 0, 0x4342), row8.low, row8.offset);
  a[2] = Operand<T>::fma(__byte_perm(word1, 0, 0x4140), row0.low, row0.offset);
  a[3] = Operand<T>::fma(__byte_perm(word1, 0, 0x4342), row8.low, row8.offset);
}

__device__ __forceinline__ bool has_rest(const RowQuant& row) {
  return (row.offset_rest & 0x7FFF) != 0;
}

// The second half of a split zero point; the scale then takes kRestScale.
template <typename T>
__device__ __forceinline__ void subtract_rest(uint32_t (&a)[4], const RowQuant& row0,
                                              const RowQuant& row8) {
  if constexpr (Operand<T>::kSplitZero) {
    a[0] = Operand<T>::fma(a[0], Operand<T>::kRestFactor, row0.offset_rest);
    a[1] = Operand<T>::fma(a[1], Operand<T>::kRestFactor, row8.offset_rest);
    a[2] = Operand<T>::fma(a[2], Operand<T>::kRestFactor, row0.offset_rest);
    a[3] = Operand<T>::fma(a[3], Operand<T>::kRestFactor, row8.offset_rest);
  }
}

}  // namespace kvopt::cuda
