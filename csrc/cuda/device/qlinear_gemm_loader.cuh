// SPDX-License-Identifier: Apache-2.0
// The tiled product's shapes, a team's stages of x and codes in shared memory and the threads that
// fill them, and the walk along the groups of the rows.
#pragma once

#include <type_traits>

#include "cuda/device/copy.cuh"
#include "cuda/device/dequant.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemm {

template <int kFragments_, int kTiles_, int kWarpsN_, int kWarpsK_, bool kSm75_, bool kSm80_,
          bool kManyGroups_>
struct Shape {
  static constexpr int kFragments = kFragments_;  // of 8 rows of x
  static constexpr int kTiles = kTiles_;          // of 16 rows of w, per warp
  static constexpr int kWarpsN = kWarpsN_;        // warps that share x, a team
  static constexpr int kWarpsK = kWarpsK_;        // teams, each with its part of K
  // Where registers allow it, operands are made a step ahead of the tensor cores. (sm_75 has half
  // as many multiplications to a step and needs registers for what cp.async does elsewhere.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kResident = kTiles * kFragments <= 8 ? 2 : 1;
  static constexpr bool kAhead = false;
#else
  static constexpr int kResident = kTiles * kFragments <= 16 ? 2 : 1;
  static constexpr bool kAhead = kFragments >= 4 && kTiles * kFragments != 16 && !kManyGroups_;
#endif
  static constexpr bool kSm75 = kSm75_;
  static constexpr bool kSm80 = kSm80_;
  static constexpr bool kManyGroups = kManyGroups_;
  static constexpr int kTeamThreads = 32 * kWarpsN;
  static constexpr int kThreads = kTeamThreads * kWarpsK;
  static constexpr int kRowsX = 8 * kFragments;
  static constexpr int kRowsW = 16 * kTiles * kWarpsN;
};

// A team's stage: 64 columns of x, then (sm_80 and newer) its warps' codes.
template <typename S, int kBits>
struct Stage {
  static constexpr int kStrideX = kBlockColumns + 8;      // elements: rows begin 16 bytes apart
  static constexpr int kPieceRows = S::kTeamThreads / 8;  // a row is eight 16-byte pieces
  static constexpr int kPieces = S::kRowsX / kPieceRows;  // per thread
  static_assert(S::kRowsX % kPieceRows == 0);
  static constexpr int kTileCodes = kBits * 128;  // bytes of 16 rows x 64 columns
  static constexpr int kCodes = S::kRowsX * kStrideX * 2;
  KVOPT_HOST_DEVICE static constexpr int bytes(int sm) {
    return kCodes + (sm >= 80 ? S::kWarpsN * S::kTiles * kTileCodes : 0);
  }
  KVOPT_HOST_DEVICE static constexpr int count(int sm) { return sm >= 80 ? 3 : 2; }

  // Rows of x per round of the epilogue.
  static constexpr int kSlice = S::kRowsX < 32 ? S::kRowsX : 32;
  static constexpr int kStrideOut = S::kRowsW + 4;
  static constexpr int kBytesOut = S::kWarpsK * kSlice * kStrideOut * 4;
  KVOPT_HOST_DEVICE static constexpr int shared_bytes(int sm) {
    return count(sm) * S::kWarpsK * bytes(sm) > kBytesOut ? count(sm) * S::kWarpsK * bytes(sm)
                                                          : kBytesOut;
  }
};

// How a lane's words of 64 columns move: pieces of 16 bytes where a block of the layout is no wider
// than that, else 8 (2 bits) or 4 (3 bits). In shared memory a piece of all lanes is contiguous.
template <int kBits>
struct Pieces {
  static constexpr int kBytes = kBits == 3 ? 4 : kBits == 2 ? 8 : 16;
  static constexpr int kCount = kBits * 4 / kBytes;

  static __device__ __forceinline__ int64_t source(int block, int piece) {
    const uint32_t word = static_cast<uint32_t>(block * kBits + piece * (kBytes / 4));
    return static_cast<int64_t>(word / 4) * 512 + word % 4 * 4;
  }
  static __device__ __forceinline__ int target(int piece, int lane) {
    return (piece * 32 + lane) * kBytes;
  }
};

