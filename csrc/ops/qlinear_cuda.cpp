// SPDX-License-Identifier: Apache-2.0
#include "ops/qlinear_cuda.h"

#include "cuda/wquant.h"

namespace kvopt::ops {
namespace {

// The product by cuBLAS on the dequantised weight, the epilogue by torch's operators: for so many
// rows that both cost little beside it.
Tensor dense_qlinear(const QLinearCall& c, void* stream) {
  const QLinearArguments& a = c.arguments;
  DequantizeCall d = make_dequantize(a.packed, a.meta, a.n, c.params.k, a.bits, a.group_size,
                                     a.scheme, a.x.scalar_type(), kMma16);
  CudaCall::check(cuda::wquant_dequantize(d.params, stream), "qlinear");
  const Tensor x = a.input_scale.has_value() ? aten_mul(a.x, *a.input_scale) : a.x;
  Tensor h = aten_linear(x, d.weight, a.bias);
  if (a.low_rank_x.has_value()) {
    h = aten_add(h, aten_linear(*a.low_rank_x, *a.low_rank_w, std::nullopt));
  }
  if (a.swiglu) {  // columns 16j + i are gate, 16j + 8 + i up
    const Tensor pairs = torch::stable::reshape(h, {c.params.m, a.n / 16, 2, 8});
    const Tensor gate = aten_silu(torch::stable::select(pairs, 2, 0));
    const Tensor product = aten_mul(gate, torch::stable::select(pairs, 2, 1));
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < c.y.dim(); ++i) shape.push_back(c.y.size(i));
    h = torch::stable::reshape(product, shape);
  }
  return a.residual.has_value() ? aten_add(h, *a.residual) : h;
}

}  // namespace

Tensor qlinear_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                    int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                    std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                    std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual) {
  CudaCall call(x);
  QLinearCall c = make_qlinear({x, packed, meta, bias, n, bits, group_size, scheme, activation_bits,
                                input_scale, low_rank_x, low_rank_w, swiglu, residual},
                               kMma16);
  if (c.params.m == 0) return c.y;
  // cuBLAS knows no int8 activations with a scale per token and group.
  if (c.params.activation_bits == 16 && cuda::prefers_dense(c.params)) {
    return dense_qlinear(c, call.stream());
  }
  run_qlinear_cuda(c, std::nullopt, call.stream());
  return c.y;
}

}  // namespace kvopt::ops
