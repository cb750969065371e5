// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "cuda/qlinear.h"
#include "cuda/wquant.h"
#include "ops/cuda_call.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {
namespace {

Tensor dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_TARGET_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor qlinear_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                    int64_t bits, int64_t group_size, bool symmetric) {
  CudaCall call(x);
  QLinearCall c = make_qlinear(x, packed, meta, bias, n, bits, group_size, symmetric, kMma16);
  QLinearParams& p = c.params;
  if (p.m == 0) return c.y;
  if (cuda::prefers_dense(p)) {
    DequantizeCall d = make_dequantize(packed, meta, n, p.k, bits, group_size, symmetric,
                                       c.x.scalar_type(), kMma16);
    CudaCall::check(cuda::wquant_dequantize(d.params, call.stream()), "qlinear");
    return dense_linear(c.x, d.weight, bias);
  }
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
