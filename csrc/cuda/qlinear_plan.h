// SPDX-License-Identifier: Apache-2.0
// Which kernel computes a product, decided on the host from sizes, formats and the chip alone: the
// same question always has the same answer, and nothing is tuned while running.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {

enum class QLinearPath : int32_t {
  kGemv,      // few rows: tensor-core matrix-vector product
  kWgmma,     // tiled product on sm_90's warpgroup instructions
  kGemm,      // tiled product on mma.sync
  kW8A8Gemv,  // int8 x int8, few rows
  kW8A8,      // int8 x int8, tiled
  kSimt,      // fp32 arithmetic
  kDense,     // dequantise the weight, then cuBLAS; the caller does that
};

struct QLinearPlan {
  QLinearPath path;
  QLinearPath fused;  // what `qlinear` launches: `path`, or the best of the others for kDense
  const char* why;    // one sentence, for `path`
  bool prologue;      // x is prepared in the workspace first
  int64_t pitch;      // elements of a row of it
  // Byte offsets in the workspace, multiples of 256: prepared rows, their scales, partial sums.
  int64_t rows_at, scales_at, partials_at, workspace_bytes;
};

bool is_valid_product(const QLinearParams& p);
QLinearPlan plan_qlinear(const QLinearParams& p, const Device& device);

}  // namespace kvopt::cuda
