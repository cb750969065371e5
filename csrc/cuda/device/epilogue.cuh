// SPDX-License-Identifier: Apache-2.0
// What happens to a finished sum: bias, low-rank up-projection, SwiGLU, residual, one rounding.
// The same for every kernel, so that a fused part means the same on every path. The type of y is a
// run-time value: a uniform branch once an output, and half as many kernels to compile.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/params.h"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {

struct Epilogue {
  const void* bias;        // (N)
  const void* addend;      // (M, N), added before the activation: a low-rank product made elsewhere
  const void* low_rank_x;  // (M, rank)
  const void* low_rank_w;  // (N, rank)
  const void* residual;    // of the shape of y
  void* y;
  const float* row_scale;  // (M): the product of row m is multiplied by it first; null: 1
  int32_t m, n, rank;
  DType dtype;  // of y, bias, addend, residual and the low-rank factors
  bool swiglu;

  __host__ __device__ bool is_plain() const {
    return addend == nullptr && rank == 0 && residual == nullptr && !swiglu;
  }
};

// The product's value of (row m of x, row n of w) with all that comes before the activation.
__device__ __forceinline__ float before_activation(const Epilogue& e, int m, int n, float value) {
  if (e.row_scale != nullptr) value *= e.row_scale[m];
  if (e.bias != nullptr) value += load_float(e.bias, n, e.dtype);
  if (e.addend != nullptr) {
    value += load_float(e.addend, static_cast<int64_t>(m) * e.n + n, e.dtype);
  }
  if (e.rank > 0) {
    const int64_t a = static_cast<int64_t>(m) * e.rank, b = static_cast<int64_t>(n) * e.rank;
    float sum = 0;
    for (int r = 0; r < e.rank; ++r) {
      sum += load_float(e.low_rank_x, a + r, e.dtype) * load_float(e.low_rank_w, b + r, e.dtype);
    }
    value += sum;
  }
  return value;
}

// Stores one element of y (row m, column n of the output), adding the residual.
__device__ __forceinline__ void store_output(const Epilogue& e, int m, int n, float value) {
  const int64_t at = static_cast<int64_t>(m) * (e.swiglu ? e.n / 2 : e.n) + n;
  if (e.residual != nullptr) value += load_float(e.residual, at, e.dtype);
  store_float(e.y, at, value, e.dtype);
}

__device__ __forceinline__ float swiglu(float gate, float up) {
  return gate / (1.0f + __expf(-gate)) * up;
}

// Both rows of w that a tensor-core lane holds, n and n + 8 (n % 16 < 8): finished and stored.
// Without SwiGLU they are two elements, with it gate and up of one.
__device__ __forceinline__ void finish_pair(const Epilogue& e, int m, int n, float value0,
                                            float value8) {
  if (e.swiglu) {
    const float gate = before_activation(e, m, n, value0);
    const float up = before_activation(e, m, n + 8, value8);
    store_output(e, m, n / 16 * 8 + n % 8, swiglu(gate, up));
    return;
  }
  if (n < e.n) store_output(e, m, n, before_activation(e, m, n, value0));
  if (n + 8 < e.n) store_output(e, m, n + 8, before_activation(e, m, n + 8, value8));
}

}  // namespace kvopt::cuda
