// SPDX-License-Identifier: Apache-2.0
// Weights into codes and back: round-to-nearest quantisation, packing to the mma16 layout of
// quant_format.h, and both ways out of it. Bit for bit the rule of common/params.h: fp32 with true
// division, ties to even, never contracted.
//
//   rtn          a warp per row and group: minimum and maximum by shuffles, then the codes (the
//                second read of w comes from cache)
//   pack         a thread per 32-bit word of the packed buffer (8 or 4 codes)
//   unpack       a thread per code
//   dequantize   a lane per 16-byte piece, as the products read it; rows of w are written in runs
//                of 32 bytes or more
//
// All are bound by memory; they run when a model is loaded, except dequantize, which also feeds a
// dense product when there are many activation rows: N * K * (bits / 8 + 2) bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <limits>

#include "cuda/device/copy.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/wquant.h"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

bool is_valid(const QuantFormat& f, int64_t n, int64_t k) {
  return n >= 1 && k >= 1 && (f.bits == 4 || f.bits == 8) && f.group_size >= 1 &&
         (f.group_size % 16 == 0 || f.group_size >= k);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rtn_kernel(const RtnParams p) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t index = global_thread() / 32;  // row * groups + group
  if (index >= p.n * groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = index / groups, group = index % groups;
  const int64_t begin = group * p.format.group_size;
  const int64_t end = min(begin + p.format.group_size, p.k);
  const T* const weight = static_cast<const T*>(p.weight) + row * p.k;

  float low = 0, high = 0;
  for (int64_t column = begin + lane; column < end; column += 32) {
    const float w = to_float(weight[column]);
    low = fminf(low, w);
    high = fmaxf(high, w);
  }
  low = warp_min(low);
  high = warp_max(high);

  const float levels = static_cast<float>((1 << p.format.bits) - 1);
  const float largest = fmaxf(-low, high);
  float wanted;
  if (!p.format.symmetric) {
    wanted = __fdiv_rn(__fsub_rn(high, low), levels);
  } else if (p.format.bits == 8) {
    wanted = __fdiv_rn(largest, 127.0f);
  } else {
    wanted = __fdiv_rn(__fmul_rn(2.0f, largest), levels);
  }
  const __half stored = __float2half_rn(fmaxf(__half2float(__float2half_rn(wanted)), 0x1p-24f));
  const float scale = __half2float(stored);
  const float zero =
      p.format.symmetric
          ? static_cast<float>(symmetric_zero(p.format))
          : fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(0.0f, low), scale)), 0.0f), levels);
  for (int64_t column = begin + lane; column < end; column += 32) {
    const float code = __fadd_rn(rintf(__fdiv_rn(to_float(weight[column]), scale)), zero);
    p.codes[row * p.k + column] = static_cast<uint8_t>(fminf(fmaxf(code, 0.0f), levels));
  }
  if (lane == 0) {
    p.scale[index] = __half_as_ushort(stored);
    p.zero[index] = __half_as_ushort(__float2half_rn(zero));
  }
}

__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const PackParams p) {
  const int64_t tile_words = mma16::tile_bytes(p.format, p.k) / 4;
  const int64_t index = global_thread();
  if (index >= ceil_div(p.n, mma16::kRows) * tile_words) return;
  const int64_t tile = index / tile_words;
  const int64_t block = index % tile_words / 128;
  const int lane = static_cast<int>(index % 128) / 4, word = static_cast<int>(index % 4);
  const int g = lane / 4, t = lane % 4;
  const auto code = [&](int64_t column, int r) -> uint32_t {
    const int64_t row = tile * mma16::kRows + r;
    return row < p.n && column < p.k ? p.codes[row * p.k + column] : 0;
  };
  uint32_t packed = 0;
  if (p.format.bits == 4) {
    const int64_t column = block * 64 + word * 16 + t * 4;
    for (int pair = 0; pair < 4; ++pair) {
      const int r = g + pair % 2 * 8;
      packed |= (code(column + pair / 2 * 2, r) & 15) << 4 * pair;
      packed |= (code(column + pair / 2 * 2 + 1, r) & 15) << (16 + 4 * pair);
    }
  } else {
    const int64_t column = block * 32 + word / 2 * 16 + t * 4 + word % 2 * 2;
    for (int i = 0; i < 4; ++i) packed |= code(column + i % 2, g + i / 2 * 8) << 8 * i;
  }
  reinterpret_cast<uint32_t*>(p.packed)[index] = packed;
}

__global__ void __launch_bounds__(kThreads) pack_meta_kernel(const PackParams p) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t index = global_thread();  // padded row * groups + group
  const int64_t row = index / groups, group = index % groups;
  if (row >= ceil_div(p.n, mma16::kRows) * mma16::kRows) return;
  const bool real = row < p.n;
  p.meta[mma16::scale_index(p.format, p.k, row, group)] = real ? p.scale[index] : 0;
  if (!p.format.symmetric) {
    p.meta[mma16::zero_index(p.format, p.k, row, group)] = real ? p.zero[index] : 0;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_codes_kernel(const PackParams p) {
  const int64_t index = global_thread();
  if (index >= p.n * p.k) return;
  const CodeAddress at = mma16::code_address(p.format, p.k, index / p.k, index % p.k);
  const int mask = p.format.bits == 4 ? 15 : 255;
  p.codes[index] = static_cast<uint8_t>(p.packed[at.byte] >> at.shift & mask);
}

__global__ void __launch_bounds__(kThreads) unpack_meta_kernel(const PackParams p) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t index = global_thread();
  if (index >= p.n * groups) return;
  const int64_t row = index / groups, group = index % groups;
  p.scale[index] = p.meta[mma16::scale_index(p.format, p.k, row, group)];
  p.zero[index] = p.format.symmetric ? __half_as_ushort(__int2half_rn(symmetric_zero(p.format)))
                                     : p.meta[mma16::zero_index(p.format, p.k, row, group)];
}

