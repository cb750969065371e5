// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for more rows: a tiled product on mma.sync, codes turned into operands in
// registers.
//
//   block    8 * kFragments rows of x   x   16 * kTiles * kWarpsN rows of w,  8 warps
//   warp     all those rows of x, kTiles tiles of w, every kWarpsK-th share of a chunk's columns
//   K        in chunks of kWarpsK * 128 columns (64 for 8 bits), two to four in shared memory
//
// x is read from shared memory by every warp, as B fragments; codes pass through it only to be in
// flight early (cp.async): a lane reads back its own 16 bytes. Each code is turned into (q - z)
// once per block and meets all rows of x. Group scales: the accumulators are kept in units of the
// current group's scale, so a new group costs one multiplication by s_old / s_new per accumulator
// and no second set of them; a zero scale zeroes the operand instead. Warps that share rows of w
// add their sums in shared memory, in order; then bias, one rounding, coalesced rows of y.
//
// Bytes: the codes ceil(M / (8 kFragments)) times, x N / (16 kTiles kWarpsN) times, from L2. Bound:
// memory up to M of about 32, then mma.sync (on Hopper half of what wgmma reaches).
// Limits: sm_75 has no cp.async: there the next chunk waits in registers while one is used.
#pragma once

#include <algorithm>
#include <iterator>

#include "cuda/device/dequant.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_gemm_loader.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {
namespace gemm {

// Accumulators, in units of the current group's scale.
template <typename T, typename S, typename C>
struct Sums {
  float sum[S::kTiles][S::kFragments][4] = {};
  RowQuant row0[S::kTiles], row8[S::kTiles];  // .scale: that of the accumulators
  int tiles;  // of this warp that exist; there are no parameters for the others
  int group = -1;
  bool rest = false;  // some zero point needs its second half subtracted

  explicit __device__ __forceinline__ Sums(int existing_tiles) : tiles(existing_tiles) {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) row0[r].scale = row8[r].scale = 1.0f;
  }

  // `meta`: this lane's word of the group's parameters, tile 0.
  __device__ __forceinline__ void enter(const QLinearProblem& p, const uint32_t* meta) {
    float old0[S::kTiles], old8[S::kTiles];
    bool any = false;
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      const uint32_t first = meta[r * C::kMetaRounds * 32];
      const uint32_t second = p.symmetric ? first >> 16 : meta[r * C::kMetaRounds * 32 + 1];
      const __half2 a = *reinterpret_cast<const __half2*>(&first);
      const __half2 b = *reinterpret_cast<const __half2*>(&second);
      const __half zero = __float2half_rn(p.symmetric_zero);
      old0[r] = row0[r].scale;
      old8[r] = row8[r].scale;
      row0[r] = make_row_quant<T>(a.x, p.symmetric ? zero : a.y);
      row8[r] = make_row_quant<T>(b.x, p.symmetric ? zero : b.y);
      any = any || (r < tiles && (has_rest(row0[r]) || has_rest(row8[r])));
    }
    if constexpr (Operand<T>::kSplitZero) rest = __any_sync(0xFFFFFFFF, any);
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      const float ratio0 = rescale(row0[r], old0[r]), ratio8 = rescale(row8[r], old8[r]);
#pragma unroll
      for (int f = 0; f < S::kFragments; ++f) {
        sum[r][f][0] *= ratio0;
        sum[r][f][1] *= ratio0;
        sum[r][f][2] *= ratio8;
        sum[r][f][3] *= ratio8;
      }
    }
  }

  // What turns sums in units of `old` into sums in units of the row's scale.
  __device__ __forceinline__ float rescale(RowQuant& row, float old) const {
    if constexpr (Operand<T>::kSplitZero) {
      if (rest) row.scale *= Operand<T>::kRestScale;
    }
    if (row.scale == 0) {
      row.scale = old;
      row.low = row.high = row.offset = row.offset_rest = 0;
    }
    return __fdividef(old, row.scale);
  }

  // Adds one warp's share of a chunk, whose first block of 64 columns is `block0`.
  template <int kBits>
  __device__ __forceinline__ void add(const QLinearProblem& p, const unsigned char* stage,
                                      int block0, int warp, int lane) {
    const T* const x = reinterpret_cast<const T*>(stage) + lane / 4 * C::kStrideX +
                       warp % S::kWarpsK * C::kWarpColumns + lane % 4 * 4;
    const auto* const codes = reinterpret_cast<const uint4*>(stage + C::kCodes) +
                              warp * S::kTiles * C::kLoads * 32 + lane;
    const auto* const meta = reinterpret_cast<const uint32_t*>(stage + C::kMeta) +
                             warp * S::kTiles * C::kMetaRounds * 32 +
                             lane / 4 * (p.symmetric ? 1 : 2);
    uint4 word[S::kTiles][C::kLoads];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < C::kLoads; ++i) word[r][i] = codes[(r * C::kLoads + i) * 32];
    }
