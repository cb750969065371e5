// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T for M > 8: a tiled product on mma.sync, codes turned into operands in registers.
//
//                    K: chunks of 64 * kWarpsK columns, kStages of them in shared memory (cp.async)
//   x   (8 * kFragments rows)   ─► B fragments, read by every warp
//   w   (16 * kTiles * kWarpsN rows; a warp owns kTiles tiles and every kWarpsK-th block of 64 columns)
//       codes pass through shared memory only to be in flight early: a lane reads back its own 16 bytes
//
// Each code is turned into (q - z) once per block and meets kFragments * 8 rows of x. Group scales: the accumulators
// are kept in units of the current group's scale, so a new group costs one multiplication by s_old / s_new per
// accumulator and no second set of them; a zero scale zeroes the operand instead. Warps that share rows add their
// sums in shared memory, in order; then bias, one rounding, coalesced rows of y.
//
// Bytes: the codes ceil(M / (8 kFragments)) times, x N / (16 kTiles kWarpsN) times (from L2). Bound: memory up to
// M of about 64, then mma.sync (some 62 % of Hopper's dense peak, which only wgmma reaches).
// Limits: sm_75 has no cp.async: there the next chunk waits in registers while one is used, and two stages suffice.
#pragma once

#include <algorithm>
#include <iterator>

#include "cuda/device/copy.cuh"
#include "cuda/device/dequant.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {
namespace gemm {

template <int kFragments_, int kTiles_, int kWarpsN_, int kWarpsK_, bool kSm75_ = false>
struct Shape {
  static constexpr int kFragments = kFragments_;  // of 8 rows of x
  static constexpr int kTiles = kTiles_;          // of 16 rows of w, per warp
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kWarpsK = kWarpsK_;
  // Two blocks on a multiprocessor hide each other's barriers; larger tiles need the registers of both.
  static constexpr int kResident = kTiles * kFragments <= 8 ? 2 : 1;
  static constexpr bool kSm75 = kSm75_;  // fits the 64 KB of shared memory of sm_75
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRowsX = 8 * kFragments;
  static constexpr int kRowsW = 16 * kTiles * kWarpsN;
};

// A chunk of K and how it lies in a stage of shared memory: x, codes, group parameters. A warp's share is two 16-byte
// loads a lane and tile: two blocks of 64 columns for 4 bits, one for 8. kGroupSteps: 4 when a block of 64 columns lies
// in one group, else 1.
template <typename S, int kBits, int kGroupSteps_>
struct Chunk {
  static constexpr int kGroupSteps = kGroupSteps_;
  static constexpr int kLoads = 2;
  static constexpr int kBlocks = kBits == 4 ? 2 : 1;  // of 64 columns, per warp
  static constexpr int kWarpColumns = kBlockColumns * kBlocks;
  static constexpr int kColumns = kWarpColumns * S::kWarpsK;
  static constexpr int kStrideX = kColumns + 16;  // elements; 32 bytes more: see gemv
  static constexpr int kMetas = kBlocks * 4 / kGroupSteps;
  static constexpr int kMetaRounds = (kMetas + 1) / 2;  // half a warp copies one group's parameters
  static constexpr int kWarps = S::kWarpsN * S::kWarpsK;
  static constexpr int kPieceColumns = kColumns / 8;  // 16-byte pieces in a row of x
  static constexpr int kPieceRows = S::kThreads / kPieceColumns;
  static constexpr int kPieces = S::kRowsX / kPieceRows;  // per thread
  static_assert(S::kThreads % kPieceColumns == 0 && S::kRowsX % kPieceRows == 0);

  static constexpr int kCodes = S::kRowsX * kStrideX * 2;  // byte offsets in a stage
  static constexpr int kMeta = kCodes + kWarps * S::kTiles * kLoads * 512;
  static constexpr int kBytes = kMeta + kWarps * S::kTiles * kMetaRounds * 2 * 64;