// Four weights of one row from column `column` on.
template <typename T>
__device__ __forceinline__ void store_4(const DequantizeParams& p, int64_t row, int64_t column,
                                        const float (&w)[4], bool aligned) {
  if (row >= p.n) return;
  T* const target = static_cast<T*>(p.weight) + row * p.k + column;
  if (aligned && column < p.k) {
    alignas(16) T values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = from_float<T>(w[i]);
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(values);
    } else {
      *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(values);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.k) target[i] = from_float<T>(w[i]);
  }
}

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const DequantizeParams p, bool aligned) {
  constexpr int kSteps = kBits == 4 ? 4 : 2;  // in a 16-byte piece
  const int64_t tile_pieces = mma16::tile_bytes(p.format, p.k) / 16;
  const int64_t index = global_thread();
  const int64_t tile = index / tile_pieces;
  if (tile >= ceil_div(p.n, mma16::kRows)) return;
  const int lane = threadIdx.x % 32;
  const int64_t first = index % tile_pieces / 32 * (kSteps * 16) + lane % 4 * 4;
  const int64_t row = tile * mma16::kRows + lane / 4;
  const uint4 piece = load_stream(p.packed + index * 16);
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  const int64_t groups = group_count(p.format, p.k);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t column = first + step * 16;
    const int64_t group = min(static_cast<int64_t>(static_cast<uint32_t>(column) /
                                                   static_cast<uint32_t>(p.format.group_size)),
                              groups - 1);
    float w[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = mma16::scale_index(p.format, p.k, row + r * 8, group);
      float scale, zero = static_cast<float>(symmetric_zero(p.format));
      if (p.format.symmetric) {
        scale = __half2float(__ushort_as_half(__ldg(p.meta + at)));
      } else {
        const uint32_t both = __ldg(reinterpret_cast<const uint32_t*>(p.meta + at));
        scale = __half2float(__ushort_as_half(static_cast<uint16_t>(both)));
        zero = __half2float(__ushort_as_half(static_cast<uint16_t>(both >> 16)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = kBits == 4
                                  ? words[step] >> (i / 2 * 8 + r * 4 + i % 2 * 16) & 15
                                  : words[(step * 2 + i / 2) % 4] >> (r * 16 + i % 2 * 8) & 255;
        w[r][i] = __fmul_rn(scale, __fsub_rn(static_cast<float>(code), zero));
      }
    }
    store_4<T>(p, row, column, w[0], aligned);
    store_4<T>(p, row + 8, column, w[1], aligned);
  }
}

template <typename T>
int launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const int64_t pieces = mma16::packed_bytes(p.format, p.n, p.k) / 16;
  const bool aligned = p.k % 4 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  if (p.format.bits == 4) {
    dequantize_kernel<T, 4><<<blocks_for(pieces), kThreads, 0, stream>>>(p, aligned);
  } else {
    dequantize_kernel<T, 8><<<blocks_for(pieces), kThreads, 0, stream>>>(p, aligned);
  }
  return cudaGetLastError();
}

}  // namespace

int wquant_rtn(const RtnParams& p, void* stream_handle) {
  if (!is_valid(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const unsigned blocks = blocks_for(p.n * group_count(p.format, p.k) * 32);
  switch (p.dtype) {
    case DType::kFloat32:
      rtn_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
      break;
    case DType::kFloat16:
      rtn_kernel<__half><<<blocks, kThreads, 0, stream>>>(p);
      break;
    case DType::kBFloat16:
      rtn_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(p);
      break;
  }
  return cudaGetLastError();
}

int wquant_pack(const PackParams& p, void* stream_handle) {
  if (!is_valid(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t words = mma16::packed_bytes(p.format, p.n, p.k) / 4;
  pack_codes_kernel<<<blocks_for(words), kThreads, 0, stream>>>(p);
  const int64_t rows = ceil_div(p.n, mma16::kRows) * mma16::kRows;
  pack_meta_kernel<<<blocks_for(rows * group_count(p.format, p.k)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

int wquant_unpack(const PackParams& p, void* stream_handle) {
  if (!is_valid(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  unpack_codes_kernel<<<blocks_for(p.n * p.k), kThreads, 0, stream>>>(p);
  unpack_meta_kernel<<<blocks_for(p.n * group_count(p.format, p.k)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

int wquant_dequantize(const DequantizeParams& p, void* stream_handle) {
  if (!is_valid(p.format, p.n, p.k)) return cudaErrorInvalidValue;
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
