// SPDX-License-Identifier: Apache-2.0
// Which tile the product on mma.sync takes. Host code only; qlinear_gemm.cuh has a kernel for each
// entry, in this order.
#pragma once

#include <algorithm>

#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda::gemm {

constexpr int kStaticShared = 2048;  // beside the stages: the code book's table, rounded up

// kSm75: fits sm_75's 64 KB; kSm80: used on sm_80 and newer. alone, pair: what a block costs on an
// H200 per K, in one unit, alone on a multiprocessor and two of them together.
struct ShapeInfo {
  int fragments, tiles, warps_n, warps_k;
  bool sm75, sm80;
  double alone, pair;

  constexpr int rows_x() const { return 8 * fragments; }
  constexpr int rows_w() const { return 16 * tiles * warps_n; }
  // Of two stages: x, codes and parameters.
  constexpr int shared_bytes(int bits) const {
    return 2 * (rows_x() * (kBlockColumns * warps_k + 8) * 2 +
                warps_n * warps_k * tiles * (bits * 128 + 4 * 64));
  }
};

constexpr ShapeInfo kShapes[] = {{2, 2, 1, 8, false, true, 7.1, 10.0},     //
                                 {2, 2, 2, 4, true, true, 10.0, 15.0},     //
                                 {4, 1, 4, 2, true, true, 13.0, 21.0},     //
                                 {8, 1, 4, 2, true, true, 20.5, 41.0},     //
                                 {8, 2, 4, 2, false, true, 32.5, 65.0},    //
                                 {16, 1, 8, 1, true, false, 60.0, 120.0},  //
                                 {16, 2, 8, 1, false, true, 98.0, 196.0}};
constexpr int kShapeCount = static_cast<int>(sizeof(kShapes) / sizeof(kShapes[0]));

// The shape whose busiest multiprocessor is done first.
inline int choose_shape_index(const QLinearProblem& p, const Device& device) {
  int best = -1;
  double best_cost = 0;
  for (int i = 0; i < kShapeCount; ++i) {
    const ShapeInfo& s = kShapes[i];
    if (device.sm >= 80 ? !s.sm80 : !s.sm75) continue;
    if (s.shared_bytes(p.format.bits) > device.block_shared - kStaticShared) continue;
    const int64_t blocks = ceil_div(p.m, s.rows_x()) * ceil_div(p.n, s.rows_w());
    const int64_t each = ceil_div(blocks, std::max(1, device.multiprocessors));
    // sm_75's shared memory holds one block.
    const double two = device.sm >= 80 ? s.pair : 2 * s.alone;
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
