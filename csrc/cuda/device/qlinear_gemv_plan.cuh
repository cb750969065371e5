// SPDX-License-Identifier: Apache-2.0
// How a matrix-vector product is dealt to blocks and warps, and what lies where
// in shared memory.
//
//   W warps share a tile of 16 rows; each takes `turns` consecutive units of
//   its columns. T such groups make a block and walk over the tiles: tile =
//   (round * gridDim + blockIdx) * T + group, so that all blocks together sweep
//   through the weight.
#pragma once

#include <algorithm>

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemv {

constexpr int kMaxRows = 8;

// Columns of a unit, what a warp loads at a time: 2 KB of codes where the
// registers for group parameters allow it. A fold is what lies in one group for
// sure, in steps of 16 columns.
KVOPT_HOST_DEVICE constexpr int unit_columns(int bits, int fold_steps) {
  if (bits == 3) return 256;
  if (bits == 8 || fold_steps < 4) return 128;
  return bits == 4 ? 256 : 512;
}

// Sixteen warps fill a multiprocessor, with two units in registers each.
constexpr int kWarps = 16, kDepth = 2;

struct Plan {
  int32_t warps, groups;  // W, T
  int32_t units, turns;   // of a tile, of a warp's share of it
  int32_t rounds;         // tiles of a group
  int32_t slots;          // rounds whose partial sums are kept until they are added
  int32_t x_pitch;        // bytes of a row of x
  int32_t record_pitch;   // bytes of two rows' records
  int32_t row_pairs;
  int32_t last_tile;          // from the first tile of a group to that of its last round
  uint32_t group_reciprocal;  // ceil(2^31 / steps of a group), see group_of_step
  // Of W, T and M, see divide.
  uint32_t warps_reciprocal, groups_reciprocal, rows_reciprocal;
  // Bytes from the start of shared memory.
  int32_t x_at, record_at, partial_at, absmax_at;
  int32_t shared_bytes;
  int32_t grid;
  int64_t codes_stride, meta_stride;  // bytes from a tile of a warp to its next

  KVOPT_HOST_DEVICE int block_warps() const { return warps * groups; }
};

// A division by the steps of a group in one multiplication: (n + 1/2) / d,
// rounded down, is n / d. Exact while steps of a row times steps of a group
// stay below 2^30.
__device__ __forceinline__ int group_of_step(const QLinearProblem& p, const Plan& plan, int step) {
  return min(static_cast<int>(__umulhi(2 * step + 1, plan.group_reciprocal)), p.groups - 1);
}

// n / d for d <= 16 and n < 2^24. 2^32 / d does not fit for d = 1: 0 stands for
// it.
inline uint32_t reciprocal(int d) {
  return d == 1 ? 0 : static_cast<uint32_t>(ceil_div(int64_t{1} << 32, d));
}
__device__ __forceinline__ int divide(int n, uint32_t reciprocal) {
  return reciprocal == 0 ? n : static_cast<int>(__umulhi(n, reciprocal));
}

// Columns after which sums are folded into the row's sum: they lie in one group
// of the weight.
inline int fold_steps(const QLinearProblem& p) {
  int steps = 8;
  if (p.groups > 1) {
    while (p.group_columns % (steps * kStepColumns) != 0) steps /= 2;
  }
  return steps;
}

// fp16 as it is and aligned: nothing is converted.
KVOPT_HOST_DEVICE inline bool is_plain(const QLinearProblem& p) {
  return p.activation_bits != 8 && p.dtype == DType::kFloat16 && p.input_scale == nullptr &&
         p.aligned;
}
// The sums are rounded and stored, that is all.
KVOPT_HOST_DEVICE inline bool only_stores(const Epilogue& e) {
  return e.is_plain() && e.bias == nullptr && e.row_scale == nullptr;
}

struct Deal {
  int warps, turns;
  int64_t cost;  // units that the busiest warp multiplies
};

// The fewest warps to a tile (their sums must be added) that keep within 4 % of
// the least work of the busiest warp.
inline Deal deal_tiles(int64_t tiles, int units, int64_t multiprocessors) {
  Deal best{1, units, 0};
  const auto cost = [&](int warps, int turns) {
    const int64_t at_a_time = multiprocessors * (kWarps / warps);
    return ceil_div(tiles, at_a_time) * turns;
  };
  best.cost = cost(1, units);
  for (int want = 2; want <= kWarps; want *= 2) {
    const int turns = static_cast<int>(ceil_div(units, want));
    const int warps = static_cast<int>(ceil_div(units, turns));
    const int64_t c = cost(warps, turns);
    if (c * 104 < best.cost * 100) best = {warps, turns, c};
  }
  return best;
}

inline Plan make_plan(const QLinearProblem& p, const Device& device) {
  const int fold = fold_steps(p), unit = unit_columns(p.format.bits, fold);
  Plan plan{};
  plan.units = static_cast<int>(ceil_div(p.blocks * kBlockColumns, unit));
  const Deal deal = deal_tiles(p.tiles, plan.units, device.multiprocessors);
  plan.warps = deal.warps;
  plan.turns = deal.turns;
  plan.groups = std::max(1, std::min(kWarps / plan.warps,
                                     static_cast<int>(ceil_div(p.tiles, device.multiprocessors))));
  const int warps = plan.block_warps();
  plan.grid =
      static_cast<int>(std::min<int64_t>(ceil_div(p.tiles, plan.groups), device.multiprocessors));
  plan.rounds = static_cast<int>(ceil_div(p.tiles, int64_t{plan.grid} * plan.groups));

  plan.last_tile = (plan.rounds - 1) * plan.grid * plan.groups;
  plan.warps_reciprocal = reciprocal(plan.warps);
  plan.groups_reciprocal = reciprocal(plan.groups);
  plan.rows_reciprocal = reciprocal(p.m);
  plan.codes_stride = p.tile_bytes * plan.grid * plan.groups;
  plan.meta_stride = int64_t{p.format.has_zeros() ? 64 : 32} * p.groups * plan.grid * plan.groups;

  plan.group_reciprocal =
      static_cast<uint32_t>(ceil_div(int64_t{1} << 31, p.group_columns / kStepColumns));
  plan.row_pairs = (p.m + 1) / 2;
  plan.x_pitch = plan.units * unit * 2 + 32;
  plan.record_pitch = plan.units * unit / (fold * kStepColumns) * 16 + 16;

  const int round_bytes = warps * 16 * p.m * 4;
  plan.slots = std::max(1, std::min(plan.rounds, 49152 / round_bytes));
  // A batch of rounds must end with the ring where it began.
  if (plan.slots < plan.rounds) plan.slots = std::max(1, plan.slots / kDepth) * kDepth;

  int at = p.format.has_book() ? 256 * 128 : 0;
  const auto take = [&](int bytes) {
    const int start = at;
    at = (at + bytes + 127) / 128 * 128;
    return start;
  };
  plan.x_at = take(plan.x_pitch * p.m);
  plan.record_at = take(plan.record_pitch * plan.row_pairs);
  plan.partial_at = take(plan.slots * round_bytes);
  plan.absmax_at = take(p.activation_bits == 8 ? p.groups * p.m * 4 : 0);
  plan.shared_bytes = at;
  return plan;
}

}  // namespace kvopt::cuda::gemv
