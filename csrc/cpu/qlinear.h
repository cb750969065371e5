// SPDX-License-Identifier: Apache-2.0
// Quantised product on the CPU. One table of entry points for each way to compute it, and one
// analytic rule that chooses the table.
#pragma once

#include "common/params.h"
#include "cpu/isa.h"

namespace kvopt::cpu {

struct QLinearKernels {
  // Bytes of scratch that `prepare` fills and `run` reads; 64-byte aligned.
  int64_t (*workspace_bytes)(const QLinearParams& p);
  // Both calls may be split over threads: `prepare` over rows of x, then (after all of it) `run`
  // over row tiles of w (tile32::kRows each). Ranges are half open. No call allocates.
  void (*prepare)(const QLinearParams& p, int64_t row_begin, int64_t row_end);
  void (*run)(const QLinearParams& p, int64_t tile_begin, int64_t tile_end);
};

// The rule of qlinear.cpp, by instruction set, scheme, bits, activation bits, dtype and M.
const QLinearKernels& qlinear_kernels(const QLinearParams& p, Isa isa);

// Writes which path the product takes and why, in one line of text, at most `size` bytes with the
// closing zero. Returns the length of the whole text, as snprintf does.
int qlinear_explain(const QLinearParams& p, Isa isa, char* out, int size);

}  // namespace kvopt::cpu
