// SPDX-License-Identifier: Apache-2.0
// A lane's share of the mma16 layout as whole 16-byte loads.
//
// For every width a lane owns `bits` words of each 64 columns of a tile, numbered along K; word n
// lies at (n / 4) * 128 + lane * 4 + n % 4. So the fewest columns that fill whole 16-byte pieces
// are 64 for 4 and 8 bits, 128 for 2 and 256 for 3.
#pragma once

#include <cstdint>

#include "cuda/device/copy.cuh"
#include "cuda/device/dequant.cuh"

namespace kvopt::cuda {

template <int kBits>
struct CodeBlock {
  static constexpr int kUnits = kBits == 2 ? 2 : kBits == 3 ? 4 : 1;  // of 64 columns
  static constexpr int kPieces = kBits * kUnits / 4;                  // of 16 bytes
  static constexpr int kBytes = kPieces * 512;

  uint4 piece[kPieces];

  // `source`: the block's first byte plus lane * 16.
  __device__ __forceinline__ void load(const uint8_t* source) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = load_stream(source + i * 512);
  }
  __device__ __forceinline__ void load_shared(const unsigned char* source) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      piece[i] = *reinterpret_cast<const uint4*>(source + i * 512);
    }
  }
  // `unit` must be a compile-time constant after unrolling.
  __device__ __forceinline__ Words<kBits> words(int unit) const {
    Words<kBits> w;
#pragma unroll
    for (int j = 0; j < kBits; ++j) {
      const int n = unit * kBits + j;
      const uint4& p = piece[n / 4];
      w.word[j] = n % 4 == 0 ? p.x : n % 4 == 1 ? p.y : n % 4 == 2 ? p.z : p.w;
    }
    return w;
  }
};

// The reverse of raw_operand: puts the code of half `half` (0, 1) of pair `i` (0..3) of a step.
template <int kBits>
__device__ __forceinline__ void insert_code(Words<kBits>& w, int step, int i, int half,
                                            uint32_t code) {
  const int side = 16 * half;
  if constexpr (kBits == 8) {
    w.word[2 * step + i / 2] |= code << (8 * (i % 2) + side);
  } else if constexpr (kBits == 4) {
    w.word[step] |= code << (4 * i + side);
  } else if constexpr (kBits == 2) {
    w.word[step / 2] |= code << (2 * (i % 2) + 4 * (step % 2) + 8 * (i / 2) + side);
  } else if (step < 3) {
    w.word[step] |= code << (3 * i + side);
  } else if (i == 2) {
#pragma unroll
    for (int b = 0; b < 3; ++b) w.word[b] |= (code >> b & 1) << (15 + side);
  } else {
    w.word[i == 3 ? 2 : i] |= code << (12 + side);
  }
}

}  // namespace kvopt::cuda
