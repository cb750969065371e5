// SPDX-License-Identifier: Apache-2.0
// The product of the outlier columns on tensor cores, for fp16 and bf16: x and the codes, integers
// of 8 bits, are exact there; sums are fp32.
//
//   compact    the first kCompactColumns columns of x and of w, gathered once to the workspace as
//              (M + N, kCompactColumns). A gathered number costs a sector of 32 bytes, here M + N
//              of them a column, not as many for each tile
//   multiply   a block has 64 tokens and 128 outputs, eight warps (two by four) 32 x 32 each. 16
//              columns a step go through registers to shared memory, the next step's while the
//              present one is multiplied. Columns past kCompactColumns are gathered in every block:
//              slow, but as exact, and in the same sum. What is added to is asked for first
//
// Lanes hold operands and sums as device/mma.cuh draws them, rows of x in the place of rows of the
// weight. Bound: reading and writing the result (4 bytes an output) up to some hundred columns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/device/mma.cuh"
#include "cuda/device/outliers.cuh"
#include "cuda/outliers.h"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = kOutlierThreads;
constexpr int kTileColumns = 16;
constexpr int kMmaRows = 64, kMmaColumns = 128, kMmaPitch = kTileColumns + 8;  // no bank twice

__device__ __forceinline__ void multiply_16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  mma_16x8x16(c, a, make_uint2(b[0], b[1]));
#endif
}

__device__ __forceinline__ void multiply_16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t pair_of(T low, T high) {
  const T two[2] = {low, high};
  uint32_t word;
  memcpy(&word, two, sizeof(word));
  return word;
}

// Two columns of a row; -1 is none.
template <typename T, typename At>
__device__ __forceinline__ uint32_t gather_pair(int64_t row, int64_t rows, const int (&column)[2],
                                                const At& at) {
  T two[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    two[h] = column[h] >= 0 && row < rows ? at(row, column[h]) : from_float<T>(0.0f);
  }
  return pair_of(two[0], two[1]);
}

