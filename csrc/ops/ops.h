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

// The eleven tensors and two numbers of a store, in the order of common/kv_store.h.
#define KVOPT_STORE_PARAMETERS                                                         \
  Tensor segments, Tensor lengths, Tensor positions, Tensor scores, Tensor plain_keys, \
      Tensor plain_values, Tensor packed_keys, Tensor packed_values, Tensor key_scale, \
      Tensor value_scale, Tensor factors, int64_t codec, int64_t group

// What the second of two layers that share what they pack has of its own.
#define KVOPT_UPPER_PARAMETERS                                                                \
  Tensor upper_lengths, Tensor upper_positions, Tensor upper_scores, Tensor upper_plain_keys, \
      Tensor upper_plain_values, Tensor upper_factors

Tensor qlinear_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                   int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                   std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                   std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual);
Tensor qlinear_outliers_cpu(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias,
                            int64_t n, double threshold, std::optional<Tensor> input_scale,
                            std::optional<Tensor> low_rank_x, std::optional<Tensor> low_rank_w,
                            bool swiglu, std::optional<Tensor> residual);
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
Tensor kv_select_scores_cpu(Tensor query, Tensor key, Tensor query_positions, Tensor key_positions,
                            double scale, bool maximum);
void kv_quant_pack_cpu(KVOPT_STORE_PARAMETERS, Tensor keys, Tensor values, Tensor key_positions,
                       std::optional<Tensor> token_scores, Tensor chosen, Tensor counts);
Triple kv_quant_unpack_cpu(KVOPT_STORE_PARAMETERS, int64_t slots);
void kv_evict_append_cpu(KVOPT_STORE_PARAMETERS, Tensor key, Tensor value, Tensor position,
                         std::optional<Tensor> token_score, double new_score,
                         std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                         bool shared, bool age);
Tensor kv_attention_decode_cpu(Tensor query, KVOPT_STORE_PARAMETERS, double scale, int64_t update,
                               int64_t first, std::optional<Tensor> gap,
                               std::optional<Tensor> frequencies);
Quadruple kv_merge_pair_cpu(Tensor a, Tensor b, double t);
void kv_merge_evict_cpu(KVOPT_STORE_PARAMETERS, KVOPT_UPPER_PARAMETERS, Tensor position,
                        std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                        bool shared, bool age, int64_t residual, double t);

Tensor qlinear_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias, int64_t n,
                    int64_t bits, int64_t group_size, int64_t scheme, int64_t activation_bits,
                    std::optional<Tensor> input_scale, std::optional<Tensor> low_rank_x,
                    std::optional<Tensor> low_rank_w, bool swiglu, std::optional<Tensor> residual);
Tensor qlinear_outliers_cuda(Tensor x, Tensor packed, Tensor meta, std::optional<Tensor> bias,
                             int64_t n, double threshold, std::optional<Tensor> input_scale,
                             std::optional<Tensor> low_rank_x, std::optional<Tensor> low_rank_w,
                             bool swiglu, std::optional<Tensor> residual);
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
Tensor kv_select_scores_cuda(Tensor query, Tensor key, Tensor query_positions, Tensor key_positions,
                             double scale, bool maximum);
void kv_quant_pack_cuda(KVOPT_STORE_PARAMETERS, Tensor keys, Tensor values, Tensor key_positions,
                        std::optional<Tensor> token_scores, Tensor chosen, Tensor counts);
Triple kv_quant_unpack_cuda(KVOPT_STORE_PARAMETERS, int64_t slots);
void kv_evict_append_cuda(KVOPT_STORE_PARAMETERS, Tensor key, Tensor value, Tensor position,
                          std::optional<Tensor> token_score, double new_score,
                          std::optional<Tensor> victim, int64_t order, int64_t first,
                          int64_t recent, bool shared, bool age);
Tensor kv_attention_decode_cuda(Tensor query, KVOPT_STORE_PARAMETERS, double scale, int64_t update,
                                int64_t first, std::optional<Tensor> gap,
                                std::optional<Tensor> frequencies);
Quadruple kv_merge_pair_cuda(Tensor a, Tensor b, double t);
void kv_merge_evict_cuda(KVOPT_STORE_PARAMETERS, KVOPT_UPPER_PARAMETERS, Tensor position,
                         std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                         bool shared, bool age, int64_t residual, double t);

}  // namespace kvopt::ops
