// SPDX-License-Identifier: Apache-2.0
// Weights into codes, codes into the packed layouts of quant_format.h, and back out. Bit for bit
// the rule of common/params.h: fp32 with true division, ties to even, never contracted.
//
//   rtn      a warp per row and group: minimum and maximum by shuffles, then the codes (the second
//            read of w comes from cache)
//   pack     a lane per 16 rows x 64 columns of a tile, 32 codes in and `bits` words out; row
//   major:
//            a thread per 4 bytes
//   unpack   a thread per code, by the layout's own address function
//
// All are bound by memory and run when a model is loaded. The way back to dense weights is in
// wquant_dequantize.cu.
#include <cuda_runtime_api.h>

#include "common/code_book.h"
#include "cuda/device/code_block.cuh"
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

// What the plain tensors hold as zero point where the packed layout has none.
__device__ __forceinline__ __half implied_zero(const QuantFormat& f) {
  return f.has_book() ? __half(0) : __int2half_rn(symmetric_zero(f));
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
  uint8_t* const codes = p.codes + row * p.k;

  float low = 0, high = 0;
  for (int64_t column = begin + lane; column < end; column += 32) {
    const float w = to_float(weight[column]);
    low = fminf(low, w);
    high = fmaxf(high, w);
  }
  low = warp_min(low);
  high = warp_max(high);

  const bool book = p.format.has_book(), zeros = p.format.has_zeros();
  const float levels = static_cast<float>((1 << p.format.bits) - 1);
  const float largest = fmaxf(-low, high);
  float wanted;
  if (book) {
    wanted = largest;
  } else if (zeros) {
    wanted = __fdiv_rn(__fsub_rn(high, low), levels);
  } else if (p.format.bits == 8) {
    wanted = __fdiv_rn(largest, 127.0f);
  } else {
    wanted = __fdiv_rn(__fmul_rn(2.0f, largest), levels);
  }
  const __half stored = __float2half_rn(fmaxf(__half2float(__float2half_rn(wanted)), 0x1p-24f));
  const float scale = __half2float(stored);
  float zero = __half2float(implied_zero(p.format));
  if (zeros) zero = fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(0.0f, low), scale)), 0.0f), levels);
  if (book) {
    const float reciprocal = __fdiv_rn(1.0f, fmaxf(largest, 1e-38f));
    for (int64_t column = begin + lane; column < end; column += 32) {
      const float scaled = __fmul_rn(to_float(weight[column]), reciprocal);
      codes[column] = static_cast<uint8_t>(choose_code(p.format.scheme, scaled));
    }
  } else {
    for (int64_t column = begin + lane; column < end; column += 32) {
      const float code = __fadd_rn(rintf(__fdiv_rn(to_float(weight[column]), scale)), zero);
      codes[column] = static_cast<uint8_t>(fminf(fmaxf(code, 0.0f), levels));
    }
  }
  if (lane == 0) {
    p.scale[index] = __half_as_ushort(stored);
    p.zero[index] = __half_as_ushort(__float2half_rn(zero));
  }
}

template <int kBits>
__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const PackParams p) {
  const int64_t tile_words = mma16::tile_bytes(p.format, p.k) / 4;
  const int64_t units = tile_words / (32 * kBits);  // of 64 columns, padding included
  const int64_t index = global_thread();
  const int64_t tile = index / (units * 32);
  if (tile >= ceil_div(p.n, mma16::kRows)) return;
  const int64_t unit = index / 32 % units;
  const int lane = static_cast<int>(index % 32), g = lane / 4, t = lane % 4;
  Words<kBits> w{};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = tile * mma16::kRows + g + i % 2 * 8;
      const int64_t column = unit * 64 + step * 16 + i / 2 * 8 + t * 2;
      if (row >= p.n) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (column + half >= p.k) continue;
        const uint32_t code = p.codes[row * p.k + column + half] & ((1u << kBits) - 1);
        insert_code<kBits>(w, step, i, half, code);
      }
    }
  }
  uint32_t* const target = reinterpret_cast<uint32_t*>(p.packed) + tile * tile_words;
#pragma unroll
  for (int j = 0; j < kBits; ++j) {
    const int64_t n = unit * kBits + j;
    target[n / 4 * 128 + lane * 4 + n % 4] = w.word[j];
  }
}

