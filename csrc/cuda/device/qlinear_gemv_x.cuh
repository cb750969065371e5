// SPDX-License-Identifier: Apache-2.0
// The activations of a matrix-vector product: every warp brings its own columns of x to shared
// memory as the tensor cores want them, and what it takes to make fp16 of any input exact.
//
// A segment is `kFoldSteps` steps of 16 columns, inside one group of the weight. Per segment and
// row of x the product sees fp16 numbers v, and two fp32 numbers, the record: x = unit * v and
// sum = unit * (sum of v) * 2^-24.
//   fp16                  v = x, unit = 1
//   bf16, or with input_scale   unit = the power of two that brings the segment's largest to
//                         [2^14, 2^15): exact but for what is 2^-29 of it
//   8-bit activations     v = round(x / s), unit = s: exact integers
// Infinities and NaN are staged as 0 and their row is marked; marked rows add them at the end, one
// by one (special_sum), since 0 * inf would make NaN of codes that only the zero point makes
// nonzero.
//
// Step s of row m: 32 bytes at m * x_pitch + 32 s; lane t of four finds columns 2t, 2t+1, 2t+8,
// 2t+9 in its 8 bytes. The pitch is 32 mod 128 bytes, so the eight rows of a load meet all banks.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_gemv_plan.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda::gemv {

constexpr uint32_t kNotFinite = 0x7F800000;

// Eight columns of a row of x times input_scale, zeros past the end.
__device__ __forceinline__ void to_floats(float (&v)[8], const QLinearProblem& p, uint4 bits,
                                          int column) {
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
  if (p.input_scale != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < p.k) v[i] *= load_float(p.input_scale, column + i, p.dtype);
    }
  }
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

// Column of the row that is the first of eight, `half` half steps into the part of warp `member`.
template <int kUnit>
__device__ __forceinline__ int column_of(const Plan& plan, int member, int half) {
  return (half / (kUnit / 8) * plan.warps + member) * kUnit + half % (kUnit / 8) * 8;
}

// The warp's part of x, as it is, to where it will be staged.
template <int kUnit>
__device__ __forceinline__ void copy_x(unsigned char* x, const QLinearProblem& p, const Plan& plan,
                                       int member) {
  const int halves = plan.part_columns / 8;
#pragma unroll 1
  for (int row = 0; row < p.m; ++row) {
    const auto* source = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k;
    auto* const target = reinterpret_cast<uint16_t*>(x + row * plan.x_pitch);
#pragma unroll 1
    for (int half = threadIdx.x % 32; half < halves; half += 32) {
      const int column = column_of<kUnit>(plan, member, half);
      if (p.aligned) {
        if (column >= p.k) continue;
#if __CUDA_ARCH__ >= 800
        copy_async_16(target + half * 8, source + column, 16);
#else
        *reinterpret_cast<uint4*>(target + half * 8) = load_16(source + column);
#endif
      } else {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
          target[half * 8 + i] = column + i < p.k ? source[column + i] : 0;
        }
      }
    }
  }
#if __CUDA_ARCH__ >= 800
  copy_async_commit();
  copy_async_wait<0>();
#endif
  __syncwarp();
}

// The warp's items are (row, half a step), eight columns each, in that order. `use` sees all lanes,
// so that it may shuffle; `valid` says whether the item exists.
template <int kUnit, typename Use>
__device__ __forceinline__ void for_each_item(const QLinearProblem& p, const Plan& plan,
                                              const unsigned char* x, int member, const Use& use) {
  const int halves = plan.part_columns / 8;
  int row = 0, half = threadIdx.x % 32;
  const auto settle = [&] {
    while (half >= halves && row < p.m) {
      half -= halves;
      ++row;
    }
  };
  const auto load = [&]() -> uint4 {
    const int column = column_of<kUnit>(plan, member, half);
    if (row >= p.m || column >= p.k) return make_uint4(0, 0, 0, 0);
    if (!plan.direct_x) return *reinterpret_cast<const uint4*>(x + row * plan.x_pitch + half * 16);
    return load_16(static_cast<const __half*>(p.x) + static_cast<int64_t>(row) * p.k + column);
  };
  settle();
  uint4 next = load();
#pragma unroll 1
  for (int item = 0; item < halves * p.m; item += 32) {
    const uint4 bits = next;
    const int this_row = row, this_half = half;
    half += 32;
    settle();
    next = load();
    __syncwarp();  // an item is staged where others of this turn were read
    use(bits, this_row, this_half, this_row < p.m);
  }
}

// 8-bit activations: the largest magnitude of each group and row, for the whole block. `absmax` is
// zero on entry; the block synchronises before and after.
template <int kUnit>
__device__ __forceinline__ void find_absmax(uint32_t* absmax, const unsigned char* x,
                                            const QLinearProblem& p, const Plan& plan, int member) {
  for_each_item<kUnit>(p, plan, x, member, [&](uint4 bits, int row, int half, bool valid) {
    if (!valid) return;
    float v[8];
    const int column = column_of<kUnit>(plan, member, half);
    to_floats(v, p, bits, column);
    const int group = group_of_step(p, plan, column / kStepColumns);
    atomicMax(&absmax[group * p.m + row], largest_bits(v));
  });
}

// Anything but fp16 as it is: v to fp16 pairs, see above. Returns `unit`.
template <int kFoldSteps>
__device__ __forceinline__ float convert(uint32_t (&pairs)[4], float (&v)[8],
                                         const uint32_t* absmax, const QLinearProblem& p,
                                         const Plan& plan, int row, int column, bool valid) {
  float unit = 1;
  if (p.activation_bits == 8) {
    const int group = group_of_step(p, plan, column / kStepColumns);
    const float size = valid ? __uint_as_float(absmax[group * p.m + row]) : 0.0f;
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

// x, records: of this warp. special: bit m is set when row m holds a number that is not finite.
template <int kUnit, int kFoldSteps>
__device__ __forceinline__ void stage_x(unsigned char* x, unsigned char* records,
                                        const uint32_t* absmax, uint32_t* special,
                                        const QLinearProblem& p, const Plan& plan, int member) {
  const bool plain =
      p.activation_bits != 8 && p.dtype == DType::kFloat16 && p.input_scale == nullptr;
  for_each_item<kUnit>(p, plan, x, member, [&](uint4 bits, int row, int half, bool valid) {
    uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    float unit = 1;
    if (plain) {
      uint32_t top = 0;  // the sign of a half is set where its exponent is all ones
#pragma unroll
      for (int i = 0; i < 4; ++i) top |= (pairs[i] & 0x7FFF7FFF) + 0x04000400;
      if ((top & 0x80008000) != 0) {
        atomicOr(special, 1u << row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t bad = ((pairs[i] & 0x7FFF7FFF) + 0x04000400) & 0x80008000;
          pairs[i] &= ~((bad >> 15) * 0xFFFF);
        }
      }
    } else {
      float v[8];
      const int column = column_of<kUnit>(plan, member, half);
      to_floats(v, p, bits, column);
      if (largest_bits(v) >= kNotFinite) {
        atomicOr(special, 1u << row);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if ((__float_as_uint(v[i]) & 0x7FFFFFFF) >= kNotFinite) v[i] = 0;
        }
      }
      unit = convert<kFoldSteps>(pairs, v, absmax, p, plan, row, column, valid);
    }
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
  });
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
