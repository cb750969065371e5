// SPDX-License-Identifier: Apache-2.0
// One row of x as the product of one row takes it (qlinear_gemv_row.cuh): a warp brings 256 columns
// at a time.
//
// Integer codes: x = unit * X with unit a power of two for 256 columns. X is three signed bytes
// (four for 2 and 3 bits), |X| < 2^22 (2^30), found by adding 0x8080 and taking it out again, bit
// by bit: X + 0x8080 ^ 0x8080 has them as its bytes. They are columns of the tensor cores' operand
// B, the highest first. Where fields of codes sit higher in their byte than others, the X of their
// columns is as much smaller.
//   Place: of 64 columns, lane (byte p, t) finds 16 bytes at p * 64 + t * 16, a word for each step:
//   columns 2t, 2t + 8, 2t + 1, 2t + 9.
//   Record of 128 columns, for the lanes of the two highest bytes and of the rest: {what rows g and
//   g + 8 are to be multiplied by, sum of x (the rest: 0)}.
// Code books: x = unit * v, v in fp16 (fp16 x: unit = 1).
//   Place: of 32 columns, lane t finds 16 bytes at t * 16: columns 2t, 2t + 1, 2t + 8, 2t + 9 of
//   two steps.
//   Record of 64 columns: unit.
// Infinities and NaN are staged as 0 and mark the row, whose outputs are then made of them alone.
#pragma once

#include "cuda/device/qlinear_gemv_row_plan.cuh"
#include "cuda/device/qlinear_gemv_x.cuh"

namespace kvopt::cuda::gemv {

// A sum of integers below 2^22 that starts at these bits is, read as fp32, 3 * 2^22 + sum.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// What the position of a code's field multiplies it by, beyond what its row's factor says: x is
// divided by it. `upper`: columns 8..15 of the step.
template <int kBits>
__device__ __forceinline__ float field_divisor(int step, bool upper) {
  if (kBits == 2) return step % 2 == 1 ? 0x1p-4f : 1.0f;
  if (kBits == 3) return step % 4 == 3 ? 0x1p-3f : upper ? 1.0f : 0x1p-2f;
  return 1.0f;
}
// The factor of rows g + 8.
template <int kBits>
__host__ __device__ constexpr float upper_factor() {
  return kBits == 8 ? 1.0f : kBits == 4 ? 16.0f : kBits == 3 ? 2.0f : 4.0f;
}

// A lane's eight columns, as they are: 0 to 3 and 8 to 11 of a step, or 4 further.
struct RowPiece {
  uint2 low, high;

  // `at`: byte offset of the lane's first column in the row.
  __device__ __forceinline__ void load(const void* row, int at, int bytes) {
    const auto* const from = static_cast<const unsigned char*>(row) + at;
    low = at < bytes ? load_8(from) : make_uint2(0, 0);
    high = at + 16 < bytes ? load_8(from + 16) : make_uint2(0, 0);
  }
};

enum class RowInput { kHalf, kBFloat, kScaled };

template <RowInput kInput>
__device__ __forceinline__ void piece_to_floats(float (&v)[8], const RowPiece& piece, DType dtype) {
  const uint32_t words[4] = {piece.low.x, piece.low.y, piece.high.x, piece.high.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kInput == RowInput::kHalf || (kInput == RowInput::kScaled && dtype == DType::kFloat16)) {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      v[2 * i] = f.x;
      v[2 * i + 1] = f.y;
    } else {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
    }
  }
}

// Bits of the largest magnitude as fp32; kNotFinite or more when one is not finite.
template <RowInput kInput>
__device__ __forceinline__ uint32_t largest_of_piece(const RowPiece& piece, const float (&v)[8]) {
  if constexpr (kInput == RowInput::kScaled) return largest_bits(v);
  constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
  const uint32_t pair = __vmaxu2(__vmaxu2(piece.low.x & kMagnitudes, piece.low.y & kMagnitudes),
                                 __vmaxu2(piece.high.x & kMagnitudes, piece.high.y & kMagnitudes));
  const uint32_t one = max(pair >> 16, pair & 0xFFFF);
  if constexpr (kInput == RowInput::kBFloat) return one << 16;
  return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(one))));
}

