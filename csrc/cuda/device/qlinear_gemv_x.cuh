// SPDX-License-Identifier: Apache-2.0
// The activations of a matrix-vector product: the block brings x to shared
// memory as the tensor cores want it, and what it takes to make fp16 of any
// input exact.
//
// A segment is `kFoldSteps` steps of 16 columns, inside one group of the
// weight. Per segment and row of x the product sees fp16 numbers v, and two
// fp32 numbers, the record: x = unit * v and sum = unit * (sum of v) * 2^-24.
//   fp16                  v = x, unit = 1
//   bf16 or input_scale   unit = the power of two that brings the segment's largest number to
//                         [2^14, 2^15): exact but for what is 2^-29 of it
//   8-bit activations     v = round(x / s), unit = s: exact integers
// Infinities and NaN are staged as 0 and their row is marked; the outputs of a
// marked row are made of them alone, one by one (special_sum): times a level
// they are infinite or NaN, whatever the rest adds, but 0 * inf would make NaN
// of codes that only the zero point makes nonzero.
//
// Step s of row m: 32 bytes at m * x_pitch + 32 s; lane t of four finds columns
// 2t, 2t+1, 2t+8, 2t+9 in its 8 bytes. The pitch is 32 mod 128 bytes, so the
// eight rows of a load meet all banks.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_gemv_plan.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda::gemv {

constexpr uint32_t kNotFinite = 0x7F800000;

// Eight numbers of x's type.
__device__ __forceinline__ void to_floats(float (&v)[8], const QLinearProblem& p, uint4 bits) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (p.dtype == DType::kFloat16) {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      v[2 * i] = f.x;
      v[2 * i + 1] = f.y;
    } else {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
    }
  }
}

// Eight columns of a row, zeros past its end.
__device__ __forceinline__ uint4 load_columns(const QLinearProblem& p, const void* row,
                                              int column) {
  const auto* const source = static_cast<const uint16_t*>(row);
  uint4 v = make_uint4(0, 0, 0, 0);
  if (p.aligned && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
    if (column < p.k) v = load_16(source + column);
  } else {
    auto* const words = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < p.k) words[i / 2] |= uint32_t{source[column + i]} << i % 2 * 16;
    }
  }
  return v;
}

// Bits of the largest magnitude; kNotFinite or more when one is not finite.
__device__ __forceinline__ uint32_t largest_bits(const float (&v)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(v[i]) & 0x7FFFFFFF);
  return largest;
}

__device__ __forceinline__ uint32_t pack_halves(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Anything but fp16 as it is: v to fp16 pairs, see above. Returns `unit`.
template <int kFoldSteps>
__device__ __forceinline__ float convert(uint32_t (&pairs)[4], float (&v)[8],
                                         const uint32_t* absmax, const QLinearProblem& p,
                                         const Plan& plan, int row, int column) {
  float unit = 1;
  if (p.activation_bits == 8) {
    const int group = group_of_step(p, plan, column / kStepColumns);
    const float size = __uint_as_float(absmax[group * p.m + row]);
    // Less is as good as nothing; not finite: special_sum answers for the row.
    const bool usable = size > 0x1p-100f && __float_as_uint(size) < kNotFinite;
    unit = usable ? __fdiv_rn(size, 127) : 0.0f;
    const float inverse = usable ? __frcp_rn(unit) : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // v / unit, correctly rounded: ties matter
      const float quotient = v[i] * inverse;
      v[i] = rintf(fmaf(fmaf(-quotient, unit, v[i]), inverse, quotient));
    }
  } else {
    uint32_t largest = largest_bits(v);
#pragma unroll
    for (int offset = 1; offset < 2 * kFoldSteps; offset *= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFF, largest, offset));
    }
    // The largest becomes 1.m * 2^14; 2^-100 is as good as nothing.
    const int exponent = max(static_cast<int>(largest >> 23) - 127 - 14, -100);
    unit = __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
    const float inverse = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= inverse;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_halves(v[2 * i], v[2 * i + 1]);
  return unit;
}

// Eight columns, the `half`-th of row `row`, go to their place, and the
// segment's record with its first. All lanes of a warp, consecutive halves;
// `valid`: there is such a half.
template <int kFoldSteps>
__device__ __forceinline__ void place_x(unsigned char* x, unsigned char* records,
                                        const uint32_t (&pairs)[4], float unit, const Plan& plan,
                                        int row, int half, bool valid) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 stored = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
    sum += stored.x + stored.y;
  }
#pragma unroll
  for (int offset = 1; offset < 2 * kFoldSteps; offset *= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
  }
  if (!valid) return;
  auto* const target =
      reinterpret_cast<uint32_t*>(x + row * plan.x_pitch + half / 2 * 32 + half % 2 * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) target[2 * i] = pairs[i];
  if (half % (2 * kFoldSteps) == 0) {
    *reinterpret_cast<float2*>(records + row / 2 * plan.record_pitch +
                               half / (2 * kFoldSteps) * 16 + row % 2 * 8) =
        make_float2(unit, sum * 0x1p-24f * unit);
  }
}

// fp16 as it is: infinities and NaN become 0 and mark their row.
__device__ __forceinline__ void clear_special(uint32_t (&pairs)[4], uint32_t* special, int row) {
  uint32_t top = 0;  // the sign of a half is set where its exponent is all ones
#pragma unroll
  for (int i = 0; i < 4; ++i) top |= (pairs[i] & 0x7FFF7FFF) + 0x04000400;
  if ((top & 0x80008000) == 0) return;
  atomicOr(special, 1u << row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bad = ((pairs[i] & 0x7FFF7FFF) + 0x04000400) & 0x80008000;
    pairs[i] &= ~((bad >> 15) * 0xFFFF);
  }
}

