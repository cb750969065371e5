// SPDX-License-Identifier: Apache-2.0
// y (M, N) = x (M, K) w^T on Hopper's warpgroup multiplications, weights from registers.
//
// The product is computed transposed, y^T = w x^T, so that the weight is the operand that may come
// from registers: codes go from shared memory to registers, become fp16 weights there and never see
// memory again. x is the other operand, read by the tensor cores from shared memory.
//
//   block   64 * kTiles * kWarpgroups rows of w  x  kRowsX rows of x: two warpgroups that
//           multiply, each 64 * kTiles rows of w, and warps that only start copies
//   codes   ring of stages of kCodeBlocks * 64 columns: bulk copies of 0.5 to 4 KB per 16 rows, the
//           groups' scales and zero points behind them
//   x       ring of stages of kBlocksX * 64 columns, or part of the stages of codes: tensor copies
//           with the 128-byte swizzle
//   A       sets of registers of 16 * kSteps columns: multiplied and refilled in turn
//   K       may be split over the blocks of a cluster; their sums meet in shared memory and are
//           added in the order of the blocks
//   tiles   a block takes every gridDim-th one, those that share codes at the same time
//
// Bytes: codes from memory once, ceil(M / kRowsX) times from L2; x N / (128 kTiles) times from L2.
// One multiplication (64 x kRowsX x 16) reads 32 kRowsX bytes of shared memory in kRowsX / 2
// cycles, half of what that gives, and costs a warp 9 to 13 instructions on its 8 weights a lane.
// Bound: up to M of about 64 memory and the instructions that make weights, then the tensor cores.
// Limits: fp16 operands; groups that end within 64 columns are slower; sm_90a only.
#pragma once

#include "cuda/device/qlinear_wgmma_fetch.cuh"
#include "cuda/device/qlinear_wgmma_multiply.cuh"
#include "cuda/device/qlinear_wgmma_store.cuh"

namespace kvopt::cuda::wgmma {

#if KVOPT_HAS_WGMMA

template <int kBits, bool kBook, bool kFine, typename S>
__device__ __forceinline__ void multiply_tiles(const QLinearProblem& p, const Plan& plan,
                                               Barriers& barriers, unsigned char* shared, int rank,
                                               int warp, int lane) {
  const Epilogue& e = p.epilogue;
  const Share<S> share(p, plan, rank);
  Multiplier<kBits, kBook, kFine, S> multiplier(p, plan, barriers, shared, warp, lane);
  unsigned char* const out = shared + plan.out;
  for (int index = blockIdx.x / plan.splits; index < plan.tiles_x * plan.tiles_w;
       index += gridDim.x / plan.splits) {
    const Tile tile(plan, index);
    multiplier.run(share.begin, share.end);
    const int m0 = tile.x * S::kRowsX, n0 = tile.w * S::kRowsW;
    if (plan.staged) {
      store_staged<S>(e, multiplier.result(), out, m0, n0, multiplier.tile16, lane);
    } else {
      store_finished<S>(e, multiplier.result(), reinterpret_cast<float*>(out), m0, n0, warp, lane,
                        rank, plan.splits);
    }
  }
  store_bulk_wait_read<0>();  // a block's shared memory must outlive the copies
                              // that read it
}

#endif  // KVOPT_HAS_WGMMA

// Without the instructions the kernel is empty, and has no static shared memory: that is how
// wgmma_fits tells.
template <int kBits, bool kBook, bool kFine, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    qlinear_wgmma_kernel(const __grid_constant__ CUtensorMap map, const QLinearProblem p,
                         const Plan plan) {
#if KVOPT_HAS_WGMMA
  __shared__ Barriers barriers;
  extern __shared__ unsigned char dynamic[];
  unsigned char* const shared =
      dynamic + ((1024 - (shared_address(dynamic) & 1023)) & 1023);  // the swizzle's period
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // uniform to the compiler
  const int rank = plan.splits > 1 ? static_cast<int>(cluster_rank()) : 0;
  if (threadIdx.x < kMaxStages) {
    const int i = threadIdx.x;
    barrier_init(&barriers.codes_full[i], 1);
    barrier_init(&barriers.codes_empty[i], S::kConsumerWarps);
    barrier_init(&barriers.x_full[i], 1);
    barrier_init(&barriers.x_empty[i], S::kConsumerWarps);
    barrier_init_fence();
  }
  if constexpr (kBook) {
    fill_table(reinterpret_cast<uint32_t*>(shared + plan.book),
               reinterpret_cast<float*>(shared + plan.out), p.format.scheme);
  }
  if (threadIdx.x == 0) prefetch_map(&map);
  // Into L2, which needs no order: the kernel before may still run.
  if (warp == S::kConsumerWarps) prefetch_codes<kBits, S>(p, plan, rank, lane);
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();  // all blocks have their places by then
  if (warp < S::kConsumerWarps) {
    if constexpr (S::kGiveRegisters) grow_registers<S::kRegisters>();
    multiply_tiles<kBits, kBook, kFine, S>(p, plan, barriers, shared, rank, warp, lane);
  } else {
    if constexpr (S::kGiveRegisters) shrink_registers<S::kRegistersCopying>();
    if (warp == S::kConsumerWarps) {
      fetch_codes<kBits, S>(p, plan, map, barriers, shared, rank, lane);
    } else if (!S::kOneRing && warp == S::kConsumerWarps + 1 && lane == 0) {
      fetch_x<S>(p, plan, map, barriers, shared, rank);
    }
    __syncwarp();
    if (plan.splits > 1) {  // cluster barriers count every thread
      for (int index = blockIdx.x / plan.splits; index < plan.tiles_x * plan.tiles_w;
           index += gridDim.x / plan.splits) {
        for (int i = 0; i < 2 * S::kSlices; ++i) cluster_sync();
      }
    }
  }
#endif
}

}  // namespace kvopt::cuda::wgmma