// kCount times 256 columns by a warp, kRowWarps * 256 apart, interleaved: each is one long chain.
template <typename K, RowInput kInput, int kCount>
__device__ __forceinline__ void place_pieces(unsigned char* x, unsigned char* records,
                                             uint32_t* special, const RowPiece* pieces, int at,
                                             const QLinearProblem& p, int span) {
  const int lane = threadIdx.x % 32, step = lane / 2, t = lane % 2 * 2;
  float v[kCount][8];
  uint32_t largest[kCount], worst = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    piece_to_floats<kInput>(v[i], pieces[i], p.dtype);
    if constexpr (kInput == RowInput::kScaled) {
      RowPiece scales;
      scales.load(p.input_scale, at + i * kRowWarps * 512, p.k * 2);
      float scale[8];
      piece_to_floats<kInput>(scale, scales, p.dtype);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] *= scale[j];
    }
    largest[i] = __reduce_max_sync(0xFFFFFFFF, largest_of_piece<kInput>(pieces[i], v[i]));
    worst = max(worst, largest[i]);
  }
  if (worst >= kNotFinite) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if ((__float_as_uint(v[i][j]) & 0x7FFFFFFF) >= kNotFinite) {
          *special = 1;
          v[i][j] = 0;
        }
      }
      largest[i] = __reduce_max_sync(0xFFFFFFFF, largest_bits(v[i]));
    }
  }
  if constexpr (K::kBook) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int block = (span + i * kRowWarps) * 4 + step / 4;  // of 64 columns
      // The largest becomes 1.m * 2^14; 2^-100 is as good as nothing.
      const int exponent =
          kInput == RowInput::kHalf ? 0 : max(static_cast<int>(largest[i] >> 23) - 127 - 14, -100);
      const float unit = __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
      const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
      unsigned char* const place = x + block * K::kBlockX + step % 4 / 2 * 64 + step % 2 * 8;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *reinterpret_cast<uint2*>(place + (t + j) * 16) =
            make_uint2(pack_halves(v[i][2 * j] * inverse, v[i][2 * j + 1] * inverse),
                       pack_halves(v[i][4 + 2 * j] * inverse, v[i][5 + 2 * j] * inverse));
      }
      if (lane % 8 == 0) *reinterpret_cast<float*>(records + block * K::kRecord) = unit;
    }
  } else {
    constexpr bool kThree = K::kPlanes == 3;
    constexpr uint32_t kBias = kThree ? 0x8080 : 0x808080;
    float unit[kCount];
    uint32_t digits[kCount][8];
    int sum[kCount], half_sum[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int exponent = max(static_cast<int>(largest[i] >> 23) - 127 - (kThree ? 21 : 29), -90);
      unit[i] = __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
      const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
      const float low = inverse * field_divisor<K::kBits>(step, false);
      const float high = inverse * field_divisor<K::kBits>(step, true);
      sum[i] = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t whole;
        if constexpr (kThree) {  // rounds to an integer in the low bits of a float
          whole = __float_as_uint(fmaf(v[i][j], inverse, kMagic));
          sum[i] = static_cast<int>(static_cast<uint32_t>(sum[i]) + whole);
          whole += kBias - kMagicBits;
        } else {
          whole = static_cast<uint32_t>(__float2int_rn(v[i][j] * (j < 4 ? low : high))) + kBias;
        }
        digits[i][j] = whole ^ kBias;
      }
      if constexpr (kThree) {
        sum[i] = static_cast<int>(static_cast<uint32_t>(sum[i]) - 8u * kMagicBits);
      } else {  // of another size each, and too large to be summed
        const float all = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) +
                          ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
        sum[i] = __float2int_rn(all * (inverse * 0x1p-8f));
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      half_sum[i] = __reduce_add_sync(0xFFFFFFFF, lane < 16 ? sum[i] : 0);
      sum[i] = __reduce_add_sync(0xFFFFFFFF, sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int block = (span + i * kRowWarps) * 4 + step / 4;  // of 64 columns
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // Columns 2t, 2t + 8, 2t + 1, 2t + 9: their bytes 0 and 1, bytes 2 and 3.
        const uint32_t a = digits[i][2 * j], b = digits[i][4 + 2 * j];
        const uint32_t c = digits[i][2 * j + 1], d = digits[i][5 + 2 * j];
        const uint32_t low_ab = __byte_perm(a, b, 0x5140), low_cd = __byte_perm(c, d, 0x5140);
        const uint32_t high_ab = __byte_perm(a, b, 0x7362), high_cd = __byte_perm(c, d, 0x7362);
        auto* word =
            reinterpret_cast<uint32_t*>(x + block * K::kBlockX + (t + j) * 16 + step % 4 * 4);
        if (!kThree) {
          *word = __byte_perm(high_ab, high_cd, 0x7632);
          word += 16;
        }
        word[0] = __byte_perm(high_ab, high_cd, 0x5410);
        word[16] = __byte_perm(low_ab, low_cd, 0x7632);
        word[32] = __byte_perm(low_ab, low_cd, 0x5410);
      }
      if (lane % 16 == 0) {
        // Lanes sum 256 times their first byte and once their second. There is no fourth of three:
        // the third's lanes read it twice.
        const float first = unit[i] * (kThree ? 256.0f : 65536.0f);
        const float second = kThree ? unit[i] * (1.0f / 257.0f) : unit[i];
        const int mine = lane == 0 ? half_sum[i] : sum[i] - half_sum[i];
        const float total = static_cast<float>(mine) * (unit[i] * (kThree ? 1.0f : 256.0f));
        constexpr float kUpper = 1.0f / upper_factor<K::kBits>();
        auto* const record = reinterpret_cast<float4*>(records + block / 2 * K::kRecord);
        record[0] = make_float4(first, first * kUpper, K::kZeros ? total : total * p.zero, 0.0f);
        record[1] = make_float4(second, second * kUpper, 0.0f, 0.0f);
      }
    }
  }
}

