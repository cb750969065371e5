// SPDX-License-Identifier: Apache-2.0
// Every operator's schema and its implementation per device; fake implementations are in
// python/kvopt/_library.py.
//
// Weights (N, K). A format is (bits, group_size, scheme) as in common/quant_format.h; group_size =
// K is one group per row; scheme is the number of a Scheme. `packed` (uint8) and `meta` (int16,
// fp16 bit patterns) are in the layout of their device. What qlinear computes stands in
// common/params.h.
#include "ops/explain.h"  // brings Python.h, which comes before everything
#include "ops/ops.h"

using namespace kvopt::ops;

// One layer of a KV cache, common/kv_store.h: what a filling operator writes, and what one that
// only reads the tokens sees.
#define KVOPT_STORE_WRITTEN                                                                   \
  "Tensor segments, Tensor(a!) lengths, Tensor(b!) positions, Tensor(c!) scores, Tensor(d!) " \
  "plain_keys, Tensor(e!) plain_values, Tensor(f!) packed_keys, Tensor(g!) packed_values, "   \
  "Tensor(h!) key_scale, Tensor(i!) value_scale, Tensor(j!) factors, int codec, int group, "
#define KVOPT_STORE_READ(scores)                                                             \
  "Tensor segments, Tensor lengths, Tensor positions, " scores                               \
  " scores, Tensor plain_keys, "                                                             \
  "Tensor plain_values, Tensor packed_keys, Tensor packed_values, Tensor key_scale, Tensor " \
  "value_scale, Tensor factors, int codec, int group, "

