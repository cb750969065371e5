// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T in plain fp32 arithmetic, for fp32 activations, which a tensor-core
// product would round.
//
//   block        8 warps, kRows rows of x
//   warp         a tile of 16 rows of w, every warps_k-th block of 64 columns (128 for 2 bits, 256
//                for 3), whose codes are whole 16-byte loads, the next one under way
//   lane (g, t)  rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9 of a 16-column step: 8
//   weights,
//                8 * kRows fma
//
// A code becomes a float by dropping its field into the mantissa of 2^23, minus 2^23; the fma that
// subtracts the zero point also takes back what the position of the field multiplied it by. Code
// books: 16 floats in shared memory, in 16 banks, so look-ups have no conflicts. Group sums are
// scaled in fp32. The four lanes of a row add by shuffles, the warps that share a tile in shared
// memory, both in a fixed order. x is read through L1.
//
// Bytes: the codes once per kRows (1 or 4) rows of x, from L2 where there are more. Bound:
// instructions (4 per weight and one fma per row of x; an H200 has 3.6 to spare per 4-bit weight at
// its full read rate).
#include "cuda/device/code_block.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/reduce.cuh"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 8;
constexpr float kMagic = 8388608.0f;  // 2^23

// A pair of raw codes as two weights, before the scale.
template <bool kBook>
__device__ __forceinline__ float2 pair_of_weights(uint32_t raw, int factor, float zero,
                                                  const float* book) {
  if constexpr (kBook) {
    return make_float2(book[(raw & 0xFFFF) / factor], book[(raw >> 16) / factor]);
  } else {
    const float inverse = 1.0f / static_cast<float>(factor);
    const uint32_t low = __byte_perm(raw, __float_as_uint(kMagic), 0x7610);
    const uint32_t high = __byte_perm(raw, __float_as_uint(kMagic), 0x7632);
    return make_float2(fmaf(__uint_as_float(low) - kMagic, inverse, -zero),
                       fmaf(__uint_as_float(high) - kMagic, inverse, -zero));
  }
}

// Two activations of a row, zeros past its end.
__device__ __forceinline__ float2 load_x(const float* row, int column, int k, bool aligned) {
  if (aligned) {
    if (column >= k) return make_float2(0, 0);
    const uint2 v = load_8(row + column);
    return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
  }
  return make_float2(column < k ? row[column] : 0, column + 1 < k ? row[column + 1] : 0);
}

// One lane's codes of a block of columns, and the group parameters of step t of each 64 of them.
template <int kBits>
struct Block {
  CodeBlock<kBits> codes;
  uint2 meta[CodeBlock<kBits>::kUnits];

  __device__ __forceinline__ void load(const QLinearProblem& p, int tile, int block, int lane) {
    using B = CodeBlock<kBits>;
    codes.load(p.packed + tile * p.tile_bytes + static_cast<int64_t>(block) * B::kBytes +
               lane * 16);
#pragma unroll
    for (int u = 0; u < B::kUnits; ++u) {
      const int column = (block * B::kUnits + u) * kBlockColumns + lane % 4 * kStepColumns;
      const __half* at = p.meta + meta_offset(p, tile, group_of_column(p, column), lane / 4);
      if (p.format.has_zeros()) {
        meta[u] = load_8(at);
      } else {
        meta[u] = make_uint2(load_4(at), 0);
      }
    }
  }
};

