// SPDX-License-Identifier: Apache-2.0
// The part of gptq_block that does not depend on the device.
#pragma once

#include "ops/wsearch_common.h"

namespace kvopt::ops {

struct GptqCall {
  Tensor weight, factor, codes, errors, scale, zero;
  std::optional<Tensor> importance, given_scale, given_zero;
  int64_t begin, end;
  QuantFormat format;
  SearchGrid grid;
  bool is_double;

  template <typename T>
  GptqBlockParams<T> params() const {
    const bool given = given_scale.has_value();
    return {weight.size(0),
            weight.size(1),
            begin,
            end,
            format,
            grid,
            static_cast<const T*>(weight.const_data_ptr()),
            static_cast<const T*>(factor.const_data_ptr()),
            data_or_null<T>(importance),
            data_or_null<uint16_t>(given_scale),
            data_or_null<uint16_t>(given_zero),
            static_cast<uint8_t*>(codes.mutable_data_ptr()),
            static_cast<T*>(errors.mutable_data_ptr()),
            given ? nullptr : static_cast<uint16_t*>(scale.mutable_data_ptr()),
            given ? nullptr : static_cast<uint16_t*>(zero.mutable_data_ptr())};
  }
};

inline GptqCall make_gptq(const Tensor& weight, const Tensor& factor,
                          const std::optional<Tensor>& importance,
                          const std::optional<Tensor>& given_scale,
                          const std::optional<Tensor>& given_zero, int64_t begin, int64_t end,
                          int64_t bits, int64_t group_size, int64_t scheme, int64_t steps,
                          double smallest) {
  const char* op = "gptq_block";
  const bool is_double = check_real(weight, op);
  const int64_t n = weight.size(0), k = weight.size(1);
  const QuantFormat format = check_integer_format(bits, group_size, scheme, n, k, op);
  const SearchGrid grid = check_grid(steps, smallest, op);
  check_like(factor, {k, k}, weight, op, "factor");
  if (importance.has_value()) check_like(*importance, {k}, weight, op, "importance");
  STD_TORCH_CHECK(0 <= begin && begin < end && end <= k && end - begin <= kGptqBlock, op,
                  ": begin and end must be a block of at most ", kGptqBlock, " of the ", k,
                  " columns, got ", begin, " and ", end);
  const int64_t size = end - begin;
  const bool given = given_scale.has_value();
  STD_TORCH_CHECK(given == given_zero.has_value(), op,
                  ": scale and zero must both be given or both be left out");
  if (given) {
    for (const auto& [t, name] : {std::pair{*given_scale, "scale"}, {*given_zero, "zero"}}) {
      check_type(t, ScalarType::Half, "float16", op, name);
      check_shape(t, {n, size}, op, name);
      check_same_device(t, weight, op, name);
    }
  } else {
    // Else a group's later columns would not be in the working copy that its scale is taken from.
    STD_TORCH_CHECK(size <= group_size || size % group_size == 0 || end == k, op,
                    ": a block that chooses scales must hold whole groups of ", group_size,
                    " columns, or lie in one; got columns ", begin, " to ", end);
  }
  const int64_t groups = given ? 0 : gptq_groups(begin, end, group_size);
  Tensor codes = torch::stable::new_empty(weight, {n, size}, ScalarType::Byte);
  Tensor errors = torch::stable::new_empty(weight, {n, size}, weight.scalar_type());
  Tensor scale = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  Tensor zero = torch::stable::new_empty(weight, {n, groups}, ScalarType::Half);
  return {weight,      factor,     codes, errors, scale,  zero, importance,
          given_scale, given_zero, begin, end,    format, grid, is_double};
}

}  // namespace kvopt::ops
