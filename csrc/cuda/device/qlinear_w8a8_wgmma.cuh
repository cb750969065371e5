// SPDX-License-Identifier: Apache-2.0
// Y = X W^T with int8 operands and exact int32 sums on Hopper's warpgroup instructions.
//
//   tile      64 kConsumers rows of X, kColumns rows of W; a warpgroup multiplies 64 x kColumns,
//             both operands from shared memory (m64nNk32: at N = 256 the tensor cores are busy for
//             128 cycles and read 80 bytes of shared memory in each of them)
//   stage     128 columns of K of both, brought by one tensor copy each, 128-byte swizzle; a
//             producer warp keeps kStages of them coming, also across the end of a tile. The first
//             kStages copies of W do not wait for the kernel that makes x
//   cluster   for products with few tiles: its blocks take different parts of K of one tile and add
//             up through distributed shared memory, each its share of the columns (int32: any
//             order is exact). Sharing W in a cluster by multicast was a fifth slower than letting
//             every block ask L2 itself: blocks that wait for each other's stages drift together.
//   order     blocks are persistent; bands of 16 tiles of X, so that what runs at a time is nearly
//             square and X stays in L2
//
// Bound: M >= 512: tensor cores, 1979 TOPS at nominal clocks (power allows some 1400); M <= 128:
// the weight's bytes. Limits: K <= kMaxColumns; outputs in 16-byte pieces (RowsEpilogue::words).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/qlinear_problem.cuh"
#include "cuda/device/qlinear_w8a8_epilogue.cuh"
#include "cuda/device/wgmma.cuh"