// Pieces of fp16 rows: one row's at a distance of the block's threads, or those of four rows. Four
// loads of a thread are under way together.
template <bool kOneRow, int kFoldSteps>
__device__ __forceinline__ void stage_plain(unsigned char* x, unsigned char* records,
                                            uint32_t* special, const QLinearProblem& p,
                                            const Plan& plan, int row, int halves) {
  constexpr int kTogether = 4;
  const int threads = blockDim.x;
#pragma unroll 1
  for (int first = threadIdx.x & ~31; first < halves; first += kOneRow ? 4 * threads : threads) {
    uint4 bits[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int half = first + (kOneRow ? i * threads : 0) + threadIdx.x % 32;
      const bool there = (kOneRow || row + i < p.m) && half * 8 < p.k;
      bits[i] = make_uint4(0, 0, 0, 0);
      if (there) {
        bits[i] = load_16(static_cast<const __half*>(p.x) +
                          static_cast<int64_t>(kOneRow ? row : row + i) * p.k + half * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int start = first + (kOneRow ? i * threads : 0), half = start + threadIdx.x % 32;
      const int this_row = kOneRow ? row : row + i;
      if (this_row >= p.m || start >= halves) break;
      uint32_t pairs[4] = {bits[i].x, bits[i].y, bits[i].z, bits[i].w};
      clear_special(pairs, special, this_row);
      place_x<kFoldSteps>(x, records, pairs, 1.0f, plan, this_row, half, half < halves);
    }
  }
}

// All of x, by all threads of the block. special: bit m is set when row m holds
// a number that is not finite. absmax: zero on entry; 8-bit activations need a
// pass of their own to find it.
template <int kFoldSteps>
__device__ __forceinline__ void stage_x(unsigned char* x, unsigned char* records, uint32_t* absmax,
                                        uint32_t* special, const QLinearProblem& p,
                                        const Plan& plan, int columns) {
  const int halves = columns / 8;
  if (is_plain(p)) {
    if (p.m == 1) {
      stage_plain<true, kFoldSteps>(x, records, special, p, plan, 0, halves);
    } else {
#pragma unroll 1
      for (int row = 0; row < p.m; row += 4) {
        stage_plain<false, kFoldSteps>(x, records, special, p, plan, row, halves);
      }
    }
    return;
  }
#pragma unroll 1
  for (int pass = p.activation_bits == 8 ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (int row = 0; row < p.m; ++row) {
#pragma unroll 1
      for (int first = threadIdx.x & ~31; first < halves; first += blockDim.x) {
        const int half = first + threadIdx.x % 32, column = half * 8;
        float v[8];
        to_floats(
            v, p,
            load_columns(p, static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k,
                         column));
        if (p.input_scale != nullptr) {
          float scale[8];
          to_floats(scale, p, load_columns(p, p.input_scale, column));
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] *= scale[i];
        }
        const uint32_t largest = largest_bits(v);
        if (pass == 0) {
          const int group = group_of_step(p, plan, column / kStepColumns);
          atomicMax(&absmax[group * p.m + row], largest);
          continue;
        }
        if (largest >= kNotFinite) {
          atomicOr(special, 1u << row);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if ((__float_as_uint(v[i]) & 0x7FFFFFFF) >= kNotFinite) v[i] = 0;
          }
        }
        uint32_t pairs[4];
        const float unit = convert<kFoldSteps>(pairs, v, absmax, p, plan, row, column);
        place_x<kFoldSteps>(x, records, pairs, unit, plan, row, half, half < halves);
      }
    }
    if (pass == 0) __syncthreads();
  }
}

// What the numbers of row m that are not finite add to output n.
template <int kBits>
__device__ __forceinline__ float special_sum(const QLinearProblem& p, int m, int n) {
  if (n >= p.n) return 0;
  if (p.activation_bits == 8) return __uint_as_float(0x7FC00000);  // its group has no step size
  const auto* words = reinterpret_cast<const uint32_t*>(p.packed);
  const auto* const meta = reinterpret_cast<const uint16_t*>(p.meta);
  const QuantFormat format{kBits, p.format.group_size, p.format.scheme};
  float sum = 0;
#pragma unroll 1
  for (int column = 0; column < p.k; ++column) {
    float x = load_float(p.x, static_cast<int64_t>(m) * p.k + column, p.dtype);
    if (p.input_scale != nullptr) x *= load_float(p.input_scale, column, p.dtype);
    if ((__float_as_uint(x) & 0x7FFFFFFF) < kNotFinite) continue;
    if (x != x) return x;
    const CodePieces at = mma16::code_pieces(format, p.k, n, column);
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (i >= at.count) break;
      const CodePiece& piece = at.piece[i];
      code |= (words[piece.word] >> piece.shift & ((1u << piece.bits) - 1)) << piece.from;
    }
    const int group = group_of_column(p, column);
    const int64_t index = mma16::scale_index(format, p.k, n, group);
    const float zero =
        p.format.has_zeros() ? __half2float(__ushort_as_half(meta[index + 1])) : p.zero;
    const float level = p.format.has_book() ? book_value(p.format.scheme, static_cast<int>(code))
                                            : static_cast<float>(code) - zero;
    sum += __half2float(__ushort_as_half(meta[index])) * level * x;
  }
  return sum;
}

}  // namespace kvopt::cuda::gemv
