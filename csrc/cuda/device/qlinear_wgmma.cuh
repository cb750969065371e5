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
//   tiles   a block takes every gridDim-th one, those that share codes at the same time. Or, where
//           tiles are few and do not go evenly into the blocks:
//   K       split over the blocks of a cluster; their sums meet in shared memory; or
//   even    all blocks do the same number of stages of all tiles in a row; sums of a tile that
//           another block ends go there through memory (see Walk). Added in the order of K always.
//
// Bytes: codes from memory once, ceil(M / kRowsX) times from L2; x N / (128 kTiles) times from L2.
// One multiplication (64 x kRowsX x 16) reads 32 kRowsX bytes of shared memory in kRowsX / 2
// cycles, half of what that gives, and costs a warp 9 to 13 instructions on its 8 weights a lane.
// With A from registers it takes no less than 28 cycles, 41 at kRowsX = 64, 147 at 256 (measured).
// Bound: at M = 16 the copies (21 us of gate-up's 26, alone) and 16 us of multiplications; at 64
// the multiplications (27 of 36), whose traffic with the registers leaves the instructions that
// make weights little to overlap with; from 256 on the multiplications alone.
// Measured slower: at M = 64 weights made by eight warps for others to multiply from shared memory
// (105 us), sets of one or two steps, 256 rows of w a block (37 to 40).
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
  Multiplier<kBits, kBook, kFine, S> multiplier(p, plan, barriers, shared, warp, lane);
  unsigned char* const out = shared + plan.out;
  for (Walk walk(plan); walk.more();) {
    const Segment s = walk.take(rank);
    multiplier.run(s.begin, s.end);
    if (plan.even) {
      if (s.end < plan.stages) {
        publish<S>(plan, multiplier.result());
        continue;
      }
      if (s.begin > 0) {
        add_published<S>(plan, multiplier.result(), walk.block_of(s.tile * plan.stages));
      }
    }
    const Tile tile(plan, s.tile);
    const int m0 = tile.x * S::kRowsX, n0 = tile.w * S::kRowsW;
    if (plan.staged) {
      store_staged<S>(e, multiplier.result(), out, m0, n0, multiplier.tile16, lane);
    } else {
      store_finished<S>(e, multiplier.result(), reinterpret_cast<float*>(out), m0, n0, warp, lane,
                        rank, plan.splits);
    }
  }
  store_bulk_wait_read<0>();  // shared memory must outlive the copies that read it
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
    fill_table(reinterpret_cast<uint4*>(shared + plan.book),
               reinterpret_cast<float*>(shared + plan.book + 1024 * kBookCopies), p.format.scheme);
  }
  if (threadIdx.x == 0) prefetch_map(&map);
  __syncthreads();
  if (warp == S::kConsumerWarps) {
    CodeFetcher<kBits, S>{p, plan, map, barriers, shared, rank, lane}.run_early();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();  // all blocks have their places by then
  if (warp < S::kConsumerWarps) {
    if constexpr (S::kGiveRegisters) grow_registers<S::kRegisters>();
    multiply_tiles<kBits, kBook, kFine, S>(p, plan, barriers, shared, rank, warp, lane);
  } else {
    if constexpr (S::kGiveRegisters) shrink_registers<S::kRegistersCopying>();
    if (warp == S::kConsumerWarps) {
      CodeFetcher<kBits, S>{p, plan, map, barriers, shared, rank, lane}.run();
    } else if (!S::kOneRing && warp == S::kConsumerWarps + 1) {
      fetch_x<S>(plan, map, barriers, shared, rank, lane);
    }
    __syncwarp();
    if (plan.splits > 1) {  // cluster barriers count every thread; a cluster does one tile
      for (int i = 0; i < S::kSlices; ++i) {
        cluster_sync();
        cluster_sync_readers();
      }
    }
  }
#endif
}

}  // namespace kvopt::cuda::wgmma
