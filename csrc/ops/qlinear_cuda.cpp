// SPDX-License-Identifier: Apache-2.0
#include "cuda/qlinear.h"
#include "cuda/wquant.h"
#include "ops/aten.h"
#include "ops/cuda_call.h"
#include "ops/qlinear_common.h"

namespace kvopt::ops {
namespace {

// From this many rows on cuBLAS makes the low-rank product; the kernels' epilogue does it for
// fewer.
constexpr int64_t kLowRankRows = 8;

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
  QLinearParams& p = c.params;
  if (p.m == 0) return c.y;
  // cuBLAS knows no int8 activations with a scale per token and group.
  if (p.activation_bits == 16 && cuda::prefers_dense(p)) return dense_qlinear(c, call.stream());
  std::optional<Tensor> addend;
  if (p.rank > 0 && p.m > kLowRankRows) {
    addend = aten_linear(*c.arguments.low_rank_x, *c.arguments.low_rank_w, std::nullopt);
    p.addend = addend->const_data_ptr();
    p.low_rank_x = p.low_rank_w = nullptr;
    p.rank = 0;
  }
  const std::optional<Tensor> workspace = make_workspace(c, cuda::qlinear_workspace_bytes(p));
  CudaCall::check(cuda::qlinear(p, call.stream()), "qlinear");
  return c.y;
}

}  // namespace kvopt::ops
