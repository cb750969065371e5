// SPDX-License-Identifier: Apache-2.0
// Which tile the product on mma.sync takes. Host code only; qlinear_gemm.cuh has a kernel for each
// entry, in this order.
#pragma once

#include <algorithm>

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemm {

constexpr int kBookShared = 16 * 1024;  // a code book's table, beside the stages

// Of 8 rows of x in a warp: a code book's look-ups need registers.
constexpr int most_fragments(bool book) { return book ? 8 : 16; }

// A block: 8 * fragments rows of x, 16 * tiles * warps_n rows of w, K in warps_k parts. sm75, sm80:
// compiled for sm_75, for sm_80 and newer. many_groups: a new group every 16 columns is allowed,
// else every 64. alone, pair: microseconds of a block at K = 4096 on an H200, alone on a
// multiprocessor and two of them together; only their ratios matter.
struct ShapeInfo {
  int fragments, tiles, warps_n, warps_k;
  bool sm75, sm80, many_groups;
  double alone, pair;

  constexpr int rows_x() const { return 8 * fragments; }
  constexpr int rows_w() const { return 16 * tiles * warps_n; }
  // Three stages of x and codes on sm_80 and newer, two of x on sm_75; or the teams' sums of up to
  // 32 rows of x.
  constexpr int shared_bytes(const QuantFormat& f, int sm) const {
    const int x = warps_k * rows_x() * (kBlockColumns + 8) * 2;
    const int stages = sm >= 80 ? 3 * (x + warps_k * warps_n * tiles * f.bits * 128) : 2 * x;
    const int sums = warps_k * std::min(rows_x(), 32) * (rows_w() + 4) * 4;
    return (f.has_book() ? kBookShared : 0) + std::max(stages, sums);
  }
};

constexpr ShapeInfo kShapes[] = {
    {2, 1, 1, 8, true, true, false, 7.0, 10.9},    {2, 2, 1, 8, true, true, false, 8.6, 12.0},
    {2, 2, 2, 4, true, false, false, 12.0, 18.0},  {2, 4, 1, 8, false, true, false, 9.3, 15.4},
    {2, 4, 2, 4, false, true, false, 15.0, 26.0},  {4, 2, 2, 4, true, true, false, 12.2, 21.0},
    {4, 2, 4, 2, true, true, false, 20.2, 35.5},   {8, 2, 4, 2, true, true, false, 34.8, 56.0},
    {8, 4, 4, 2, false, true, false, 51.3, 103.0}, {16, 2, 8, 1, true, false, false, 113.0, 226.0},
    {2, 1, 1, 8, true, true, true, 12.0, 20.0},    {2, 2, 2, 4, true, true, true, 12.0, 21.0},
    {8, 2, 4, 2, true, true, true, 38.0, 67.0}};
constexpr int kShapeCount = static_cast<int>(sizeof(kShapes) / sizeof(kShapes[0]));

// Whether a shape is compiled for the product on the device, and fits.
inline bool shape_fits(const ShapeInfo& s, const QLinearProblem& p, const Device& device) {
  if (s.fragments > most_fragments(p.format.has_book())) return false;
  return (device.sm >= 80 ? s.sm80 : s.sm75) && p.tiles >= s.tiles &&
         s.many_groups == (p.group_columns % kBlockColumns != 0) &&
         ceil_div(p.n, s.rows_w()) <= 65535 &&  // of a grid's y
         s.shared_bytes(p.format, device.sm) <= device.block_shared;
}

// The shape whose busiest multiprocessor is done first.
inline int choose_shape_index(const QLinearProblem& p, const Device& device) {
  int best = -1;
  double best_cost = 0;
  for (int i = 0; i < kShapeCount; ++i) {
    const ShapeInfo& s = kShapes[i];
    if (!shape_fits(s, p, device)) continue;
    const int64_t blocks = ceil_div(p.m, s.rows_x()) * ceil_div(p.n, s.rows_w());
    const int64_t each = ceil_div(blocks, std::max(1, device.multiprocessors));
    const bool together =
        2 * (s.shared_bytes(p.format, device.sm) + 1024) <= device.multiprocessor_shared;
    const double two = together ? s.pair : 2 * s.alone;
    const double cost = static_cast<double>(each / 2) * two + (each % 2 == 1 ? s.alone : 0);
    if (best < 0 || cost < best_cost) {
      best = i;
      best_cost = cost;
    }
  }
  return best;
}

inline ShapeInfo choose_shape(const QLinearProblem& p, const Device& device) {
  return kShapes[std::max(0, choose_shape_index(p, device))];
}

}  // namespace kvopt::cuda::gemm