// All of x by the warps that multiply.
template <typename K>
struct RowStager {
  const void* row;
  int at, bytes;  // of this lane's next columns, of the row

  // Before x may be read.
  __device__ __forceinline__ explicit RowStager(const QLinearProblem& p)
      : row(p.x), bytes(p.k * 2) {
    const int lane = threadIdx.x % 32;
    at = threadIdx.x / 32 * 512 + lane / 2 * 32 + lane % 2 * 8;
    asm volatile("" : "+l"(row), "+r"(at), "+r"(bytes));
  }
  template <RowInput kInput>
  __device__ __forceinline__ void run(unsigned char* x, unsigned char* records, uint32_t* special,
                                      const QLinearProblem& p, const RowPlan& plan) {
    constexpr int kStep = kRowWarps * 512;
    RowPiece pieces[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) pieces[i].load(row, at + i * kStep, bytes);
    int span = threadIdx.x / 32;  // of 256 columns
#pragma unroll 1
    for (; span + kRowWarps < plan.spans; span += 2 * kRowWarps) {
      RowPiece these[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        these[i] = pieces[i];
        pieces[i].load(row, at + (2 + i) * kStep, bytes);
      }
      place_pieces<K, kInput, 2>(x, records, special, these, at, p, span);
      at += 2 * kStep;
    }
    if (span < plan.spans) place_pieces<K, kInput, 1>(x, records, special, pieces, at, p, span);
  }
};

}  // namespace kvopt::cuda::gemv