namespace kvopt::cuda::w8a8 {

constexpr int kStageColumns = 128;

template <int kConsumers_, int kColumns_, int kStages_>
struct WarpgroupTile {
  static constexpr int kConsumers = kConsumers_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kSums = kColumns / 2;  // registers of a thread
  static constexpr int kXBytes = kRows * kStageColumns, kWBytes = kColumns * kStageColumns;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // 1024: to align the ring
  static constexpr bool kMovesRegisters = kColumns == 256;
};

struct TileOrder {
  int columns;  // of K, as stored
  int row_tiles, column_tiles;
  int band;    // row tiles of a band
  int split;   // blocks of a cluster: they share a tile along K
  int x_rows;  // that a copy brings: no more than there are, copies of missing rows are slow
};

__device__ __forceinline__ void place_of_tile(const TileOrder& o, int tile, int& row, int& column) {
  const int first = tile / (o.band * o.column_tiles) * o.band;
  const int rows = min(o.band, o.row_tiles - first);
  const int rest = tile - first * o.column_tiles;
  row = first + rest % rows;
  column = rest / rows;
}

#if KVOPT_HAS_WGMMA

__device__ __forceinline__ int4 load_cluster_sums(uint32_t address) {
  int4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

#endif

// Bounds for three warpgroups, also where there are two: at 168 registers a thread a block finds
// room beside one that prepares few rows of x.
template <typename T>
__global__ void __launch_bounds__(384, 1) wgmma_kernel(const __grid_constant__ CUtensorMap x_map,
                                                       const __grid_constant__ CUtensorMap w_map,
                                                       TileOrder order, RowsEpilogue epilogue) {
#if KVOPT_HAS_WGMMA
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[T::kStages], empty[T::kStages];
  __shared__ uint2 columns[T::kConsumers][T::kColumns / 2];
  uint8_t* ring = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const int group = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = order.split == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], 4 * T::kConsumers);
    }
    barrier_init_fence();
    prefetch_map(&x_map);
    prefetch_map(&w_map);
  }
  __syncthreads();
  const int tiles = order.row_tiles * order.column_tiles;
  const int cluster = static_cast<int>(blockIdx.x) / order.split;
  const int clusters = static_cast<int>(gridDim.x) / order.split;
  const int steps = (order.columns + kStageColumns - 1) / kStageColumns;
  const int first_step = rank * steps / order.split;
  const int end_step = (rank + 1) * steps / order.split;

  if (group == 0) {
    if constexpr (T::kMovesRegisters) shrink_registers<40>();
    let_next_kernel_start();  // before the wait: see launch_kernel
    if (warp == 0 && lane == 0) {
      int stage = 0;
      uint32_t phase = 1;  // of `empty`: nothing to wait for in the first round
      const auto bring_w = [&](int at, int step, int column) {
        barrier_expect(&full[at], order.x_rows * kStageColumns + T::kWBytes);
        copy_box(ring + at * T::kStageBytes + T::kXBytes, &w_map, step * kStageColumns, column,
                 &full[at], kEvictFirst);
      };
      int ahead = 0;  // stages whose part of W is on its way
      for (int tile = cluster; tile < tiles; tile += clusters) {
        int row, column;
        place_of_tile(order, tile, row, column);
        row *= T::kRows;
        column *= T::kColumns;
        if (tile == cluster) {  // W does not wait for the kernel that makes x
          ahead = min(T::kStages, end_step - first_step);
          for (int i = 0; i < ahead; ++i) bring_w(i, first_step + i, column);
          wait_for_previous_kernel();
        }
        for (int step = first_step; step < end_step; ++step) {
          if (ahead > 0) {
            --ahead;
          } else {
            barrier_wait(&empty[stage], phase);
            bring_w(stage, step, column);
          }
          copy_box(ring + stage * T::kStageBytes, &x_map, step * kStageColumns, row, &full[stage],
                   kEvictLast);
          if (++stage == T::kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if (order.split > 1) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    if constexpr (T::kMovesRegisters) grow_registers<232>();
    wait_for_previous_kernel();
    const int consumer = group - 1;
    int stage = 0;
    uint32_t phase = 0;
    int32_t sum[T::kSums];
    const auto release = [&](int s) {
      if (lane == 0) barrier_arrive(&empty[s]);
    };
    for (int tile = cluster; tile < tiles; tile += clusters) {
      int row, column;
      place_of_tile(order, tile, row, column);
      row = row * T::kRows + consumer * 64;
      column *= T::kColumns;
      // Two columns a thread, on their way while the tile is multiplied.
      const int mine = static_cast<int>(threadIdx.x) % 128;
      uint2 words = make_uint2(0, 0);
      if (mine < T::kColumns / 2) {
        words = make_uint2(scale_word(epilogue, column + 2 * mine),
                           bias_word(epilogue, column + 2 * mine));
      }
      const int first_row = row + warp % 4 * 16 + lane / 4;
      const RowScales row_scales(epilogue, first_row);
      int previous = -1;
      for (int step = first_step; step < end_step; ++step) {
        barrier_wait(&full[stage], phase);
        const uint32_t base = shared_address(ring) + stage * T::kStageBytes;
        const uint64_t x = swizzled_operand(base + consumer * 64 * kStageColumns);
        const uint64_t w = swizzled_operand(base + T::kXBytes);
        pin_registers(sum);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kStageColumns / 32; ++i) {
          wgmma_s8(sum, advance_operand(x, 32 * i), advance_operand(w, 32 * i),
                   step > first_step || i > 0);
        }
        wgmma_commit();
        pin_registers(sum);
        if (previous >= 0) {
          wgmma_wait<1>();
          release(previous);
        }
        previous = stage;
        if (++stage == T::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      wgmma_wait<0>();
      pin_registers(sum);
      release(previous);
      named_barrier(2 + consumer, 128);  // all are through with the last tile's
      if (mine < T::kColumns / 2) columns[consumer][mine] = words;
      named_barrier(2 + consumer, 128);
      if (order.split == 1) {
        finish_rows<T::kSums / 4>(epilogue, SharedColumns{columns[consumer]}, row_scales, first_row,
                                  column, [&](int j, int half) {
                                    return make_int2(sum[4 * j + 2 * half],
                                                     sum[4 * j + 2 * half + 1]);
                                  });
        continue;
      }
      // The only tile of this block: the ring is free once all consumers are through. Every block
      // leaves its sums there and finishes some strips of 32 columns from all of them.
      named_barrier(1, 128 * T::kConsumers);
      auto* parts = reinterpret_cast<int4*>(ring) + consumer * (T::kSums / 4 * 128) + mine;
#pragma unroll
      for (int i = 0; i < T::kSums / 4; ++i) {
        parts[i * 128] = make_int4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
      }
      cluster_sync();
      for (int strip = rank; strip < T::kSums / 16; strip += order.split) {
        int4 total[4] = {};
        for (int other = 0; other < order.split; ++other) {
          const uint32_t from = address_in_block(parts + strip * 4 * 128, other);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int4 v = load_cluster_sums(from + i * 128 * 16);
            total[i].x += v.x;
            total[i].y += v.y;
            total[i].z += v.z;
            total[i].w += v.w;
          }
        }
        finish_rows<4>(epilogue, SharedColumns{columns[consumer] + strip * 16}, row_scales,
                       first_row, column + 32 * strip, [&](int j, int half) {
                         return half == 0 ? make_int2(total[j].x, total[j].y)
                                          : make_int2(total[j].z, total[j].w);
                       });
      }
      cluster_sync();  // a block's memory lasts as long as others read it
    }
  }
#endif
}

}  // namespace kvopt::cuda::w8a8
