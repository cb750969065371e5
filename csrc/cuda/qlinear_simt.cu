// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T in plain fp32 arithmetic, for fp32 activations (a tensor-core product
// would round them) and for bf16 on sm_75, whose tensor cores do not know it.
//
//   block        8 warps, kRows rows of x
//   warp         a tile of 16 rows of w, every warps_k-th block of 64 columns
//   lane (g, t)  rows g and g + 8, columns 4t .. 4t+3 of a 16-column step: 8 weights, 8 * kRows fma
//
// A code becomes a float by dropping it into the mantissa of a power of two just above its range
// (2^4 + q, 2^8 + q), and minus that power minus the zero point. Group sums are scaled in fp32. The
// four lanes of a row add by shuffles, the warps that share a tile in shared memory, both in a
// fixed order. x is read through L1.
//
// Bytes: the codes once per kRows rows of x. Bound: instructions (4 per weight and one fma per row
// of x; an H200 has 3.6 to spare per 4-bit weight at its full read rate).
#include <algorithm>

#include "cuda/device/copy.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/vec.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 8;

template <int kBits>
struct Magic;
template <>
struct Magic<4> {
  static constexpr uint32_t kBits32 = 0x41800000;  // 2^4
  static constexpr float kValue = 16.0f;
  static constexpr int kShift = 19;  // the code's place in the mantissa
  static constexpr uint32_t kMask = 0x00780000;
};
template <>
struct Magic<8> {
  static constexpr uint32_t kBits32 = 0x43800000;  // 2^8
  static constexpr float kValue = 256.0f;
  static constexpr int kShift = 15;
  static constexpr uint32_t kMask = 0x007F8000;
};

// The code at bit `at` of a word, minus zero; `offset` = kValue + zero.
template <int kBits>
__device__ __forceinline__ float weight(uint32_t word, int at, float offset) {
  using C = Magic<kBits>;
  const uint32_t moved = at <= C::kShift ? word << (C::kShift - at) : word >> (at - C::kShift);
  return __uint_as_float((moved & C::kMask) | C::kBits32) - offset;
}

// Four activations of a row, zeros past its end.
template <typename T, bool kAligned>
__device__ __forceinline__ float4 load_x(const T* row, int column, const QLinearProblem& p) {
  if constexpr (kAligned) {
    if (column >= p.k) return make_float4(0, 0, 0, 0);
    if constexpr (sizeof(T) == 4) {
      const uint4 v = load_16(row + column);
      return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                         __uint_as_float(v.w));
    } else {
      const uint2 bits = load_8(row + column);
      const T* v = reinterpret_cast<const T*>(&bits);
      return make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
    }
  } else {
    return make_float4(column < p.k ? to_float(row[column]) : 0,
                       column + 1 < p.k ? to_float(row[column + 1]) : 0,
                       column + 2 < p.k ? to_float(row[column + 2]) : 0,
                       column + 3 < p.k ? to_float(row[column + 3]) : 0);
  }
}

// One lane's codes of a block of 64 columns, and the group parameters of its step t.
template <int kBits>
struct Block {
  uint4 codes[kBits / 4];
  uint2 meta;

  __device__ __forceinline__ void load(const QLinearProblem& p, int tile, int block, int lane) {
    const uint8_t* source = p.packed + tile * p.tile_bytes +
                            static_cast<int64_t>(block) * (kBits / 4 * 512) + lane * 16;
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) codes[i] = load_stream(source + i * 512);
    const __half* at =
        p.meta + meta_offset(p, tile, group_of_step(p, block * 4 + lane % 4), lane / 4);
    meta = make_uint2(0, 0);
    if (p.symmetric) {
      meta.x = load_4(at);
    } else {
      meta = load_8(at);
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& c = codes[i / 4];
    return i % 4 == 0 ? c.x : i % 4 == 1 ? c.y : i % 4 == 2 ? c.z : c.w;
  }
};

