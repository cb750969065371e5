// SPDX-License-Identifier: Apache-2.0
// The tiled product's shapes, the layout of its stages in shared memory, and the threads that fill
// them.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda::gemm {

template <int kFragments_, int kTiles_, int kWarpsN_, int kWarpsK_, bool kSm75_ = false>
struct Shape {
  static constexpr int kFragments = kFragments_;  // of 8 rows of x
  static constexpr int kTiles = kTiles_;          // of 16 rows of w, per warp
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kWarpsK = kWarpsK_;
  // Two blocks on a multiprocessor hide each other's barriers; larger tiles need the registers of
  // both.
  static constexpr int kResident = kTiles * kFragments <= 8 ? 2 : 1;
  static constexpr bool kSm75 = kSm75_;  // fits the 64 KB of shared memory of sm_75
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRowsX = 8 * kFragments;
  static constexpr int kRowsW = 16 * kTiles * kWarpsN;
};

// A chunk of K and how it lies in a stage of shared memory: x, codes, group parameters. A warp's
// share is two 16-byte loads a lane and tile: two blocks of 64 columns for 4 bits, one for 8.
// kGroupSteps: 4 when a block of 64 columns lies in one group, else 1.
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

  static constexpr int kSlice =
      S::kRowsX < 32 ? S::kRowsX : 32;  // rows of x per round of the epilogue
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
        held_codes_[r][i] = holds_codes(r, i) ? load_stream(codes_ + r * p_.tile_bytes + i * 512)
                                              : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < C::kMetaRounds; ++i) {
        held_meta_[r][i] =
            holds_meta(r, i) ? load_4(meta_ + meta_offset(i) + r * p_.groups * words_) : 0;
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
    if (p_.aligned) return load_16(source);
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
  int column_, block_;  // first column of the thread's pieces of x, first block of the warp's codes
  int x_rows_, tiles_;  // rows of x and tiles of w from the thread's first on
  int words_;           // of 4 bytes: parameters of one group of a tile
  int x_slot_, codes_slot_, meta_slot_;
#if __CUDA_ARCH__ < 800
  uint4 held_codes_[S::kTiles][C::kLoads];
  uint32_t held_meta_[S::kTiles][C::kMetaRounds];
  uint4 held_x_[C::kPieces];
#endif
};

}  // namespace kvopt::cuda::gemm
