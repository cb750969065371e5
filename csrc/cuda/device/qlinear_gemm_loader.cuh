// SPDX-License-Identifier: Apache-2.0
// The tiled product's shapes, the layout of its stages in shared memory, and the threads that fill
// them.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/dequant.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemm {

template <int kFragments_, int kTiles_, int kWarpsN_, int kWarpsK_, bool kSm75_, bool kSm80_ = true>
struct Shape {
  static constexpr int kFragments = kFragments_;  // of 8 rows of x
  static constexpr int kTiles = kTiles_;          // of 16 rows of w, per warp
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kWarpsK = kWarpsK_;
  // Two blocks on a multiprocessor hide each other's barriers; larger tiles need the registers of
  // both.
  static constexpr int kResident = kTiles * kFragments <= 8 ? 2 : 1;
  static constexpr bool kSm75 = kSm75_;  // fits the 64 KB of shared memory of sm_75
  static constexpr bool kSm80 = kSm80_;  // used on sm_80 and newer
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRowsX = 8 * kFragments;
  static constexpr int kRowsW = 16 * kTiles * kWarpsN;
};

// A chunk of K, 64 columns for each warp along it, and how it lies in a stage of shared memory: x,
// codes, group parameters (up to four groups in 64 columns).
template <typename S, int kBits>
struct Chunk {
  static constexpr int kColumns = kBlockColumns * S::kWarpsK;
  static constexpr int kStrideX = kColumns + 8;  // elements: rows begin 16 bytes (4 banks) apart
  static constexpr int kWarps = S::kWarpsN * S::kWarpsK;
  static constexpr int kPieceColumns = kColumns / 8;  // 16-byte pieces in a row of x
  static constexpr int kPieceRows = S::kThreads / kPieceColumns;
  static constexpr int kPieces = S::kRowsX / kPieceRows;  // per thread
  static_assert(S::kThreads % kPieceColumns == 0 && S::kRowsX % kPieceRows == 0);

  static constexpr int kTileCodes = kBits * 128;  // bytes of 16 rows x 64 columns
  static constexpr int kTileMeta = 4 * 64;
  static constexpr int kCodes = S::kRowsX * kStrideX * 2;  // byte offsets in a stage
  static constexpr int kMeta = kCodes + kWarps * S::kTiles * kTileCodes;
  static constexpr int kBytes = kMeta + kWarps * S::kTiles * kTileMeta;

  // Rows of x per round of the epilogue.
  static constexpr int kSlice = S::kRowsX < 32 ? S::kRowsX : 32;
  static constexpr int kStrideOut = S::kRowsW + 4;
  static constexpr int kBytesOut = S::kWarpsK * kSlice * kStrideOut * 4;
  KVOPT_HOST_DEVICE static constexpr int shared_bytes(int stages) {
    return stages * kBytes > kBytesOut ? stages * kBytes : kBytesOut;
  }
  static_assert(!S::kSm75 || shared_bytes(2) <= 63 * 1024);
};

// How a lane's words of 64 columns move: pieces of 16 bytes where a block of the layout is no wider
// than that, else 8 (2 bits) or 4 (3 bits). In shared memory a piece of all lanes is contiguous.
template <int kBits>
struct Pieces {
  static constexpr int kBytes = kBits == 3 ? 4 : kBits == 2 ? 8 : 16;
  static constexpr int kCount = kBits * 4 / kBytes;

  static __device__ __forceinline__ int64_t source(int block, int piece, int lane) {
    const int word = block * kBits + piece * (kBytes / 4);
    return static_cast<int64_t>(word / 4) * 512 + lane * 16 + word % 4 * 4;
  }
  static __device__ __forceinline__ int target(int piece, int lane) {
    return (piece * 32 + lane) * kBytes;
  }
};

// Reads back the lane's words.
template <int kBits>
__device__ __forceinline__ Words<kBits> load_words(const unsigned char* codes, int lane) {
  using P = Pieces<kBits>;
  Words<kBits> w;
#pragma unroll
  for (int i = 0; i < P::kCount; ++i) {
    const unsigned char* const source = codes + P::target(i, lane);
    if constexpr (P::kBytes == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(source);
      w.word[i * 4] = v.x;
      w.word[i * 4 + 1] = v.y;
      w.word[i * 4 + 2] = v.z;
      w.word[i * 4 + 3] = v.w;
    } else if constexpr (P::kBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(source);
      w.word[0] = v.x;
      w.word[1] = v.y;
    } else {
      w.word[i] = *reinterpret_cast<const uint32_t*>(source);
    }
  }
  return w;
}

// A thread's share of the copying, chunk after chunk.
template <int kBits, typename S>
class Loader {
  using C = Chunk<S, kBits>;
  using P = Pieces<kBits>;

