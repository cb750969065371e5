// SPDX-License-Identifier: Apache-2.0
// A 128 x 64 tile of products of two sets of 16-bit vectors on the tensor cores, for kv_select.cu.
//
// Both sets lie in shared memory as whole vectors, rows 16 bytes longer than the vectors, so that
// the eight rows of an ldmatrix lie in different banks. The set that stays is fetched once; a warp
// holds 32 of its rows, so each fragment of the streaming set serves two products.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/kv_mma.cuh"
#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

template <bool kBFloat>
class MmaTile {
 public:
  static constexpr int kX = 128, kY = 64, kRows = 4, kColumns = 16;
  static constexpr int kRowLanes = 4;
  static constexpr int kThreads = 128;

  static int64_t shared_bytes(int64_t dim) { return (kX + kY) * pitch_of(dim) * 2; }

  __device__ MmaTile(uint8_t* shared, KvType /*type*/, int dim)
      : x_(reinterpret_cast<uint16_t*>(shared)), dim_(dim), pitch_(pitch_of(dim)) {
    y_ = x_ + kX * pitch_;
  }

  __device__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / 32 * 32 + i / 2 * 16 + i % 2 * 8 +
           static_cast<int>(threadIdx.x) % 32 / 4;
  }
  __device__ static int column(int j) {
    return j / 2 * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + j % 2;
  }

  __device__ void stay(const void* data, int64_t at, int rows) {
    fetch<kX>(x_, static_cast<const uint16_t*>(data) + at, rows);
  }

  __device__ void multiply(float (&sums)[kRows][kColumns], const void* data, int64_t at, int rows) {
    __syncthreads();
    fetch<kY>(y_, static_cast<const uint16_t*>(data) + at, rows);
    __syncthreads();
    float c[2][kColumns / 2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0;
      }
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t x = shared_address(x_ + (32 * warp + lane % 16) * pitch_ + 8 * (lane / 16));
    const uint32_t y =
        shared_address(y_ + (lane / 16 * 8 + lane % 8) * pitch_ + 8 * (lane / 8 % 2));
#pragma unroll 2
    for (int k = 0; k < dim_; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint2 low, high;
        load_fragments(low, high, x + 2 * (16 * m * pitch_ + k));
        a[m][0] = low.x, a[m][1] = low.y, a[m][2] = high.x, a[m][3] = high.y;
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; n += 2) {
        uint2 first, second;
        load_fragments(first, second, y + 2 * (8 * n * pitch_ + k));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_step<kBFloat>(c[m][n], a[m], first.x, first.y);
          mma_step<kBFloat>(c[m][n + 1], a[m], second.x, second.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = c[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
  }

 private:
  __host__ __device__ static int pitch_of(int64_t dim) {
    return static_cast<int>((dim + 15) / 16 * 16 + 8);
  }

  template <int kCount>
  __device__ void fetch(uint16_t* target, const uint16_t* source, int rows) const {
    const int pieces = (dim_ + 15) / 16 * 2;  // of eight channels
#pragma unroll 4
    for (int i = threadIdx.x; i < kCount * pieces; i += kThreads) {
      const int row = i / pieces, c = 8 * (i % pieces);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row < rows && c < dim_) v = load_16(source + row * int64_t{dim_} + c);
      *reinterpret_cast<uint4*>(target + row * pitch_ + c) = v;
    }
  }

  uint16_t* x_;
  uint16_t* y_;
  int dim_, pitch_;
};

}  // namespace kvopt::cuda
