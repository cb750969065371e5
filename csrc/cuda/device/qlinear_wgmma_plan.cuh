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
  int splits;            // blocks of a cluster, which share a tile's columns
  int stages_x, stages_codes;
  int meta;              // room for the parameters of 16 rows in a stage of codes
  int stage_codes;       // codes and parameters
  int codes, out, book;  // where they begin; x begins at 0
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

// Stages [begin, end) of K that this block of the cluster multiplies.
template <typename S>
struct Share {
  int begin, end;
  __device__ __forceinline__ Share(const QLinearProblem& p, const Plan& plan, int rank) {
    const int stages = (p.blocks + S::kCodeBlocks - 1) / S::kCodeBlocks;
    begin = rank * stages / plan.splits;
    end = (rank + 1) * stages / plan.splits;
  }
};

}  // namespace kvopt::cuda::wgmma
