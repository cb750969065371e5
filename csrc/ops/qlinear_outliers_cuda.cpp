// SPDX-License-Identifier: Apache-2.0
#include "cuda/outliers.h"
#include "ops/qlinear_cuda.h"
#include "ops/qlinear_outliers_common.h"

namespace kvopt::ops {

Tensor qlinear_outliers_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias,
                             int64_t n, double threshold, std::optional<Tensor> input_scale,
                             std::optional<Tensor> low_rank_x, std::optional<Tensor> low_rank_w,
                             bool swiglu, std::optional<Tensor> residual) {
  CudaCall call(x);
  OutlierCall c = make_outliers(x, packed, meta, bias, n, threshold, input_scale, low_rank_x,
                                low_rank_w, swiglu, residual, kMma16);
  if (c.params.m == 0) return c.product.y;
  const char* op = "qlinear_outliers";
  CudaCall::check(cuda::outliers_find(c.params, call.stream()), op);
  c.product.params.input_scale = c.params.inlier_scale;
  std::optional<Tensor> workspace;
  if (const int64_t bytes = cuda::outliers_workspace_bytes(c.params); bytes > 0) {
    workspace = torch::stable::new_empty(c.product.y, {bytes}, ScalarType::Byte);
    c.params.workspace = workspace->mutable_data_ptr();
  }
  if (swiglu || residual.has_value()) {  // what comes after the sum must not come before
    const Tensor part = make_part(c);
    CudaCall::check(cuda::outliers_multiply(c.params, call.stream()), op);
    run_qlinear_cuda(c.product, part, call.stream());
    return c.product.y;
  }
  // Added afterwards, the part costs nothing where there are no outliers.
  run_qlinear_cuda(c.product, std::nullopt, call.stream());
  c.params.part = c.product.y.mutable_data_ptr();
  c.params.accumulate = true;
  CudaCall::check(cuda::outliers_multiply(c.params, call.stream()), op);
  return c.product.y;
}

}  // namespace kvopt::ops
