// SPDX-License-Identifier: Apache-2.0
// Runs a product on the CPU, split over torch's threads.
#pragma once

#include "cpu/qlinear.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {

inline void run_qlinear_cpu(QLinearCall& c) {
  QLinearParams& p = c.params;
  const cpu::QLinearKernels& kernels = cpu::qlinear_kernels(p, cpu::selected_isa());
  const std::optional<Tensor> workspace = make_workspace(c, kernels.workspace_bytes(p));

  // A thread must have enough to read that waking it (some microseconds) pays: about 128 KiB of
  // weights at M = 1.
  constexpr int64_t kGrainBytes = 128 << 10;
  constexpr int64_t kGrainElements = 1 << 15;
  torch::stable::parallel_for(0, p.m, std::max<int64_t>(1, kGrainElements / p.k),
                              [&](int64_t begin, int64_t end) { kernels.prepare(p, begin, end); });
  const int64_t work_per_tile = tile32::tile_bytes(p.format, p.k) * std::max<int64_t>(1, p.m / 4);
  torch::stable::parallel_for(0, ceil_div(p.n, tile32::kRows),
                              std::max<int64_t>(1, kGrainBytes / work_per_tile),
                              [&](int64_t begin, int64_t end) { kernels.run(p, begin, end); });
}

}  // namespace kvopt::ops