// kGroupSteps: 4 when a block of 64 columns lies in one group, else 1.
template <typename T, int kBits, int kRows, int kGroupSteps, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32, 2)
    qlinear_simt_kernel(const QLinearProblem p, int warps_k) {
  __shared__ float partial[kWarps][kRows][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_k = warp % warps_k;
  const int tile = blockIdx.y * (kWarps / warps_k) + warp / warps_k;
  const int row0 = blockIdx.x * kRows;

  const T* x[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    x[m] = static_cast<const T*>(p.x) + static_cast<int64_t>(min(row0 + m, p.m - 1)) * p.k;
  }
  float total[2][kRows] = {}, sum[2][kRows] = {};
  float scale[2] = {}, offset[2] = {};
  int group = -1;
  Block<kBits> next;
  if (tile < p.tiles && warp_k < p.blocks) next.load(p, tile, warp_k, lane);
  for (int block = warp_k; tile < p.tiles && block < p.blocks; block += warps_k) {
    const Block<kBits> now = next;
    if (block + warps_k < p.blocks) next.load(p, tile, block + warps_k, lane);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int step_group = step % kGroupSteps == 0 ? group_of_step(p, block * 4 + step) : group;
      if (step % kGroupSteps == 0 && step_group != group) {
        group = step_group;
        const uint32_t first = __shfl_sync(0xFFFFFFFF, now.meta.x, lane / 4 * 4 + step);
        const uint32_t second = __shfl_sync(0xFFFFFFFF, now.meta.y, lane / 4 * 4 + step);
        const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&first));
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&second));
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          total[0][m] += scale[0] * sum[0][m];
          total[1][m] += scale[1] * sum[1][m];
          sum[0][m] = sum[1][m] = 0;
        }
        scale[0] = low.x;
        scale[1] = p.symmetric ? low.y : high.x;
        offset[0] = Magic<kBits>::kValue + (p.symmetric ? p.symmetric_zero : low.y);
        offset[1] = Magic<kBits>::kValue + (p.symmetric ? p.symmetric_zero : high.y);
      }
      float w[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kBits == 4) {  // column c + i of row g: pair i / 2 * 2, half i % 2
          w[0][i] = weight<4>(now.word(step), i / 2 * 8 + i % 2 * 16, offset[0]);
          w[1][i] = weight<4>(now.word(step), i / 2 * 8 + 4 + i % 2 * 16, offset[1]);
        } else {
          w[0][i] = weight<8>(now.word(step * 2 + i / 2), i % 2 * 8, offset[0]);
          w[1][i] = weight<8>(now.word(step * 2 + i / 2), 16 + i % 2 * 8, offset[1]);
        }
      }
      const int column = block * kBlockColumns + step * kStepColumns + lane % 4 * 4;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float4 v = load_x<T, kAligned>(x[m], column, p);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sum[r][m] = fmaf(w[r][0], v.x, sum[r][m]);
          sum[r][m] = fmaf(w[r][1], v.y, sum[r][m]);
          sum[r][m] = fmaf(w[r][2], v.z, sum[r][m]);
          sum[r][m] = fmaf(w[r][3], v.w, sum[r][m]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float v = fmaf(scale[r], sum[r][m], total[r][m]);
      v += __shfl_xor_sync(0xFFFFFFFF, v, 1);
      v += __shfl_xor_sync(0xFFFFFFFF, v, 2);
      if (lane % 4 == 0) partial[warp][m][r * 8 + lane / 4] = v;
    }
  }
  __syncthreads();
  const int rows_w = kWarps / warps_k * 16;
  for (int i = threadIdx.x; i < rows_w * kRows; i += kWarps * 32) {
    const int m = i / rows_w, r = i % rows_w;
    const int row_w = blockIdx.y * rows_w + r;
    if (row0 + m >= p.m || row_w >= p.n) continue;
    float v = 0;
    for (int w = 0; w < warps_k; ++w) v += partial[r / 16 * warps_k + w][m][r % 16];
    if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[row_w]);
    static_cast<T*>(p.y)[static_cast<int64_t>(row0 + m) * p.n + row_w] = from_float<T>(v);
  }
}

// K is split over more warps until there are two blocks per multiprocessor.
template <typename T, int kBits, int kRows>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const int64_t chunks = ceil_div(p.m, kRows);
  int warps_k = 1;
  while (warps_k < kWarps && warps_k * 2 <= p.blocks &&
         chunks * ceil_div(p.tiles, kWarps / warps_k) < 2 * device.multiprocessors) {
    warps_k *= 2;
  }
  const dim3 grid(static_cast<unsigned>(chunks),
                  static_cast<unsigned>(ceil_div(p.tiles, kWarps / warps_k)));
  const auto kernel = !p.aligned ? qlinear_simt_kernel<T, kBits, kRows, 1, false>
                      : p.groups == 1 || p.group_steps % 4 == 0
                          ? qlinear_simt_kernel<T, kBits, kRows, 4, true>
                          : qlinear_simt_kernel<T, kBits, kRows, 1, true>;
  return launch_kernel(kernel, grid, kWarps * 32, 0, false, stream, p, warps_k);
}

template <typename T, int kBits>
int launch_for_rows(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (p.m == 1) return launch<T, kBits, 1>(p, device, stream);
  if (p.m <= 4) return launch<T, kBits, 4>(p, device, stream);
  return launch<T, kBits, 8>(p, device, stream);
}

}  // namespace

template <typename T>
int launch_simt(const QLinearProblem& p, int bits, const Device& device, cudaStream_t stream) {
  return bits == 4 ? launch_for_rows<T, 4>(p, device, stream)
                   : launch_for_rows<T, 8>(p, device, stream);
}

template int launch_simt<float>(const QLinearProblem&, int, const Device&, cudaStream_t);
template int launch_simt<__nv_bfloat16>(const QLinearProblem&, int, const Device&, cudaStream_t);

}  // namespace kvopt::cuda
