// SPDX-License-Identifier: Apache-2.0
// W8A8 for one or two rows of x: every byte of the weight is read once, at the speed of memory.
//
//   block   quantises x itself, all of it, into shared memory. That costs a launch less than a
//           prologue, and little while the first weights are on their way; for more rows of x than
//           two, or two long ones, the prologue is faster
//   warp    two rows of the weight at a time (gate and up with SwiGLU); a lane takes 16 bytes of
//           each, 512 columns a warp. The next pieces are loaded before the present ones are used,
//           so 64 bytes a lane are in flight at any time: 32 warps make 64 KB a multiprocessor,
//           twice what the latency of an H200's memory times its bandwidth asks for
//   dp4a    4 products an instruction; x comes from shared memory once for both rows
//   sums    int32, exact; the lanes' sums are added by one instruction each on sm_80. Where there
//           are few rows, several warps share one along K and add up in shared memory
//
// Bytes: N K. Bound: memory. Limits: M K <= shared memory, K <= kMaxColumns.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_mma.cuh"
#include "cuda/device/qlinear_w8a8_quantize.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPieceColumns = 512;  // 16 bytes a lane

constexpr int kRows = 2;    // of the weight, at a time
constexpr int kPieces = 2;  // of each of them in flight
constexpr int kChunkColumns = kPieces * kPieceColumns;
constexpr int kBlocks = 4;     // of a multiprocessor
constexpr int kMaxTokens = 2;  // one where rows are longer than kManyColumns
constexpr int kManyColumns = 8192;

struct StreamPlan {
  int groups;   // of kRows rows
  int chunks;   // of K
  int split;    // warps that share a group
  int columns;  // of a row in shared memory
};

__device__ __forceinline__ int warp_sum(int v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xFFFFFFFF, v);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFF, v, offset);
  return v;
#endif
}

// Row r of a group. With SwiGLU the second half of the group are the up rows of the first.
__device__ __forceinline__ int row_of(bool swiglu, int group, int r) {
  if (!swiglu) return group * kRows + r;
  const int column = group * (kRows / 2) + r % (kRows / 2);
  return column / 8 * 16 + column % 8 + r / (kRows / 2) * 8;
}

// x as int8 in shared memory: row m at m * columns. `slots`: 32 words for each row.
template <typename T, bool kAligned, int kM>
__device__ __forceinline__ void quantize_rows(const QLinearProblem& p, int8_t* x, int columns,
                                              float* scales, uint32_t* slots) {
  const int first = static_cast<int>(threadIdx.x) * 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t largest[kM] = {};
  for (int column = first; column < p.k; column += kThreads * 8) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= p.m) continue;
      largest[m] = max(largest[m],
                       largest_of_row_8<kAligned>(p, load_x_8<T, kAligned>(p, m, column), column));
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    largest[m] = warp_max_bits(largest[m]);
    if (lane == 0) slots[m * kWarps + warp] = largest[m];
  }
  __syncthreads();
  float scale[kM], inverse[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    uint32_t most = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = max(most, slots[m * kWarps + w]);
    scale[m] = int8_scale(most);
    inverse[m] = int8_inverse(scale[m]);
    if (threadIdx.x == 0) scales[m] = scale[m];
  }
  for (int column = first; column < columns; column += kThreads * 8) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint2 packed = make_uint2(0, 0);
      if (m < p.m && column < p.k) {
        float v[8];
        load_scaled_8<T, kAligned>(v, p, m, column);
        packed = quantize_8(v, scale[m], inverse[m]);
      }
      *reinterpret_cast<uint2*>(x + m * columns + column) = packed;
    }
  }
  __syncthreads();
}

