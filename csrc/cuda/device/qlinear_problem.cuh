// SPDX-License-Identifier: Apache-2.0
// One product as its kernels see it, and the launches that qlinear.cu chooses from.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace kvopt::cuda {

constexpr int kStepColumns = 16;   // one tensor-core multiplication
constexpr int kBlockColumns = 64;  // columns of one 4-bit load of a lane; K is padded to it

struct QLinearProblem {
  const void* x;
  const uint8_t* packed;
  const __half* meta;
  const void* bias;
  void* y;
  int32_t m, n, k;
  int32_t tiles;        // of 16 rows of the weight
  int32_t blocks;       // of 64 columns, in a tile
  int32_t groups;       // of a row
  int32_t group_steps;  // 16-column steps per group
  int32_t group_shift;  // its log2, or -1 when it is no power of two; 31 when there is one group
  int64_t tile_bytes;
  float symmetric_zero;
  bool symmetric;
  bool aligned;  // rows of x start on 16 bytes and hold whole 16-byte pieces
};

// Group of a 16-column step. Steps past the last column (they meet zero activations) count to the
// last group. kSteps = 4: the caller knows that groups are 2^group_shift >= 4 steps and asks for a
// block's first step only, which holds at least one column.
template <int kSteps = 1>
__device__ __forceinline__ int group_of_step(const QLinearProblem& p, int step) {
  if constexpr (kSteps == 4) return step >> p.group_shift;
  const int group = p.group_shift >= 0 ? step >> p.group_shift : step / p.group_steps;
  return min(group, p.groups - 1);
}

// The (scale, zero) pairs of rows g and g + 8 as they lie in memory: two words, or one when
// symmetric.
__device__ __forceinline__ int64_t meta_offset(const QLinearProblem& p, int tile, int group,
                                               int g) {
  const int64_t index = static_cast<int64_t>(tile) * p.groups + group;
  return p.symmetric ? index * 16 + g * 2 : index * 32 + g * 4;
}

struct Device {
  int sm;  // 10 * major + minor of the code that will run
  int multiprocessors;
  int multiprocessor_shared;  // bytes of shared memory of a multiprocessor
  int block_shared;           // and how many of them one block may ask for
};

// Each returns a cudaError_t. T: __half, __nv_bfloat16.

// Tensor-core matrix-vector product, for few rows when x fits in shared memory. Where it has a tile
// or two per multiprocessor to work on, staging more than four rows of x costs more than the tiled
// product does (measured).
inline bool gemv_fits(const QLinearProblem& p, const Device& device) {
  if (p.m > (p.tiles <= 2 * device.multiprocessors ? 4 : 8)) return false;
  const int64_t bytes = p.m * (p.blocks + 4ll) * kBlockColumns * 2;
  return bytes <= device.multiprocessor_shared / 3 && bytes <= device.block_shared - 16 * 1024;
}
template <typename T>
int launch_gemv(const QLinearProblem& p, int bits, const Device& device, cudaStream_t stream);

// Tiled tensor-core product, for any M.
template <typename T, int kBits>
int launch_gemm(const QLinearProblem& p, const Device& device, cudaStream_t stream);

// fp32 arithmetic, any M. T: float, and __nv_bfloat16 for chips whose tensor cores do not know it.
template <typename T>
int launch_simt(const QLinearProblem& p, int bits, const Device& device, cudaStream_t stream);

// Launches `kernel`. overlap: its blocks may take their places while the kernel before it in the
// stream still runs (programmatic dependent launch, sm_90). Such a kernel calls
// wait_for_previous_kernel() before its first read or write of global memory, so stream order holds
// as ever; what is saved is the launch, some 0.4 us of 3 for a small product.
// let_next_kernel_start() says from where on the next kernel's blocks are welcome. Not for every
// kernel: blocks that arrive early can crowd onto few multiprocessors, which cost the fp32 kernel
// up to a quarter.
template <typename Kernel, typename... Arguments>
int launch_kernel(Kernel kernel, dim3 grid, int threads, int shared_bytes, bool overlap,
                  cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more must be asked for by name
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace kvopt::cuda