#pragma unroll
    for (int step = 0; step < C::kBlocks * 4; ++step) {
      if (step % 4 == 0 && block0 + step / 4 >= p.blocks) break;
      if (step % C::kGroupSteps == 0) {
        const int now = group_of_step<C::kGroupSteps>(p, block0 * 4 + step);
        if (now != group) {
          group = now;
          enter(p, meta + step / C::kGroupSteps * 16);
        }
      }
      uint2 b[S::kFragments];
#pragma unroll
      for (int f = 0; f < S::kFragments; ++f) {
        b[f] = *reinterpret_cast<const uint2*>(x + f * 8 * C::kStrideX + step * kStepColumns);
      }
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        uint32_t a[4];
        if constexpr (kBits == 4) {
          const uint4& c = word[r][step / 4];
          const int i = step % 4;
          dequant_4bit<T>(a, i == 0 ? c.x : i == 1 ? c.y : i == 2 ? c.z : c.w, row0[r], row8[r]);
        } else {
          const uint4& c = word[r][step / 2];
          dequant_8bit<T>(a, step % 2 ? c.z : c.x, step % 2 ? c.w : c.y, row0[r], row8[r]);
        }
        if constexpr (Operand<T>::kSplitZero) {
          if (rest) subtract_rest<T>(a, row0[r], row8[r]);
        }
#pragma unroll
        for (int f = 0; f < S::kFragments; ++f) mma_16x8x16(sum[r][f], a, b[f], T());
      }
    }
  }
};

template <typename T, int kBits, typename S, typename C>
__device__ __forceinline__ void run_gemm(const QLinearProblem& p, int stages) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp / S::kWarpsK, warp_k = warp % S::kWarpsK;
  constexpr int kChunkBlocks = C::kBlocks * S::kWarpsK;
  const int chunks = (p.blocks + kChunkBlocks - 1) / kChunkBlocks;
  // Blocks that share rows of w are neighbours, so the second finds the codes in L2.
  const int row0 = blockIdx.x * S::kRowsX;
  const int tile0 = (blockIdx.y * S::kWarpsN + warp_n) * S::kTiles;

  Loader<T, kBits, S, C> loader(p, row0, tile0, warp_k);
  Sums<T, S, C> sums(p.tiles - tile0);
  int block = warp_k * C::kBlocks;
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
    sums.template add<kBits>(p, used, block, warp, lane);
    block += kChunkBlocks;
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
    sums.template add<kBits>(p, stage, block, warp, lane);
    block += kChunkBlocks;
  }
#endif

  // Epilogue, kSlice rows of x at a time: sums to shared memory as [warp_k][row of x][row of w].
  float* const out = reinterpret_cast<float*>(shared);
  const int first_row_w = blockIdx.y * S::kRowsW;
#pragma unroll
  for (int slice = 0; slice < S::kRowsX / C::kSlice; ++slice) {
    __syncthreads();
#pragma unroll
    for (int f = 0; f < C::kSlice / 8; ++f) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        const float* const c = sums.sum[r][slice * (C::kSlice / 8) + f];
        float* const target = out + (warp_k * C::kSlice + f * 8 + lane % 4 * 2) * C::kStrideOut +
                              (warp_n * S::kTiles + r) * 16 + lane / 4;
        target[0] = c[0] * sums.row0[r].scale;
        target[C::kStrideOut] = c[1] * sums.row0[r].scale;
        target[8] = c[2] * sums.row8[r].scale;
        target[C::kStrideOut + 8] = c[3] * sums.row8[r].scale;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < C::kSlice * S::kRowsW; i += S::kThreads) {
      const int row_x = i / S::kRowsW, row_w = i % S::kRowsW;
      const int m = row0 + slice * C::kSlice + row_x, n = first_row_w + row_w;
      if (m >= p.m || n >= p.n) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < S::kWarpsK; ++w) {
        total += out[(w * C::kSlice + row_x) * C::kStrideOut + row_w];
      }
      if (p.bias != nullptr) total += to_float(static_cast<const T*>(p.bias)[n]);
      static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.n + n] = from_float<T>(total);
    }
  }
}

template <typename T, int kBits, int kGroupSteps, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    qlinear_gemm_kernel(const QLinearProblem p, int stages) {
#if __CUDA_ARCH__ >= 800
  constexpr bool kCompiled = true;
#else
  constexpr bool kCompiled = S::kSm75 && !Operand<T>::kNeedsSm80;
#endif
  if constexpr (kCompiled) run_gemm<T, kBits, S, Chunk<S, kBits, kGroupSteps>>(p, stages);
}

