// SPDX-License-Identifier: Apache-2.0
// x on its way to the matrix kernels: times the input scale, rounded to int8 where asked, as fp16
// times a power of two per row, or as int8 with one scale per row.
//
//   half  v = x * input_scale (fp32). activation_bits 8: v = round(v / s) * s with s of the token
//         and weight group. Then out = fp16(v * f), row_scale = 1 / f, f the power of two that
//         brings the row's largest finite magnitude into [2^14, 2^15): bf16 values are then fp16
//         values exactly unless they are 2^31 times smaller than the largest. fp16 x without
//         scaling keeps f = 1.
//   int8  out = round(v / s), row_scale = s = max |v| / 127.
//
// A block takes a row and reads it once: 16 bytes a thread and load, kept in registers until the
// row's maximum is known (rows of more than 16384 columns read the rest again); the next row is on
// its way meanwhile. Bytes: 2 K read, 2 K or K written per row, that is all there is to it: 8192 x
// 4096 is 101 MB as int8, 25 us of an H200's 4 TB/s. Few rows are a matter of latency: a thread
// then has 8 columns, all rows are in flight at once, and blocks are small enough for the product's
// to take their places beside them and fetch weights. Infinities and NaN stay what they are (half)
// or make the row's scale NaN (int8).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_quantize.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = 512;  // at most; 64 registers each, 40 where a thread has one piece
#if __CUDA_ARCH__ >= 800
constexpr int kSmallBlocks = 3;  // of a multiprocessor
#else
constexpr int kSmallBlocks = 2;  // sm_75 holds 1024 threads
#endif
// Pieces of eight columns that a thread keeps: rows of up to 16384 columns are read once.
template <typename T>
constexpr int kKept = 8 / static_cast<int>(sizeof(T));

int block_threads(int64_t vectors, int per_thread) {
  return static_cast<int>(
      std::min<int64_t>(ceil_div(ceil_div(vectors, per_thread), 32) * 32, kThreads));
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

// The power of two that brings the largest magnitude into [2^14, 2^15), kept so that its inverse is
// a normal number too.
__device__ __forceinline__ float half_factor(uint32_t largest) {
  const int exponent = 268 - static_cast<int>(largest >> 23);
  return __uint_as_float(static_cast<uint32_t>(min(max(exponent, 1), 253)) << 23);
}

__device__ __forceinline__ uint4 to_halves_8(const float (&v)[8], float factor) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(v[2 * i] * factor, v[2 * i + 1] * factor);
    memcpy(&words[i], &pair, 4);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// What rows become, given the bits of their largest magnitude.
struct Int8Row {
  using Piece = uint2;  // eight columns
  static constexpr bool kFinite = false;
  float scale, inverse;

  template <typename T>
  static __device__ __forceinline__ Int8Row make(const QLinearProblem&, uint32_t largest) {
    const float scale = int8_scale(largest);
    return {scale, int8_inverse(scale)};
  }
  __device__ __forceinline__ Piece piece(const float (&v)[8]) const {
    return quantize_8(v, scale, inverse);
  }
};

struct HalfRow {
  using Piece = uint4;
  static constexpr bool kFinite = true;  // the largest finite magnitude is what counts
  float scale, factor;

  template <typename T>
  static __device__ __forceinline__ HalfRow make(const QLinearProblem& p, uint32_t largest) {
    const bool same = std::is_same_v<T, __half> && p.input_scale == nullptr;
    const float factor = same ? 1.0f : half_factor(largest);
    return {1.0f / factor, factor};
  }
  __device__ __forceinline__ Piece piece(const float (&v)[8]) const {
    return to_halves_8(v, factor);
  }
};

template <typename T, bool kAligned, int kVectors, typename Row>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? kSmallBlocks : 2)
    rows_kernel(QLinearProblem p, typename Row::Piece* out, int pieces, float* row_scale) {
  __shared__ uint32_t slots[2][32], finite_slots[2][32];
  const int threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x), rest = kVectors * threads + first;
  // Before the wait: small blocks leave room for the product's (the rule is launch_kernel's, in
  // qlinear_problem.cuh).
  let_next_kernel_start();
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
    if (row + static_cast<int>(gridDim.x) < p.m) load(row + static_cast<int>(gridDim.x));
    for (int piece = rest; piece < pieces; piece += threads) {
      float v[8];
      load_scaled_8<T, kAligned>(v, p, row, piece * 8);
      largest = max(largest, largest_of_8(v));
    }
    largest = block_max_bits(largest, slots[parity]);
    if (Row::kFinite && largest >= kInfinityBits) {
      largest = 0;
      for (int piece = first; piece < pieces; piece += threads) {
        float v[8];
        load_scaled_8<T, kAligned>(v, p, row, piece * 8);
        largest = max(largest, largest_finite_of_8(v));
      }
      largest = block_max_bits(largest, finite_slots[parity]);
    }
    const Row maker = Row::template make<T>(p, largest);
    auto* const target = out + static_cast<int64_t>(row) * pieces;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int piece = i * threads + first;
      if (piece >= pieces) continue;
      float v[8];
      scale_8<kAligned>(v, p, kept[i], piece * 8);
      target[piece] = maker.piece(v);
    }
    for (int piece = rest; piece < pieces; piece += threads) {
      float v[8];
      load_scaled_8<T, kAligned>(v, p, row, piece * 8);
      target[piece] = maker.piece(v);
    }
    if (first == 0) row_scale[row] = maker.scale;
  }
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

