// SPDX-License-Identifier: Apache-2.0
// The product of the outlier columns, over a list whose length is known to the device alone:
//
//     part (M, N) = scale[n] * sum over j of v[m][columns[j]] * q[n][columns[j]]
//
// The length is a loop bound, so any number of outliers is exact, and none costs a launch.
//
//   few tokens   a thread has one n and all tokens; it reads the codes where they lie
//   fp16, bf16   tensor cores: outliers_mma.cu
//   otherwise    a tile of the result a block: 16 columns at a time are gathered to shared memory
//                as fp32; of 64 x 128 a thread has 4 x 8: three 16-byte reads for 32 multiply-adds
//
// A gathered number costs a sector of 32 bytes: M + N of them a column and tile. Bound: reading and
// writing the result for a few columns, the gathers for more.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "cuda/device/outliers.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/outliers.h"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = kOutlierThreads;
constexpr int kFewRows = 8;
constexpr int kFewColumns = 64;  // gathered at a time
constexpr int kTileColumns = 16;

// Outputs of a block and of each of its threads.
template <int kM, int kN, int kThreadM, int kThreadN>
struct Tile {
  static constexpr int kRows = kM, kColumns = kN, kMine = kThreadM, kOurs = kThreadN;
  static constexpr int kAcross = kN / kThreadN;  // threads beside each other
  static_assert(kM / kThreadM * kAcross == kThreads && kThreadM % 4 == 0 && kThreadN % 4 == 0);
};
using WideTile = Tile<64, 128, 4, 8>;
using FlatTile = Tile<32, 128, 4, 4>;  // up to kFlatRows tokens
constexpr int kFlatRows = 64;

template <typename T>
__global__ void __launch_bounds__(kThreads) multiply_few_kernel(OutlierParams p) {
  __shared__ float x[kFewColumns][kFewRows];
  __shared__ int columns[kFewColumns];
  const int count = *p.count;
  if (count == 0 && p.accumulate) return;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float sum[kFewRows] = {};
  for (int first = 0; first < count; first += kFewColumns) {
    const int some = min(kFewColumns, count - first);
    __syncthreads();
    for (int i = threadIdx.x; i < some * kFewRows; i += kThreads) {
      const int j = i / kFewRows, row = i % kFewRows;
      const int column = p.columns[first + j];
      if (row == 0) columns[j] = column;
      x[j][row] = row < p.m ? gather_x<T>(p, row, column) : 0.0f;
    }
    __syncthreads();
    if (n < p.n) {
#pragma unroll 4
      for (int j = 0; j < some; ++j) {
        const float w = gather_code(p, n, columns[j]);
#pragma unroll
        for (int row = 0; row < kFewRows; ++row) sum[row] = fmaf(w, x[j][row], sum[row]);
      }
    }
  }
  if (n >= p.n) return;
  const float scale = row_scale(p, n);
#pragma unroll
  for (int row = 0; row < kFewRows; ++row) {
    if (row < p.m) store_part<T>(p, row, n, sum[row] * scale);
  }
}

// Four outputs of a row side by side, as they are stored.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

template <typename T>
__device__ __forceinline__ Four<T>* four_at(const OutlierParams& p, int64_t row, int64_t n) {
  return reinterpret_cast<Four<T>*>(static_cast<T*>(p.part) + row * p.n + n);
}

// `before`: what stood there, where the sum is added to it.
template <typename T>
__device__ __forceinline__ void store_4(const OutlierParams& p, int64_t row, int64_t n,
                                        const float (&v)[4], Four<T> before) {
  if (p.n % 4 != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < p.n) store_part<T>(p, row, n + i, v[i]);
    }
    return;
  }
  if (n >= p.n) return;
  T four[4];
  memcpy(four, &before, sizeof(before));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four[i] = from_float<T>(p.accumulate ? v[i] + to_float(four[i]) : v[i]);
  }
  Four<T> word;
  memcpy(&word, four, sizeof(word));
  *four_at<T>(p, row, n) = word;
}

