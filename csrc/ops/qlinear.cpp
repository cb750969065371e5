// SPDX-License-Identifier: Apache-2.0
#include "cpu/qlinear.h"

#include "ops/qlinear_common.h"

namespace kvopt::ops {

Tensor qlinear_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                   int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                   std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                   std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual) {
  QLinearCall c = make_qlinear({x, packed, meta, bias, n, bits, group_size, scheme, activation_bits,
                                input_scale, low_rank_x, low_rank_w, swiglu, residual},
                               kTile32);
  QLinearParams& p = c.params;
  if (p.m == 0) return c.y;
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
  return c.y;
}

}  // namespace kvopt::ops
