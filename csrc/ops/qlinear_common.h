// SPDX-License-Identifier: Apache-2.0
// The part of the qlinear operator that does not depend on the device.
#pragma once

#include "ops/wquant_common.h"

namespace kvopt::ops {

struct QLinearArguments {  // as in the schema
  Tensor x, packed, meta;
  std::optional<Tensor> bias;
  int64_t n, bits, group_size, scheme, activation_bits;
  std::optional<Tensor> input_scale, low_rank_x, low_rank_w;
  bool swiglu;
  std::optional<Tensor> residual;
};

struct QLinearCall {
  QLinearArguments arguments;  // contiguous; keeps what `params` points to
  Tensor y;
  QLinearParams params;  // workspace still null
};

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// A vector or matrix that belongs to the weight: of the dtype and on the device of x.
inline void check_companion(const std::optional<Tensor>& t, const Tensor& x,
                            std::vector<int64_t> shape, const char* op, const char* argument) {
  if (!t.has_value()) return;
  check_same_type(*t, x, op, argument);
  check_shape(*t, std::move(shape), op, argument);
  STD_TORCH_CHECK(t->is_contiguous(), op, ": ", argument, " must be contiguous");
}

// The same for something with the rows of x, made contiguous.
inline void check_rows(std::optional<Tensor>& t, const Tensor& x, std::vector<int64_t> shape,
                       int64_t columns, const char* op, const char* argument) {
  if (!t.has_value()) return;
  check_same_type(*t, x, op, argument);
  shape.back() = columns;
  check_shape(*t, std::move(shape), op, argument);
  t = torch::stable::contiguous(*t);
}

inline QLinearCall make_qlinear(QLinearArguments a, const Layout& layout,
                                const char* op = "qlinear") {
  STD_TORCH_CHECK(a.x.dim() >= 1, op,
                  ": x must have at least one dimension (..., K), got a scalar");
  const int64_t k = a.x.size(-1);
  const QuantFormat format =
      check_packed(a.packed, a.meta, a.n, k, a.bits, a.group_size, a.scheme, layout, op);
  const DType dtype = kernel_dtype(a.x.scalar_type(), op, "x");
  check_same_device(a.packed, a.x, op, "packed");
  STD_TORCH_CHECK(a.activation_bits == 8 || a.activation_bits == 16, op,
                  ": activation_bits must be 8 or 16, got ", a.activation_bits);
  STD_TORCH_CHECK(!a.swiglu || a.n % 16 == 0, op,
                  ": n must be a multiple of 16 with swiglu (rows of gate and up alternate in "
                  "eights), got ",
                  a.n);
  std::vector<int64_t> shape;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < a.x.dim(); ++i) {
    shape.push_back(a.x.size(i));
    m *= a.x.size(i);
  }
  shape.push_back(a.swiglu ? a.n / 2 : a.n);

  check_companion(a.bias, a.x, {a.n}, op, "bias");
  check_companion(a.input_scale, a.x, {k}, op, "input_scale");
  STD_TORCH_CHECK(a.low_rank_x.has_value() == a.low_rank_w.has_value(), op,
                  ": low_rank_x and low_rank_w come together, got only ",
                  a.low_rank_x.has_value() ? "low_rank_x" : "low_rank_w");
  int64_t rank = 0;
  if (a.low_rank_w.has_value()) {
    STD_TORCH_CHECK(a.low_rank_w->dim() == 2 && a.low_rank_w->size(1) >= 1, op,
                    ": low_rank_w must have shape (N, rank) with rank >= 1, got ",
                    a.low_rank_w->dim(), " dimensions");
    rank = a.low_rank_w->size(1);
    check_companion(a.low_rank_w, a.x, {a.n, rank}, op, "low_rank_w");
    check_rows(a.low_rank_x, a.x, shape, rank, op, "low_rank_x");
  }
  check_rows(a.residual, a.x, shape, shape.back(), op, "residual");
  if (!a.x.is_contiguous()) a.x = torch::stable::contiguous(a.x);

  Tensor y = make_empty(a.x, shape, a.x.scalar_type());
  QLinearParams p{};
  p.m = m;
  p.n = a.n;
  p.k = k;
  p.dtype = dtype;
  p.format = format;
  p.x = a.x.const_data_ptr();
  p.packed = static_cast<const uint8_t*>(a.packed.const_data_ptr());
  p.meta = static_cast<const uint16_t*>(a.meta.const_data_ptr());
  p.bias = data_or_null(a.bias);
  p.y = y.mutable_data_ptr();
  p.activation_bits =
      format.scheme == Scheme::kInt8Dynamic ? 8 : static_cast<int32_t>(a.activation_bits);
  p.swiglu = a.swiglu;
  p.input_scale = data_or_null(a.input_scale);
  p.low_rank_x = data_or_null(a.low_rank_x);
  p.low_rank_w = data_or_null(a.low_rank_w);
  p.rank = rank;
  p.residual = data_or_null(a.residual);
  return {std::move(a), y, p};
}

// Scratch memory of a call; the caller keeps it until the kernels are launched or done.
inline std::optional<Tensor> make_workspace(QLinearCall& c, int64_t bytes) {
  if (bytes == 0) return std::nullopt;
  Tensor workspace = make_empty(c.y, {bytes}, ScalarType::Byte);
  c.params.workspace = workspace.mutable_data_ptr();
  return workspace;
}

}  // namespace kvopt::ops
