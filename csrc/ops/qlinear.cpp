// SPDX-License-Identifier: Apache-2.0
#include "ops/qlinear_cpu.h"

namespace kvopt::ops {

Tensor qlinear_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                   int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                   std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                   std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual) {
  QLinearCall c = make_qlinear({x, packed, meta, bias, n, bits, group_size, scheme, activation_bits,
                                input_scale, low_rank_x, low_rank_w, swiglu, residual},
                               kTile32);
  if (c.params.m > 0) run_qlinear_cpu(c);
  return c.y;
}

}  // namespace kvopt::ops
