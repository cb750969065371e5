// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for any number of rows: a tiled product on mma.sync, codes turned into
// fp16 weights in registers. It serves the chips without wgmma and whatever that path refuses.
//
//   block    8 * kFragments rows of x   x   16 * kTiles * kWarpsN rows of w,  8 warps
//   warp     all those rows of x, kTiles tiles of w, every kWarpsK-th 64 columns
//   K        in chunks of kWarpsK * 64 columns, two to four in shared memory
//
// x is read from shared memory by every warp, as B fragments (ldmatrix, rows 16 bytes apart in the
// banks); codes pass through it only to be in flight early (cp.async): a lane reads back its own
// bytes. Each code becomes scale * (q - zero), rounded once to fp16 (7 instructions for 4 weights
// and row pair, table look-ups for code books), and meets all rows of x. Warps that share rows of w
// add their sums in shared memory, in order; then the epilogue and coalesced rows of y.
//
// Bytes: the codes ceil(M / (8 kFragments)) times, x N / (16 kTiles kWarpsN) times, from L2. Bound:
// memory up to M of about 32, then mma.sync (on Hopper half of what wgmma reaches).
// Limits: sm_75 has no cp.async: there the next chunk waits in registers while one is used.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/device/dequant.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemm_loader.cuh"
#include "cuda/device/qlinear_gemm_plan.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {
namespace gemm {

// Codes of a byte pair looked up, times the scale. `step` as in raw_operand.
__device__ __forceinline__ void book_operand(uint32_t (&a)[4], const Words<4>& w, int step,
                                             const RowScale& row0, const RowScale& row8,
                                             const uint32_t* table) {
  const uint32_t word = w.word[step];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = word >> 4 * i & 0x000F000F;
    a[i] = mul_pair(table[(pair | pair >> 12) & 0xFF], i % 2 == 0 ? row0.scale : row8.scale);
  }
}

template <int kBits, bool kBook, typename S>
struct Sums {
  using C = Chunk<S, kBits>;
  float sum[S::kTiles][S::kFragments][4] = {};
  RowScale row0[S::kTiles], row8[S::kTiles];
  int group = -1;
  bool wide = false;

  // `meta`: the group's parameters, tile 0.
  __device__ __forceinline__ void enter(const QLinearProblem& p, const unsigned char* meta, int g) {
    __half2 first[S::kTiles], second[S::kTiles];  // {scale, zero} of rows g and g + 8
    bool large = false;
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      const auto* const words = reinterpret_cast<const __half2*>(meta + r * C::kTileMeta);
      if (p.format.has_zeros()) {
        first[r] = words[g * 2];
        second[r] = words[g * 2 + 1];
      } else {
        const __half2 scales = words[g];
        const __half zero = __float2half_rn(p.zero);
        first[r] = __halves2half2(__low2half(scales), zero);
        second[r] = __halves2half2(__high2half(scales), zero);
      }
      large = large || is_wide(__low2half(first[r])) || is_wide(__low2half(second[r]));
    }
    wide = kBook || __any_sync(0xFFFFFFFF, large);
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      row0[r] = make_row_scale(__low2half(first[r]), __high2half(first[r]), wide);
      row8[r] = make_row_scale(__low2half(second[r]), __high2half(second[r]), wide);
    }
  }

  // Adds one warp's 64 columns, number `block` of the tile.
  __device__ __forceinline__ void add(const QLinearProblem& p, const unsigned char* stage,
                                      int block, int warp, int lane, const uint32_t* table) {
    if (block >= p.blocks) return;
    const int row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
    const uint32_t x = shared_address(stage) +
                       (row * C::kStrideX + warp % S::kWarpsK * kBlockColumns + column) * 2;
    const unsigned char* const codes = stage + C::kCodes + warp * (S::kTiles * C::kTileCodes);
    const unsigned char* const meta = stage + C::kMeta + warp * (S::kTiles * C::kTileMeta);
    const bool one_group = Loader<kBits, S>::group_slots(p) == 1;
    Words<kBits> words[S::kTiles];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      words[r] = load_words<kBits>(codes + r * C::kTileCodes, lane);
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step == 0 || !one_group) {
        const int now = group_of_column(p, block * kBlockColumns + step * kStepColumns);
        if (now != group) {
          group = now;
          enter(p, meta + step * 64, lane / 4);
        }
      }
      uint32_t a[S::kTiles][4];
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        if constexpr (kBook) {
          book_operand(a[r], words[r], step, row0[r], row8[r], table);
        } else {
          weights_operand<kBits>(a[r], words[r], step, row0[r], row8[r], wide);
        }
      }
