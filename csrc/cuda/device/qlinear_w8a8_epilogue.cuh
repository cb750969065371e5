// SPDX-License-Identifier: Apache-2.0
// From int32 sums in a tensor core's accumulator to rows of y.
//
// The accumulators of mma.m16n8k32 and wgmma.m64nNk32 look alike: lane 4g + t of a warp holds, of
// rows g and g + 8 of x and of every 8 columns of y, columns 2t and 2t + 1. Stored as they are,
// four lanes would write 16 bytes in a row of y. Instead the four exchange their words (a 4 x 4
// transposition, four shuffles for 32 columns), after which a lane has 8 consecutive columns and
// the four of them write 64 bytes: whole sectors, and no shared memory is spent.
//
//   value = int32 sum * scale[n], then device/epilogue.cuh's order of things
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/epilogue.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {

struct RowsEpilogue {
  Epilogue parts;
  const __half* scale;  // (N)
  bool words;  // everything may be read and written in aligned 4- and 16-byte words of 16-bit types
};

inline bool is_aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

inline RowsEpilogue make_rows_epilogue(const QLinearProblem& p, const float* row_scale) {
  RowsEpilogue e{p.epilogue, p.meta, false};
  e.parts.row_scale = row_scale;
  const Epilogue& q = e.parts;
  const int width = q.swiglu ? q.n / 2 : q.n;
  e.words = q.dtype != DType::kFloat32 && width % 8 == 0 && q.n % 8 == 0 && q.rank == 0 &&
            is_aligned_16(q.y) && is_aligned_16(q.bias) && is_aligned_16(q.addend) &&
            is_aligned_16(q.residual) && is_aligned_16(e.scale);
  return e;
}

__device__ __forceinline__ float2 unpack_two(uint32_t word, DType type) {
  if (type == DType::kFloat16) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    return __half22float2(pair);
  }
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}

__device__ __forceinline__ uint32_t pack_two(float2 v, DType type) {
  uint32_t word;
  if (type == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(v.x, v.y);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// word[i] of lane t becomes word[t] of lane i, among the lanes 4g .. 4g + 3.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t keep = odd ? word[i + 1] : word[i], give = odd ? word[i] : word[i + 1];
    const uint32_t get = __shfl_xor_sync(0xFFFFFFFF, give, 1);
    word[i] = odd ? get : keep;
    word[i + 1] = odd ? keep : get;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t keep = upper ? word[i + 2] : word[i], give = upper ? word[i] : word[i + 2];
    const uint32_t get = __shfl_xor_sync(0xFFFFFFFF, give, 2);
    word[i] = upper ? get : keep;
    word[i + 2] = upper ? keep : get;
  }
}

// Scales and biases of columns n and n + 1 (n even), as they lie in memory; 0 past the last column.
__device__ __forceinline__ uint32_t scale_word(const RowsEpilogue& e, int n) {
  return n < e.parts.n ? reinterpret_cast<const uint32_t*>(e.scale)[n / 2] : 0;
}
__device__ __forceinline__ uint32_t bias_word(const RowsEpilogue& e, int n) {
  const auto* bias = static_cast<const uint32_t*>(e.parts.bias);
  return bias != nullptr && n < e.parts.n ? bias[n / 2] : 0;
}

// Those that a lane needs, first + 8j + 2t and the next: in registers, or of all columns from
// `first` on in shared memory.
template <int kPairs>
struct ColumnRegisters {
  uint32_t scales[kPairs], biases[kPairs];

  __device__ __forceinline__ void load(const RowsEpilogue& e, int first) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int n = first + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2;
      scales[j] = scale_word(e, n);
      biases[j] = bias_word(e, n);
    }
  }
  __device__ __forceinline__ uint32_t scale(int j) const { return scales[j]; }
  __device__ __forceinline__ uint32_t bias(int j) const { return biases[j]; }
};

struct SharedColumns {
  const uint2* words;  // {scale, bias}

  __device__ __forceinline__ uint32_t scale(int j) const { return at(j).x; }
  __device__ __forceinline__ uint32_t bias(int j) const { return at(j).y; }
  __device__ __forceinline__ uint2 at(int j) const { return words[4 * j + threadIdx.x % 4]; }
};

__device__ __forceinline__ void add_two(float2& v, uint32_t word, DType type) {
  const float2 more = unpack_two(word, type);
  v.x += more.x;
  v.y += more.y;
}

// kWords words of 8 columns each, from `column` of a row of y on; `row` null: there is no such row.
template <int kWords>
__device__ __forceinline__ void store_words(uint16_t* row, int column, int width,
                                            uint32_t (&word)[kWords]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  if constexpr (kWords == 4) {
    transpose_quad(word);
    if (row != nullptr && column + 8 * t < width) {
      *reinterpret_cast<uint4*>(row + column + 8 * t) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int n = column + 8 * i + 2 * t;
      if (row != nullptr && n < width) *reinterpret_cast<uint32_t*>(row + n) = word[i];
    }
  }
}

