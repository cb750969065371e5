// SPDX-License-Identifier: Apache-2.0
// The choice of a group's scale and zero point by one warp, bit for bit the rule of
// common/wsearch.h: never contracted, true division, sums in the order of the columns.
//
// A lane owns candidates (lane, lane + 32, ...), four at a time, so a sum needs no exchange and has
// the order of the CPU's; all lanes read the same value at once, which is one broadcast. Then the
// smallest error of all, the first of equals, by shuffles. Work per column and candidate is a
// division and some eight instructions: the division bounds it, and memory does not.
#pragma once

#include <cuda_fp16.h>
#include <math_constants.h>

#include "common/wsearch.h"

namespace kvopt::cuda {

__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double div_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ float round_even(float v) { return rintf(v); }
__device__ __forceinline__ double round_even(double v) { return rint(v); }
__device__ __forceinline__ float round_down(float v) { return floorf(v); }
__device__ __forceinline__ double round_down(double v) { return floor(v); }

template <typename T>
__device__ __forceinline__ T clamp_value(T v, T low, T high) {
  v = v > low ? v : low;  // NaN becomes low
  return v < high ? v : high;
}

template <typename T>
struct GroupChoice {
  T scale;  // as stored: an fp16 value
  T zero;
};

template <typename T>
__device__ __forceinline__ T code_value(T value, const GroupChoice<T>& choice, T largest_code) {
  const T steps = round_even(clamp_value(div_rn(value, choice.scale), T(-1024), T(1024)));
  return clamp_value(add_rn(steps, choice.zero), T(0), largest_code);
}

// scale * (code - zero) - value
template <typename T>
__device__ __forceinline__ T code_error(T value, T code, const GroupChoice<T>& choice) {
  return add_rn(mul_rn(choice.scale, add_rn(code, -choice.zero)), -value);
}

template <typename T>
__device__ __forceinline__ T stored_scale(T scale) {
  const float half = __half2float(__float2half_rn(static_cast<float>(scale)));
  return static_cast<T>(clamp_value(half, 0x1p-24f, 65504.0f));
}

template <typename T>
__device__ __forceinline__ GroupChoice<T> nearest_choice(const QuantFormat& f, T low, T high) {
  const T top = static_cast<T>((1 << f.bits) - 1);
  const T magnitude = high > -low ? high : -low;
  if (f.has_zeros()) {
    const T scale = stored_scale(div_rn(add_rn(high, -low), top));
    const T zero = round_even(clamp_value(div_rn(-low, scale), T(0), T(1024)));
    return {scale, clamp_value(zero, T(0), top)};
  }
  const T scale = f.bits == 8 ? div_rn(magnitude, T(127)) : div_rn(mul_rn(T(2), magnitude), top);
  return {stored_scale(scale), static_cast<T>(symmetric_zero(f))};
}

template <typename T>
__device__ __forceinline__ GroupChoice<T> candidate(const QuantFormat& f, const SearchGrid& grid,
                                                    int index, T low, T high) {
  const int readings = search_readings(f), i = index / readings, v = index % readings;
  const T top = static_cast<T>((1 << f.bits) - 1);
  const T magnitude = high > -low ? high : -low;
  const T shrink = add_rn(T(1), -static_cast<T>(grid.smallest));
  const T p = add_rn(T(1), -div_rn(mul_rn(shrink, static_cast<T>(i)), static_cast<T>(grid.steps)));
  if (f.has_zeros()) {
    const T scale = stored_scale(mul_rn(p, div_rn(add_rn(high, -low), top)));
    const T below = round_down(clamp_value(div_rn(mul_rn(-low, p), scale), T(0), T(1024)));
    return {scale, clamp_value(add_rn(below, static_cast<T>(v - 1)), T(0), top)};
  }
  const bool to_the_top = f.bits == 8 ? v == 0 : v == 1;
  const T size = f.bits == 8 && to_the_top ? magnitude : mul_rn(T(2), magnitude);
  const T divisor = !to_the_top ? top : f.bits == 8 ? T(127) : top - T(1);
  return {stored_scale(mul_rn(p, div_rn(size, divisor))), static_cast<T>(symmetric_zero(f))};
}

// All lanes of the warp call it together, and all get the result. values: `count` of them, in
// shared or global memory and not being written.
template <typename T>
__device__ GroupChoice<T> search_group(const QuantFormat& f, const SearchGrid& grid,
                                       const T* values, const T* importance, int64_t count) {
  constexpr unsigned kAll = 0xFFFFFFFF;
  constexpr int kOwn = 4;  // candidates of a lane at a time
  const int lane = threadIdx.x % 32;
  T low = 0, high = 0;
  for (int64_t i = lane; i < count; i += 32) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other_low = __shfl_xor_sync(kAll, low, offset);
    const T other_high = __shfl_xor_sync(kAll, high, offset);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (grid.steps == 0) return nearest_choice(f, low, high);

  const T top = static_cast<T>((1 << f.bits) - 1);
  const int candidates = candidate_count(f, grid);
  T best = static_cast<T>(CUDART_INF);
  int best_index = candidates;
  for (int first = 0; first < candidates; first += 32 * kOwn) {
    GroupChoice<T> choice[kOwn];
    T sum[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int index = first + c * 32 + lane;
      choice[c] = candidate(f, grid, index < candidates ? index : 0, low, high);
      sum[c] = 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      const T value = values[i];
      const T weight = importance == nullptr ? T(1) : importance[i];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const T d = code_error(value, code_value(value, choice[c], top), choice[c]);
        sum[c] = add_rn(sum[c], mul_rn(weight, mul_rn(d, d)));
      }
    }
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int index = first + c * 32 + lane;
      if (index < candidates && sum[c] < best) {  // a lane's candidates come in rising order
        best = sum[c];
        best_index = index;
      }
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAll, best, offset);
    const int other_index = __shfl_xor_sync(kAll, best_index, offset);
    if (other < best || (other == best && other_index < best_index)) {
      best = other;
      best_index = other_index;
    }
  }
  return candidate(f, grid, best_index < candidates ? best_index : 0, low, high);
}

}  // namespace kvopt::cuda
