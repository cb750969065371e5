// SPDX-License-Identifier: Apache-2.0
// What the kernels of outliers*.cu share: the two factors of the outliers' product where they lie,
// and its result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/outliers.h"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {

constexpr int kOutlierThreads = 256;

template <typename T>
__device__ __forceinline__ float gather_x(const OutlierParams& p, int64_t row, int column) {
  const float v = to_float(static_cast<const T*>(p.x)[row * p.k + column]);
  return p.input_scale == nullptr ? v : v * to_float(static_cast<const T*>(p.input_scale)[column]);
}

__device__ __forceinline__ float gather_code(const OutlierParams& p, int64_t n, int column) {
  const auto* const bytes = reinterpret_cast<const int8_t*>(p.packed);  // q - 128, row major
  return static_cast<float>(__ldg(bytes + n * mma16::row_pitch(p.k) + column));
}

__device__ __forceinline__ float row_scale(const OutlierParams& p, int64_t n) {
  return __half2float(reinterpret_cast<const __half*>(p.meta)[n]);
}

template <typename T>
__device__ __forceinline__ void store_part(const OutlierParams& p, int64_t row, int64_t n,
                                           float v) {
  T* const out = static_cast<T*>(p.part) + row * p.n + n;
  *out = from_float<T>(p.accumulate ? v + to_float(*out) : v);
}

// outliers_mma.cu: fp16 and bf16 without an input scale, on sm_80 and newer; needs the workspace.
int launch_outliers_mma(const OutlierParams& p, cudaStream_t stream);

}  // namespace kvopt::cuda
