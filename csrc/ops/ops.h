// SPDX-License-Identifier: Apache-2.0
// Every operator function, per device, as registration.cpp registers it. Schemas and meanings stand
// there.
#pragma once

#include <tuple>

#include "ops/checks.h"

namespace kvopt::ops {

using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor qlinear_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                   int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                   std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                   std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual);
Triple wquant_rtn_cpu(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme);
Pair wquant_pack_cpu(Tensor codes, Tensor scale, Tensor zero, int64_t bits, int64_t group_size,
                     int64_t scheme);
Triple wquant_unpack_cpu(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                         int64_t group_size, int64_t scheme);
Tensor wquant_dequantize_cpu(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                             int64_t group_size, int64_t scheme, ScalarType dtype);
Tensor wquant_expand_scales_cpu(Tensor absmax_codes, Tensor absmax_scale, Tensor offset, int64_t n,
                                int64_t k, int64_t bits, int64_t group_size, int64_t scheme);
Quadruple gptq_block_cpu(Tensor weight, Tensor factor, std::optional<Tensor> importance,
                         std::optional<Tensor> scale, std::optional<Tensor> zero, int64_t begin,
                         int64_t end, int64_t bits, int64_t group_size, int64_t scheme,
                         int64_t steps, double smallest);
Triple wsearch_cpu(Tensor weight, std::optional<Tensor> importance, int64_t bits,
                   int64_t group_size, int64_t scheme, int64_t steps, double smallest);
Triple wsearch_hqq_cpu(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme,
                       int64_t iterations, double beta, double kappa, double norm);

Tensor qlinear_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                    int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                    std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                    std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual);
Triple wquant_rtn_cuda(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme);
Pair wquant_pack_cuda(Tensor codes, Tensor scale, Tensor zero, int64_t bits, int64_t group_size,
                      int64_t scheme);
Triple wquant_unpack_cuda(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                          int64_t group_size, int64_t scheme);
Tensor wquant_dequantize_cuda(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                              int64_t group_size, int64_t scheme, ScalarType dtype);
Tensor wquant_expand_scales_cuda(Tensor absmax_codes, Tensor absmax_scale, Tensor offset, int64_t n,
                                 int64_t k, int64_t bits, int64_t group_size, int64_t scheme);
Quadruple gptq_block_cuda(Tensor weight, Tensor factor, std::optional<Tensor> importance,
                          std::optional<Tensor> scale, std::optional<Tensor> zero, int64_t begin,
                          int64_t end, int64_t bits, int64_t group_size, int64_t scheme,
                          int64_t steps, double smallest);
Triple wsearch_cuda(Tensor weight, std::optional<Tensor> importance, int64_t bits,
                    int64_t group_size, int64_t scheme, int64_t steps, double smallest);
Triple wsearch_hqq_cuda(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme,
                        int64_t iterations, double beta, double kappa, double norm);

}  // namespace kvopt::ops
