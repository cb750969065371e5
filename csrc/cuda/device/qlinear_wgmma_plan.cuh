// SPDX-License-Identifier: Apache-2.0
// The warpgroup product's division of work: the shapes of a block's tile, what the host decides of
// it, the order of tiles, the stages in shared memory. See qlinear_wgmma.cuh.
#pragma once

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::wgmma {

constexpr int kMaxStages = 16;
constexpr int kMaxSplits = 8;    // blocks of a portable cluster
constexpr int kBookCopies = 16;  // of a code book's table, against bank conflicts

// resident: blocks of a multiprocessor. One: the copying warps give their registers away.
template <int kRowsX_, int kTiles_, int kSteps_, int kSets_, int kCodeBlocks_, int kBlocksX_,
          int kResident_>
struct Shape {
  static constexpr int kWarpgroups = 2;  // that multiply
  static constexpr int kConsumers = kWarpgroups * 128;
  static constexpr int kConsumerWarps = kConsumers / 32;
  static constexpr int kRowsX = kRowsX_;  // N of the instruction
  static constexpr int kTiles = kTiles_;  // of 64 rows of w, per warpgroup
  static constexpr int kSteps = kSteps_;  // of 16 columns in a set of A registers: 1, 2 or 4
  static constexpr int kSets = kSets_;    // of A registers
  static constexpr int kBlocksX = kBlocksX_;
  static constexpr int kResident = kResident_;
  static constexpr int kCodeBlocks = kCodeBlocks_;
  static constexpr int kRowsW = kTiles * kWarpgroups * 64;
  static constexpr bool kOneRing = kBlocksX == kCodeBlocks;  // x lies in the stages of codes
  static constexpr int kTiles16 = kRowsW / 16;
  static constexpr bool kGiveRegisters = kResident == 1;
  static constexpr int kRegisters = 232;  // of a multiplying thread
  static constexpr int kRegistersCopying = 40;
  static constexpr int kThreads = kConsumers + (kGiveRegisters ? 128 : kOneRing ? 32 : 64);
  static constexpr int kStageX = kBlocksX * kRowsX * 128;
  static constexpr int kSliceX = kRowsX < 128 ? kRowsX : 128;  // see store_finished
  static constexpr int kSlices = kTiles * kRowsX / kSliceX;
  static constexpr int kColumns = kWarpgroups * 64;  // see store_finished
  static constexpr int kPitchSums = kColumns + 4;    // of a row of sums, in floats
  static constexpr int kPitchOut = kRowsW * 2 + 16;  // of a row of y in shared memory
};

// What the host decides (make_plan in qlinear_wgmma_launch.cuh); sizes and offsets in bytes.
struct Plan {
  int tiles_x, tiles_w;  // of the product
  int band;              // tiles of x that are done for all rows of w before the next ones
  int splits;            // blocks of a cluster that share a tile's columns
  int stages;            // of a tile, 64 * kCodeBlocks columns each
  bool even;             // blocks share tiles so that all do as many stages
  float4* partials;      // even: sums of the tiles that a block leaves to others
  uint64_t* published;   // even: kPublished when they are there
  int stages_x, stages_codes;
  int meta;              // room for the parameters of 16 rows in a stage of codes
  int stage_codes;       // codes and parameters
  int codes, out, book;  // where they begin; x begins at 0
  int bytes;             // of all, and to reach the swizzle's period
  bool staged;           // y leaves through shared memory, whole rows of a tile at a time
};

template <int kBits, typename S>
constexpr int tile_stage_bytes() {
  return S::kCodeBlocks * 128 * kBits;
}

// Position in a ring of stages: the slot and the parity of its current phase.
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

struct Barriers {
  uint64_t codes_full[kMaxStages], codes_empty[kMaxStages];
  uint64_t x_full[kMaxStages], x_empty[kMaxStages];
};

// The tile that is `index`-th in turn. Within a band, tiles that share codes are neighbours, and a
// band's rows of x stay in L2 while all codes pass by.
struct Tile {
  int x, w;
  __device__ __forceinline__ Tile(const Plan& plan, int index) {
    const int in_band = plan.band * plan.tiles_w;
    const int band = index / in_band;
    const int width = min(plan.band, plan.tiles_x - band * plan.band);
    const int rest = index - band * in_band;
    w = rest / width;
    x = band * plan.band + rest - w * width;
  }
};

// Stages [begin, end) of a tile.
struct Segment {
  int tile, begin, end;
};

// What a block does, in turn. Either tiles, or the part of a tile's stages that falls to a block of
// the cluster; or (even) all stages of all tiles in a row, in as many equal runs as there are
// blocks. A run is done from its end to its beginning: what it has of a tile whose end lies in a
// later run comes first, and is left in `partials`; the tile whose end it has, and earlier runs the
// beginning, comes last. So blocks wait only for earlier blocks, and for what these did first.
struct Walk {
  const Plan& plan;
  int at, end, step;  // tiles; even: the stages [end, at) are left

  __device__ __forceinline__ explicit Walk(const Plan& plan) : plan(plan) {
    const int block = static_cast<int>(blockIdx.x);
    if (plan.even) {
      at = first_of(block + 1);
      end = first_of(block);
      step = 0;
    } else {
      at = block / plan.splits;
      end = plan.tiles_x * plan.tiles_w;
      step = static_cast<int>(gridDim.x) / plan.splits;
    }
  }
  __device__ __forceinline__ int all() const { return plan.tiles_x * plan.tiles_w * plan.stages; }
  // Of a block's run; the block whose run has a stage. (32 bits: make_plan sees to it.)
  __device__ __forceinline__ int first_of(int block) const {
    return static_cast<int>(static_cast<unsigned>(block * all()) / gridDim.x);
  }
  __device__ __forceinline__ int block_of(int stage) const {
    return static_cast<int>(((stage + 1) * gridDim.x - 1) / static_cast<unsigned>(all()));
  }
  __device__ __forceinline__ bool more() const { return plan.even ? at > end : at < end; }
  __device__ __forceinline__ Segment take(int rank) {
    Segment s;
    if (plan.even) {
      s.tile = (at - 1) / plan.stages;
      const int first = s.tile * plan.stages;
      s.begin = max(end - first, 0);
      s.end = at - first;
      at = first + s.begin;
    } else {
      s = {at, rank * plan.stages / plan.splits, (rank + 1) * plan.stages / plan.splits};
      at += step;
    }
    return s;
  }
};

}  // namespace kvopt::cuda::wgmma
