// SPDX-License-Identifier: Apache-2.0
// One product as its kernels see it, and the launches that qlinear.cu chooses from.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"
#include "cuda/device/epilogue.cuh"

namespace kvopt::cuda {

constexpr int kStepColumns = 16;   // one tensor-core multiplication
constexpr int kBlockColumns = 64;  // four of them

struct QLinearProblem {
  const void* x;  // (M, K) in `dtype`
  const uint8_t* packed;
  const __half* meta;
  const void* input_scale;  // (K) in `dtype`, or null
  DType dtype;
  QuantFormat format;
  int32_t activation_bits;  // 16 or 8
  int32_t m, n, k;
  int32_t tiles;          // of 16 rows of the weight
  int32_t blocks;         // of 64 columns in a tile, padding included
  int32_t groups;         // of a row
  int32_t group_columns;  // a multiple of 16, or all of `blocks` * 64 where there is one group
  int32_t group_shift;    // its log2, or -1 when it is no power of two; 31 when there is one group
  int64_t tile_bytes;
  float zero;    // of all codes where none is stored
  bool aligned;  // rows of x start on 16 bytes and hold whole 16-byte pieces
  Epilogue epilogue;
};

// Group of a column; columns past the last (they meet zero activations) count to the last group.
__device__ __forceinline__ int group_of_column(const QLinearProblem& p, int column) {
  const int group = p.group_shift >= 0 ? column >> p.group_shift : column / p.group_columns;
  return min(group, p.groups - 1);
}

// 16-bit words from the start of `meta` to what rows g and g + 8 of a tile have of a group: {scale,
// scale} or {scale, zero, scale, zero}.
__device__ __forceinline__ int64_t meta_offset(const QLinearProblem& p, int tile, int group,
                                               int g) {
  const int64_t index = static_cast<int64_t>(tile) * p.groups + group;
  return p.format.has_zeros() ? index * 32 + g * 4 : index * 16 + g * 2;
}

struct Device {
  int sm;  // 10 * major + minor of the code that will run
  int multiprocessors;
  int multiprocessor_shared;  // bytes of shared memory of a multiprocessor
  int block_shared;           // and how many of them one block may ask for
};

// qlinear_problem.cu. The current GPU, asked once per GPU; a GPU that is not here, by its
// capability (10 * major + minor); what the kernels see of a product.
int query_device(Device& device);  // a cudaError_t
Device device_of(int capability, int multiprocessors);
QLinearProblem make_problem(const QLinearParams& p);

// x as the matrix kernels take it: fp16 (M, pitch), columns from k to pitch are zero, pitch a
// multiple of 8, 16-byte aligned; the product of row m is to be multiplied by row_scale[m] (null:
// 1). It is p.x itself where that will do, else what the prologue wrote to the workspace.
struct HalfRows {
  const __half* x;
  int64_t pitch;
  const float* row_scale;
};

// x as W8A8 takes it: int8 (M, pitch), pitch a multiple of 16, columns past k zero.
struct Int8Rows {
  const int8_t* x;
  int64_t pitch;
  const float* row_scale;
};

// Every launch returns a cudaError_t.

// qlinear_prologue.cu. x * input_scale, rounded to int8 per token and group when activation_bits is
// 8, as fp16 times a power of two per row; or as int8 per token.
bool needs_prologue(const QLinearProblem& p);
int launch_prologue_half(const QLinearProblem& p, __half* out, int64_t pitch, float* row_scale,
                         const Device& device, cudaStream_t stream);
int launch_prologue_int8(const QLinearProblem& p, int8_t* out, int64_t pitch, float* row_scale,
                         const Device& device, cudaStream_t stream);

// qlinear_gemv*.cu: few rows, fp16 and bf16, every scheme but W8A8; reads p.x, does its own
// prologue.
bool gemv_fits(const QLinearProblem& p, const Device& device);
int launch_gemv(const QLinearProblem& p, const Device& device, cudaStream_t stream);

// qlinear_gemm*.cu: tiled product on mma.sync, any M, every scheme but W8A8.
int launch_gemm(const QLinearProblem& p, const HalfRows& x, const Device& device,
                cudaStream_t stream);

// qlinear_wgmma*.cu: the same on sm_90's warpgroup instructions. `partials` as many bytes as
// wgmma_partial_bytes says (0: none), for sums that are split over K.
bool wgmma_fits(const QLinearProblem& p, const Device& device);
int64_t wgmma_partial_bytes(const QLinearProblem& p, const Device& device);
int launch_wgmma(const QLinearProblem& p, const HalfRows& x, void* partials, const Device& device,
                 cudaStream_t stream);

// qlinear_w8a8*.cu: int8 x int8, any M. launch_w8a8_gemv reads p.x and quantises it itself, for one
// or two rows.
int launch_w8a8(const QLinearProblem& p, const Int8Rows& x, const Device& device,
                cudaStream_t stream);
bool w8a8_gemv_fits(const QLinearProblem& p, const Device& device);
int launch_w8a8_gemv(const QLinearProblem& p, const Device& device, cudaStream_t stream);

// qlinear_simt.cu: fp32 arithmetic, any M, every scheme but W8A8; fp32 activations. What comes
// before the product (input_scale, activation_bits 8) is launch_simt_rows's: fp32 (M, K), to be
// given to launch_simt as p.x.
int launch_simt_rows(const QLinearProblem& p, float* out, const Device& device,
                     cudaStream_t stream);
int launch_simt(const QLinearProblem& p, const Device& device, cudaStream_t stream);

// Launches `kernel`. overlap: its blocks may take their places while the kernel before it in the
// stream still runs (programmatic dependent launch, sm_90). Such a kernel calls
// wait_for_previous_kernel() before its first write and its first read of anything but weights,
// which settle_weights() (wquant.h) lets it read ahead, so stream order holds as ever; what is
// saved is the launch, some 0.4 us of 3 for a small product, and the first trip to memory.
// let_next_kernel_start() says from where on the next kernel's blocks are welcome. Not for every
// kernel: blocks that arrive early can crowd onto few multiprocessors, which cost the fp32 kernel
// up to a quarter.
//
// Which of the two comes first in a kernel is a matter of speed alone. The wait ends when the
// kernel in front has ended and its writes are seen; that one has waited in its turn before it
// ended, so a chain holds link by link, also where the next kernel's blocks came before this one's
// wait was over. What must hold: every kernel launched with overlap waits; what its blocks do
// before is to read weights; and a kernel that writes weights calls neither. So
//   before the wait   where a block leaves room for one of the next kernel's (the prologue, the
//                     copying warps of W8A8): weights then travel while this kernel waits for x
//   after the wait    where a block fills its multiprocessor (gemv, Hopper's tiles): the next
//                     kernel's find no room before this one's leave, and would only be asked for
//   in the last turn  where blocks of the next kernel would take bandwidth from this one's (the
//                     mma.sync tiles, W8A8's few rows)
template <typename Kernel, typename... Arguments>
int launch_kernel(Kernel kernel, dim3 grid, int threads, int shared_bytes, bool overlap,
                  cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 40 * 1024) {  // 48 KB with the static part; more must be asked for by name
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
