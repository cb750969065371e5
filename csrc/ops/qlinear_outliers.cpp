// SPDX-License-Identifier: Apache-2.0
#include "cpu/outliers.h"
#include "ops/qlinear_cpu.h"
#include "ops/qlinear_outliers_common.h"

namespace kvopt::ops {

Tensor qlinear_outliers_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias,
                            int64_t n, double threshold, std::optional<Tensor> input_scale,
                            std::optional<Tensor> low_rank_x, std::optional<Tensor> low_rank_w,
                            bool swiglu, std::optional<Tensor> residual) {
  OutlierCall c = make_outliers(x, packed, meta, bias, n, threshold, input_scale, low_rank_x,
                                low_rank_w, swiglu, residual, kTile32);
  const OutlierParams& p = c.params;
  if (p.m == 0) return c.product.y;
  constexpr int64_t kGrain = 1 << 15;  // elements that pay for waking a thread
  torch::stable::parallel_for(
      0, bitmap_words(p.k), std::max<int64_t>(1, kGrain / (32 * p.m)),
      [&](int64_t begin, int64_t end) { cpu::outliers_mark(p, begin, end); });
  const int64_t count = cpu::outliers_collect(p);
  std::optional<Tensor> part;
  if (count > 0) {
    cpu::outliers_scale(p);
    Tensor gathered = torch::stable::new_empty(c.scratch, {p.m, count}, ScalarType::Float);
    auto* const values = static_cast<float*>(gathered.mutable_data_ptr());
    part = make_part(c);
    torch::stable::parallel_for(
        0, p.m, std::max<int64_t>(1, kGrain / count),
        [&](int64_t begin, int64_t end) { cpu::outliers_gather(p, count, values, begin, end); });
    const int64_t work_per_tile = tile32::kRows * count * std::max<int64_t>(1, p.m);
    torch::stable::parallel_for(
        0, ceil_div(p.n, tile32::kRows), std::max<int64_t>(1, 4 * kGrain / work_per_tile),
        [&](int64_t begin, int64_t end) { cpu::outliers_multiply(p, count, values, begin, end); });
    c.product.params.input_scale = p.inlier_scale;
    c.product.params.addend = p.part;
  }
  run_qlinear_cpu(c.product);
  return c.product.y;
}

}  // namespace kvopt::ops