 public:
  __device__ __forceinline__ Loader(const QLinearProblem& p, const HalfRows& x, int row0, int tile0,
                                    int warp_k)
      : p_(p) {
    const int warp = threadIdx.x / 32;
    const int piece_row = threadIdx.x / C::kPieceColumns;
    lane_ = threadIdx.x % 32;
    column_ = threadIdx.x % C::kPieceColumns * 8;
    pitch_ = x.pitch;
    x_ = x.x + (row0 + piece_row) * pitch_ + column_;
    x_rows_ = p.m - row0 - piece_row;
    x_slot_ = (piece_row * C::kStrideX + column_) * 2;
    block_ = warp_k;
    tiles_ = p.tiles - tile0;
    codes_ = p.packed + tile0 * p.tile_bytes;
    codes_slot_ = C::kCodes + warp * (S::kTiles * C::kTileCodes);
    words_ = p.format.has_zeros() ? 16 : 8;
    slots_ = group_slots(p);
    meta_ = reinterpret_cast<const uint32_t*>(p.meta) +
            static_cast<int64_t>(tile0) * p.groups * words_ + lane_ % 16;
    meta_slot_ = C::kMeta + warp * (S::kTiles * C::kTileMeta) + lane_ * 4;
  }

  // How many groups may meet in 64 columns: one, or a new one every 16.
  static __device__ __forceinline__ int group_slots(const QLinearProblem& p) {
    return p.group_columns % kBlockColumns == 0 ? 1 : 4;
  }

#if __CUDA_ARCH__ >= 800
  // Starts the copies of the next chunk.
  __device__ __forceinline__ void fetch(unsigned char* stage) {
    if (block_ < p_.blocks) {
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const uint8_t* const source = codes_ + P::source(block_, i, lane_);
        unsigned char* const target = stage + codes_slot_ + P::target(i, lane_);
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          if (r < tiles_) copy(target + r * C::kTileCodes, source + r * p_.tile_bytes);
        }
      }
      for (int i = 0; i < (slots_ + 1) / 2; ++i) {
        if (!holds_meta(i)) continue;
        const uint32_t* const source = meta_ + meta_offset(i);
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          if (r < tiles_) {
            copy_async_4(stage + meta_slot_ + r * C::kTileMeta + i * 128,
                         source + r * p_.groups * words_);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      copy_async_16(stage + x_slot_ + i * (C::kPieceRows * C::kStrideX * 2),
                    holds_x(i) ? x_ + i * C::kPieceRows * pitch_ : nullptr, holds_x(i) ? 16 : 0);
    }
    advance();
  }
#else
  // The next chunk into registers, and from there to its stage.
  __device__ __forceinline__ void hold() {
    if (block_ < p_.blocks) {
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const uint8_t* const source = codes_ + P::source(block_, i, lane_);
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          if (r < tiles_) load(held_codes_[r][i], source + r * p_.tile_bytes);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!holds_meta(i)) continue;
        const uint32_t* const source = meta_ + meta_offset(i);
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
          if (r < tiles_) held_meta_[r][i] = load_4(source + r * p_.groups * words_);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < C::kPieces; ++i) {
      held_x_[i] = holds_x(i) ? load_16(x_ + i * C::kPieceRows * pitch_) : make_uint4(0, 0, 0, 0);
    }
    advance();
  }
  __device__ __forceinline__ void release(unsigned char* stage) const {
#pragma unroll
    for (int r = 0; r < S::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        *reinterpret_cast<Piece*>(stage + codes_slot_ + r * C::kTileCodes + P::target(i, lane_)) =
            held_codes_[r][i];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint32_t*>(stage + meta_slot_ + r * C::kTileMeta + i * 128) =
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
#if __CUDA_ARCH__ >= 800
  static __device__ __forceinline__ void copy(unsigned char* target, const uint8_t* source) {
    if constexpr (P::kBytes == 16) {
      copy_async_16(target, source, 16);
    } else if constexpr (P::kBytes == 8) {
      copy_async_8(target, source);
    } else {
      copy_async_4(target, source);
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

  // Lanes 0-15 copy the parameters of group slot 2 i, lanes 16-31 those of 2 i + 1.
  __device__ __forceinline__ bool holds_meta(int i) const {
    return 2 * i + lane_ / 16 < slots_ && lane_ % 16 < words_;
  }
  __device__ __forceinline__ int64_t meta_offset(int i) const {
    const int column = block_ * kBlockColumns + (2 * i + lane_ / 16) * kStepColumns;
    return static_cast<int64_t>(group_of_column(p_, column)) * words_;
  }
  __device__ __forceinline__ bool holds_x(int i) const {
    return i * C::kPieceRows < x_rows_ && column_ < pitch_;
  }
  __device__ __forceinline__ void advance() {
    x_ += C::kColumns;
    column_ += C::kColumns;
    block_ += S::kWarpsK;
  }

  const QLinearProblem& p_;
  const __half* x_;
  const uint8_t* codes_;
  const uint32_t* meta_;
  int64_t pitch_;
  int column_, block_;  // first column of the thread's pieces of x, the warp's block of codes
  int x_rows_, tiles_;  // rows of x and tiles of w from the thread's first on
  int words_;           // of 4 bytes: parameters of one group of a tile
  int slots_, lane_;
  int x_slot_, codes_slot_, meta_slot_;
#if __CUDA_ARCH__ < 800
  using Piece = std::conditional_t<P::kBytes == 16, uint4,
                                   std::conditional_t<P::kBytes == 8, uint2, uint32_t>>;
  Piece held_codes_[S::kTiles][P::kCount];
  uint32_t held_meta_[S::kTiles][2];
  uint4 held_x_[C::kPieces];
#endif
};

}  // namespace kvopt::cuda::gemm
