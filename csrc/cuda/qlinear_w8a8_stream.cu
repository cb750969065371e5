// SPDX-License-Identifier: Apache-2.0
// W8A8 for up to 8 rows of x that are int8 already: every byte of the weight goes from memory to
// registers and there into mma, at the speed of memory.
//
//   unit    16 rows of the weight; the eight warps of a block take an eighth of K each and add up
//           in shared memory. A block has N / 16 / blocks units to do, one after the other
//   lane    16 bytes of rows g and g + 8, at columns 16t of 64: two multiplications. (Which four
//           columns the instruction takes for its 4t.. does not matter as long as both operands
//           agree, so nothing is rearranged.) x comes from shared memory, 16 bytes for each eight
//           rows of it; rows are 64 bytes off a multiple of 128 apart, so no two lanes collide
//   chunk   256 columns: 128 bytes a lane in flight, the next ones loaded before these are used,
//           across units too, and the first ones before the kernel that makes x is done
//
// Bytes: N K. Bound: memory. Work per byte is small: at M = 8, 1 KB of weights are 2 loads, 1 read
// of shared memory and 2 multiplications of a warp.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_mma.cuh"
#include "cuda/qlinear_w8a8.h"

namespace kvopt::cuda::w8a8 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16;                               // of the weight, at a time
constexpr int kTokens = 8;                              // rows of x
constexpr int kMostColumns = 8192;                      // of longer rows x crowds shared memory
constexpr int kStaticBytes = 2 * kThreads * 16 + 1024;  // sums of two units; 1 KB is the system's
constexpr int kSegments = 4, kChunkColumns = 64 * kSegments;

struct StreamPlan {
  int units;   // of 16 rows of the weight
  int chunks;  // of K
  int pitch;   // of x in shared memory
};

__global__ void __launch_bounds__(kThreads, 2)
    stream_kernel(Operands o, Epilogue epilogue, const __half* scale, StreamPlan plan) {
  extern __shared__ __align__(16) uint8_t x[];
  __shared__ int4 parts[2][kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int first_chunk = warp * plan.chunks / kWarps;
  const int end_chunk = (warp + 1) * plan.chunks / kWarps;
  const auto* w = reinterpret_cast<const uint8_t*>(o.w);

  const uint8_t* row[2];
  const auto point_at = [&](int unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = w + min(unit * kRows + g + 8 * half, o.n - 1) * o.w_pitch + 16 * t;
    }
  };
  uint4 next[kSegments][2];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      const int column = chunk * kChunkColumns + 64 * s;
      const bool inside = column + 16 * t < o.columns;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        next[s][half] = inside ? load_stream(row[half] + column) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  point_at(static_cast<int>(blockIdx.x));
  if (first_chunk < end_chunk) load(first_chunk);
  wait_for_previous_kernel();

  const int pieces = plan.chunks * (kChunkColumns / 16);
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * pieces; i += kThreads) {
    const int m = i / pieces, column = i % pieces * 16;
    const uint4 v = m < o.m && column < o.columns ? load_16(o.x + m * o.x_pitch + column)
                                                  : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(x + m * plan.pitch + column) = v;
  }
  __syncthreads();

  int buffer = 0;
  for (int unit = static_cast<int>(blockIdx.x); unit < plan.units;
       unit += static_cast<int>(gridDim.x), buffer ^= 1) {
    const int following = unit + static_cast<int>(gridDim.x);
    if (following >= plan.units) let_next_kernel_start();
    int sum[4] = {};
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      uint4 now[kSegments][2];
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        now[s][0] = next[s][0];
        now[s][1] = next[s][1];
      }
      if (chunk + 1 < end_chunk) {
        load(chunk + 1);
      } else if (following < plan.units) {
        point_at(following);
        load(first_chunk);
      }
#pragma unroll
      for (int s = 0; s < kSegments; ++s) {
        const uint4 a = now[s][0], b = now[s][1];
        const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
        const uint4 v = *reinterpret_cast<const uint4*>(x + g * plan.pitch + chunk * kChunkColumns +
                                                        64 * s + 16 * t);
        multiply(sum, first, v.x, v.y);
        multiply(sum, second, v.z, v.w);
      }
    }
    parts[buffer][warp][lane] = make_int4(sum[0], sum[1], sum[2], sum[3]);
    __syncthreads();  // the other buffer is written next: nobody reads this one by then
    const int m = static_cast<int>(threadIdx.x) / 8, r = static_cast<int>(threadIdx.x) % 8;
    const int n = unit * kRows + r;
    if (m < o.m && n < o.n) {
      int low = 0, high = 0;
#pragma unroll
      for (int s = 0; s < kWarps; ++s) {
        const int* from = reinterpret_cast<const int*>(&parts[buffer][s][r * 4 + m / 2]);
        low += from[m % 2];
        high += from[2 + m % 2];
      }
      const float second = n + 8 < o.n ? static_cast<float>(high) * to_float(scale[n + 8]) : 0.0f;
      finish_pair(epilogue, m, n, static_cast<float>(low) * to_float(scale[n]), second);
    }
  }
}

int shared_pitch(const Operands& o) {
  return static_cast<int>(ceil_div(o.columns, kChunkColumns)) * kChunkColumns + 64;
}

}  // namespace

bool stream_fits(const Operands& o, const Device& device) {
  return o.m <= kTokens && o.columns <= kMostColumns &&
         kTokens * shared_pitch(o) + kStaticBytes <= device.block_shared;
}

int launch_stream(const Operands& o, const RowsEpilogue& epilogue, const Device& device,
                  cudaStream_t stream) {
  StreamPlan plan{};
  plan.units = static_cast<int>(ceil_div(o.n, kRows));
  plan.chunks = static_cast<int>(ceil_div(o.columns, kChunkColumns));
  plan.pitch = shared_pitch(o);
  const int shared = kTokens * plan.pitch;
  const int resident = 2 * (shared + kStaticBytes) <= device.multiprocessor_shared ? 2 : 1;
  const int blocks = std::min(plan.units, device.multiprocessors * resident);
  return launch_kernel(stream_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared,
                       device.sm >= 90, stream, o, epilogue.parts, epilogue.scale, plan);
}

}  // namespace kvopt::cuda::w8a8
