// SPDX-License-Identifier: Apache-2.0
// The part of the qlinear operator that does not depend on the device.
#pragma once

#include "ops/wquant_common.h"

namespace kvopt::ops {

struct QLinearCall {
  Tensor x, y;
  QLinearParams params;  // workspace still null
};

inline QLinearCall make_qlinear(const Tensor& x_in, const Tensor& packed, const Tensor& meta,
                                const std::optional<Tensor>& bias, int64_t n, int64_t bits,
                                int64_t group_size, bool symmetric, const Layout& layout) {
  const char* op = "qlinear";
  STD_TORCH_CHECK(x_in.dim() >= 1, op,
                  ": x must have at least one dimension (..., K), got a scalar");
  const int64_t k = x_in.size(-1);
  const QuantFormat format =
      check_packed(packed, meta, n, k, bits, group_size, symmetric, layout, op);
  const DType dtype = kernel_dtype(x_in.scalar_type(), op, "x");
  check_same_device(packed, x_in, op, "packed");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == x_in.scalar_type() && bias->is_contiguous(), op,
                    ": bias must be contiguous and of the dtype of x");
    check_shape(*bias, {n}, op, "bias");
    check_same_device(*bias, x_in, op, "bias");
  }
  std::vector<int64_t> shape;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x_in.dim(); ++i) {
    shape.push_back(x_in.size(i));
    m *= x_in.size(i);
  }
  shape.push_back(n);
  Tensor x = torch::stable::contiguous(x_in);
  Tensor y = torch::stable::new_empty(x, shape);
  QLinearParams p{m,
                  n,
                  k,
                  dtype,
                  format,
                  x.const_data_ptr(),
                  static_cast<const uint8_t*>(packed.const_data_ptr()),
                  static_cast<const uint16_t*>(meta.const_data_ptr()),
                  bias.has_value() ? bias->const_data_ptr() : nullptr,
                  y.mutable_data_ptr(),
                  nullptr};
  return {x, y, p};
}

}  // namespace kvopt::ops