  static constexpr int kSlice = S::kRowsX < 32 ? S::kRowsX : 32;  // rows of x per round of the epilogue
  static constexpr int kStrideOut = S::kRowsW + 4;
  static constexpr int kBytesOut = S::kWarpsK * kSlice * kStrideOut * 4;
  KVOPT_HOST_DEVICE static constexpr int shared_bytes(int stages) {
    return stages * kBytes > kBytesOut ? stages * kBytes : kBytesOut;
  }
};

// A thread's share of the copying, chunk after chunk.
template <typename T, int kBits, typename S, typename C>
class Loader {
 public:
  __device__ __forceinline__ Loader(const QLinearProblem& p, int row0, int tile0, int warp_k)
      : p_(p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int piece_row = threadIdx.x / C::kPieceColumns;
    column_ = threadIdx.x % C::kPieceColumns * 8;
    x_ = static_cast<const T*>(p.x) + static_cast<int64_t>(row0 + piece_row) * p.k + column_;
    x_rows_ = p.m - row0 - piece_row;
    x_slot_ = (piece_row * C::kStrideX + column_) * 2;
    block_ = warp_k * C::kBlocks;
    tiles_ = p.tiles - tile0;
    codes_ = p.packed + tile0 * p.tile_bytes + block_ * (kBits / 4 * 512) + lane * 16;
    codes_slot_ = C::kCodes + warp * (S::kTiles * C::kLoads * 512) + lane * 16;
    words_ = p.symmetric ? 8 : 16;
    const int64_t first = static_cast<int64_t>(tile0) * p.groups * words_ + lane % 16;
    meta_ = reinterpret_cast<const uint32_t*>(p.meta) + first;
    meta_slot_ = C::kMeta + warp * (S::kTiles * C::kMetaRounds * 128) + lane * 4;
  }

#if __CUDA_ARCH__ >= 800
  // Starts the copies of the next chunk.
  __device__ __forceinline__ void fetch(unsigned char* stage) {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < C::kLoads; ++i) {
        copy_async_16(stage + codes_slot_ + (r * C::kLoads + i) * 512,
                      codes_ + r * p_.tile_bytes + i * 512, holds_codes(r, i) ? 16 : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < C::kMetaRounds; ++i) {
      const int64_t offset = meta_offset(i);
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        if (holds_meta(r, i)) {
          copy_async_4(stage + meta_slot_ + (r * C::kMetaRounds + i) * 128,
                       meta_ + offset + r * p_.groups * words_);
        }
      }
    }
    if (p_.aligned) {
#pragma unroll
      for (int i = 0; i < C::kPieces; ++i) {
        copy_async_16(stage + x_slot_ + i * (C::kPieceRows * C::kStrideX * 2),
                      x_ + static_cast<int64_t>(i * C::kPieceRows) * p_.k, holds_x(i) ? 16 : 0);
      }
    } else {
      for (int i = 0; i < C::kPieces; ++i) {
        *reinterpret_cast<uint4*>(stage + x_slot_ + i * (C::kPieceRows * C::kStrideX * 2)) =
            read_x(i);
      }
    }
    advance();
  }
#else
  // The next chunk into registers, and from there to its stage.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < C::kLoads; ++i) {
        held_codes_[r][i] = holds_codes(r, i)
                                ? load_stream(codes_ + r * p_.tile_bytes + i * 512)
                                : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < C::kMetaRounds; ++i) {
        held_meta_[r][i] =
            holds_meta(r, i) ? __ldg(meta_ + meta_offset(i) + r * p_.groups * words_) : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) held_x_[i] = read_x(i);
    advance();
  }
  __device__ __forceinline__ void release(unsigned char* stage) const {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < C::kLoads; ++i) {
        *reinterpret_cast<uint4*>(stage + codes_slot_ + (r * C::kLoads + i) * 512) =
            held_codes_[r][i];
      }
#pragma unroll
      for (int i = 0; i < C::kMetaRounds; ++i) {
        *reinterpret_cast<uint32_t*>(stage + meta_slot_ + (r * C::kMetaRounds + i) * 128) =
            held_meta_[r][i];
      }
    }
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      *reinterpret_cast<uint4*>(stage + x_slot_ + i * (C::kPieceRows * C::kStrideX * 2)) =
          held_x_[i];
    }
  }
#endif

 private:
  __device__ __forceinline__ bool holds_codes(int r, int i) const {
    return r < tiles_ && block_ + (kBits == 4 ? i : 0) < p_.blocks;
  }
  // Lanes 0-15 copy the parameters of group piece 2 i, lanes 16-31 those of 2 i + 1.
  __device__ __forceinline__ int meta_step(int i) const {
    return block_ * 4 + (2 * i + threadIdx.x % 32 / 16) * C::kGroupSteps;
  }
  __device__ __forceinline__ bool holds_meta(int r, int i) const {
    return r < tiles_ && meta_step(i) < p_.blocks * 4 && threadIdx.x % 16 < words_ &&
           2 * i + threadIdx.x % 32 / 16 < C::kMetas;
  }
  __device__ __forceinline__ int64_t meta_offset(int i) const {
    return group_of_step<C::kGroupSteps>(p_, meta_step(i)) * words_;
  }
  __device__ __forceinline__ bool holds_x(int i) const {
    return i * C::kPieceRows < x_rows_ && column_ < p_.k;
  }
  __device__ __forceinline__ uint4 read_x(int i) const {
    const T* const source = x_ + static_cast<int64_t>(i * C::kPieceRows) * p_.k;
    if (!holds_x(i)) return make_uint4(0, 0, 0, 0);
    if (p_.aligned) return __ldg(reinterpret_cast<const uint4*>(source));
    return load_row_8(source, 0, p_.k - column_);
  }
  __device__ __forceinline__ void advance() {
    x_ += C::kColumns;
    column_ += C::kColumns;
    codes_ += S::kWarpsK * C::kLoads * 512;
    block_ += S::kWarpsK * C::kBlocks;
  }

  const QLinearProblem& p_;
  const T* x_;
  const uint8_t* codes_;
  const uint32_t* meta_;
  int column_, block_;   // first column of the thread's pieces of x, first block of the warp's codes
  int x_rows_, tiles_;   // rows of x and tiles of w from the thread's first on
  int words_;            // of 4 bytes: parameters of one group of a tile
  int x_slot_, codes_slot_, meta_slot_;
#if __CUDA_ARCH__ < 800
  uint4 held_codes_[S::kTiles][C::kLoads];
  uint32_t held_meta_[S::kTiles][C::kMetaRounds];
  uint4 held_x_[C::kPieces];
#endif
};

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
  return launch_kernel(kernel, grid, S::kThreads, bytes, device, stream, p, stages);
}

template <typename T, int kBits, typename S>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const bool shifts = p.group_shift >= 2;  // groups are a power of two of whole blocks
  return shifts ? launch_shape<T, kBits, 4, S>(p, device, stream)
                : launch_shape<T, kBits, 1, S>(p, device, stream);
}

// What a block of each shape costs on an H200 per K, in one unit: alone on a multiprocessor, and two of them together.
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