// A thread's rows, and its columns in fours as far apart as the block's threads reach, so that its
// neighbours read other banks and write the bytes beside its own. What is added to is asked for
// first, the next columns' numbers before the present ones are used: neither trip to memory waits
// for the other.
template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads) multiply_kernel(OutlierParams p) {
  constexpr int kStride = Tile::kAcross * 4, kGathered = kThreads / kTileColumns;
  constexpr int kFours = Tile::kOurs / 4;
  __shared__ __align__(16) float x[kTileColumns][Tile::kRows + 4];
  __shared__ __align__(16) float w[kTileColumns][Tile::kColumns + 4];
  const int count = *p.count;
  if (count == 0 && p.accumulate) return;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * Tile::kColumns;
  const int thread = static_cast<int>(threadIdx.x);
  const int m = thread / Tile::kAcross * Tile::kMine, n = thread % Tile::kAcross * 4;
  const int j = thread % kTileColumns, lane = thread / kTileColumns;

  Four<T> before[Tile::kMine][kFours] = {};
  if (p.accumulate && p.n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Tile::kMine; ++i) {
#pragma unroll
      for (int l = 0; l < kFours; ++l) {
        const int64_t row = first_m + m + i, column = first_n + n + l * kStride;
        if (row < p.m && column < p.n) before[i][l] = *four_at<T>(p, row, column);
      }
    }
  }

  float next_x[Tile::kRows / kGathered], next_w[Tile::kColumns / kGathered];
  const auto gather = [&](int first) {
    const int column = first + j < count ? p.columns[first + j] : -1;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kGathered; ++i) {
      const int64_t row = first_m + i * kGathered + lane;
      next_x[i] = column >= 0 && row < p.m ? gather_x<T>(p, row, column) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kColumns / kGathered; ++i) {
      const int64_t row = first_n + i * kGathered + lane;
      next_w[i] = column >= 0 && row < p.n ? gather_code(p, row, column) : 0.0f;
    }
  };

  float sum[Tile::kMine][Tile::kOurs] = {};
  if (count > 0) gather(0);
  for (int first = 0; first < count; first += kTileColumns) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kRows / kGathered; ++i) x[j][i * kGathered + lane] = next_x[i];
#pragma unroll
    for (int i = 0; i < Tile::kColumns / kGathered; ++i) w[j][i * kGathered + lane] = next_w[i];
    __syncthreads();
    if (first + kTileColumns < count) gather(first + kTileColumns);
    const int some = min(kTileColumns, count - first);
#pragma unroll 4
    for (int c = 0; c < some; ++c) {
      float a[Tile::kMine], b[Tile::kOurs];
#pragma unroll
      for (int i = 0; i < Tile::kMine; i += 4) {
        *reinterpret_cast<float4*>(a + i) = *reinterpret_cast<const float4*>(&x[c][m + i]);
      }
#pragma unroll
      for (int l = 0; l < kFours; ++l) {
        *reinterpret_cast<float4*>(b + 4 * l) =
            *reinterpret_cast<const float4*>(&w[c][n + l * kStride]);
      }
#pragma unroll
      for (int i = 0; i < Tile::kMine; ++i) {
#pragma unroll
        for (int l = 0; l < Tile::kOurs; ++l) sum[i][l] = fmaf(a[i], b[l], sum[i][l]);
      }
    }
  }
#pragma unroll
  for (int l = 0; l < kFours; ++l) {
    const int64_t column = first_n + n + l * kStride;
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = column + i < p.n ? row_scale(p, column + i) : 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kMine; ++i) {
      const int64_t row = first_m + m + i;
      if (row >= p.m) continue;
      const float four[4] = {sum[i][4 * l] * scale[0], sum[i][4 * l + 1] * scale[1],
                             sum[i][4 * l + 2] * scale[2], sum[i][4 * l + 3] * scale[3]};
      store_4<T>(p, row, column, four, before[i][l]);
    }
  }
}

template <typename T, typename Tile>
int multiply_tiles(const OutlierParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, Tile::kColumns)),
                  static_cast<unsigned>(ceil_div(p.m, Tile::kRows)));
  multiply_kernel<T, Tile><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
int multiply(const OutlierParams& p, cudaStream_t stream) {
  if (p.m <= kFewRows) {
    const auto blocks = static_cast<unsigned>(ceil_div(p.n, kThreads));
    multiply_few_kernel<T><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  if (p.workspace != nullptr) return launch_outliers_mma(p, stream);
  return p.m > kFlatRows ? multiply_tiles<T, WideTile>(p, stream)
                         : multiply_tiles<T, FlatTile>(p, stream);
}

}  // namespace

int64_t outliers_workspace_bytes(const OutlierParams& p) {
  Device device{};
  const bool fits = p.m > kFewRows && p.dtype != DType::kFloat32 && p.input_scale == nullptr &&
                    query_device(device) == cudaSuccess && device.sm >= 80;
  return fits ? (p.m + p.n) * kCompactColumns * 2 : 0;
}

int outliers_multiply(const OutlierParams& p, void* stream_handle) {
  constexpr int64_t kMaxGrid = 65535;
  if (p.m < 1 || !mma16::is_row_major(p.format) || ceil_div(p.m, FlatTile::kRows) > kMaxGrid) {
    return cudaErrorInvalidValue;
  }
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.dtype) {
    case DType::kFloat16:
      return multiply<__half>(p, stream);
    case DType::kBFloat16:
      return multiply<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return multiply<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvopt::cuda