#pragma unroll
      for (int f = 0; f < S::kFragments; f += 2) {
        uint2 b0, b1;
        load_fragments(b0, b1, x + (f * 8 * C::kStrideX + step * kStepColumns) * 2);
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          mma_16x8x16(sum[r][f], a[r], b0);
          mma_16x8x16(sum[r][f + 1], a[r], b1);
        }
      }
    }
  }
};

// kSlice rows of x at a time: sums to shared memory as [warp_k][row of x][row of w], then added,
// finished and stored.
template <typename S, typename C>
__device__ __forceinline__ void finish(const QLinearProblem& p,
                                       const float (&sum)[S::kTiles][S::kFragments][4], float* out,
                                       int row0, int warp_n, int warp_k, int lane) {
  const Epilogue& e = p.epilogue;
  const int first_row_w = blockIdx.y * S::kRowsW;
  const auto total = [&](int row_x, int row_w) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < S::kWarpsK; ++w) {
      v += out[(w * C::kSlice + row_x) * C::kStrideOut + row_w];
    }
    return v;
  };
#pragma unroll
  for (int slice = 0; slice < S::kRowsX / C::kSlice; ++slice) {
    __syncthreads();
#pragma unroll
    for (int f = 0; f < C::kSlice / 8; ++f) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        const float* const c = sum[r][slice * (C::kSlice / 8) + f];
        float* const target = out + (warp_k * C::kSlice + f * 8 + lane % 4 * 2) * C::kStrideOut +
                              (warp_n * S::kTiles + r) * 16 + lane / 4;
        target[0] = c[0];
        target[C::kStrideOut] = c[1];
        target[8] = c[2];
        target[C::kStrideOut + 8] = c[3];
      }
    }
    __syncthreads();
    const int first = row0 + slice * C::kSlice;
    if (e.swiglu) {
      constexpr int kPairs = S::kRowsW / 2;
      for (int i = threadIdx.x; i < C::kSlice * kPairs; i += S::kThreads) {
        const int row_x = i / kPairs, row_w = i % kPairs / 8 * 16 + i % 8;
        if (first + row_x >= p.m || first_row_w + row_w >= p.n) continue;
        finish_pair(e, first + row_x, first_row_w + row_w, total(row_x, row_w),
                    total(row_x, row_w + 8));
      }
    } else {
      for (int i = threadIdx.x; i < C::kSlice * S::kRowsW; i += S::kThreads) {
        const int row_x = i / S::kRowsW, row_w = i % S::kRowsW;
        const int m = first + row_x, n = first_row_w + row_w;
        if (m >= p.m || n >= p.n) continue;
        store_output(e, m, n, before_activation(e, m, n, total(row_x, row_w)));
      }
    }
  }
}

template <int kBits, bool kBook, typename S>
__device__ __forceinline__ void run_gemm(const QLinearProblem& p, const HalfRows& x, int stages) {
  using C = Chunk<S, kBits>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint32_t table[kBook ? 256 : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp / S::kWarpsK, warp_k = warp % S::kWarpsK;
  const int chunks = (p.blocks + S::kWarpsK - 1) / S::kWarpsK;
  // Blocks that share rows of w are neighbours, so the second finds the codes in L2.
  const int row0 = blockIdx.x * S::kRowsX;
  const int tile0 = (blockIdx.y * S::kWarpsN + warp_n) * S::kTiles;

  if constexpr (kBook) fill_book(table, p.format.scheme);
  Loader<kBits, S> loader(p, x, row0, tile0, warp_k);
  Sums<kBits, kBook, S> sums;
  int block = warp_k;
  wait_for_previous_kernel();

#if __CUDA_ARCH__ >= 800
  for (int s = 0; s < stages - 1; ++s) {
    if (s < chunks) loader.fetch(shared + s * C::kBytes);
    copy_async_commit();
  }
  const unsigned char* used = shared;
  unsigned char* free = shared + (stages - 1) * C::kBytes;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (stages == 4) {
      copy_async_wait<2>();
    } else if (stages == 3) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // this chunk is here, and nobody still reads the one before it
    if (chunk + stages - 1 < chunks) loader.fetch(free);
    copy_async_commit();
    sums.add(p, used, block, warp, lane, table);
    block += S::kWarpsK;
    used += C::kBytes;
    free += C::kBytes;
    if (used == shared + stages * C::kBytes) used = shared;
    if (free == shared + stages * C::kBytes) free = shared;
  }
  copy_async_wait<0>();
  let_next_kernel_start();
#else
  loader.hold();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    unsigned char* const stage = shared + chunk % 2 * C::kBytes;
    loader.release(stage);
    __syncthreads();
    if (chunk + 1 < chunks) loader.hold();
    sums.add(p, stage, block, warp, lane, table);
    block += S::kWarpsK;
  }