__global__ void __launch_bounds__(kThreads) pack_row_major_kernel(const PackParams p) {
  const int64_t words = mma16::row_pitch(p.k) / 4;
  const int64_t index = global_thread();
  if (index >= p.n * words) return;
  const int64_t row = index / words, column = index % words * 4;
  uint32_t word = 0;
  for (int i = 0; i < 4 && column + i < p.k; ++i) {
    word |= (p.codes[row * p.k + column + i] ^ mma16::stored_flip(p.format)) << 8 * i;
  }
  reinterpret_cast<uint32_t*>(p.packed)[index] = word;
}

__global__ void __launch_bounds__(kThreads) pack_meta_kernel(const PackParams p, int64_t rows) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t index = global_thread();  // padded row * groups + group
  const int64_t row = index / groups, group = index % groups;
  if (row >= rows) return;
  const bool real = row < p.n;
  p.meta[mma16::scale_index(p.format, p.k, row, group)] = real ? p.scale[index] : 0;
  if (p.format.has_zeros()) {
    p.meta[mma16::zero_index(p.format, p.k, row, group)] = real ? p.zero[index] : 0;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_codes_kernel(const PackParams p) {
  const int64_t index = global_thread();
  if (index >= p.n * p.k) return;
  const CodePieces at = mma16::code_pieces(p.format, p.k, index / p.k, index % p.k);
  const auto* const words = reinterpret_cast<const uint32_t*>(p.packed);
  uint32_t code = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i >= at.count) break;
    const CodePiece& piece = at.piece[i];
    code |= (words[piece.word] >> piece.shift & ((1u << piece.bits) - 1)) << piece.from;
  }
  p.codes[index] = static_cast<uint8_t>(code ^ mma16::stored_flip(p.format));
}

__global__ void __launch_bounds__(kThreads) unpack_meta_kernel(const PackParams p) {
  const int64_t groups = group_count(p.format, p.k);
  const int64_t index = global_thread();
  if (index >= p.n * groups) return;
  const int64_t row = index / groups, group = index % groups;
  p.scale[index] = p.meta[mma16::scale_index(p.format, p.k, row, group)];
  p.zero[index] = p.format.has_zeros() ? p.meta[mma16::zero_index(p.format, p.k, row, group)]
                                       : __half_as_ushort(implied_zero(p.format));
}

__global__ void settle_kernel() {}

template <int kBits>
void launch_pack(const PackParams& p, cudaStream_t stream) {
  const int64_t lanes = mma16::packed_bytes(p.format, p.n, p.k) / (4 * kBits);
  pack_codes_kernel<kBits><<<blocks_for(lanes), kThreads, 0, stream>>>(p);
}

}  // namespace

bool is_valid_weight(const QuantFormat& f, int64_t n, int64_t k) {
  if (n < 1 || k < 1 || f.group_size < 1) return false;
  switch (f.scheme) {
    case Scheme::kNf4:
    case Scheme::kFp4:
      if (f.bits != 4) return false;
      break;
    case Scheme::kInt8Dynamic:
      return f.bits == 8 && f.group_size >= k;
    default:
      if (f.bits != 2 && f.bits != 3 && f.bits != 4 && f.bits != 8) return false;
  }
  return f.group_size % 16 == 0 || f.group_size >= k;
}

int settle_weights(void* stream) {
  settle_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return cudaGetLastError();
}

int wquant_rtn(const RtnParams& p, void* stream_handle) {
  if (!is_valid_weight(p.format, p.n, p.k)) return cudaErrorInvalidValue;
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
  if (!is_valid_weight(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  int64_t rows = ceil_div(p.n, mma16::kRows) * mma16::kRows;
  if (mma16::is_row_major(p.format)) {
    rows = p.n;
    const int64_t words = p.n * mma16::row_pitch(p.k) / 4;
    pack_row_major_kernel<<<blocks_for(words), kThreads, 0, stream>>>(p);
  } else if (p.format.bits == 2) {
    launch_pack<2>(p, stream);
  } else if (p.format.bits == 3) {
    launch_pack<3>(p, stream);
  } else if (p.format.bits == 4) {
    launch_pack<4>(p, stream);
  } else {
    launch_pack<8>(p, stream);
  }
  const int64_t entries = rows * group_count(p.format, p.k);
  pack_meta_kernel<<<blocks_for(entries), kThreads, 0, stream>>>(p, rows);
  return settle_weights(stream_handle);
}

int wquant_unpack(const PackParams& p, void* stream_handle) {
  if (!is_valid_weight(p.format, p.n, p.k)) return cudaErrorInvalidValue;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  unpack_codes_kernel<<<blocks_for(p.n * p.k), kThreads, 0, stream>>>(p);
  unpack_meta_kernel<<<blocks_for(p.n * group_count(p.format, p.k)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace kvopt::cuda
