// SPDX-License-Identifier: Apache-2.0
// Packed codes -> dense weight (N, K), which feeds a dense product when there are many rows of x.
//
//   warp   16 rows x 64 columns (128 for 2 bits, 256 for 3), its codes in one or a few 16-byte
//          loads a lane, as the products read them
//
// A lane holds pairs of columns of rows g and g + 8; the four lanes of a row exchange words (four
// shuffles for 4 x 4 of them), so that each then stores eight consecutive columns and the row's
// lanes 64 bytes side by side: whole sectors. Codes become floats without conversions: 2^23 + q has
// q in its low bits. scale * (q - zero) is fp32, rounded once. A code book of 16 floats sits in
// shared memory, in 16 banks: no conflicts.
//
// Bytes: N K (bits / 8 + size of the type) plus scales. Bound: memory; about 5 instructions a
// weight, where an H200 has 12 in the time of 2.5 bytes.
#include <cuda_runtime_api.h>

#include "cuda/device/code_block.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/wquant.h"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 8;

// What a lane knows of rows g and g + 8 in one group.
struct RowPair {
  float scale[2], zero[2];
};

__device__ __forceinline__ RowPair load_pair(const DequantizeParams& p, int64_t tile, int groups,
                                             int group, int g, float implied) {
  const int64_t index = tile * groups + group;
  RowPair r;
  if (p.format.has_zeros()) {
    const uint2 m = __ldg(reinterpret_cast<const uint2*>(p.meta + index * 32 + g * 4));
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&m.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&m.y));
    r = {{low.x, high.x}, {low.y, high.y}};
  } else {
    const uint32_t m = __ldg(reinterpret_cast<const uint32_t*>(p.meta + index * 16 + g * 2));
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&m));
    r = {{both.x, both.y}, {implied, implied}};
  }
  return r;
}

// One code of a raw pair (half 0 or 1) as a weight.
template <bool kBook>
__device__ __forceinline__ float weight(uint32_t raw, int half, int factor, float scale, float zero,
                                        const float* book) {
  if constexpr (kBook) {
    const uint32_t code = (half == 0 ? raw & 0xFFFF : raw >> 16) / factor;
    return __fmul_rn(scale, book[code]);
  } else {
    constexpr float kMagic = 8388608.0f;  // 2^23
    const float level =
        __uint_as_float(__byte_perm(raw, __float_as_uint(kMagic), half == 0 ? 0x7610 : 0x7632)) -
        kMagic;
    return __fmul_rn(scale, __fmaf_rn(level, 1.0f / static_cast<float>(factor), -zero));
  }
}

// Lane t of a quad has column pair t of four pieces of eight columns; afterwards it has all four
// pairs of piece t.
template <typename V>
__device__ __forceinline__ void transpose_quad(V (&v)[4], int t) {
  const auto exchange = [&](V& a, V& b, int mask) {  // lanes with the bit give a and keep b
    const V sent = t & mask ? a : b;
    const V got = __shfl_xor_sync(0xFFFFFFFF, sent, mask);
    (t & mask ? a : b) = got;
  };
  exchange(v[0], v[1], 1);
  exchange(v[2], v[3], 1);
  exchange(v[0], v[2], 2);
  exchange(v[1], v[3], 2);
}

__device__ __forceinline__ uint32_t to_pair(float a, float b, __half /*tag*/) {
  const __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t to_pair(float a, float b, __nv_bfloat16 /*tag*/) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint64_t to_pair(float a, float b, float /*tag*/) {
  return __float_as_uint(a) | static_cast<uint64_t>(__float_as_uint(b)) << 32;
}

// Eight columns of a row from `column` on.
template <typename T, typename V>
__device__ __forceinline__ void store_8(const DequantizeParams& p, int64_t row, int column,
                                        const V (&v)[4], bool aligned) {
  if (row >= p.n || column >= p.k) return;
  T* const target = static_cast<T*>(p.weight) + row * p.k + column;
  if (aligned) {
    if constexpr (sizeof(V) == 4) {
      *reinterpret_cast<uint4*>(target) = make_uint4(v[0], v[1], v[2], v[3]);
    } else {
      reinterpret_cast<ulonglong2*>(target)[0] = make_ulonglong2(v[0], v[1]);
      reinterpret_cast<ulonglong2*>(target)[1] = make_ulonglong2(v[2], v[3]);
    }
    return;
  }
  const T* const values = reinterpret_cast<const T*>(v);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < p.k) target[i] = values[i];
  }
}

