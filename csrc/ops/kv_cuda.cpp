// SPDX-License-Identifier: Apache-2.0
#include "cuda/kv.h"
#include "ops/cuda_call.h"
#include "ops/kv_common.h"

namespace kvopt::ops {
namespace {

void check_taken(const char* refusal, const char* op) {
  STD_TORCH_CHECK(refusal == nullptr, op, ": CUDA does not take ", refusal);
}

KvStore make_cuda_store(KVOPT_STORE_PARAMETERS, const char* op) {
  const KvStore s = make_store(KVOPT_STORE_ARGUMENTS, op);
  check_taken(cuda::kv_refusal(s), op);
  return s;
}

Tensor make_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace

Tensor kv_select_scores_cuda(Tensor query, Tensor key, Tensor query_positions, Tensor key_positions,
                             double scale, bool maximum) {
  const char* op = "kv_select_scores";
  CudaCall call(key);
  const SelectCall c = make_select(query, key, query_positions, key_positions, scale, maximum, op);
  check_taken(cuda::kv_refusal(c.params.type, c.params.dim), op);
  Tensor workspace = make_workspace(key, cuda::kv_select_scores_workspace(c.params));
  CudaCall::check(cuda::kv_select_scores(c.params, workspace.mutable_data_ptr(), call.stream()),
                  op);
  return c.scores;
}

void kv_quant_pack_cuda(KVOPT_STORE_PARAMETERS, Tensor keys, Tensor values, Tensor key_positions,
                        std::optional<Tensor> token_scores, Tensor chosen, Tensor counts) {
  const char* op = "kv_quant_pack";
  CudaCall call(plain_keys);
  const KvStore s = make_cuda_store(KVOPT_STORE_ARGUMENTS, op);
  const KvPackParams p =
      make_pack(s, plain_keys, keys, values, key_positions, token_scores, chosen, counts, op);
  CudaCall::check(cuda::kv_quant_pack(p, call.stream()), op);
}

Triple kv_quant_unpack_cuda(KVOPT_STORE_PARAMETERS, int64_t slots) {
  const char* op = "kv_quant_unpack";
  CudaCall call(plain_keys);
  const KvStore s = make_cuda_store(KVOPT_STORE_ARGUMENTS, op);
  const UnpackCall c = make_unpack(s, plain_keys, positions, slots, op);
  CudaCall::check(cuda::kv_quant_unpack(c.params, call.stream()), op);
  return c.out;
}

void kv_evict_append_cuda(KVOPT_STORE_PARAMETERS, Tensor key, Tensor value, Tensor position,
                          std::optional<Tensor> token_score, double new_score,
                          std::optional<Tensor> victim, int64_t order, int64_t first,
                          int64_t recent, bool shared, bool age) {
  const char* op = "kv_evict_append";
  CudaCall call(plain_keys);
  const KvStore s = make_cuda_store(KVOPT_STORE_ARGUMENTS, op);
  const KvAppendParams p = make_append(s, plain_keys, key, value, position, token_score, new_score,
                                       victim, order, first, recent, shared, age, op);
  Tensor workspace = make_workspace(plain_keys, cuda::kv_evict_append_workspace(p));
  CudaCall::check(cuda::kv_evict_append(p, workspace.mutable_data_ptr(), call.stream()), op);
}

Tensor kv_attention_decode_cuda(Tensor query, KVOPT_STORE_PARAMETERS, double scale, int64_t update,
                                int64_t first, std::optional<Tensor> gap,
                                std::optional<Tensor> frequencies) {
  const char* op = "kv_attention_decode";
  CudaCall call(query);
  const KvStore s = make_cuda_store(KVOPT_STORE_ARGUMENTS, op);
  const AttentionCall c =
      make_attention(s, plain_keys, query, scale, update, first, gap, frequencies, op);
  STD_TORCH_CHECK(c.params.query_group <= cuda::kKvMostQueryGroup, op, ": CUDA takes at most ",
                  cuda::kKvMostQueryGroup, " query heads per KV head, got ", c.params.query_group);
  Tensor workspace = make_workspace(query, cuda::kv_attention_decode_workspace(c.params));
  CudaCall::check(cuda::kv_attention_decode(c.params, workspace.mutable_data_ptr(), call.stream()),
                  op);
  return c.out;
}

Quadruple kv_merge_pair_cuda(Tensor a, Tensor b, double t) {
  const char* op = "kv_merge_pair";
  CudaCall call(a);
  const MergeCall c = make_merge(a, b, t, op);
  check_taken(cuda::kv_refusal(c.params.type, c.params.dim), op);
  CudaCall::check(cuda::kv_merge_pair(c.params, call.stream()), op);
  return c.out;
}

void kv_merge_evict_cuda(KVOPT_STORE_PARAMETERS, KVOPT_UPPER_PARAMETERS, Tensor position,
                         std::optional<Tensor> victim, int64_t order, int64_t first, int64_t recent,
                         bool shared, bool age, int64_t residual, double t) {
  const char* op = "kv_merge_evict";
  CudaCall call(plain_keys);
  const KvMergeEvictParams p =
      make_merge_evict(KVOPT_STORE_ARGUMENTS, KVOPT_UPPER_ARGUMENTS, position, victim, order, first,
                       recent, shared, age, residual, t, op);
  check_taken(cuda::kv_refusal(p.lower), op);
  Tensor workspace = make_workspace(plain_keys, cuda::kv_merge_evict_workspace(p));
  CudaCall::check(cuda::kv_merge_evict(p, workspace.mutable_data_ptr(), call.stream()), op);
}

}  // namespace kvopt::ops
