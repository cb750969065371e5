// SPDX-License-Identifier: Apache-2.0
// Weight-only quantised product on the CPU: one table of entry points per instruction set, chosen
// once.
#pragma once

#include "common/params.h"
#include "cpu/isa.h"

namespace kvopt::cpu {

// Bytes of scratch that `prepare` fills and `run` reads.
int64_t qlinear_workspace_bytes(const QLinearParams& p, Isa isa);

// Both calls may be split over threads: `prepare` over rows of x, then (after all of it) `run` over
// row tiles of w (tile32::kRows each). Ranges are half open. No call allocates.
struct QLinearKernels {
  void (*prepare)(const QLinearParams& p, int64_t row_begin, int64_t row_end);
  void (*run)(const QLinearParams& p, int64_t tile_begin, int64_t tile_end);
};

const QLinearKernels& qlinear_kernels(Isa isa);

}  // namespace kvopt::cpu
