// SPDX-License-Identifier: Apache-2.0
// A block of GPTQ, a warp per row: the row's at most 128 working values lie in shared memory, lanes
// share the columns that an error is passed on to.
//
//     column i:  all lanes   code, e = error / U_ii        (the same in each)
//                lane l      w_j -= e * U_ij               j = i + 1 + l, + 32, ...
//
// Columns are one after the other, so a warp waits: some 100 cycles a column. As many warps as a
// multiprocessor holds hide that; U's block (64 KiB in fp32) is read by all of them out of the
// first-level cache. A (28672, 4096) weight on an H200: 32 blocks of at most 0.9 ms, 1.7 ms with
// the search, and the caller's products with the columns behind, 4.8e11 operations; 0.12 s in all.
#include <cuda_runtime_api.h>

#include "cuda/device/wsearch.cuh"
#include "cuda/wquant.h"
#include "cuda/wsearch.h"

namespace kvopt::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

template <typename T>
__global__ void __launch_bounds__(kThreads) gptq_kernel(const GptqBlockParams<T> p) {
  __shared__ T shared[kWarps][kGptqBlock];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  const int lane = threadIdx.x % 32;
  T* const w = shared[threadIdx.x / 32];
  const int size = static_cast<int>(p.end - p.begin);
  const int64_t groups = gptq_groups(p.begin, p.end, p.format.group_size);
  const T top = static_cast<T>((1 << p.format.bits) - 1);
  const T* const source = p.weight + row * p.k + p.begin;
  for (int i = lane; i < size; i += 32) w[i] = source[i];
  __syncwarp();
  GroupChoice<T> choice = {};
  for (int i = 0; i < size; ++i) {
    if (p.given_scale != nullptr) {
      choice.scale = static_cast<T>(__half2float(__ushort_as_half(p.given_scale[row * size + i])));
      choice.zero = static_cast<T>(__half2float(__ushort_as_half(p.given_zero[row * size + i])));
    } else if (i % p.format.group_size == 0) {
      const int64_t count = min(static_cast<int64_t>(p.format.group_size), p.k - p.begin - i);
      const T* const values = i + count <= size ? w + i : source;  // a longer one begins the block
      const T* const importance = p.importance == nullptr ? nullptr : p.importance + p.begin + i;
      choice = search_group(p.format, p.grid, values, importance, count);
      if (lane == 0) {
        const int64_t index = row * groups + i / p.format.group_size;
        p.scale[index] = __half_as_ushort(__float2half_rn(static_cast<float>(choice.scale)));
        p.zero[index] = __half_as_ushort(__float2half_rn(static_cast<float>(choice.zero)));
      }
    }
    const T* const factor = p.factor + (p.begin + i) * p.k + p.begin;
    const T value = w[i];
    const T code = code_value(value, choice, top);
    const T error = div_rn(-code_error(value, code, choice), factor[i]);
    if (lane == 0) {
      p.codes[row * size + i] = static_cast<uint8_t>(code);
      p.errors[row * size + i] = error;
    }
    for (int j = i + 1 + lane; j < size; j += 32) w[j] = add_rn(w[j], -mul_rn(error, factor[j]));
    __syncwarp();
  }
}

template <typename T>
int launch(const GptqBlockParams<T>& p, void* stream) {
  const int64_t size = p.end - p.begin;
  if (!is_valid_weight(p.format, p.n, p.k) || p.format.has_book()) return cudaErrorInvalidValue;
  if (p.begin < 0 || size < 1 || size > kGptqBlock || p.end > p.k) return cudaErrorInvalidValue;
  if (p.grid.steps < 0 || p.grid.steps > kMaxSearchSteps) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(ceil_div(p.n, kWarps));
  gptq_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace

int gptq_block(const GptqBlockParams<float>& p, void* stream) { return launch(p, stream); }
int gptq_block(const GptqBlockParams<double>& p, void* stream) { return launch(p, stream); }

}  // namespace kvopt::cuda