// A warp a row, of x and then of w: its first kCompactColumns outliers side by side, zeros up to a
// whole step.
template <typename T>
__global__ void __launch_bounds__(kThreads) compact_kernel(OutlierParams p) {
  const int count = min(*p.count, kCompactColumns);
  const int padded = (count + kTileColumns - 1) / kTileColumns * kTileColumns;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.m + p.n) return;
  T* const out = static_cast<T*>(p.workspace) + row * kCompactColumns;
  for (int j = static_cast<int>(threadIdx.x) % 32; j < padded; j += 32) {
    T value = from_float<T>(0.0f);
    if (j < count) {
      const int column = p.columns[j];
      value = row < p.m ? static_cast<const T*>(p.x)[row * p.k + column]
                        : from_float<T>(gather_code(p, row - p.m, column));
    }
    out[j] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) multiply_mma_kernel(OutlierParams p) {
  constexpr int kPairs = kTileColumns / 2, kGathered = kThreads / kPairs;  // rows at a time
  constexpr int kX = kMmaRows / kGathered, kW = kMmaColumns / kGathered;
  __shared__ uint32_t x[kMmaRows][kMmaPitch / 2];
  __shared__ uint32_t w[kMmaColumns][kMmaPitch / 2];
  const int count = *p.count;
  if (count == 0 && p.accumulate) return;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * kMmaRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kMmaColumns;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int g = thread % 32 / 4, t = thread % 4;
  const int m = warp / 4 * 32 + g, n = warp % 4 * 32 + 2 * t;  // of the lane's first sum
  const bool words = p.n % 2 == 0;

  // [i][h][l]: row m + 16 i + 8 h, columns n + 8 l and the next
  uint32_t before[2][2][4] = {};
  if (p.accumulate && words) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_m + m + 8 * i;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const int64_t column = first_n + n + 8 * l;
        if (row >= p.m || column >= p.n) continue;
        before[i / 2][i % 2][l] =
            *reinterpret_cast<const uint32_t*>(static_cast<T*>(p.part) + row * p.n + column);
      }
    }
  }

  const int j = thread % kPairs, lane = thread / kPairs;
  const int compact = min(count, kCompactColumns);
  const uint32_t* const compact_x = static_cast<const uint32_t*>(p.workspace);
  const uint32_t* const compact_w = compact_x + p.m * (kCompactColumns / 2);
  uint32_t next_x[kX], next_w[kW];
  const auto x_at = [&](int64_t row, int column) {
    return static_cast<const T*>(p.x)[row * p.k + column];
  };
  const auto w_at = [&](int64_t row, int column) {
    return from_float<T>(gather_code(p, row, column));
  };
  const auto load = [&](int first) {
    if (first < compact) {
#pragma unroll
      for (int i = 0; i < kX; ++i) {
        const int64_t row = first_m + i * kGathered + lane;
        next_x[i] = row < p.m ? compact_x[(row * kCompactColumns + first) / 2 + j] : 0;
      }
#pragma unroll
      for (int i = 0; i < kW; ++i) {
        const int64_t row = first_n + i * kGathered + lane;
        next_w[i] = row < p.n ? compact_w[(row * kCompactColumns + first) / 2 + j] : 0;
      }
      return;
    }
    int column[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      column[h] = first + 2 * j + h < count ? p.columns[first + 2 * j + h] : -1;
    }
#pragma unroll
    for (int i = 0; i < kX; ++i) {
      next_x[i] = gather_pair<T>(first_m + i * kGathered + lane, p.m, column, x_at);
    }
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      next_w[i] = gather_pair<T>(first_n + i * kGathered + lane, p.n, column, w_at);
    }
  };

  float sum[2][4][4] = {};
  if (count > 0) load(0);
  for (int first = 0; first < count; first += kTileColumns) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kX; ++i) x[i * kGathered + lane][j] = next_x[i];
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      w[i * kGathered + lane][j] = next_w[i];
    }
    __syncthreads();
    if (first + kTileColumns < count) load(first + kTileColumns);
    uint32_t a[2][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) a[i][q] = x[m + 16 * i + q % 2 * 8][t + q / 2 * 4];
    }
#pragma unroll
    for (int l = 0; l < 4; ++l) {
#pragma unroll
      for (int q = 0; q < 2; ++q) b[l][q] = w[warp % 4 * 32 + 8 * l + g][t + 4 * q];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int l = 0; l < 4; ++l) multiply_16(sum[i][l], a[i], b[l], T{});
    }
  }

#pragma unroll
  for (int l = 0; l < 4; ++l) {
    const int64_t column = first_n + n + 8 * l;
    if (column >= p.n) continue;
    const float low_scale = row_scale(p, column);
    const float high_scale = column + 1 < p.n ? row_scale(p, column + 1) : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_m + m + 8 * i;
      if (row >= p.m) continue;
      float low = sum[i / 2][l][i % 2 * 2] * low_scale;
      float high = sum[i / 2][l][i % 2 * 2 + 1] * high_scale;
      if (!words) {
        store_part<T>(p, row, column, low);
        if (column + 1 < p.n) store_part<T>(p, row, column + 1, high);
        continue;
      }
      if (p.accumulate) {
        T two[2];
        memcpy(two, &before[i / 2][i % 2][l], sizeof(two));
        low += to_float(two[0]);
        high += to_float(two[1]);
      }
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.part) + row * p.n + column) =
          pair_of(from_float<T>(low), from_float<T>(high));
    }
  }
}

template <typename T>
int launch(const OutlierParams& p, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(ceil_div(p.m + p.n, kThreads / 32));
  compact_kernel<T><<<rows, kThreads, 0, stream>>>(p);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kMmaColumns)),
                  static_cast<unsigned>(ceil_div(p.m, kMmaRows)));
  multiply_mma_kernel<T><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int launch_outliers_mma(const OutlierParams& p, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace kvopt::cuda