#endif
  finish<S, C>(p, sums.sum, reinterpret_cast<float*>(shared), row0, warp_n, warp_k, lane);
}

template <int kBits, bool kBook, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    qlinear_gemm_kernel(const QLinearProblem p, const HalfRows x, int stages) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kCompiled = S::kSm80;
#else
  constexpr bool kCompiled = S::kSm75;
#endif
  if constexpr (kCompiled) run_gemm<kBits, kBook, S>(p, x, stages);
}

template <int kBits, bool kBook, typename S>
int launch(const QLinearProblem& p, const HalfRows& x, const Device& device, cudaStream_t stream) {
  using C = Chunk<S, kBits>;
  const int share = device.multiprocessor_shared / S::kResident - kStaticShared;
  const dim3 grid((p.m + S::kRowsX - 1) / S::kRowsX, (p.n + S::kRowsW - 1) / S::kRowsW);
  const bool alone = static_cast<int64_t>(grid.x) * grid.y <= device.multiprocessors;
  const int most = device.block_shared - kStaticShared;
  const int goal = !alone && C::shared_bytes(2) <= share ? std::min(share, most) : most;
  int stages = device.sm >= 80 ? 4 : 2;
  while (stages > 2 && C::shared_bytes(stages) > goal) --stages;
  return launch_kernel(qlinear_gemm_kernel<kBits, kBook, S>, grid, S::kThreads,
                       C::shared_bytes(stages), device.sm >= 90, stream, p, x, stages);
}

template <int kBits, bool kBook, int kIndex>
int launch_index(const QLinearProblem& p, const HalfRows& x, const Device& device,
                 cudaStream_t stream) {
  constexpr ShapeInfo s = kShapes[kIndex];
  return launch<kBits, kBook, Shape<s.fragments, s.tiles, s.warps_n, s.warps_k, s.sm75, s.sm80>>(
      p, x, device, stream);
}

}  // namespace gemm

// One format's kernels.
template <int kBits, bool kBook>
int launch_gemm_format(const QLinearProblem& p, const HalfRows& x, const Device& device,
                       cudaStream_t stream) {
  using namespace gemm;
  static_assert(kShapeCount == 7);
  switch (choose_shape_index(p, device)) {
    case 0:
      return launch_index<kBits, kBook, 0>(p, x, device, stream);
    case 1:
      return launch_index<kBits, kBook, 1>(p, x, device, stream);
    case 2:
      return launch_index<kBits, kBook, 2>(p, x, device, stream);
    case 3:
      return launch_index<kBits, kBook, 3>(p, x, device, stream);
    case 4:
      return launch_index<kBits, kBook, 4>(p, x, device, stream);
    case 5:
      return launch_index<kBits, kBook, 5>(p, x, device, stream);
    case 6:
      return launch_index<kBits, kBook, 6>(p, x, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

extern template int launch_gemm_format<2, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<3, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<4, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<8, false>(const QLinearProblem&, const HalfRows&,
                                                 const Device&, cudaStream_t);
extern template int launch_gemm_format<4, true>(const QLinearProblem&, const HalfRows&,
                                                const Device&, cudaStream_t);

}  // namespace kvopt::cuda
