// SPDX-License-Identifier: Apache-2.0
// Torch's own operators that the stable headers do not wrap, called through the dispatcher.
#pragma once

#include <array>

#include "ops/checks.h"

namespace kvopt::ops {

template <typename... Arguments>
Tensor call_aten(const char* name, const char* overload, const Arguments&... arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_TARGET_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor aten_linear(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  return call_aten("aten::linear", "", x, weight, bias);
}

inline Tensor aten_mul(const Tensor& a, const Tensor& b) {
  return call_aten("aten::mul", "Tensor", a, b);
}

inline Tensor aten_add(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}

inline Tensor aten_silu(const Tensor& a) { return call_aten("aten::silu", "", a); }

}  // namespace kvopt::ops