template <int kBits, bool kBook, int kRows>
__global__ void __launch_bounds__(kWarps * 32, 2)
    qlinear_simt_kernel(const QLinearProblem p, int blocks, int warps_k, bool aligned) {
  using B = CodeBlock<kBits>;
  __shared__ float partial[kWarps][kRows][16];
  __shared__ float book[16];
  if constexpr (kBook) {
    if (threadIdx.x < 16) book[threadIdx.x] = book_value(p.format.scheme, threadIdx.x);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_k = warp % warps_k;
  const int tile = blockIdx.y * (kWarps / warps_k) + warp / warps_k;
  const int row0 = blockIdx.x * kRows;
  const int steps = p.group_columns % kBlockColumns == 0 ? 4 : 1;  // that share a group

  const float* x[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    x[m] = static_cast<const float*>(p.x) + static_cast<int64_t>(min(row0 + m, p.m - 1)) * p.k;
  }
  float total[2][kRows] = {}, sum[2][kRows] = {};
  float scale[2] = {}, zero[2] = {};
  int group = -1;
  Block<kBits> next;
  if (tile < p.tiles && warp_k < blocks) next.load(p, tile, warp_k, lane);
  for (int block = warp_k; tile < p.tiles && block < blocks; block += warps_k) {
    const Block<kBits> now = next;
    if (block + warps_k < blocks) next.load(p, tile, block + warps_k, lane);
#pragma unroll
    for (int u = 0; u < B::kUnits; ++u) {
      const Words<kBits> words = now.codes.words(u);
      const int first = (block * B::kUnits + u) * kBlockColumns;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int column = first + step * kStepColumns;
        if (step % steps == 0) {
          const int step_group = group_of_column(p, column);
          if (step_group != group) {
            group = step_group;
            const uint32_t low = __shfl_sync(0xFFFFFFFF, now.meta[u].x, lane / 4 * 4 + step);
            const uint32_t high = __shfl_sync(0xFFFFFFFF, now.meta[u].y, lane / 4 * 4 + step);
            const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&low));
            const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&high));
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
              total[0][m] = fmaf(scale[0], sum[0][m], total[0][m]);
              total[1][m] = fmaf(scale[1], sum[1][m], total[1][m]);
              sum[0][m] = sum[1][m] = 0;
            }
            scale[0] = a.x;
            scale[1] = p.format.has_zeros() ? b.x : a.y;
            zero[0] = p.format.has_zeros() ? a.y : p.zero;
            zero[1] = p.format.has_zeros() ? b.y : p.zero;
          }
        }
        uint32_t raw[4];
        raw_operand<kBits>(raw, words, step);
        float2 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = pair_of_weights<kBook>(raw[i], raw_factor<kBits>(step, i % 2 == 1), zero[i % 2],
                                        book);
        }
        const int at = column + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const float2 v0 = load_x(x[m], at, p.k, aligned);
          const float2 v8 = load_x(x[m], at + 8, p.k, aligned);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[r][m] = fmaf(w[r].x, v0.x, sum[r][m]);
            sum[r][m] = fmaf(w[r].y, v0.y, sum[r][m]);
            sum[r][m] = fmaf(w[r + 2].x, v8.x, sum[r][m]);
            sum[r][m] = fmaf(w[r + 2].y, v8.y, sum[r][m]);
          }
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
  const auto complete = [&](int m, int r) {
    float v = 0;
    for (int w = 0; w < warps_k; ++w) v += partial[r / 16 * warps_k + w][m][r % 16];
    return v;
  };
  // Rows of w in pairs n, n + 8, as SwiGLU wants them.
  for (int i = threadIdx.x; i < rows_w / 2 * kRows; i += kWarps * 32) {
    const int m = i / (rows_w / 2), j = i % (rows_w / 2), r = j / 8 * 16 + j % 8;
    const int n = blockIdx.y * rows_w + r;
    if (row0 + m < p.m && n < p.n) {
      finish_pair(p.epilogue, row0 + m, n, complete(m, r), complete(m, r + 8));
    }
  }
}

// K is split over more warps until there are two blocks per multiprocessor.
template <int kBits, bool kBook, int kRows>
int launch(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  const int blocks = p.blocks / CodeBlock<kBits>::kUnits;
  const int64_t chunks = ceil_div(p.m, kRows);
  int warps_k = 1;
  while (warps_k < kWarps && warps_k * 2 <= blocks &&
         chunks * ceil_div(p.tiles, kWarps / warps_k) < 2 * device.multiprocessors) {
    warps_k *= 2;
  }
  const dim3 grid(static_cast<unsigned>(chunks),
                  static_cast<unsigned>(ceil_div(p.tiles, kWarps / warps_k)));
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 8 == 0 && p.k % 2 == 0;
  return launch_kernel(qlinear_simt_kernel<kBits, kBook, kRows>, grid, kWarps * 32, 0, false,
                       stream, p, blocks, warps_k, aligned);
}

template <int kBits, bool kBook = false>
int launch_for_rows(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  return p.m == 1 ? launch<kBits, kBook, 1>(p, device, stream)
                  : launch<kBits, kBook, 4>(p, device, stream);
}

// A warp per row of x and group of the weight.
__global__ void __launch_bounds__(kWarps * 32)
    prepare_rows_kernel(const QLinearProblem p, int group_size, float* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t row = index / p.groups;
  if (row >= p.m) return;
  const int begin = static_cast<int>(index % p.groups) * group_size;
  const int end = min(static_cast<int64_t>(begin) + group_size, static_cast<int64_t>(p.k));
  const float* const x = static_cast<const float*>(p.x) + row * p.k;
  const auto value = [&](int c) {
    return p.input_scale == nullptr ? x[c] : x[c] * static_cast<const float*>(p.input_scale)[c];
  };
  float step = 0;
  bool finite = true;
  if (p.activation_bits == 8) {
    for (int c = begin + threadIdx.x % 32; c < end; c += 32) {
      step = fmaxf(step, fabsf(value(c)));
      finite = finite && isfinite(value(c));
    }
    step = __fdiv_rn(warp_max(step), 127.0f);
    finite = __all_sync(0xFFFFFFFF, finite);
  }
  for (int c = begin + threadIdx.x % 32; c < end; c += 32) {
    const float v = value(c);
    // Infinities and NaN pass unrounded, so that they show.
    out[row * p.k + c] = step > 0 && finite ? rintf(__fdiv_rn(v, step)) * step : v;
  }
}

}  // namespace

int launch_simt_rows(const QLinearProblem& p, float* out, const Device& /*device*/,
                     cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(static_cast<int64_t>(p.m) * p.groups, kWarps)));
  return launch_kernel(prepare_rows_kernel, grid, kWarps * 32, 0, false, stream, p,
                       p.format.group_size, out);
}

int launch_simt(const QLinearProblem& p, const Device& device, cudaStream_t stream) {
  if (p.format.has_book()) return launch_for_rows<4, true>(p, device, stream);
  if (p.format.bits == 2) return launch_for_rows<2>(p, device, stream);
  if (p.format.bits == 3) return launch_for_rows<3>(p, device, stream);
  if (p.format.bits == 4) return launch_for_rows<4>(p, device, stream);
  return launch_for_rows<8>(p, device, stream);
}

}  // namespace kvopt::cuda
