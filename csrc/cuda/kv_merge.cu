// SPDX-License-Identifier: Apache-2.0
// MiniCache's merge of two layers' vectors into one direction and two magnitudes (arXiv:2405.14366,
// section 3; the formulas and their edge cases stand in common/kv_store.h).
//
// One warp per pair of vectors, which stay in its registers: both are read once, the direction is
// written once. Sums in fp32 over the warp in a fixed order; 4 D + 12 bytes a pair in 16-bit types,
// 2 D read for each of a and b: bound by memory.
#include "cuda/device/kv_merge.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(32 * kWarps) merge_kernel(KvMergeParams p) {
  const int64_t vector = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (vector >= p.vectors) return;
  const int64_t at = vector * p.dim;
  const KvVectorPair x = load_pair(p.a, p.b, at, at, p.dim, p.type);
  store_direction(x, p.t, p.direction, at, p.dim, p.type);
  if (threadIdx.x % 32 != 0) return;
  p.norm_a[vector] = x.norm_a;
  p.norm_b[vector] = x.norm_b;
  p.distance[vector] = distance_of(x);
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