// fp16 rows rounded to int8 per group: a block for each.
template <typename T, bool kAligned, int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    rounded_rows_kernel(QLinearProblem p, __half* out, int64_t pitch, float* row_scale, int lanes) {
  extern __shared__ uint32_t group_largest[];  // one a group
  __shared__ uint32_t slots[32];
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(pitch / 8), threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x);
  for (int g = first; g < p.groups; g += threads) group_largest[g] = 0;
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  Raw8<T> kept[kVectors];
  uint32_t largest = 0;
  const auto see = [&](const float (&v)[8], int vector) {
    const uint32_t bits = largest_finite_of_8(v);
    largest = max(largest, bits);
    group_max(group_largest, group_of_column(p, vector * 8), bits, lanes);
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
  const float factor =
      half_factor(block_max_bits(largest, slots));  // also the barrier behind the groups' maxima
  auto* target = reinterpret_cast<uint4*>(out + row * pitch);
  const auto write = [&](const float (&v)[8], int vector) {
    const float scale = int8_scale(group_largest[group_of_column(p, vector * 8)]);
    float rounded[8];
    round_8(rounded, v, scale, int8_inverse(scale));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      rounded[i] = magnitude(v[i]) < kInfinityBits ? (rounded[i] - kIntegerUnit) * scale : v[i];
    }
    target[vector] = to_halves_8(rounded, factor);
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

template <typename T, bool kAligned, typename Row>
int launch_rows(const QLinearProblem& p, void* out, int64_t pitch, float* row_scale,
                const Device& device, cudaStream_t stream) {
  const auto pieces = static_cast<int>(pitch / 8);
  const auto launch = [&](auto kernel, int threads) {
    const int blocks = std::min(p.m, device.multiprocessors * (2 * kThreads / threads));
    return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, 0, device.sm >= 90,
                         stream, p, static_cast<typename Row::Piece*>(out), pieces, row_scale);
  };
  // As many threads for a row as leave all rows in flight at once; for few rows also few registers,
  // so that the product's blocks find room beside.
  const int64_t threads = int64_t{2} * kThreads * device.multiprocessors;
  if (pieces <= kThreads && int64_t{p.m} * pieces <= threads) {
    return launch(rows_kernel<T, kAligned, 1, Row>, block_threads(pieces, 1));
  }
  if (kKept<T> > 2 && pieces <= 2 * kThreads && int64_t{p.m} * pieces <= 2 * threads) {
    return launch(rows_kernel<T, kAligned, 2, Row>, block_threads(pieces, 2));
  }
  return launch(rows_kernel<T, kAligned, kKept<T>, Row>, block_threads(pieces, kKept<T>));
}

template <typename T, bool kAligned>
int launch_rounded(const QLinearProblem& p, __half* out, int64_t pitch, float* row_scale,
                   const Device& device, cudaStream_t stream) {
  const int shared = p.groups * 4;
  if (shared > device.block_shared - 1024) return cudaErrorInvalidValue;
  // The largest power of two that divides a group's pieces; a single group has them all.
  const int pieces = p.groups == 1 ? 32 : p.group_columns / 8;
  int lanes = 1;
  while (lanes < 32 && pieces % (2 * lanes) == 0) lanes *= 2;
  return launch_kernel(rounded_rows_kernel<T, kAligned, kKept<T>>, dim3(static_cast<unsigned>(p.m)),
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
    using T = decltype(type);
    constexpr bool kAligned = decltype(aligned)::value;
    return p.activation_bits == 8
               ? launch_rounded<T, kAligned>(p, out, pitch, row_scale, device, stream)
               : launch_rows<T, kAligned, HalfRow>(p, out, pitch, row_scale, device, stream);
  };
  if (p.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  return with_type(p, launch);
}

int launch_prologue_int8(const QLinearProblem& p, int8_t* out, int64_t pitch, float* row_scale,
                         const Device& device, cudaStream_t stream) {
  const auto launch = [&](auto type, auto aligned) {
    return launch_rows<decltype(type), decltype(aligned)::value, Int8Row>(p, out, pitch, row_scale,
                                                                          device, stream);
  };
  if (p.dtype == DType::kFloat32) return launch(float(), std::false_type());
  return with_type(p, launch);
}

}  // namespace kvopt::cuda
