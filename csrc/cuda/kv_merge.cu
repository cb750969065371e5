// SPDX-License-Identifier: Apache-2.0
// MiniCache's merge of two layers' vectors into one direction and two magnitudes (arXiv:2405.14366,
// section 3; the formulas and their edge cases stand in common/kv_store.h).
//
// One warp per pair of vectors, which stay in its registers: both are read once, the direction is
// written once. Sums in fp32 over the warp in a fixed order; 4 D + 12 bytes a pair in 16-bit types,
// 2 D read for each of a and b: bound by memory.
#include "cuda/device/kv_store.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kChunks = kKvMaxDim / 128;  // of four channels, per lane

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFF, v, offset);
  return v;
}

__device__ __forceinline__ float square_sum(float4 v) {
  return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ __forceinline__ float4 combination(float s, float4 u, float t, float4 v) {
  return make_float4(s * u.x + t * v.x, s * u.y + t * v.y, s * u.z + t * v.z, s * u.w + t * v.w);
}

__device__ __forceinline__ float4 over(float4 v, float norm) {
  if (norm == 0.0f) return make_float4(0, 0, 0, 0);
  return make_float4(v.x / norm, v.y / norm, v.z / norm, v.w / norm);
}

__global__ void __launch_bounds__(32 * kWarps) merge_kernel(KvMergeParams p) {
  const int64_t vector = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (vector >= p.vectors) return;
  float4 u[kChunks], v[kChunks];
  float norm_a = 0, norm_b = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int64_t c = 128 * i + 4 * lane;
    u[i] = v[i] = make_float4(0, 0, 0, 0);
    if (c < p.dim) {
      u[i] = load_four(p.a, vector * p.dim + c, p.type);
      v[i] = load_four(p.b, vector * p.dim + c, p.type);
    }
    norm_a += square_sum(u[i]);
    norm_b += square_sum(v[i]);
  }
  norm_a = sqrtf(warp_sum(norm_a));
  norm_b = sqrtf(warp_sum(norm_b));
  float apart = 0, along = 0, line = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    u[i] = over(u[i], norm_a);
    v[i] = over(v[i], norm_b);
    apart += square_sum(combination(1, u[i], -1, v[i]));
    along += square_sum(combination(1, u[i], 1, v[i]));
    line += square_sum(combination(1 - p.t, u[i], p.t, v[i]));
  }
  const float angle = 2 * atan2f(sqrtf(warp_sum(apart)), sqrtf(warp_sum(along)));
  const float length = sqrtf(warp_sum(line));
  const bool missing = norm_a == 0.0f || norm_b == 0.0f;
  const float sine = sinf(angle);
  float weight_u = 1, weight_v = 1;  // one of the vectors is zero
  if (!missing) {
    if (sine >= 1e-4f) {
      weight_u = sinf((1 - p.t) * angle) / sine;
      weight_v = sinf(p.t * angle) / sine;
    } else if (length >= 1e-4f) {
      weight_u = (1 - p.t) / length;
      weight_v = p.t / length;
    } else {
      weight_v = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int64_t c = 128 * i + 4 * lane;
    if (c >= p.dim) continue;
    store_four(p.direction, vector * p.dim + c, combination(weight_u, u[i], weight_v, v[i]),
               p.type);
  }
  if (lane != 0) return;
  p.norm_a[vector] = norm_a;
  p.norm_b[vector] = norm_b;
  p.distance[vector] = missing ? 0.0f : angle * 0.318309886183790672f;
}

}  // namespace

int kv_merge_pair(const KvMergeParams& p, void* stream) {
  if (kv_refusal(p.type, p.dim) != nullptr) return cudaErrorInvalidValue;
  if (p.vectors == 0) return cudaSuccess;
  const int64_t blocks = (p.vectors + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  merge_kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0,
                 static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
