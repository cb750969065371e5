// SPDX-License-Identifier: Apache-2.0
// Rows of x on their way into a product: x * input_scale in fp32, rounded to int8 with one scale.
// One definition for the prologue's kernels and for the products that quantise x themselves, so
// that every path sees the same integers.
//
// X = round-half-even(v / s), s = max |v| / 127, both in fp32 with true division. The quotient lies
// between v * (1 / s) * (1 - 2^-22) and v * (1 / s) * (1 + 2^-22), whatever was rounded on the way:
// two fma, which round to integers as well. Only where they differ (one time in 2^14 or less) is
// the division done. Magnitudes are compared as bit patterns: positive fp32 numbers are ordered
// like integers, infinity and NaN come last and so survive the maximum.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {

constexpr uint32_t kInfinityBits = 0x7F800000;

__device__ __forceinline__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFF; }

__device__ __forceinline__ uint32_t warp_max_bits(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFF, v);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = max(v, __shfl_xor_sync(0xFFFFFFFF, v, offset));
  return v;
#endif
}

// Maximum over the block, for every thread. `slots`: 32 words of shared memory.
__device__ __forceinline__ uint32_t block_max_bits(uint32_t v, uint32_t* slots) {
  v = warp_max_bits(v);
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = v;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  return warp_max_bits(lane < blockDim.x / 32 ? slots[lane] : 0);
}

// Eight consecutive elements of a row as they lie in memory; columns past k are 0.
template <typename T>
struct Raw8 {
  uint32_t word[2 * sizeof(T)];
};

// 16 bytes, or zeros without a read: one predicated instruction, so that it stays in flight where a
// branch would wait for it.
__device__ __forceinline__ uint4 load_16_if(bool wanted, const void* address) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "
      "mov.b32 %3, 0; @p ld.global.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<int>(wanted))
      : "memory");
  return v;
}

// kAligned: the row starts on 16 bytes and k is a multiple of 8.
template <bool kAligned, typename T>
__device__ __forceinline__ Raw8<T> load_raw_8(const T* row, int column, int k) {
  Raw8<T> raw;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      raw.word[i] = column + i < k ? __float_as_uint(row[column + i]) : 0;
    }
  } else {
    uint4 v = make_uint4(0, 0, 0, 0);
    if constexpr (kAligned) {
      v = load_16_if(column < k, row + column);
    } else if (column < k) {
      v = load_row_8(row, column, k);
    }
    raw.word[0] = v.x;
    raw.word[1] = v.y;
    raw.word[2] = v.z;
    raw.word[3] = v.w;
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void to_floats_8(float (&v)[8], const Raw8<T>& raw) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(raw.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = raw.word[i];
      if constexpr (std::is_same_v<T, __half>) {
        __half2 pair;
        memcpy(&pair, &word, 4);
        v[2 * i] = __low2float(pair);
        v[2 * i + 1] = __high2float(pair);
      } else {  // the upper half of an fp32 number
        v[2 * i] = __uint_as_float(word << 16);
        v[2 * i + 1] = __uint_as_float(word & 0xFFFF0000);
      }
    }
  }
}

// Whether x and input_scale may be read 16 bytes at a time.
inline bool reads_aligned(const QLinearProblem& p) {
  return p.dtype != DType::kFloat32 && p.aligned &&
         reinterpret_cast<uintptr_t>(p.input_scale) % 16 == 0;
}

template <typename T, bool kAligned>
__device__ __forceinline__ Raw8<T> load_x_8(const QLinearProblem& p, int64_t row, int column) {
  return load_raw_8<kAligned>(static_cast<const T*>(p.x) + row * p.k, column, p.k);
}

// x * input_scale[column ..].
template <bool kAligned, typename T>
__device__ __forceinline__ void scale_8(float (&v)[8], const QLinearProblem& p, const Raw8<T>& raw,
                                        int column) {
  to_floats_8(v, raw);
  if (p.input_scale != nullptr) {
    float scale[8];
    to_floats_8(scale, load_raw_8<kAligned>(static_cast<const T*>(p.input_scale), column, p.k));
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale[i];
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_scaled_8(float (&v)[8], const QLinearProblem& p, int64_t row,
                                              int column) {
  scale_8<kAligned>(v, p, load_x_8<T, kAligned>(p, row, column), column);
}

__device__ __forceinline__ uint32_t largest_of_8(const float (&v)[8]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, magnitude(v[i]));
  return most;
}

// Largest magnitude of x * input_scale among eight columns; without a scale 16-bit numbers are
// compared in pairs as they are.
template <bool kAligned, typename T>
__device__ __forceinline__ uint32_t largest_of_row_8(const QLinearProblem& p, const Raw8<T>& raw,
                                                     int column) {
  if constexpr (sizeof(T) == 2) {
    if (p.input_scale == nullptr) {
      uint32_t most = raw.word[0] & 0x7FFF7FFF;
#pragma unroll
      for (int i = 1; i < 4; ++i) most = __vmaxu2(most, raw.word[i] & 0x7FFF7FFF);
      most = max(most & 0xFFFF, most >> 16);
      if constexpr (std::is_same_v<T, __half>) {
        return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(most))));
      }
      return most << 16;
    }
  }
  float v[8];
  scale_8<kAligned>(v, p, raw, column);
  return largest_of_8(v);
}

// The scale of a row (or group) whose largest magnitude has these bits; NaN when it is not finite.
__device__ __forceinline__ float int8_scale(uint32_t largest) {
  return largest < kInfinityBits ? __fdiv_rn(__uint_as_float(largest), 127.0f)
                                 : __uint_as_float(0x7FC00000);
}

// 1 / scale; 0, which makes all integers 0, for rows that are zero or not finite.
__device__ __forceinline__ float int8_inverse(float scale) {
  return scale > 0 ? __fdiv_rn(1.0f, scale) : 0.0f;
}

constexpr float kIntegerUnit = 12582912.0f;  // 1.5 * 2^23: numbers of this size end at the units

// The integers of eight numbers, each plus kIntegerUnit, so that they are the low bits as well.
__device__ __forceinline__ void round_8(float (&integer)[8], const float (&v)[8], float scale,
                                        float inverse) {
  const float low = inverse * (1.0f - 0x1p-22f), high = inverse * (1.0f + 0x1p-22f);
  uint32_t different = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    integer[i] = fmaf(v[i], low, kIntegerUnit);
    different |= __float_as_uint(integer[i]) ^ __float_as_uint(fmaf(v[i], high, kIntegerUnit));
  }
  // Scales so small that their inverse is rough are left to the division as well.
  if ((different != 0 || scale < 0x1p-120f) && scale > 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      integer[i] = fminf(fmaxf(rintf(__fdiv_rn(v[i], scale)), -127.0f), 127.0f) + kIntegerUnit;
    }
  }
}

__device__ __forceinline__ uint2 quantize_8(const float (&v)[8], float scale, float inverse) {
  float integer[8];
  round_8(integer, v, scale, inverse);
  uint32_t word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low =
        __byte_perm(__float_as_uint(integer[4 * i]), __float_as_uint(integer[4 * i + 1]), 0x0040);
    const uint32_t high = __byte_perm(__float_as_uint(integer[4 * i + 2]),
                                      __float_as_uint(integer[4 * i + 3]), 0x0040);
    word[i] = __byte_perm(low, high, 0x5410);
  }
  return make_uint2(word[0], word[1]);
}

}  // namespace kvopt::cuda