template <typename T, bool kAligned, int kM>
__global__ void __launch_bounds__(kThreads, kBlocks)
    stream_kernel(QLinearProblem p, StreamPlan plan) {
  extern __shared__ __align__(16) int8_t x[];
  __shared__ uint32_t slots[kM * kWarps];
  __shared__ float scales[kM];
  __shared__ int parts[kWarps][kRows * kM];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const bool swiglu = p.epilogue.swiglu;
  const int64_t pitch = mma16::row_pitch(p.k);
  const int slice = warp % plan.split;
  const int stride = static_cast<int>(gridDim.x) * (kWarps / plan.split);
  const int first_chunk = slice * plan.chunks / plan.split;
  const int end_chunk = (slice + 1) * plan.chunks / plan.split;

  const uint8_t* row[kRows];
  const auto point_at = [&](int group) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = p.packed + min(row_of(swiglu, group, r), p.n - 1) * pitch + lane * 16;
    }
  };
  uint4 next[kRows][kPieces];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = chunk * kChunkColumns + i * kPieceColumns;
      const bool inside = column + lane * 16 < pitch;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        next[r][i] = inside ? load_stream(row[r] + column) : make_uint4(0, 0, 0, 0);
      }
    }
  };

  int group = static_cast<int>(blockIdx.x) * (kWarps / plan.split) + warp / plan.split;
  point_at(min(group, plan.groups - 1));
  load(first_chunk);
  wait_for_previous_kernel();
  quantize_rows<T, kAligned, kM>(p, x, plan.columns, scales, slots);

  // Every warp of the block makes the same number of turns: they meet at barriers when they share.
  const int first_group = static_cast<int>(blockIdx.x) * (kWarps / plan.split);
  for (int turn = first_group; turn < plan.groups; turn += stride, group += stride) {
    if (turn + stride >= plan.groups) let_next_kernel_start();
    int sum[kRows][kM] = {};
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      uint4 w[kRows][kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) w[r][i] = next[r][i];
      }
      if (chunk + 1 < end_chunk) {
        load(chunk + 1);
      } else if (group + stride < plan.groups) {
        point_at(group + stride);
        load(first_chunk);
      }
      const int8_t* columns = x + chunk * kChunkColumns + lane * 16;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int4 v =
              *reinterpret_cast<const int4*>(columns + m * plan.columns + i * kPieceColumns);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            sum[r][m] = __dp4a(static_cast<int>(w[r][i].x), v.x, sum[r][m]);
            sum[r][m] = __dp4a(static_cast<int>(w[r][i].y), v.y, sum[r][m]);
            sum[r][m] = __dp4a(static_cast<int>(w[r][i].z), v.z, sum[r][m]);
            sum[r][m] = __dp4a(static_cast<int>(w[r][i].w), v.w, sum[r][m]);
          }
        }
      }
    }
    // Lane r * kM + m takes that sum.
    int mine = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int total = warp_sum(sum[r][m]);
        if (lane == r * kM + m) mine = total;
      }
    }
    if (plan.split > 1) {
      if (lane < kRows * kM) parts[warp][lane] = mine;
      __syncthreads();
      if (slice == 0 && lane < kRows * kM) {
        for (int s = 1; s < plan.split; ++s) mine += parts[warp + s][lane];
      }
      __syncthreads();
      if (slice != 0) continue;
    }
    if (group >= plan.groups) continue;
    const int m = lane % kM, r = lane / kM;
    const int n = row_of(swiglu, group, r);
    const bool exists = r < kRows && m < p.m && n < p.n;
    float value = 0;
    if (exists) {
      value = static_cast<float>(mine) * to_float(p.meta[n]) * scales[m];
      value = before_activation(p.epilogue, m, n, value);
    }
    if (swiglu) {
      const float up = __shfl_down_sync(0xFFFFFFFF, value, kRows / 2 * kM);
      if (exists && r < kRows / 2) {
        store_output(p.epilogue, m, group * (kRows / 2) + r, kvopt::cuda::swiglu(value, up));
      }
    } else if (exists) {
      store_output(p.epilogue, m, n, value);
    }
  }
}

int shared_columns(const QLinearProblem& p) {
  return static_cast<int>(ceil_div(p.k, kChunkColumns) * kChunkColumns);
}

template <typename T, bool kAligned, int kM>
int launch_rows(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  StreamPlan plan{};
  plan.groups = static_cast<int>(ceil_div(p.n, kRows));
  plan.chunks = static_cast<int>(ceil_div(p.k, kChunkColumns));
  plan.columns = shared_columns(p);
  const int shared = kM * plan.columns;
  const int by_memory =
      std::max(1, device.multiprocessor_shared / (shared + kM * kWarps * 16 + 2048));
  const int blocks = device.multiprocessors * std::min({kBlocks, by_memory});
  plan.split = 1;
  while (plan.split < kWarps && 2 * plan.split <= plan.chunks &&
         static_cast<int64_t>(plan.groups) * plan.split * 2 <=
             static_cast<int64_t>(blocks) * kWarps) {
    plan.split *= 2;
  }
  const auto needed = static_cast<int>(ceil_div(plan.groups, kWarps / plan.split));
  return launch_kernel(stream_kernel<T, kAligned, kM>,
                       dim3(static_cast<unsigned>(std::min(blocks, needed))), kThreads, shared,
                       device.sm >= 90, stream, p, plan);
}

template <typename T, bool kAligned>
int launch_type(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  return p.m == 1 ? launch_rows<T, kAligned, 1>(p, device, stream)
                  : launch_rows<T, kAligned, 2>(p, device, stream);
}

}  // namespace

bool w8a8_gemv_fits(const QLinearProblem& p, const Device& device) {
  return p.format.scheme == Scheme::kInt8Dynamic && p.m >= 1 &&
         p.m <= (p.k <= kManyColumns ? kMaxTokens : 1) && p.k <= w8a8::kMaxColumns &&
         int64_t{p.m} * shared_columns(p) + 4096 <= device.block_shared;
}

int launch_w8a8_gemv(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (!w8a8_gemv_fits(p, device)) return cudaErrorInvalidValue;
  const bool aligned = reads_aligned(p);
  if (p.dtype == DType::kFloat16) {
    return aligned ? launch_type<__half, true>(p, device, stream)
                   : launch_type<__half, false>(p, device, stream);
  }
  if (p.dtype == DType::kBFloat16) {
    return aligned ? launch_type<__nv_bfloat16, true>(p, device, stream)
                   : launch_type<__nv_bfloat16, false>(p, device, stream);
  }
  return launch_type<float, false>(p, device, stream);
}

}  // namespace kvopt::cuda
