// SPDX-License-Identifier: Apache-2.0
// What every operator checks before a kernel sees a pointer. A message names the op, the argument,
// what came and what was expected; it reaches Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/params.h"

namespace kvopt::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType kernel_dtype(ScalarType type, const char* op, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument,
                      " must be float32, float16 or bfloat16, got dtype number ",
                      static_cast<int>(type));
  }
}

inline void check_type(const Tensor& t, ScalarType type, const char* type_name, const char* op,
                       const char* argument) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", argument, " must be ", type_name,
                  ", got dtype number ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous");
}

inline void check_shape(const Tensor& t, std::vector<int64_t> expected, const char* op,
                        const char* argument) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(i) == expected[i];
  if (same) return;
  std::string got, want;
  for (int64_t i = 0; i < t.dim(); ++i) got += (i ? ", " : "") + std::to_string(t.size(i));
  for (size_t i = 0; i < expected.size(); ++i)
    want += (i ? ", " : "") + std::to_string(expected[i]);
  STD_TORCH_CHECK(false, op, ": ", argument, " must have shape (", want, "), got (", got, ")");
}

inline void check_same_device(const Tensor& t, const Tensor& as, const char* op,
                              const char* argument) {
  STD_TORCH_CHECK(t.device() == as.device(), op, ": ", argument,
                  " must be on the device of the first argument");
}

inline void check_same_type(const Tensor& t, const Tensor& as, const char* op,
                            const char* argument) {
  STD_TORCH_CHECK(t.scalar_type() == as.scalar_type(), op, ": ", argument,
                  " must have the dtype of the first argument (number ",
                  static_cast<int>(as.scalar_type()), "), got dtype number ",
                  static_cast<int>(t.scalar_type()));
  check_same_device(t, as, op, argument);
}

// An uninitialised contiguous tensor on the device of `like`. torch::stable::new_empty passes the
// dispatcher twice on its way to the same call: some microseconds, which a small product feels.
inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), to<int32_t>(from(type)),
                                                  device_type, device_index, &made));
  return Tensor(made);
}

inline bool is_scheme(int64_t scheme, Scheme expected) {
  return scheme == static_cast<int64_t>(expected);
}

// The format, once it is known to be one that the kernels take for a weight (n, k).
inline QuantFormat check_format(int64_t bits, int64_t group_size, int64_t scheme, int64_t n,
                                int64_t k, const char* op) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op,
                  ": bits must be 2, 3, 4 or 8, got ", bits);
  STD_TORCH_CHECK(scheme >= 0 && scheme <= static_cast<int64_t>(Scheme::kInt8Dynamic), op,
                  ": scheme must be 0 (asymmetric), 1 (symmetric), 2 (nf4), 3 (fp4) or 4 (int8 "
                  "dynamic), got ",
                  scheme);
  const bool book = is_scheme(scheme, Scheme::kNf4) || is_scheme(scheme, Scheme::kFp4);
  STD_TORCH_CHECK(!book || bits == 4, op, ": bits must be 4 for the code book of scheme ", scheme,
                  ", got ", bits);
  STD_TORCH_CHECK(n >= 1 && k >= 1, op, ": the weight needs at least one row and one column, got (",
                  n, ", ", k, ")");
  STD_TORCH_CHECK(n <= INT32_MAX && k <= INT32_MAX, op, ": the weight is too large: (", n, ", ", k,
                  ")");
  STD_TORCH_CHECK(
      group_size == k || (group_size >= 16 && group_size % 16 == 0 && group_size <= k), op,
      ": group_size must be a multiple of 16 up to the number of columns, or that number itself (",
      k, "), got ", group_size);
  if (is_scheme(scheme, Scheme::kInt8Dynamic)) {
    STD_TORCH_CHECK(bits == 8, op, ": bits must be 8 for int8 dynamic, got ", bits);
    STD_TORCH_CHECK(group_size == k, op,
                    ": group_size must be the number of columns for int8 dynamic (", k, "), got ",
                    group_size);
  }
  return {static_cast<int32_t>(bits), static_cast<int32_t>(group_size),
          static_cast<Scheme>(scheme)};
}

}  // namespace kvopt::ops
