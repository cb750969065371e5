// SPDX-License-Identifier: Apache-2.0
// How a matrix-vector product is dealt to blocks and warps, and what lies where in shared memory.
//
//   W warps share a tile of 16 rows. A unit is what a warp loads at a time; unit u of a tile goes
//   to warp u % W. T such groups make a block (T > 1 only where K is short) and walk over the
//   tiles: tile = (blockIdx + round * gridDim) * T + group.
#pragma once

#include <algorithm>

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemv {

constexpr int kMaxRows = 8;
constexpr int kMaxWarps = 16;
constexpr int kMaxThreads = kMaxWarps * 32;

// Columns of a unit, 2 KB of codes where the registers for group parameters allow it. A fold is
// what lies in one group for sure, in steps of 16 columns.
KVOPT_HOST_DEVICE constexpr int unit_columns(int bits, int fold_steps) {
  if (bits == 3) return 256;
  if (bits == 8 || fold_steps < 4) return 128;
  return bits == 4 ? 256 : 512;
}

KVOPT_HOST_DEVICE constexpr int code_bytes(int bits, int columns) { return columns * 2 * bits; }

struct Plan {
  int32_t warps, groups;  // W, T
  int32_t units;          // of a tile
  int32_t part_columns;   // of a warp's units of a tile, whether they exist or not
  int32_t prefetch;       // units that are asked for to come to L2 ahead
  int32_t slots;          // rounds whose partial sums are kept until they are added
  int32_t x_pitch;        // bytes of a row of x in a warp's part
  int32_t record_pitch;   // bytes of two rows' records
  int32_t row_pairs;
  uint32_t group_reciprocal;  // ceil(2^31 / steps of a group), see group_of_step
  // Bytes from the start of shared memory. x and records: the warp's share times the warp.
  int32_t x_at, x_share, record_at, record_share, partial_at, absmax_at;
  int32_t shared_bytes;
  int32_t grid;
  bool direct_x;  // few activations go to registers at once

  KVOPT_HOST_DEVICE int block_warps() const { return warps * groups; }
};

// A division by the steps of a group in one multiplication: (n + 1/2) / d, rounded down, is n / d.
// Exact while steps of a row times steps of a group stay below 2^30.
__device__ __forceinline__ int group_of_step(const QLinearProblem& p, const Plan& plan, int step) {
  return min(static_cast<int>(__umulhi(2 * step + 1, plan.group_reciprocal)), p.groups - 1);
}

// Columns after which sums are folded into the row's sum: they lie in one group of the weight.
inline int fold_steps(const QLinearProblem& p) {
  int steps = 8;
  if (p.groups > 1) {
    while (p.group_columns % (steps * kStepColumns) != 0) steps /= 2;
  }
  return steps;
}

struct Choice {
  int warps, blocks_per_multiprocessor;
};

// Sixteen warps a multiprocessor. In one block where there are no more tiles than multiprocessors,
// so that a short product has all of its codes under way at once, and for several rows of x, which
// the block's warps share; else in two, which wait less for each other.
inline Choice choose(const QLinearProblem& p, const Device& device) {
  const bool wide = p.tiles <= device.multiprocessors || p.m > 2;
  return {wide ? 16 : 8, wide ? 1 : 2};
}

inline Plan make_plan(const QLinearProblem& p, const Device& device) {
  const Choice choice = choose(p, device);
  const int fold = fold_steps(p), unit = unit_columns(p.format.bits, fold);
  Plan plan{};
  plan.units = static_cast<int>(ceil_div(p.blocks * kBlockColumns, unit));
  const int turns = static_cast<int>(ceil_div(plan.units, choice.warps));
  plan.warps = static_cast<int>(ceil_div(plan.units, turns));
  plan.part_columns = turns * unit;
  plan.groups = std::max(1, std::min(choice.warps / plan.warps,
                                     static_cast<int>(ceil_div(p.tiles, device.multiprocessors))));
  const int warps = plan.block_warps();
  plan.prefetch = 1;

  plan.group_reciprocal =
      static_cast<uint32_t>(ceil_div(int64_t{1} << 31, p.group_columns / kStepColumns));
  plan.row_pairs = (p.m + 1) / 2;
  plan.x_pitch = plan.part_columns * 2 + 32;
  plan.x_share = plan.x_pitch * p.m;
  plan.record_pitch = plan.part_columns / (fold * kStepColumns) * 16 + 16;
  plan.record_share = plan.record_pitch * plan.row_pairs;
  plan.direct_x = p.aligned && p.m == 1;

  const int round_bytes = warps * 16 * p.m * 4;
  plan.grid = std::min(static_cast<int>(ceil_div(p.tiles, plan.groups)),
                       device.multiprocessors * choice.blocks_per_multiprocessor);
  const int rounds = static_cast<int>(ceil_div(p.tiles, plan.grid * plan.groups));
  plan.slots = std::max(1, std::min(rounds, 16384 / round_bytes));

  int at = p.format.has_book() ? 256 * 128 : 0;
  const auto take = [&](int bytes) {
    const int start = at;
    at = (at + bytes + 127) / 128 * 128;
    return start;
  };
  plan.x_at = take(warps * plan.x_share);
  plan.record_at = take(warps * plan.record_share);
  plan.partial_at = take(plan.slots * round_bytes);
  plan.absmax_at = take(p.activation_bits == 8 ? p.groups * p.m * 4 : 0);
  plan.shared_bytes = at;
  return plan;
}

}  // namespace kvopt::cuda::gemv
