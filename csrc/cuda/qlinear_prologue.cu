// SPDX-License-Identifier: Apache-2.0
// x on its way to the matrix kernels: times the input scale, rounded to int8 where asked, as fp16
// times a power of two per row, or as int8 with one scale per row.
//
//   half  v = x * input_scale (fp32). activation_bits 8: v = round(v / s) * s with s of the token
//   and
//         weight group. Then out = fp16(v * f), row_scale = 1 / f, f the power of two that brings
//         the row's largest finite magnitude into [2^14, 2^15): bf16 values are then fp16 values
//         exactly unless they are 2^31 times smaller than the largest. fp16 x without scaling keeps
//         f = 1.
//   int8  out = round(v / s), row_scale = s = max |v| / 127.
//
// A block takes a row and reads it once: 16 bytes a thread and load, kept in registers until the
// row's maximum is known (rows of more than 16384 columns read the rest again); the next row is on
// its way meanwhile (int8). Bytes: 2 K read, 2 K or K written per row, that is all there is to it:
// 8192 x 4096 is 101 MB as int8, 25 us of an H200's 4 TB/s. Infinities and NaN stay what they are
// (half) or make the row's scale NaN (int8).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_quantize.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = 512;  // at most; 64 registers each
// Pieces of eight columns that a thread keeps: rows of up to 16384 columns are read once.
template <typename T>
constexpr int kKept = 8 / static_cast<int>(sizeof(T));

int block_threads(int64_t vectors, int per_thread) {
  return static_cast<int>(
      std::min<int64_t>(ceil_div(ceil_div(vectors, per_thread), 32) * 32, kThreads));
}

template <typename T, bool kAligned, int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    int8_rows_kernel(QLinearProblem p, int8_t* out, int64_t pitch, float* row_scale) {
  __shared__ uint32_t slots[2][32];
  const int vectors = static_cast<int>(pitch / 8), threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x), rest = kVectors * threads + first;
  wait_for_previous_kernel();
  Raw8<T> next[kVectors];
  const auto load = [&](int row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      next[i] = load_x_8<T, kAligned>(p, row, (i * threads + first) * 8);
  };
  load(static_cast<int>(blockIdx.x));
  int parity = 0;
  for (int row = static_cast<int>(blockIdx.x); row < p.m;
       row += static_cast<int>(gridDim.x), parity ^= 1) {
    Raw8<T> kept[kVectors];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      kept[i] = next[i];
      largest = max(largest, largest_of_row_8<kAligned>(p, kept[i], (i * threads + first) * 8));
    }
    if (row + static_cast<int>(gridDim.x) < p.m) {
      load(row + static_cast<int>(gridDim.x));
    } else {
      let_next_kernel_start();
    }
    for (int vector = rest; vector < vectors; vector += threads) {
      float v[8];
      load_scaled_8<T, kAligned>(v, p, row, vector * 8);
      largest = max(largest, largest_of_8(v));
    }
    const float scale = int8_scale(block_max_bits(largest, slots[parity]));
    const float inverse = int8_inverse(scale);
    auto* target = reinterpret_cast<uint2*>(out + row * pitch);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = i * threads + first;
      if (vector >= vectors) continue;
      float v[8];
      scale_8<kAligned>(v, p, kept[i], vector * 8);
      target[vector] = quantize_8(v, scale, inverse);
    }
    for (int vector = rest; vector < vectors; vector += threads) {
      float v[8];
      load_scaled_8<T, kAligned>(v, p, row, vector * 8);
      target[vector] = quantize_8(v, scale, inverse);
    }
    if (first == 0) row_scale[row] = scale;
  }
}

__device__ __forceinline__ uint32_t largest_finite_of_8(const float (&v)[8]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = magnitude(v[i]);
    if (bits < kInfinityBits) most = max(most, bits);
  }
  return most;
}

// Adds what a thread knows of eight columns to the maximum of their group. Every lane of the warp
// calls it, with consecutive pieces. lanes: consecutive lanes that share a group for certain, a
// power of two.
__device__ __forceinline__ void group_max(uint32_t* groups, int group, uint32_t bits, int lanes) {
  for (int offset = 1; offset < lanes; offset *= 2) {
    bits = max(bits, __shfl_xor_sync(0xFFFFFFFF, bits, offset));
  }
  if (threadIdx.x % lanes == 0 && bits != 0) atomicMax(groups + group, bits);
}

