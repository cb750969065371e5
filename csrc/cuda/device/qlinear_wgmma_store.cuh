// SPDX-License-Identifier: Apache-2.0
// From the warpgroup product's sums to y. They lie transposed in registers: a lane holds rows g and
// g + 8 of w for two rows of x, y wants consecutive rows of w. Both ways lead through shared
// memory.
#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/qlinear_wgmma_plan.cuh"
#include "cuda/device/wgmma.cuh"

namespace kvopt::cuda::wgmma {

#if KVOPT_HAS_WGMMA

__device__ __forceinline__ uint32_t pack_output(float low, float high, DType type) {
  uint32_t v;
  if (type == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(low, high);
    v = *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    v = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return v;
}

// A tile of y whose epilogue is plain: transposed into shared memory, then whole rows of the tile
// by bulk copies, which run on while the next tile is multiplied.
template <typename S>
__device__ __forceinline__ void store_staged(const Epilogue& e,
                                             const float (&sum)[S::kTiles][S::kRowsX / 2],
                                             unsigned char* out, int m0, int n0, int tile16,
                                             int lane) {
  store_bulk_wait_read<0>();  // of the tile before; only threads that issued
                              // copies wait
  named_barrier(1, S::kConsumers);
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
    const int row_w = (tile16 + 4 * t) * 16;
    const int n = n0 + row_w + lane / 4;
    float bias0 = 0, bias8 = 0;
    if (e.bias != nullptr) {
      if (n < e.n) bias0 = load_float(e.bias, n, e.dtype);
      if (n + 8 < e.n) bias8 = load_float(e.bias, n + 8, e.dtype);
    }
    // Four 8 x 8 matrices a store: rows g and g + 8 of w, of eight rows of x and the next eight.
    const uint32_t target = shared_address(out) + (lane / 16 * 8 + lane % 8) * S::kPitchOut +
                            (row_w + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int j = 0; j < S::kRowsX / 8; j += 2) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* const d = &sum[t][4 * (j + i)];
        float scale0 = 1, scale1 = 1;
        if (e.row_scale != nullptr) {
          const int m = m0 + (j + i) * 8 + lane % 4 * 2;
          if (m < e.m) scale0 = e.row_scale[m];
          if (m + 1 < e.m) scale1 = e.row_scale[m + 1];
        }
        v[2 * i] = pack_output(d[0] * scale0 + bias0, d[1] * scale1 + bias0, e.dtype);
        v[2 * i + 1] = pack_output(d[2] * scale0 + bias8, d[3] * scale1 + bias8, e.dtype);
      }
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], "
          "{%1,%2,%3,%4};" ::"r"(target + j * 8 * S::kPitchOut),
          "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
          : "memory");
    }
  }
  async_proxy_fence();
  named_barrier(1, S::kConsumers);
  const int row = threadIdx.x;
  if (row < S::kRowsX && m0 + row < e.m) {
    const int columns = min(S::kRowsW, e.n - n0);
    store_bulk(static_cast<uint16_t*>(e.y) + static_cast<int64_t>(m0 + row) * e.n + n0,
               out + row * S::kPitchOut, columns * 2);
    store_bulk_commit();
  }
}

// Any other tile: the sums go through shared memory, kSliceX rows of x and 128 rows of w at a time,
// and are finished in rows of y; by all blocks of a cluster, each its share of the rows.
template <typename S>
__device__ __forceinline__ void store_finished(const Epilogue& e,
                                               const float (&sum)[S::kTiles][S::kRowsX / 2],
                                               float* out, int m0, int n0, int warp, int lane,
                                               int rank, int splits) {
  constexpr int kSlicesX = S::kRowsX / S::kSliceX;
  const int columns = e.swiglu ? S::kColumns / 2 : S::kColumns;
#pragma unroll 1
  for (int slice = 0; slice < S::kTiles * kSlicesX; ++slice) {
    // Rows g and g + 8 of w, rows 2 t and 2 t + 1 of x.
    float* const mine = out + lane % 4 * 2 * S::kPitchSums + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < S::kTiles * kSlicesX; ++i) {
      if (i != slice) continue;
#pragma unroll
      for (int j = 0; j < S::kSliceX / 8; ++j) {
        const float* const d = &sum[i / kSlicesX][(i % kSlicesX * (S::kSliceX / 8) + j) * 4];
        float* const target = mine + j * 8 * S::kPitchSums;
        target[0] = d[0], target[S::kPitchSums] = d[1];
        target[8] = d[2], target[S::kPitchSums + 8] = d[3];
      }
    }
    if (splits > 1) {
      cluster_sync();
    } else {
      named_barrier(1, S::kConsumers);
    }
    const int first_m = m0 + slice % kSlicesX * S::kSliceX;
    const int rows = min(S::kSliceX, e.m - first_m);
#pragma unroll 1
    for (int i = rank * S::kConsumers + threadIdx.x; i < rows * columns;
         i += splits * S::kConsumers) {
      const int row = i / columns, c = i % columns;
      const int column = e.swiglu ? c / 8 * 16 + c % 8 : c;
      const auto total = [&](int at) {
        const float* const source = out + row * S::kPitchSums + at;
        if (splits == 1) return *source;
        float part[kMaxSplits];
#pragma unroll
        for (int r = 0; r < kMaxSplits; ++r) {
          part[r] = r < splits ? load_cluster(address_in_block(source, r)) : 0.0f;
        }
        float v = 0;
#pragma unroll
        for (int r = 0; r < kMaxSplits; ++r) v += part[r];
        return v;
      };
      const int m = first_m + row;
      const int n = n0 + (column / 64 * S::kTiles + slice / kSlicesX) * 64 + column % 64;
      if (n >= e.n) continue;
      float v = before_activation(e, m, n, total(column));
      if (e.swiglu) v = swiglu(v, before_activation(e, m, n + 8, total(column + 8)));
      store_output(e, m, e.swiglu ? n / 16 * 8 + n % 8 : n, v);
    }
    if (splits > 1) {
      cluster_sync();
    } else {
      named_barrier(1, S::kConsumers);
    }
  }
}

#endif  // KVOPT_HAS_WGMMA

}  // namespace kvopt::cuda::wgmma
