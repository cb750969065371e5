// SPDX-License-Identifier: Apache-2.0
// The part of the solvers' operators that does not depend on the device: validate, allocate,
// describe to the kernel.
#pragma once

#include <algorithm>

#include "common/gptq.h"
#include "ops/ops.h"

namespace kvopt::ops {

inline QuantFormat check_integer_format(int64_t bits, int64_t group_size, int64_t scheme, int64_t n,
                                        int64_t k, const char* op) {
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  STD_TORCH_CHECK(!format.has_book(), op, ": scheme must be an integer one (0, 1 or 4), got ",
                  scheme);
  return format;
}

inline SearchGrid check_grid(int64_t steps, double smallest, const char* op) {
  STD_TORCH_CHECK(steps >= 0 && steps <= kMaxSearchSteps, op, ": steps must be 0 to ",
                  kMaxSearchSteps, ", got ", steps);
  STD_TORCH_CHECK(smallest > 0 && smallest <= 1, op, ": smallest must be in (0, 1], got ",
                  smallest);
  return {static_cast<int32_t>(steps), smallest};
}

// Whether the weight is double; float otherwise.
inline bool check_real(const Tensor& weight, const char* op) {
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be 2-dimensional (N, K), got ",
                  weight.dim(), " dimensions");
  const ScalarType type = weight.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": weight must be float32 or float64, got dtype number ", static_cast<int>(type));
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weight must be contiguous");
  return type == ScalarType::Double;
}

inline void check_like(const Tensor& t, std::vector<int64_t> shape, const Tensor& weight,
                       const char* op, const char* argument) {
  check_same_type(t, weight, op, argument);
  check_shape(t, std::move(shape), op, argument);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous");
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// What is allocated, and what was checked; `params` describes it to a kernel of type T.
struct SearchCall {
  Tensor weight, codes, scale, zero;
  std::optional<Tensor> importance;
  QuantFormat format;
  SearchGrid grid;
  bool is_double;

  template <typename T>
  SearchParams<T> params() const {
    return {weight.size(0),
            weight.size(1),
            format,
            grid,
            static_cast<const T*>(weight.const_data_ptr()),
            data_or_null<T>(importance),
            static_cast<uint8_t*>(codes.mutable_data_ptr()),
            static_cast<uint16_t*>(scale.mutable_data_ptr()),
            static_cast<uint16_t*>(zero.mutable_data_ptr())};
  }
};

inline SearchCall make_search(const Tensor& weight, const std::optional<Tensor>& importance,
                              int64_t bits, int64_t group_size, int64_t scheme, int64_t steps,
                              double smallest) {
  const char* op = "wsearch";
  const bool is_double = check_real(weight, op);
  const int64_t n = weight.size(0), k = weight.size(1);
  const QuantFormat format = check_integer_format(bits, group_size, scheme, n, k, op);
  const SearchGrid grid = check_grid(steps, smallest, op);
  if (importance.has_value()) check_like(*importance, {k}, weight, op, "importance");
  const int64_t groups = group_count(format, k);
  Tensor codes = torch::stable::new_empty(weight, {n, k}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  Tensor zero = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  return {weight, codes, scale, zero, importance, format, grid, is_double};
}

struct HqqCall {
  Tensor codes, scale, zero;
  HqqParams params;
};

inline HqqCall make_hqq(const Tensor& weight, int64_t bits, int64_t group_size, int64_t scheme,
                        int64_t iterations, double beta, double kappa, double norm) {
  const char* op = "wsearch_hqq";
  STD_TORCH_CHECK(!check_real(weight, op), op, ": weight must be float32");
  const int64_t n = weight.size(0), k = weight.size(1);
  const QuantFormat format = check_format(bits, group_size, scheme, n, k, op);
  STD_TORCH_CHECK(format.has_zeros(), op, ": scheme must be 0 (asymmetric), got ", scheme);
  STD_TORCH_CHECK(iterations >= 1 && iterations <= 1000, op, ": iterations must be 1 to 1000, got ",
                  iterations);
  STD_TORCH_CHECK(beta > 0 && kappa > 0, op, ": beta and kappa must be positive, got ", beta,
                  " and ", kappa);
  STD_TORCH_CHECK(norm > 0 && norm <= 1, op, ": norm must be in (0, 1], got ", norm);
  const int64_t groups = group_count(format, k);
  Tensor codes = torch::stable::new_empty(weight, {n, k}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  Tensor zero = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  return {codes,
          scale,
          zero,
          {n, k, format, static_cast<int32_t>(iterations), static_cast<float>(beta),
           static_cast<float>(kappa), static_cast<float>(norm),
           static_cast<const float*>(weight.const_data_ptr()),
           static_cast<uint8_t*>(codes.mutable_data_ptr()),
           static_cast<uint16_t*>(scale.mutable_data_ptr()),
           static_cast<uint16_t*>(zero.mutable_data_ptr())}};
}

}  // namespace kvopt::ops
