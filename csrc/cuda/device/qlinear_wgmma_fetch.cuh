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
struct CodeFetcher {
  static constexpr int kTileBytes = tile_stage_bytes<kBits, S>();

  const QLinearProblem& p;
  const Plan& plan;
  const CUtensorMap& map;
  Barriers& barriers;
  unsigned char* const shared;
  const int rank, lane;

  // What this lane copies of a stage: codes of a row tile (lanes 0..15), its parameters (16..31).
  struct Copies {
    int bytes;     // none: 0
    int expected;  // of all lanes, without x
    const void* source;
    int target;  // from the stage's begin
  };

  __device__ __forceinline__ Copies copies_of(const Tile& tile, int stage) const {
    const int column = stage * S::kCodeBlocks * kBlockColumns;
    const int group = group_of_column(p, column);
    const int last = group_of_column(p, column + S::kCodeBlocks * kBlockColumns - 1);
    // What lies behind the tile's last block stays what it was: any code will do for the zeros that
    // x has there.
    const int64_t offset = static_cast<int64_t>(stage) * kTileBytes;
    const int codes =
        static_cast<int>(min(static_cast<int64_t>(kTileBytes), p.tile_bytes - offset));
    const int parameters = (last - group + 1) * (p.format.has_zeros() ? 64 : 32);
    const int i = lane % 16, row_tile = tile.w * S::kTiles16 + i;
    const int tiles = min(S::kTiles16, p.tiles - tile.w * S::kTiles16);
    Copies c;
    c.bytes = i >= tiles ? 0 : lane < 16 ? codes : parameters;
    c.expected = tiles * (codes + parameters);
    c.source = lane < 16 ? static_cast<const void*>(p.packed + row_tile * p.tile_bytes + offset)
                         : static_cast<const void*>(p.meta + meta_offset(p, row_tile, group, 0));
    c.target = lane < 16 ? i * kTileBytes : S::kTiles16 * kTileBytes + i * plan.meta;
    return c;
  }

  // Announces all that a stage will hold, and starts the copies of codes (of parameters, of both).
  __device__ __forceinline__ void announce(const Copies& c, int slot) const {
    if (lane == 0) {
      barrier_expect(&barriers.codes_full[slot], c.expected + (S::kOneRing ? S::kStageX : 0));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void start(const Copies& c, int slot, bool codes,
                                        bool parameters) const {
    if (c.bytes == 0 || !(lane < 16 ? codes : parameters)) return;
    copy_bulk(shared + plan.codes + slot * plan.stage_codes + c.target, c.source, c.bytes,
              &barriers.codes_full[slot], plan.tiles_x > 1 ? kEvictNormal : kEvictFirst);
  }

  // Codes may be fetched before the kernel before has ended: nothing writes them while products
  // run. The first stage; the next ones, into L2, so that the rest of the first does not queue
  // behind them.
  __device__ __forceinline__ void run_early() const {
    const Segment s = Walk(plan).take(rank);
    const Tile tile(plan, s.tile);
    const Copies c = copies_of(tile, s.begin);
    announce(c, 0);
    start(c, 0, true, false);
    const int row_tile = tile.w * S::kTiles16 + lane;
    const int64_t from = static_cast<int64_t>(s.begin + 1) * kTileBytes;
    const int64_t to = min(
        static_cast<int64_t>(min(s.end, s.begin + plan.stages_codes)) * kTileBytes, p.tile_bytes);
    if (lane < S::kTiles16 && row_tile < p.tiles && from < to) {
      prefetch_bulk(p.packed + row_tile * p.tile_bytes + from, static_cast<uint32_t>(to - from));
    }
  }

  __device__ __forceinline__ void run() const {
    Ring ring;
    bool early = true;
    for (Walk walk(plan); walk.more();) {
      const Segment s = walk.take(rank);
      const Tile tile(plan, s.tile);
      for (int stage = s.begin; stage < s.end; ++stage) {
        const Copies c = copies_of(tile, stage);  // before the wait
        if (!early) {
          barrier_wait(&barriers.codes_empty[ring.slot], ring.parity ^ 1);
          announce(c, ring.slot);
        }
        start(c, ring.slot, !early, true);
        early = false;
        if (S::kOneRing && lane < S::kBlocksX) {
          copy_box(shared + ring.slot * S::kStageX + lane * S::kRowsX * 128, &map,
                   stage * S::kCodeBlocks * kBlockColumns + lane * kBlockColumns,
                   tile.x * S::kRowsX, &barriers.codes_full[ring.slot], kEvictLast);
        }
        ring.next(plan.stages_codes);
      }
    }
  }
};

// The warp that fetches x into a ring of its own.
template <typename S>
__device__ __forceinline__ void fetch_x(const Plan& plan, const CUtensorMap& map,
                                        Barriers& barriers, unsigned char* shared, int rank,
                                        int lane) {
  Ring ring;
  for (Walk walk(plan); walk.more();) {
    const Segment s = walk.take(rank);
    const int row = Tile(plan, s.tile).x * S::kRowsX;
    for (int block = s.begin * S::kCodeBlocks; block < s.end * S::kCodeBlocks;
         block += S::kBlocksX) {
      barrier_wait(&barriers.x_empty[ring.slot], ring.parity ^ 1);
      unsigned char* const stage = shared + ring.slot * S::kStageX;
      uint64_t* const full = &barriers.x_full[ring.slot];
      if (lane == 0) {
        barrier_expect(full, S::kStageX);
#pragma unroll
        for (int i = 0; i < S::kBlocksX; ++i) {
          copy_box(stage + i * S::kRowsX * 128, &map, (block + i) * kBlockColumns, row, full,
                   kEvictLast);
        }
      }
      ring.next(plan.stages_x);
    }
  }
}

#endif  // KVOPT_HAS_WGMMA

}  // namespace kvopt::cuda::wgmma
