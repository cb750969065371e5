// SPDX-License-Identifier: Apache-2.0
// A thread for each fp16 of `meta`, so that writes are whole lines; the codes of a tile's 16 rows
// are read from 16 places, each line of them by neighbouring blocks out of L2. 3 bytes a group
// against 32 of its codes (blocks of 64): some 9 % of a product's time at one token, which buys 0.4
// bits per weight.
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "cuda/wquant.h"
#include "cuda/wquant_scales.h"

namespace kvopt::cuda {
namespace {

constexpr int kThreads = 256;
__device__ const DynamicMap kMap = dynamic_map();

__global__ void __launch_bounds__(kThreads)
    expand_scales_kernel(const ExpandScalesParams p, int64_t groups, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t slot = index % mma16::kRows;
  const int64_t group = index / mma16::kRows % groups;
  const int64_t row = index / mma16::kRows / groups * mma16::kRows + slot % 2 * 8 + slot / 2;
  uint16_t half = 0;
  if (row < p.n) {
    const int64_t at = row * groups + group;
    const float product = __fmul_rn(kMap.value[p.codes[at]], __ldg(p.scale + at / kDoubleBlock));
    const __half rounded = __float2half_rn(__fadd_rn(product, __ldg(p.offset)));
    half = __half_as_ushort(rounded);
    if (half == 0 || half >= 0x8000) half = 1;  // 2^-24
  }
  p.meta[index] = half;
}

}  // namespace

int wquant_expand_scales(const ExpandScalesParams& p, void* stream) {
  if (p.n < 1 || p.k < 1 || p.format.has_zeros() || mma16::is_row_major(p.format)) {
    return cudaErrorInvalidValue;
  }
  const int64_t count = mma16::meta_count(p.format, p.n, p.k);
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  expand_scales_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p, group_count(p.format, p.k), count);
  return settle_weights(stream);
}

}  // namespace kvopt::cuda
