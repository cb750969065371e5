// SPDX-License-Identifier: Apache-2.0
// The warpgroup product's copying warps: they start copies into the stages as these fall free, a
// ring's length ahead of the multiplications, across the ends of tiles.
#pragma once

#include <cuda.h>

#include "cuda/device/qlinear_wgmma_plan.cuh"
#include "cuda/device/wgmma.cuh"

namespace kvopt::cuda::wgmma {

#if KVOPT_HAS_WGMMA

// The warp that fetches codes and parameters; kOneRing: and x.
template <int kBits, typename S>
__device__ __forceinline__ void fetch_codes(const QLinearProblem& p, const Plan& plan,
                                            const CUtensorMap& map, Barriers& barriers,
                                            unsigned char* shared, int rank, int lane) {
  const Share<S> share(p, plan, rank);
  constexpr int kTileBytes = tile_stage_bytes<kBits, S>();
  const int meta_unit = p.format.has_zeros() ? 64 : 32;
  const uint64_t policy = plan.tiles_x > 1 ? kEvictNormal : kEvictFirst;
  Ring ring;
  for (int index = blockIdx.x / plan.splits; index < plan.tiles_x * plan.tiles_w;
       index += gridDim.x / plan.splits) {
    const Tile tile(plan, index);
    const int first_tile = tile.w * S::kTiles16;
    const int tiles = min(S::kTiles16, p.tiles - first_tile);
    const int i = lane % 16;
    for (int s = share.begin; s < share.end; ++s) {
      barrier_wait(&barriers.codes_empty[ring.slot], ring.parity ^ 1);
      unsigned char* const stage = shared + plan.codes + ring.slot * plan.stage_codes;
      uint64_t* const full = &barriers.codes_full[ring.slot];
      // What lies behind the tile's last block stays what it was: any code will do for the zeros
      // that x has there.
      const int64_t offset = static_cast<int64_t>(s) * kTileBytes;
      const int bytes =
          static_cast<int>(min(static_cast<int64_t>(kTileBytes), p.tile_bytes - offset));
      const int column = s * S::kCodeBlocks * kBlockColumns;
      const int group = group_of_column(p, column);
      const int groups =
          group_of_column(p, column + S::kCodeBlocks * kBlockColumns - 1) - group + 1;
      if (lane == 0) {
        barrier_expect(full, tiles * (bytes + groups * meta_unit) + (S::kOneRing ? S::kStageX : 0));
      }
      __syncwarp();
      if (i < tiles) {
        const int row_tile = first_tile + i;
        if (lane < 16) {
          copy_bulk(stage + i * kTileBytes, p.packed + row_tile * p.tile_bytes + offset, bytes,
                    full, policy);
        } else {
          copy_bulk(stage + S::kTiles16 * kTileBytes + i * plan.meta,
                    p.meta + meta_offset(p, row_tile, group, 0), groups * meta_unit, full, policy);
        }
      }
      if (S::kOneRing && lane < S::kBlocksX) {
        copy_box(shared + ring.slot * S::kStageX + lane * S::kRowsX * 128, &map,
                 column + lane * kBlockColumns, tile.x * S::kRowsX, full, kEvictLast);
      }
      ring.next(plan.stages_codes);
    }
  }
}

// The codes of this block's first stages.
template <int kBits, typename S>
__device__ __forceinline__ void prefetch_codes(const QLinearProblem& p, const Plan& plan, int rank,
                                               int lane) {
  const int row_tile = Tile(plan, blockIdx.x / plan.splits).w * S::kTiles16 + lane;
  if (lane >= S::kTiles16 || row_tile >= p.tiles) return;
  const int64_t stage = tile_stage_bytes<kBits, S>();
  const int64_t offset = Share<S>(p, plan, rank).begin * stage;
  const int64_t bytes = min(plan.stages_codes * stage, p.tile_bytes - offset);
  prefetch_bulk(p.packed + row_tile * p.tile_bytes + offset, static_cast<uint32_t>(bytes));
}

// The thread that fetches x into a ring of its own.
template <typename S>
__device__ __forceinline__ void fetch_x(const QLinearProblem& p, const Plan& plan,
                                        const CUtensorMap& map, Barriers& barriers,
                                        unsigned char* shared, int rank) {
  const Share<S> share(p, plan, rank);
  Ring ring;
  for (int index = blockIdx.x / plan.splits; index < plan.tiles_x * plan.tiles_w;
       index += gridDim.x / plan.splits) {
    const int row = Tile(plan, index).x * S::kRowsX;
    for (int block = share.begin * S::kCodeBlocks; block < share.end * S::kCodeBlocks;
         block += S::kBlocksX) {
      barrier_wait(&barriers.x_empty[ring.slot], ring.parity ^ 1);
      unsigned char* const stage = shared + ring.slot * S::kStageX;
      uint64_t* const full = &barriers.x_full[ring.slot];
      barrier_expect(full, S::kStageX);
#pragma unroll
      for (int i = 0; i < S::kBlocksX; ++i) {
        copy_box(stage + i * S::kRowsX * 128, &map, (block + i) * kBlockColumns, row, full,
                 kEvictLast);
      }
      ring.next(plan.stages_x);
    }
  }
}

#endif  // KVOPT_HAS_WGMMA

}  // namespace kvopt::cuda::wgmma