template <typename T, int kBits, bool kBook>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_kernel(const DequantizeParams p, int blocks, int groups, bool aligned) {
  using V = decltype(to_pair(0, 0, T()));
  using Block = CodeBlock<kBits>;
  __shared__ float book[16];
  if constexpr (kBook) {
    if (threadIdx.x < 16) book[threadIdx.x] = book_value(p.format.scheme, threadIdx.x);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int block = blockIdx.y * kWarps + threadIdx.x / 32;
  const int64_t tile = blockIdx.x;
  if (block >= blocks) return;
  Block codes;
  codes.load(p.packed + (tile * blocks + block) * Block::kBytes + lane * 16);
  const float implied = static_cast<float>(symmetric_zero(p.format));
  const auto size = static_cast<uint32_t>(p.format.group_size);
  int group = -1;
  RowPair rows;
#pragma unroll
  for (int unit = 0; unit < Block::kUnits; ++unit) {
    const Words<kBits> words = codes.words(unit);
    const int column = (block * Block::kUnits + unit) * kBlockColumns;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // of steps: 32 columns
      V v[2][4];                            // [row][piece of eight columns]
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = pair * 2 + s;
        const int now =
            min(static_cast<int>(static_cast<uint32_t>(column + step * 16) / size), groups - 1);
        if (now != group) {
          group = now;
          rows = load_pair(p, tile, groups, group, g, implied);
        }
        uint32_t a[4];
        raw_operand<kBits>(a, words, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i % 2, factor = raw_factor<kBits>(step, r == 1);
          v[r][s * 2 + i / 2] =
              to_pair(weight<kBook>(a[i], 0, factor, rows.scale[r], rows.zero[r], book),
                      weight<kBook>(a[i], 1, factor, rows.scale[r], rows.zero[r], book), T());
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        transpose_quad(v[r], t);
        store_8<T>(p, tile * mma16::kRows + g + r * 8, column + pair * 32 + t * 8, v[r], aligned);
      }
    }
  }
}

// Row major: a thread per eight columns.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_rows_kernel(const DequantizeParams p, bool aligned) {
  using V = decltype(to_pair(0, 0, T()));
  const int column = (blockIdx.y * kWarps * 32 + threadIdx.x) * 8;
  const int64_t row = blockIdx.x;
  if (column >= p.k) return;
  const uint2 bytes =
      __ldg(reinterpret_cast<const uint2*>(p.packed + row * mma16::row_pitch(p.k) + column));
  const float scale = __half2float(__ushort_as_half(__ldg(p.meta + row)));
  V v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t two = static_cast<int32_t>((i < 2 ? bytes.x : bytes.y) << (16 - i % 2 * 16));
    v[i] = to_pair(__fmul_rn(scale, static_cast<float>(two << 8 >> 24)),
                   __fmul_rn(scale, static_cast<float>(two >> 24)), T());
  }
  store_8<T>(p, row, column, v, aligned);
}

template <typename T, int kBits, bool kBook = false>
int launch(const DequantizeParams& p, bool aligned, cudaStream_t stream) {
  const auto blocks = static_cast<int>(mma16::tile_bytes(p.format, p.k) / CodeBlock<kBits>::kBytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, mma16::kRows)),
                  static_cast<unsigned>(ceil_div(blocks, kWarps)));
  dequantize_kernel<T, kBits, kBook><<<grid, kWarps * 32, 0, stream>>>(
      p, blocks, static_cast<int>(group_count(p.format, p.k)), aligned);
  return cudaGetLastError();
}

template <typename T>
int launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const bool aligned =
      p.k * sizeof(T) % 16 == 0 && p.k % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  if (mma16::is_row_major(p.format)) {
    const dim3 grid(static_cast<unsigned>(p.n),
                    static_cast<unsigned>(ceil_div(p.k, kWarps * 32 * 8)));
    dequantize_rows_kernel<T><<<grid, kWarps * 32, 0, stream>>>(p, aligned);
    return cudaGetLastError();
  }
  if (p.format.has_book()) return launch<T, 4, true>(p, aligned, stream);
  if (p.format.bits == 2) return launch<T, 2>(p, aligned, stream);
  if (p.format.bits == 3) return launch<T, 3>(p, aligned, stream);
  if (p.format.bits == 4) return launch<T, 4>(p, aligned, stream);
  return launch<T, 8>(p, aligned, stream);
}

}  // namespace

int wquant_dequantize(const DequantizeParams& p, void* stream_handle) {
  if (!is_valid_weight(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_dequantize<float>(p, stream);
    case DType::kFloat16:
      return launch_dequantize<__half>(p, stream);
    case DType::kBFloat16:
      return launch_dequantize<__nv_bfloat16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvopt::cuda
