// SPDX-License-Identifier: Apache-2.0
// Element types by name: conversions that round once, and unaligned-safe reads of consecutive
// elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/params.h"

namespace kvopt::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Element i of an array whose type is known at run time.
__device__ __forceinline__ float load_float(const void* data, int64_t i, DType type) {
  if (type == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
__device__ __forceinline__ void store_float(void* data, int64_t i, float v, DType type) {
  if (type == DType::kFloat16) {
    static_cast<__half*>(data)[i] = __float2half_rn(v);
  } else if (type == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
  } else {
    static_cast<float*>(data)[i] = v;
  }
}

// Eight consecutive 16-bit elements of a row of length k, zeros past its end; no alignment is
// assumed.
template <typename T>
__device__ __forceinline__ uint4 load_row_8(const T* row, int64_t column, int64_t k) {
  static_assert(sizeof(T) == 2);
  const auto* bits = reinterpret_cast<const uint16_t*>(row);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = column + 2 * i < k ? bits[column + 2 * i] : 0;
    const uint32_t high = column + 2 * i + 1 < k ? bits[column + 2 * i + 1] : 0;
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace kvopt::cuda