// Words of a row of addend or residual; 0 where there are none.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&word)[kWords], const void* data, bool exists,
                                           int64_t row, int column, int width) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int n = column + 8 * i + 2 * t;
    word[i] = exists && n < width ? *reinterpret_cast<const uint32_t*>(
                                        static_cast<const uint16_t*>(data) + row * width + n)
                                  : 0;
  }
}

// Scales of rows m and m + 8 of x, to be read long before they are needed.
struct RowScales {
  bool exists[2];
  float scale[2];

  __device__ __forceinline__ RowScales(const RowsEpilogue& e, int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exists[half] = m + 8 * half < e.parts.m;
      scale[half] = exists[half] ? e.parts.row_scale[m + 8 * half] : 0.0f;
    }
  }
};

// Rows m and m + 8, kPairs pairs of columns from `first` on; `sums(j, half)` are the int32 sums of
// pair j in row m + 8 half. `first` is a multiple of 16, kPairs even. Every lane of the warp calls
// it, also for rows past the last. Only where RowsEpilogue::words.
template <int kPairs, typename Columns, typename Sums>
__device__ __forceinline__ void finish_rows(const RowsEpilogue& e, const Columns& c,
                                            const RowScales& rows, int m, int first, Sums sums) {
  const Epilogue& q = e.parts;
  const auto* y = static_cast<uint16_t*>(q.y);
  // kCount pairs from pair j on, before the activation.
  const auto before = [&]<int kCount>(float2(&v)[kCount], int j, int half) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int2 sum = sums(j + i, half);
      const float2 scale = unpack_two(c.scale(j + i), DType::kFloat16);
      const float2 bias = unpack_two(c.bias(j + i), q.dtype);
      v[i].x = fmaf(static_cast<float>(sum.x) * scale.x, rows.scale[half], bias.x);
      v[i].y = fmaf(static_cast<float>(sum.y) * scale.y, rows.scale[half], bias.y);
    }
    if (q.addend != nullptr) {
      uint32_t word[kCount];
      load_words(word, q.addend, rows.exists[half], m + 8 * half, first + 8 * j, q.n);
#pragma unroll
      for (int i = 0; i < kCount; ++i) add_two(v[i], word[i], q.dtype);
    }
  };
  const auto after = [&]<int kCount>(float2(&v)[kCount], int column, int width, int half) {
    uint32_t word[kCount];
    if (q.residual != nullptr) {
      load_words(word, q.residual, rows.exists[half], m + 8 * half, column, width);
#pragma unroll
      for (int i = 0; i < kCount; ++i) add_two(v[i], word[i], q.dtype);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) word[i] = pack_two(v[i], q.dtype);
    uint16_t* row =
        rows.exists[half] ? const_cast<uint16_t*>(y) + int64_t{m + 8 * half} * width : nullptr;
    store_words(row, column, width, word);
  };
  if (q.swiglu) {
    constexpr int kOut = kPairs % 8 == 0 ? 4 : 1;
#pragma unroll
    for (int j = 0; j < kPairs; j += 2 * kOut) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 both[2 * kOut], v[kOut];
        before(both, j, half);
#pragma unroll
        for (int i = 0; i < kOut; ++i) {
          v[i] = make_float2(swiglu(both[2 * i].x, both[2 * i + 1].x),
                             swiglu(both[2 * i].y, both[2 * i + 1].y));
        }
        after(v, first / 2 + 4 * j, q.n / 2, half);
      }
    }
  } else {
    constexpr int kOut = kPairs % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int j = 0; j < kPairs; j += kOut) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 v[kOut];
        before(v, j, half);
        after(v, first + 8 * j, q.n, half);
      }
    }
  }
}

// The same for any alignment, any type and low-rank factors: element by element.
template <int kPairs, typename Sums>
__device__ __forceinline__ void finish_rows_slowly(const RowsEpilogue& e, int m, int first,
                                                   Sums sums) {
  const Epilogue& q = e.parts;
  const auto value = [&](int n, int sum) { return static_cast<float>(sum) * to_float(e.scale[n]); };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = m + 8 * half;
    if (row >= q.m) return;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int2 pair = sums(j, half);
      const int column = first + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = column + i, sum = i == 0 ? pair.x : pair.y;
        if (n >= q.n) continue;
        if (!q.swiglu) {
          store_output(q, row, n, before_activation(q, row, n, value(n, sum)));
        } else if (j % 2 == 0) {
          const int2 up = sums(j + 1, half);
          finish_pair(q, row, n, value(n, sum), value(n + 8, i == 0 ? up.x : up.y));
        }
      }
    }
  }
}

}  // namespace kvopt::cuda