__device__ __forceinline__ uint4 finish_8(const float (&v)[8], bool quantized, float scale,
                                          float inverse, float factor) {
  float out[8];
  if (quantized) {
    round_8(out, v, scale, inverse);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = magnitude(v[i]) < kInfinityBits ? (out[i] - kIntegerUnit) * scale : v[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = v[i];
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(out[2 * i] * factor, out[2 * i + 1] * factor);
    memcpy(&words[i], &pair, 4);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T, bool kAligned, int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    half_rows_kernel(QLinearProblem p, __half* out, int64_t pitch, float* row_scale, int lanes) {
  extern __shared__ uint32_t group_largest[];  // one a group, when activations are rounded
  __shared__ uint32_t slots[32];
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(pitch / 8), threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x);
  const bool quantized = p.activation_bits == 8;
  if (quantized) {
    for (int g = first; g < p.groups; g += threads) group_largest[g] = 0;
    __syncthreads();
  }
  wait_for_previous_kernel();
  Raw8<T> kept[kVectors];
  uint32_t largest = 0;
  const auto see = [&](const float (&v)[8], int vector) {
    const uint32_t bits = largest_finite_of_8(v);
    largest = max(largest, bits);
    if (quantized) group_max(group_largest, group_of_column(p, vector * 8), bits, lanes);
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    kept[i] = load_x_8<T, kAligned>(p, row, (i * threads + first) * 8);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[8];
    scale_8<kAligned>(v, p, kept[i], (i * threads + first) * 8);
    see(v, i * threads + first);
  }
  // All lanes of a warp stay in the loop: they reduce together.
  for (int base = kVectors * threads; base < vectors; base += threads) {
    float again[8];
    load_scaled_8<T, kAligned>(again, p, row, (base + first) * 8);
    see(again, base + first);
  }
  let_next_kernel_start();
  largest = block_max_bits(largest, slots);  // also the barrier behind the groups' maxima
  float factor = 1.0f;
  if ((sizeof(T) == 2 && !std::is_same_v<T, __half>) || p.input_scale != nullptr || quantized) {
    // The exponent of 2^14 / largest, kept so that the inverse is a normal number too.
    const int exponent = 268 - static_cast<int>(largest >> 23);
    factor = __uint_as_float(static_cast<uint32_t>(min(max(exponent, 1), 253)) << 23);
  }
  auto* target = reinterpret_cast<uint4*>(out + row * pitch);
  const auto write = [&](const float (&v)[8], int vector) {
    float scale = 0, inverse = 0;
    if (quantized) {
      scale = int8_scale(group_largest[group_of_column(p, vector * 8)]);
      inverse = int8_inverse(scale);
    }
    target[vector] = finish_8(v, quantized, scale, inverse, factor);
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i * threads + first >= vectors) continue;
    float v[8];
    scale_8<kAligned>(v, p, kept[i], (i * threads + first) * 8);
    write(v, i * threads + first);
  }
  for (int v = kVectors * threads + first; v < vectors; v += threads) {
    float again[8];
    load_scaled_8<T, kAligned>(again, p, row, v * 8);
    write(again, v);
  }
  if (threadIdx.x == 0) row_scale[row] = 1.0f / factor;
}

template <typename T, bool kAligned>
int launch_int8(const QLinearProblem& p, int8_t* out, int64_t pitch, float* row_scale,
                const Device& device, cudaStream_t stream) {
  const int threads = block_threads(pitch / 8, kKept<T>);
  const int blocks = std::min(p.m, device.multiprocessors * (2 * kThreads / threads));
  return launch_kernel(int8_rows_kernel<T, kAligned, kKept<T>>, dim3(static_cast<unsigned>(blocks)),
                       threads, 0, device.sm >= 90, stream, p, out, pitch, row_scale);
}

template <typename T, bool kAligned>
int launch_half(const QLinearProblem& p, __half* out, int64_t pitch, float* row_scale,
                const Device& device, cudaStream_t stream) {
  int shared = 0, lanes = 1;
  if (p.activation_bits == 8) {
    shared = p.groups * 4;
    if (shared > device.block_shared - 1024) return cudaErrorInvalidValue;
    // The largest power of two that divides a group's pieces; a single group has them all.
    const int pieces = p.groups == 1 ? 32 : p.group_columns / 8;
    while (lanes < 32 && pieces % (2 * lanes) == 0) lanes *= 2;
  }
  return launch_kernel(half_rows_kernel<T, kAligned, kKept<T>>, dim3(static_cast<unsigned>(p.m)),
                       block_threads(pitch / 8, kKept<T>), shared, device.sm >= 90, stream, p, out,
                       pitch, row_scale, lanes);
}

// launch(type, aligned) for 16-bit x.
template <typename Launch>
int with_type(const QLinearProblem& p, const Launch& launch) {
  const bool aligned = reads_aligned(p);
  if (p.dtype == DType::kFloat16) {
    return aligned ? launch(__half(), std::true_type()) : launch(__half(), std::false_type());
  }
  return aligned ? launch(__nv_bfloat16(), std::true_type())
                 : launch(__nv_bfloat16(), std::false_type());
}

}  // namespace

bool needs_prologue(const QLinearProblem& p) {
  return p.dtype != DType::kFloat16 || p.input_scale != nullptr || p.activation_bits == 8 ||
         !p.aligned;
}

int launch_prologue_half(const QLinearProblem& p, __half* out, int64_t pitch, float* row_scale,
                         const Device& device, cudaStream_t stream) {
  const auto launch = [&](auto type, auto aligned) {
    return launch_half<decltype(type), decltype(aligned)::value>(p, out, pitch, row_scale, device,
                                                                 stream);
  };
  if (p.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  return with_type(p, launch);
}

int launch_prologue_int8(const QLinearProblem& p, int8_t* out, int64_t pitch, float* row_scale,
                         const Device& device, cudaStream_t stream) {
  const auto launch = [&](auto type, auto aligned) {
    return launch_int8<decltype(type), decltype(aligned)::value>(p, out, pitch, row_scale, device,
                                                                 stream);
  };
  if (p.dtype == DType::kFloat32) return launch(float(), std::false_type());
  return with_type(p, launch);
}

}  // namespace kvopt::cuda
