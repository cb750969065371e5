// SPDX-License-Identifier: Apache-2.0
// The part of the qlinear_outliers operator that does not depend on the device.
#pragma once

#include <cmath>

#include "common/outliers.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {

struct OutlierCall {
  QLinearCall product;
  OutlierParams params;  // part still null
  Tensor inlier_scale;
  Tensor scratch;  // what params points to: bitmap, columns, count
};

inline OutlierCall make_outliers(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias,
                                 int64_t n, double threshold, std::optional<Tensor> input_scale,
                                 std::optional<Tensor> low_rank_x, std::optional<Tensor> low_rank_w,
                                 bool swiglu, std::optional<Tensor> residual,
                                 const Layout& layout) {
  const char* op = "qlinear_outliers";
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension (..., K), got a scalar");
  STD_TORCH_CHECK(threshold > 0 && std::isfinite(threshold), op,
                  ": threshold must be a positive number, got ", threshold);
  QLinearCall product = make_qlinear(
      {x, packed, meta, bias, n, 8, x.size(-1), static_cast<int64_t>(Scheme::kInt8Dynamic), 8,
       input_scale, low_rank_x, low_rank_w, swiglu, residual},
      layout, op);
  const QLinearParams& q = product.params;
  Tensor inlier_scale = torch::stable::new_empty(product.y, {q.k});
  const int64_t words = bitmap_words(q.k);
  Tensor scratch = torch::stable::new_empty(product.y, {words + q.k + 1}, ScalarType::Int);
  OutlierParams p{};
  p.m = q.m;
  p.n = q.n;
  p.k = q.k;
  p.dtype = q.dtype;
  p.format = q.format;
  p.threshold = static_cast<float>(threshold);
  p.x = q.x;
  p.input_scale = q.input_scale;
  p.packed = q.packed;
  p.meta = q.meta;
  p.inlier_scale = inlier_scale.mutable_data_ptr();
  auto* const numbers = static_cast<int32_t*>(scratch.mutable_data_ptr());
  p.bitmap = reinterpret_cast<uint32_t*>(numbers);
  p.columns = numbers + words;
  p.count = numbers + words + q.k;
  return {std::move(product), p, inlier_scale, scratch};
}

// (M, N) in the type of y, for OutlierParams::part.
inline Tensor make_part(OutlierCall& c) {
  Tensor part = torch::stable::new_empty(c.product.y, {c.params.m, c.params.n});
  c.params.part = part.mutable_data_ptr();
  return part;
}

}  // namespace kvopt::ops
