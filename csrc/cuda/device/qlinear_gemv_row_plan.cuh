// SPDX-License-Identifier: Apache-2.0
// How the product of one row of x is dealt to blocks and warps, and what lies where in shared
// memory (qlinear_gemv_row.cuh).
//
//   W of the eight warps share a tile of 16 rows, a unit of columns each at a time: `turns` stages
//   of W units make a tile. 8 / W tiles side by side make a round of a block; all blocks together
//   sweep through the weight.
#pragma once

#include "cuda/device/qlinear_gemv_plan.cuh"

namespace kvopt::cuda::gemv {

constexpr int kRowWarps = 8, kRowLogWarps = 3;  // that multiply; one more fetches
constexpr int kRowStages = 16;                  // of the ring, at most
constexpr int kRowFewStages = 3;  // with fewer a block has the multiprocessor for itself
constexpr int kRowSlots = 16;     // rounds whose partial sums are kept

// What the kernel is compiled for, and sizes that follow. A segment lies in one group.
template <int kBits_, bool kBook_, bool kZeros_>
struct RowKind {
  static constexpr int kBits = kBits_;
  static constexpr bool kBook = kBook_, kZeros = kZeros_;
  static constexpr int kUnit = kBits == 2 ? 512 : kBits == 8 ? 128 : 256;  // columns
  static constexpr int kUnitBytes = kUnit * kBits * 2;
  static constexpr int kSegment = kBook ? 64 : 128, kSegments = kUnit / kSegment;
  static constexpr int kStride = kZeros ? 64 : 32;  // bytes of a group's parameters
  // Bytes of x (qlinear_gemv_row_x.cuh): planes of 64 columns, of a unit, of a segment's record.
  static constexpr int kPlanes = kBits >= 4 ? 3 : 4;
  static constexpr int kBlockX = kBook ? 128 : kPlanes == 3 ? 192 : 272;
  static constexpr int kUnitX = kUnit / 64 * kBlockX;
  static constexpr int kRecord = kBook ? 4 : 32;
};

struct RowPlan {
  int32_t warps_log2;           // W
  int32_t units, turns;         // of a tile
  int32_t rounds;               // of a block
  int32_t slots;                // rounds whose partial sums are kept until they are added
  int32_t stages, stage_bytes;  // of the ring
  int32_t segments;             // of a row
  int32_t spans;                // of 256 columns in x's place
  int32_t group_shift;          // from a segment to its group
  int32_t turn_codes, last_codes, turn_meta, last_meta;  // bytes of a tile's turns
  int64_t round_codes, round_meta;                       // from a block's tile to its next
  int32_t x_at, record_at, partial_at, ring_at, shared_bytes;
  int32_t grid;
  bool plain;  // sums and a bias, that is all
};

template <typename K>
bool row_fits(const QLinearProblem& p, const Device& device) {
  if (device.sm < 90 || p.m != 1 || p.activation_bits != 16 || !p.aligned) return false;
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return false;
  if (reinterpret_cast<uintptr_t>(p.input_scale) % 16 != 0) return false;
  return p.groups == 1 || (p.group_shift >= 0 && p.group_columns % K::kSegment == 0);
}

// stages 0: it does not fit.
template <typename K>
RowPlan make_row_plan(const QLinearProblem& p, const Device& device) {
  RowPlan plan{};
  plan.units = static_cast<int>(ceil_div(p.blocks * kBlockColumns, K::kUnit));
  while (plan.warps_log2 < kRowLogWarps && (1 << plan.warps_log2) < plan.units) ++plan.warps_log2;
  const int warps = 1 << plan.warps_log2, side = kRowWarps / warps;
  plan.turns = static_cast<int>(ceil_div(plan.units, warps));
  const int64_t strips = ceil_div(p.tiles, side);
  plan.rounds = static_cast<int>(ceil_div(strips, device.multiprocessors));
  plan.grid = static_cast<int>(ceil_div(strips, plan.rounds));
  plan.segments = static_cast<int>(ceil_div(p.k, K::kSegment));
  plan.group_shift = 30;
  if (p.groups > 1) {
    plan.group_shift = 0;
    while (K::kSegment << plan.group_shift < p.group_columns) ++plan.group_shift;
  }

  plan.turn_codes = warps * K::kUnitBytes;
  plan.last_codes = static_cast<int>(p.tile_bytes - int64_t{plan.turns - 1} * plan.turn_codes);
  const int turn_segments = warps * K::kSegments;
  const int turn_groups = std::max(1, turn_segments >> plan.group_shift);
  const int last_group = ((plan.turns - 1) * turn_segments) >> plan.group_shift;
  plan.turn_meta = turn_groups * K::kStride;
  plan.last_meta = std::min(turn_groups, p.groups - last_group) * K::kStride;
  plan.round_codes = p.tile_bytes * plan.grid * side;
  plan.round_meta = int64_t{p.groups} * K::kStride * plan.grid * side;
  plan.stage_bytes = kRowWarps * (K::kUnitBytes + K::kSegments * K::kStride);
  plan.slots = std::min(plan.rounds, kRowSlots);
  plan.plain = p.epilogue.is_plain() && p.epilogue.row_scale == nullptr;

  int at = K::kBook ? 256 * 128 : 0;
  const auto take = [&](int bytes) {
    const int start = at;
    at = (at + bytes + 127) / 128 * 128;
    return start;
  };
  // Whole spans of 256 columns.
  plan.spans = static_cast<int>(ceil_div(plan.units * K::kUnit, 256));
  plan.x_at = take(plan.spans * 4 * K::kBlockX);
  plan.record_at = take(plan.spans * (256 / K::kSegment) * K::kRecord);
  plan.partial_at = take(plan.slots * kRowWarps * 64);
  plan.ring_at = at;
  const int all = plan.rounds * plan.turns;
  // The driver and the static part have 1.5 KB of a block.
  int room = (device.multiprocessor_shared / 2 - 1536 - at) / plan.stage_bytes;
  if (room < kRowFewStages) room = (device.block_shared - 512 - at) / plan.stage_bytes;
  plan.stages = std::max(0, std::min({room, kRowStages, all}));
  plan.shared_bytes = at + plan.stages * plan.stage_bytes;
  return plan;
}

}  // namespace kvopt::cuda::gemv
