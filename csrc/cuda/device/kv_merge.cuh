// SPDX-License-Identifier: Apache-2.0
// A warp merges two vectors, KvMergeParams of common/kv_store.h. Lane l holds the channels
// 128 i + 4 l .. + 3. What is fused is written down: the same bits wherever this is used.
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

constexpr int kKvMergeChunks = kKvMaxDim / 128;  // of four channels, per lane

// Two vectors as unit vectors (or 0) and norms, and the angle between them (0 with a zero vector).
struct KvVectorPair {
  float4 u[kKvMergeChunks], v[kKvMergeChunks];
  float norm_a, norm_b, angle;

  __device__ bool missing() const { return norm_a == 0.0f || norm_b == 0.0f; }
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = __fadd_rn(v, __shfl_xor_sync(0xFFFFFFFF, v, offset));
  }
  return v;
}

__device__ __forceinline__ float add_squares(float sum, float4 v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

__device__ __forceinline__ float4 combination(float s, float4 u, float t, float4 v) {
  return make_float4(fmaf(s, u.x, __fmul_rn(t, v.x)), fmaf(s, u.y, __fmul_rn(t, v.y)),
                     fmaf(s, u.z, __fmul_rn(t, v.z)), fmaf(s, u.w, __fmul_rn(t, v.w)));
}

__device__ __forceinline__ float4 over(float4 v, float norm) {
  if (norm == 0.0f) return make_float4(0, 0, 0, 0);
  return make_float4(__fdiv_rn(v.x, norm), __fdiv_rn(v.y, norm), __fdiv_rn(v.z, norm),
                     __fdiv_rn(v.w, norm));
}

// |s u + t v|.
__device__ __forceinline__ float length_of(const KvVectorPair& x, float s, float t) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kKvMergeChunks; ++i) {
    sum = add_squares(sum, combination(s, x.u[i], t, x.v[i]));
  }
  return __fsqrt_rn(warp_sum(sum));
}

// The vectors that begin at elements a_at and b_at.
__device__ __forceinline__ KvVectorPair load_pair(const void* a, const void* b, int64_t a_at,
                                                  int64_t b_at, int64_t dim, KvType type) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  KvVectorPair x;
  float sum_a = 0, sum_b = 0;
#pragma unroll
  for (int i = 0; i < kKvMergeChunks; ++i) {
    const int64_t c = 128 * i + 4 * lane;
    x.u[i] = x.v[i] = make_float4(0, 0, 0, 0);
    if (c < dim) {
      x.u[i] = load_four(a, a_at + c, type);
      x.v[i] = load_four(b, b_at + c, type);
    }
    sum_a = add_squares(sum_a, x.u[i]);
    sum_b = add_squares(sum_b, x.v[i]);
  }
  x.norm_a = __fsqrt_rn(warp_sum(sum_a));
  x.norm_b = __fsqrt_rn(warp_sum(sum_b));
#pragma unroll
  for (int i = 0; i < kKvMergeChunks; ++i) {
    x.u[i] = over(x.u[i], x.norm_a);
    x.v[i] = over(x.v[i], x.norm_b);
  }
  const float apart = length_of(x, 1, -1), along = length_of(x, 1, 1);
  x.angle = x.missing() ? 0.0f : 2 * atan2f(apart, along);
  return x;
}

__device__ __forceinline__ float distance_of(const KvVectorPair& x) {
  return __fmul_rn(x.angle, 0.318309886183790672f);
}

// The direction, from element `at` on.
__device__ __forceinline__ void store_direction(const KvVectorPair& x, float t, void* direction,
                                                int64_t at, int64_t dim, KvType type) {
  const float rest = __fsub_rn(1, t), sine = sinf(x.angle);
  const float line = length_of(x, rest, t);
  float weight_u = 1, weight_v = 1;  // one of the vectors is zero
  if (!x.missing()) {
    if (sine >= 1e-4f) {
      weight_u = __fdiv_rn(sinf(__fmul_rn(rest, x.angle)), sine);
      weight_v = __fdiv_rn(sinf(__fmul_rn(t, x.angle)), sine);
    } else if (line >= 1e-4f) {
      weight_u = __fdiv_rn(rest, line);
      weight_v = __fdiv_rn(t, line);
    } else {
      weight_v = 0;
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kKvMergeChunks; ++i) {
    const int64_t c = 128 * i + 4 * lane;
    if (c >= dim) continue;
    store_four(direction, at + c, combination(weight_u, x.u[i], weight_v, x.v[i]), type);
  }
}

}  // namespace kvopt::cuda