// The threads of a team wait for each other. One wait for each 64 columns orders everything: a
// stage is written before the wait that its readers pass, and written again only after a later
// wait, at which its readers arrive when they have read it.
//
// compute-sanitizer's racecheck finds nothing where all teams have as many columns, and reports
// hazards where one has fewer, all of them across a __syncthreads() of `finish`. It loses count
// when part of a block is there while others use named barriers, in launches of several blocks: a
// kernel of twenty lines with a ring and a barrier for each team, of which one skips its loop, is
// reported in the same way with eight blocks and clean with one. (Without one of its barriers it is
// reported with one block too.)
template <typename S>
__device__ __forceinline__ void team_barrier(int team) {
  if constexpr (S::kWarpsN == 1) {
    __syncwarp();
  } else if constexpr (S::kWarpsK == 1) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(S::kTeamThreads) : "memory");
  }
}

// A thread's share of the copying. Rows and columns of x past the last are zeros.
template <int kBits, typename S>
class Loader {
  using St = Stage<S, kBits>;
  using P = Pieces<kBits>;

 public:
  __device__ __forceinline__ Loader(const QLinearProblem& p, const HalfRows& x, int row0, int tile0,
                                    int warp_n, int block, int end)
      : end_(end) {
    const int thread = threadIdx.x % S::kTeamThreads;
    const int row = thread / 8;
    lane_ = threadIdx.x % 32;
    block_ = block;
    left_ = static_cast<int>(x.pitch) - block * kBlockColumns - thread % 8 * 8;
    rows_ = p.m - row0 - row;
    x_ = x.x + (row0 + row) * x.pitch + block * kBlockColumns + thread % 8 * 8;
    x_stride_ = St::kPieceRows * x.pitch;
    x_slot_ = (row * St::kStrideX + thread % 8 * 8) * 2;
    codes_ = p.packed + tile0 * p.tile_bytes + lane_ * 16;
    tile_bytes_ = p.tile_bytes;
    codes_slot_ = St::kCodes + warp_n * (S::kTiles * St::kTileCodes);
  }

#if __CUDA_ARCH__ >= 800
  // Starts the copies of the next 64 columns; past the last ones zeros are written.
  __device__ __forceinline__ void fetch(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      const int64_t source = P::source(block_, i);
      unsigned char* const target = stage + codes_slot_ + P::target(i, lane_);
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        copy(target + r * St::kTileCodes, codes_ + source + r * tile_bytes_, block_ < end_);
      }
    }
#pragma unroll
    for (int i = 0; i < St::kPieces; ++i) {
      copy_async_16(stage + x_slot_ + i * (St::kPieceRows * St::kStrideX * 2), x_ + i * x_stride_,
                    holds_x(i) ? 16 : 0);
    }
    advance();
  }
  __device__ __forceinline__ void words(Words<kBits> (&w)[S::kTiles],
                                        const unsigned char* stage) const {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        set(w[r], i,
            *reinterpret_cast<const Piece*>(stage + codes_slot_ + r * St::kTileCodes +
                                            P::target(i, lane_)));
      }
    }
  }
#else
  // The next 64 columns into registers; x goes from there to its stage.
  __device__ __forceinline__ void fetch() {
    if (block_ >= end_) return;
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      const int64_t source = P::source(block_, i);
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r)
        load(held_codes_[r][i], codes_ + source + r * tile_bytes_);
    }
#pragma unroll
    for (int i = 0; i < St::kPieces; ++i) {
      held_x_[i] = holds_x(i) ? load_16(x_ + i * x_stride_) : make_uint4(0, 0, 0, 0);
    }
    advance();
  }
  __device__ __forceinline__ void store_x(unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < St::kPieces; ++i) {
      *reinterpret_cast<uint4*>(stage + x_slot_ + i * (St::kPieceRows * St::kStrideX * 2)) =
          held_x_[i];
    }
  }
  __device__ __forceinline__ void words(Words<kBits> (&w)[S::kTiles]) const {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) set(w[r], i, held_codes_[r][i]);
    }
  }
#endif

 private:
  using Piece = std::conditional_t<P::kBytes == 16, uint4,
                                   std::conditional_t<P::kBytes == 8, uint2, uint32_t>>;

  static __device__ __forceinline__ void set(Words<kBits>& w, int i, const Piece& v) {
    if constexpr (P::kBytes == 16) {
      w.word[i * 4] = v.x;
      w.word[i * 4 + 1] = v.y;
      w.word[i * 4 + 2] = v.z;
      w.word[i * 4 + 3] = v.w;
    } else if constexpr (P::kBytes == 8) {
      w.word[0] = v.x;
      w.word[1] = v.y;
    } else {
      w.word[i] = v;
    }
  }
