// SPDX-License-Identifier: Apache-2.0
// Runs a product on a GPU: one of our kernels, after cuBLAS made the low-rank product of many rows.
#pragma once

#include "cuda/qlinear.h"
#include "ops/aten.h"
#include "ops/cuda_call.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {

// addend: (M, N), what is added before the activation; or none.
inline void run_qlinear_cuda(QLinearCall& c, std::optional<Tensor> addend, void* stream) {
  // From this many rows on cuBLAS makes the low-rank product; the kernels' epilogue does it for
  // fewer.
  constexpr int64_t kLowRankRows = 8;
  QLinearParams& p = c.params;
  if (p.rank > 0 && p.m > kLowRankRows) {
    const Tensor product =
        aten_linear(*c.arguments.low_rank_x, *c.arguments.low_rank_w, std::nullopt);
    addend = addend.has_value() ? aten_add(torch::stable::reshape(product, {p.m, p.n}), *addend)
                                : product;
    p.low_rank_x = p.low_rank_w = nullptr;
    p.rank = 0;
  }
  p.addend = data_or_null(addend);
  const std::optional<Tensor> workspace = make_workspace(c, cuda::qlinear_workspace_bytes(p));
  CudaCall::check(cuda::qlinear(p, stream), "qlinear");
}

}  // namespace kvopt::ops
