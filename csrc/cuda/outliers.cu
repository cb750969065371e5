// SPDX-License-Identifier: Apache-2.0
// The outlier columns of common/outliers.h, found and listed without the host.
//
//   mark      256 columns and some rows of x a block; a thread has 8 columns and every eighth row.
//             Bits are joined by atomic OR, whose result no order changes. Bytes: x once
//   collect   one block: counts the bitmap's bits, adds them up in order and writes the list, which
//             so is ascending, its length and the inlier scale. For few tokens it reads x itself,
//             which saves a memset and a launch
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device/qlinear_w8a8_quantize.cuh"
#include "cuda/outliers.h"

namespace kvopt::cuda {
namespace {

constexpr int kMarkLanes = 32, kMarkRows = 8;  // threads of a block
constexpr int kMarkColumns = kMarkLanes * 8;   // columns of a block
constexpr int kCollectThreads = 1024;
constexpr int64_t kCollectElements = 32 * 1024;  // of x that `collect` reads itself

// Bits 0..7: which of eight columns has |v| >= threshold, or NaN.
template <typename T, bool kAligned>
__device__ __forceinline__ uint32_t marked_8(const OutlierParams& p, const float (&scale)[8],
                                             int64_t row, int column) {
  float v[8];
  to_floats_8(v, load_raw_8<kAligned>(static_cast<const T*>(p.x) + row * p.k, column,
                                      static_cast<int>(p.k)));
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = fabsf(v[i] * scale[i]) < p.threshold;
    bits |= static_cast<uint32_t>(!inside) << i;
  }
  return bits;
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_scale_8(float (&scale)[8], const OutlierParams& p,
                                             int column) {
#pragma unroll
  for (float& s : scale) s = 1.0f;
  if (p.input_scale == nullptr) return;
  to_floats_8(scale, load_raw_8<kAligned>(static_cast<const T*>(p.input_scale), column,
                                          static_cast<int>(p.k)));
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMarkLanes* kMarkRows) mark_kernel(OutlierParams p) {
  __shared__ uint32_t words[kMarkColumns / 32];
  const int column =
      static_cast<int>(blockIdx.x) * kMarkColumns + static_cast<int>(threadIdx.x) * 8;
  const int thread = static_cast<int>(threadIdx.y) * kMarkLanes + static_cast<int>(threadIdx.x);
  if (thread < kMarkColumns / 32) words[thread] = 0;
  __syncthreads();
  if (column < p.k) {
    float scale[8];
    load_scale_8<T, kAligned>(scale, p, column);
    uint32_t bits = 0;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kMarkRows;
#pragma unroll 4
    for (int64_t row = blockIdx.y * kMarkRows + threadIdx.y; row < p.m; row += stride) {
      bits |= marked_8<T, kAligned>(p, scale, row, column);
    }
    if (bits != 0) atomicOr(&words[threadIdx.x / 4], bits << threadIdx.x % 4 * 8);
  }
  __syncthreads();
  const int64_t word = static_cast<int64_t>(blockIdx.x) * (kMarkColumns / 32) + thread;
  if (thread < kMarkColumns / 32 && word < bitmap_words(p.k) && words[thread] != 0) {
    atomicOr(&p.bitmap[word], words[thread]);
  }
}

// Sum over the threads before this one; `parts`: 32 words of shared memory.
__device__ __forceinline__ int exclusive_sum(int value, int* parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFF, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) parts[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) before += parts[w];
  return before + sum - value;
}

// kMarks: it fills the bitmap itself.
template <typename T, bool kAligned, bool kMarks>
__global__ void __launch_bounds__(kCollectThreads) collect_kernel(OutlierParams p) {
  __shared__ int parts[32];
  const auto words = static_cast<int>(bitmap_words(p.k));
  const auto thread = static_cast<int>(threadIdx.x);
  if constexpr (kMarks) {  // a word's 32 columns are those of four neighbouring lanes
    for (int first = 0; first < words * 4; first += kCollectThreads) {
      const int column = (first + thread) * 8;
      uint32_t bits = 0;
      if (column < p.k) {
        float scale[8];
        load_scale_8<T, kAligned>(scale, p, column);
        for (int64_t row = 0; row < p.m; ++row) {
          bits |= marked_8<T, kAligned>(p, scale, row, column);
        }
      }
      bits <<= thread % 4 * 8;
      bits |= __shfl_xor_sync(0xFFFFFFFF, bits, 1);
      bits |= __shfl_xor_sync(0xFFFFFFFF, bits, 2);
      if (thread % 4 == 0 && column < p.k) p.bitmap[column / 32] = bits;
    }
    __syncthreads();
  }
  const int share = (words + kCollectThreads - 1) / kCollectThreads;
  const int begin = min(thread * share, words), end = min(begin + share, words);
  int mine = 0;
  for (int word = begin; word < end; ++word) mine += __popc(p.bitmap[word]);
  int at = exclusive_sum(mine, parts);
  if (thread == kCollectThreads - 1) *p.count = at + mine;
  for (int word = begin; word < end; ++word) {
    for (uint32_t bits = p.bitmap[word]; bits != 0; bits &= bits - 1) {
      p.columns[at++] = word * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
  }
  auto* const out = static_cast<T*>(p.inlier_scale);
  for (int column = thread; column < p.k; column += kCollectThreads) {
    const bool outlier = p.bitmap[column / 32] >> column % 32 & 1;
    const float scale =
        p.input_scale == nullptr ? 1.0f : to_float(static_cast<const T*>(p.input_scale)[column]);
    out[column] = from_float<T>(outlier ? 0.0f : scale);
  }
}

template <typename T, bool kAligned>
int find(const OutlierParams& p, cudaStream_t stream) {
  if (p.m * p.k <= kCollectElements) {
    collect_kernel<T, kAligned, true><<<1, kCollectThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const cudaError_t error =
      cudaMemsetAsync(p.bitmap, 0, sizeof(uint32_t) * bitmap_words(p.k), stream);
  if (error != cudaSuccess) return error;
  const int64_t across = ceil_div(p.k, kMarkColumns);
  const int64_t down = std::clamp<int64_t>(1024 / across, 1, ceil_div(p.m, kMarkRows));
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  mark_kernel<T, kAligned><<<grid, dim3(kMarkLanes, kMarkRows), 0, stream>>>(p);
  collect_kernel<T, kAligned, false><<<1, kCollectThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
int find_type(const OutlierParams& p, cudaStream_t stream) {
  const bool aligned = sizeof(T) == 2 && p.k % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.input_scale) % 16 == 0;
  return aligned ? find<T, true>(p, stream) : find<T, false>(p, stream);
}

}  // namespace

int outliers_find(const OutlierParams& p, void* stream_handle) {
  if (p.m < 1) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.dtype) {
    case DType::kFloat16:
      return find_type<__half>(p, stream);
    case DType::kBFloat16:
      return find_type<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return find_type<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvopt::cuda