#if __CUDA_ARCH__ >= 800
  static __device__ __forceinline__ void copy(unsigned char* target, const uint8_t* source,
                                              bool exists) {
    if constexpr (P::kBytes == 16) {
      copy_async_16(target, source, exists ? 16 : 0);
    } else if (exists) {
      if constexpr (P::kBytes == 8) copy_async_8(target, source);
      if constexpr (P::kBytes == 4) copy_async_4(target, source);
    }
  }
#else
  static __device__ __forceinline__ void load(uint4& v, const uint8_t* source) {
    v = load_stream(source);
  }
  static __device__ __forceinline__ void load(uint2& v, const uint8_t* source) {
    v = load_8(source);
  }
  static __device__ __forceinline__ void load(uint32_t& v, const uint8_t* source) {
    v = load_4(source);
  }
#endif

  __device__ __forceinline__ bool holds_x(int i) const {
    return i * St::kPieceRows < rows_ && left_ > 0 && block_ < end_;
  }
  __device__ __forceinline__ void advance() {
    x_ += kBlockColumns;
    left_ -= kBlockColumns;
    ++block_;
  }

  const __half* x_;
  const uint8_t* codes_;
  int64_t x_stride_, tile_bytes_;
  int rows_, left_;  // rows and columns of x from the thread's piece on
  int block_, end_;  // of 64 columns
  int lane_, x_slot_, codes_slot_;
#if __CUDA_ARCH__ < 800
  Piece held_codes_[S::kTiles][P::kCount];
  uint4 held_x_[St::kPieces];
#endif
};

// The groups along a warp's part of K; the parameters of one group ahead wait in registers.
template <typename S>
class GroupWalk {
 public:
  __device__ __forceinline__ GroupWalk(const QLinearProblem& p, int tile0, int lane, int block)
      : zeros_(p.format.has_zeros()), implied_(__half_as_ushort(__float2half_rn(p.zero))) {
    const int column = block * kBlockColumns;
    columns_ = p.group_columns;
    left_ = p.groups - min(column / columns_, p.groups - 1);
    bytes_ = zeros_ ? 64 : 32;
    tile_bytes_ = static_cast<int64_t>(p.groups) * bytes_;
    at_ = reinterpret_cast<const uint8_t*>(p.meta) + tile0 * tile_bytes_ +
          static_cast<int64_t>(p.groups - left_) * bytes_ + lane / 4 * (bytes_ / 8);
    next_ = column;  // the part's first group is entered at its first column
    following_ = (p.groups - left_ + 1) * columns_;
  }
  // Loads the parameters of the group that will be entered next.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      if (zeros_) {
        held_[r] = load_8(at_ + r * tile_bytes_);
      } else {
        held_[r].x = load_4(at_ + r * tile_bytes_);
      }
    }
  }
  // Whether a group begins at `column`. Columns past the last group's count to it.
  __device__ __forceinline__ bool enters(int column) const { return column >= next_; }
  // {scale, zero} of rows g and g + 8; then the next group's are loaded.
  __device__ __forceinline__ void enter(__half2 (&row0)[S::kTiles], __half2 (&row8)[S::kTiles]) {
    uint32_t v0[S::kTiles], v8[S::kTiles];
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      v0[r] = held_[r].x;
      v8[r] = held_[r].y;
    }
    if (!zeros_) {
#pragma unroll
      for (int r = 0; r < S::kTiles; ++r) {
        v8[r] = __byte_perm(v0[r], implied_, 0x5432);
        v0[r] = __byte_perm(v0[r], implied_, 0x5410);
      }
    }
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
      row0[r] = *reinterpret_cast<const __half2*>(&v0[r]);
      row8[r] = *reinterpret_cast<const __half2*>(&v8[r]);
    }
    if (--left_ == 0) {
      next_ = 0x7FFFFFFF;
      return;
    }
    next_ = following_;
    following_ += columns_;
    at_ += bytes_;
    load();
  }

 private:
  uint2 held_[S::kTiles];
  const uint8_t* at_;
  int64_t tile_bytes_;
  bool zeros_;
  uint32_t implied_;
  int left_, columns_, next_, following_, bytes_;
};

}  // namespace kvopt::cuda::gemm
