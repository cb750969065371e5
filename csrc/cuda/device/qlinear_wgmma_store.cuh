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

// A block's sums of a tile that a later block ends, to global memory; and these added to the later
// block's. The same thread holds the same elements in every block. kPublished is what other memory
// hardly contains: `published` need not be initialised, and is cleared when it was read.
constexpr uint64_t kPublished = 0xB5297A4D68E31DA4;

template <typename S>
__device__ __forceinline__ void publish(const Plan& plan,
                                        const float (&sum)[S::kTiles][S::kRowsX / 2]) {
  float4* const target =
      plan.partials + static_cast<int64_t>(blockIdx.x) * (S::kRowsX * S::kRowsW / 4) + threadIdx.x;
#pragma unroll
  for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < S::kRowsX / 8; ++i) {
      const float* const d = &sum[t][4 * i];
      target[(t * (S::kRowsX / 8) + i) * S::kConsumers] = {d[0], d[1], d[2], d[3]};
    }
  }
  __threadfence();
  named_barrier(1, S::kConsumers);
  if (threadIdx.x == 0) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(plan.published + blockIdx.x),
                 "l"(kPublished)
                 : "memory");
  }
}

template <typename S>
__device__ __forceinline__ void add_published(const Plan& plan,
                                              float (&sum)[S::kTiles][S::kRowsX / 2], int first) {
  for (int block = first; block < static_cast<int>(blockIdx.x); ++block) {
    uint64_t* const flag = plan.published + block;
    asm volatile(  // one address: a warp's lanes see the same
        "{.reg .pred p;\n"
        ".reg .u64 v;\n"
        "again: ld.acquire.gpu.global.u64 v, [%0];\n"
        "setp.eq.u64 p, v, %1;\n"
        "@p bra.uni done;\n"
        "bra.uni again;\n"
        "done: }" ::"l"(flag),
        "l"(kPublished)
        : "memory");
    named_barrier(1, S::kConsumers);
    if (threadIdx.x == 0) *flag = 0;
    const float4* const source =
        plan.partials + static_cast<int64_t>(block) * (S::kRowsX * S::kRowsW / 4) + threadIdx.x;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < S::kRowsX / 8; ++i) {
        const float4 v = __ldcg(source + (t * (S::kRowsX / 8) + i) * S::kConsumers);
        float* const d = &sum[t][4 * i];
        d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
      }
    }
  }
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

// Four neighbouring columns' sums of a row, over the blocks that share the tile, in their order.
__device__ __forceinline__ float4 total_of(uint32_t source, int splits) {
  float4 sum{0, 0, 0, 0};
#pragma unroll
  for (int first = 0; first < kMaxSplits; first += 4) {
    if (first >= splits) break;
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // four loads under way
      if (first + i >= splits) break;
      v[i] = load_cluster_4(address_in_block(source, first + i));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= splits) break;
      sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
    }
  }
  return sum;
}

// Any other tile: the sums go through shared memory, kSliceX rows of x and 128 rows of w at a time,
// and are finished in rows of y, four columns a thread; by all blocks that share the tile, each its
// share of the rows.
template <typename S>
__device__ __forceinline__ void store_finished(const Epilogue& e,
                                               const float (&sum)[S::kTiles][S::kRowsX / 2],
                                               float* out, int m0, int n0, int warp, int lane,
                                               int rank, int splits) {
  constexpr int kSlicesX = S::kRowsX / S::kSliceX;
  const int quads = (e.swiglu ? S::kColumns / 2 : S::kColumns) / 4;
  const bool vectors = e.dtype != DType::kFloat32 && e.n % (e.swiglu ? 8 : 4) == 0 &&
                       reinterpret_cast<uintptr_t>(e.y) % 8 == 0 && e.residual == nullptr;
  if (splits > 1) named_barrier(1, S::kConsumers);  // `out` is where the stages were
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
    const int shift = e.swiglu ? 4 : 5;  // log2(quads)
#pragma unroll 1
    for (int i = rank * S::kConsumers + threadIdx.x; i < rows * quads;
         i += splits * S::kConsumers) {
      const int row = i >> shift, c = (i & (quads - 1)) * 4;
      const int column = e.swiglu ? c / 8 * 16 + c % 8 : c;
      const int m = first_m + row;
      const int n = n0 + (column / 64 * S::kTiles + slice / kSlicesX) * 64 + column % 64;
      if (n >= e.n) continue;
      const uint32_t source = shared_address(out + row * S::kPitchSums + column);
      const float4 total = total_of(source, splits);
      float v[4] = {total.x, total.y, total.z, total.w};
      if (e.swiglu) {
        const float4 up = total_of(source + 32, splits);
        const float u[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = swiglu(before_activation(e, m, n + j, v[j]),
                        before_activation(e, m, n + j + 8, u[j]));
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (n + j < e.n) v[j] = before_activation(e, m, n + j, v[j]);
        }
      }
      const int at = e.swiglu ? n / 16 * 8 + n % 8 : n;
      const int width = e.swiglu ? e.n / 2 : e.n;
      if (vectors) {
        uint2 packed;
        packed.x = pack_output(v[0], v[1], e.dtype);
        packed.y = pack_output(v[2], v[3], e.dtype);
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(e.y) + static_cast<int64_t>(m) * width +
                                  at) = packed;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (at + j < width) store_output(e, m, at + j, v[j]);
        }
      }
    }
    if (splits > 1) {
      cluster_sync_readers();
    } else {
      named_barrier(1, S::kConsumers);
    }
  }
}

#endif  // KVOPT_HAS_WGMMA

}  // namespace kvopt::cuda::wgmma
