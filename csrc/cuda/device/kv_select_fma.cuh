// SPDX-License-Identifier: Apache-2.0
// A 64 x 64 tile of products of two sets of vectors in fp32 arithmetic: what kv_select.cu falls
// back to (float32, bfloat16 on sm_75, and sizes that the tensor-core tile does not take).
//
// Both sets pass through shared memory 32 channels at a time. Thread (y, x) of 16 x 8 holds rows
// y + 16 i and columns x + 8 j; rows are 36 floats apart, so the eight columns that a quarter warp
// reads lie in different banks.
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

class FmaTile {
 public:
  static constexpr int kX = 64, kY = 64, kRows = 4, kColumns = 8;
  static constexpr int kRowLanes = 8;  // neighbouring lanes that share rows
  static constexpr int kThreads = 128;

  static int64_t shared_bytes(int64_t /*dim*/) { return 2 * 64 * kPitch * sizeof(float); }

  __device__ FmaTile(uint8_t* shared, KvType type, int dim)
      : x_(reinterpret_cast<float*>(shared)), y_(x_ + kX * kPitch), type_(type), dim_(dim) {}

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / 8 + 16 * i; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x) % 8 + 8 * j; }

  // The set that stays: `rows` vectors side by side from element `at` on.
  __device__ void stay(const void* data, int64_t at, int rows) {
    stays_ = data;
    stays_at_ = at;
    stays_rows_ = rows;
  }

  __device__ void multiply(float (&sums)[kRows][kColumns], const void* data, int64_t at, int rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0;
    }
    for (int begin = 0; begin < dim_; begin += kDepth) {
      __syncthreads();
      fetch(x_, stays_, stays_at_, stays_rows_, begin);
      fetch(y_, data, at, rows, begin);
      __syncthreads();
#pragma unroll 2
      for (int k = 0; k < kDepth; k += 4) {
        float4 x[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          x[i] = *reinterpret_cast<const float4*>(x_ + row(i) * kPitch + k);
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float4 y = *reinterpret_cast<const float4*>(y_ + column(j) * kPitch + k);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            sums[i][j] = fmaf(x[i].x, y.x, sums[i][j]);
            sums[i][j] = fmaf(x[i].y, y.y, sums[i][j]);
            sums[i][j] = fmaf(x[i].z, y.z, sums[i][j]);
            sums[i][j] = fmaf(x[i].w, y.w, sums[i][j]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kDepth = 32, kPitch = kDepth + 4;

  __device__ void fetch(float* target, const void* data, int64_t at, int rows, int begin) const {
#pragma unroll
    for (int i = threadIdx.x; i < 64 * kDepth / 4; i += kThreads) {
      const int row = i / (kDepth / 4), c = 4 * (i % (kDepth / 4));
      float4 v = make_float4(0, 0, 0, 0);
      if (row < rows && begin + c < dim_) {
        v = load_four(data, at + row * int64_t{dim_} + begin + c, type_);
      }
      *reinterpret_cast<float4*>(target + row * kPitch + c) = v;
    }
  }

  float* x_;
  float* y_;
  KvType type_;
  int dim_;
  const void* stays_ = nullptr;
  int64_t stays_at_ = 0;
  int stays_rows_ = 0;
};

}  // namespace kvopt::cuda
