// SPDX-License-Identifier: Apache-2.0
#include "cuda/qlinear.h"

#include "ops/cuda_call.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {

Tensor qlinear_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                    int64_t bits, int64_t group_size, bool symmetric) {
  CudaCall call(x);
  QLinearCall c = make_qlinear(x, packed, meta, bias, n, bits, group_size, symmetric, kMma16);
  QLinearParams& p = c.params;
  if (p.m == 0) return c.y;
  const int64_t bytes = cuda::qlinear_workspace_bytes(p);
  Tensor workspace;
  if (bytes > 0) {
    workspace = torch::stable::new_empty(c.x, {bytes}, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
  }
  CudaCall::check(cuda::qlinear(p, call.stream()), "qlinear");
  return c.y;
}

}  // namespace kvopt::ops