template <typename T, int kBits, int kGroupSteps, typename S>
int launch_shape(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  using C = Chunk<S, kBits, kGroupSteps>;
  const auto kernel = qlinear_gemm_kernel<T, kBits, kGroupSteps, S>;
  const int share = device.multiprocessor_shared / S::kResident - 1024;
  const dim3 grid((p.m + S::kRowsX - 1) / S::kRowsX, (p.n + S::kRowsW - 1) / S::kRowsW);
  const bool alone = static_cast<int>(grid.x * grid.y) <= device.multiprocessors;
  int stages = device.sm >= 80 ? 4 : 2;
  const int goal = !alone && C::shared_bytes(2) <= share ? std::min(share, device.block_shared)
                                                         : device.block_shared;
  while (stages > 2 && C::shared_bytes(stages) > goal) --stages;
  const int bytes = C::shared_bytes(stages);
  return launch_kernel(kernel, grid, S::kThreads, bytes, device.sm >= 90, stream, p, stages);
}

template <typename T, int kBits, typename S>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const bool shifts = p.group_shift >= 2;  // groups are a power of two of whole blocks
  return shifts ? launch_shape<T, kBits, 4, S>(p, device, stream)
                : launch_shape<T, kBits, 1, S>(p, device, stream);
}

// What a block of each shape costs on an H200 per K, in one unit: alone on a multiprocessor, and
// two of them together.
struct Cost {
  int rows_x, rows_w, shared_bytes;
  double alone, pair;
};

template <typename S, int kBits>
constexpr Cost cost_of(double alone, double pair) {
  return {S::kRowsX, S::kRowsW, Chunk<S, kBits, 1>::shared_bytes(2), alone, pair};
}

using Rows16x32 = Shape<2, 2, 1, 8>;
using Rows16x64 = Shape<2, 2, 2, 4>;
using Rows16x128 = Shape<2, 2, 4, 2, true>;
using Rows32x64 = Shape<4, 2, 2, 4>;
using Rows32x128 = Shape<4, 2, 4, 2>;
using Rows64x64 = Shape<8, 2, 2, 4>;
using Rows64x128 = Shape<8, 2, 4, 2>;
using Rows64x256 = Shape<8, 4, 4, 2>;
using Rows128x256 = Shape<16, 2, 8, 1>;
using Rows32Sm75 = Shape<4, 1, 4, 2, true>;

}  // namespace gemm

// The shape whose busiest multiprocessor is done first.
template <typename T, int kBits>
int launch_gemm(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  using namespace gemm;
  if (device.sm < 80) {
    return p.m <= 16 ? launch<T, kBits, Rows16x128>(p, device, stream)
                     : launch<T, kBits, Rows32Sm75>(p, device, stream);
  }
  static constexpr Cost kCosts[] = {
      cost_of<Rows16x32, kBits>(7.1, 10.0),    cost_of<Rows16x64, kBits>(10.0, 15.0),
      cost_of<Rows16x128, kBits>(16.8, 27.0),  cost_of<Rows32x64, kBits>(13.0, 21.0),
      cost_of<Rows32x128, kBits>(21.5, 37.0),  cost_of<Rows64x64, kBits>(20.5, 41.0),
      cost_of<Rows64x128, kBits>(32.5, 65.0),  cost_of<Rows64x256, kBits>(58.0, 116.0),
      cost_of<Rows128x256, kBits>(98.0, 196.0)};
  int best = -1;
  double best_cost = 0;
  for (int i = 0; i < static_cast<int>(std::size(kCosts)); ++i) {
    const Cost& c = kCosts[i];
    if (c.shared_bytes > device.block_shared) continue;
    const int64_t blocks = ceil_div(p.m, c.rows_x) * ceil_div(p.n, c.rows_w);
    const int64_t each = ceil_div(blocks, device.multiprocessors);
    const double cost = static_cast<double>(each / 2) * c.pair + (each % 2 == 1 ? c.alone : 0);
    if (best < 0 || cost < best_cost) {
      best = i;
      best_cost = cost;
    }
  }
  switch (best) {
    case 0:
      return launch<T, kBits, Rows16x32>(p, device, stream);
    case 1:
      return launch<T, kBits, Rows16x64>(p, device, stream);
    case 2:
      return launch<T, kBits, Rows16x128>(p, device, stream);
    case 3:
      return launch<T, kBits, Rows32x64>(p, device, stream);
    case 4:
      return launch<T, kBits, Rows32x128>(p, device, stream);
    case 5:
      return launch<T, kBits, Rows64x64>(p, device, stream);
    case 6:
      return launch<T, kBits, Rows64x128>(p, device, stream);
    case 7:
      return launch<T, kBits, Rows64x256>(p, device, stream);
    default:
      return launch<T, kBits, Rows128x256>(p, device, stream);
  }
}

}  // namespace kvopt::cuda
