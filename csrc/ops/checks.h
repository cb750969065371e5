// SPDX-License-Identifier: Apache-2.0
// What every operator checks before a kernel sees a pointer. A message names the op, the argument,
// what came and what was expected; it reaches Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

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

// The format, once it is known to be one that the kernels take for `k` columns.
inline QuantFormat check_format(int64_t bits, int64_t group_size, bool symmetric, int64_t n,
                                int64_t k, const char* op) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
  STD_TORCH_CHECK(n >= 1 && k >= 1, op, ": the weight needs at least one row and one column, got (",
                  n, ", ", k, ")");
  STD_TORCH_CHECK(n <= INT32_MAX && k <= INT32_MAX, op, ": the weight is too large: (", n, ", ", k,
                  ")");
  STD_TORCH_CHECK(
      group_size == k || (group_size >= 16 && group_size % 16 == 0 && group_size <= k), op,
      ": group_size must be a multiple of 16 up to the number of columns, or that number itself (",
      k, "), got ", group_size);
  return {static_cast<int32_t>(bits), static_cast<int32_t>(group_size), symmetric};
}

}  // namespace kvopt::ops