STABLE_TORCH_LIBRARY(kvopt, m) {
  m.def(
      "qlinear(Tensor x, Tensor packed, Tensor meta, Tensor? bias, int n, int bits, int "
      "group_size, "
      "int scheme, int activation_bits=16, Tensor? input_scale=None, Tensor? low_rank_x=None, "
      "Tensor? low_rank_w=None, bool swiglu=False, Tensor? residual=None) -> Tensor");
  m.def(
      "qlinear_outliers(Tensor x, Tensor packed, Tensor meta, Tensor? bias, int n, float "
      "threshold, "
      "Tensor? input_scale=None, Tensor? low_rank_x=None, Tensor? low_rank_w=None, bool "
      "swiglu=False, Tensor? residual=None) -> Tensor");
  m.def(
      "wquant_rtn(Tensor weight, int bits, int group_size, int scheme) -> (Tensor codes, Tensor "
      "scale, Tensor zero)");
  m.def(
      "wquant_pack(Tensor codes, Tensor scale, Tensor zero, int bits, int group_size, int scheme) "
      "-> (Tensor packed, Tensor meta)");
  m.def(
      "wquant_unpack(Tensor packed, Tensor meta, int n, int k, int bits, int group_size, int "
      "scheme) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "wquant_dequantize(Tensor packed, Tensor meta, int n, int k, int bits, int group_size, int "
      "scheme, ScalarType dtype) -> Tensor");
  m.def(
      "wquant_expand_scales(Tensor absmax_codes, Tensor absmax_scale, Tensor offset, int n, int k, "
      "int bits, int group_size, int scheme) -> Tensor");
  m.def(
      "wsearch(Tensor weight, Tensor? importance, int bits, int group_size, int scheme, int steps, "
      "float smallest) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "wsearch_hqq(Tensor weight, int bits, int group_size, int scheme, int iterations, float "
      "beta, float kappa, float norm) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "gptq_block(Tensor weight, Tensor factor, Tensor? importance, Tensor? scale, Tensor? zero, "
      "int begin, int end, int bits, int group_size, int scheme, int steps, float smallest) -> "
      "(Tensor codes, Tensor errors, Tensor scale, Tensor zero)");
  m.def(
      "kv_select_scores(Tensor query, Tensor key, Tensor query_positions, Tensor key_positions, "
      "float scale, bool maximum) -> Tensor");
  m.def("kv_quant_pack(" KVOPT_STORE_WRITTEN
        "Tensor keys, Tensor values, Tensor key_positions, Tensor? token_scores, Tensor chosen, "
        "Tensor counts) -> ()");
  m.def("kv_quant_unpack(" KVOPT_STORE_READ(
      "Tensor") "int slots) -> (Tensor keys, Tensor values, Tensor positions)");
  m.def("kv_evict_append(" KVOPT_STORE_WRITTEN
        "Tensor key, Tensor value, Tensor position, Tensor? token_score, float new_score, Tensor? "
        "victim, int order, int first, int recent, bool shared, bool age) -> ()");
  m.def("kv_attention_decode(Tensor query, " KVOPT_STORE_READ(
      "Tensor(a!)") "float scale, int update, int first, Tensor? gap, Tensor? frequencies) -> "
                    "Tensor");
  m.def(
      "kv_merge_pair(Tensor a, Tensor b, float t) -> (Tensor direction, Tensor norm_a, Tensor "
      "norm_b, Tensor distance)");
  m.def("kv_merge_evict(" KVOPT_STORE_WRITTEN
        "Tensor(k!) upper_lengths, Tensor(l!) upper_positions, Tensor(m!) upper_scores, "
        "Tensor(n!) upper_plain_keys, Tensor(o!) upper_plain_values, Tensor(p!) upper_factors, "
        "Tensor position, Tensor? victim, int order, int first, int recent, bool shared, bool age, "
        "int residual, float t) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvopt, CPU, m) {
  m.impl("qlinear", TORCH_BOX(&qlinear_cpu));
  m.impl("qlinear_outliers", TORCH_BOX(&qlinear_outliers_cpu));
  m.impl("wquant_rtn", TORCH_BOX(&wquant_rtn_cpu));
  m.impl("wquant_pack", TORCH_BOX(&wquant_pack_cpu));
  m.impl("wquant_unpack", TORCH_BOX(&wquant_unpack_cpu));
  m.impl("wquant_dequantize", TORCH_BOX(&wquant_dequantize_cpu));
  m.impl("wquant_expand_scales", TORCH_BOX(&wquant_expand_scales_cpu));
  m.impl("wsearch", TORCH_BOX(&wsearch_cpu));
  m.impl("wsearch_hqq", TORCH_BOX(&wsearch_hqq_cpu));
  m.impl("gptq_block", TORCH_BOX(&gptq_block_cpu));
  m.impl("kv_select_scores", TORCH_BOX(&kv_select_scores_cpu));
  m.impl("kv_quant_pack", TORCH_BOX(&kv_quant_pack_cpu));
  m.impl("kv_quant_unpack", TORCH_BOX(&kv_quant_unpack_cpu));
  m.impl("kv_evict_append", TORCH_BOX(&kv_evict_append_cpu));
  m.impl("kv_attention_decode", TORCH_BOX(&kv_attention_decode_cpu));
  m.impl("kv_merge_pair", TORCH_BOX(&kv_merge_pair_cpu));
  m.impl("kv_merge_evict", TORCH_BOX(&kv_merge_evict_cpu));
}

#ifdef KVOPT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kvopt, CUDA, m) {
  m.impl("qlinear", TORCH_BOX(&qlinear_cuda));
  m.impl("qlinear_outliers", TORCH_BOX(&qlinear_outliers_cuda));
  m.impl("wquant_rtn", TORCH_BOX(&wquant_rtn_cuda));
  m.impl("wquant_pack", TORCH_BOX(&wquant_pack_cuda));
  m.impl("wquant_unpack", TORCH_BOX(&wquant_unpack_cuda));
  m.impl("wquant_dequantize", TORCH_BOX(&wquant_dequantize_cuda));
  m.impl("wquant_expand_scales", TORCH_BOX(&wquant_expand_scales_cuda));
  m.impl("wsearch", TORCH_BOX(&wsearch_cuda));
  m.impl("wsearch_hqq", TORCH_BOX(&wsearch_hqq_cuda));
  m.impl("gptq_block", TORCH_BOX(&gptq_block_cuda));
  m.impl("kv_select_scores", TORCH_BOX(&kv_select_scores_cuda));
  m.impl("kv_quant_pack", TORCH_BOX(&kv_quant_pack_cuda));
  m.impl("kv_quant_unpack", TORCH_BOX(&kv_quant_unpack_cuda));
  m.impl("kv_evict_append", TORCH_BOX(&kv_evict_append_cuda));
  m.impl("kv_attention_decode", TORCH_BOX(&kv_attention_decode_cuda));
  m.impl("kv_merge_pair", TORCH_BOX(&kv_merge_pair_cuda));
  m.impl("kv_merge_evict", TORCH_BOX(&kv_merge_evict_cuda));
}
#endif

// `import kvopt._ops` loads the library, which registers the operators, tells what it was built
// with, and explains which kernel a product takes.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__ops() {
  static PyMethodDef methods[] = {kExplainMethod, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_ops", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "cuda_archs", KVOPT_CUDA_ARCHS);
  PyModule_AddStringConstant(module, "cuda_reason", KVOPT_CUDA_REASON);
  return module;
}
