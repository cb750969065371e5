// SPDX-License-Identifier: Apache-2.0
#include "cuda/wquant.h"
#include "cuda/wquant_scales.h"
#include "ops/cuda_call.h"
#include "ops/wquant_common.h"

namespace kvopt::ops {

Triple wquant_rtn_cuda(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme) {
  CudaCall call(weight);
  RtnCall c = make_rtn(weight, bits, group_size, scheme);
  CudaCall::check(cuda::wquant_rtn(c.params, call.stream()), "wquant_rtn");
  return {c.codes, c.scale, c.zero};
}

Pair wquant_pack_cuda(Tensor codes, Tensor scale, Tensor zero, int64_t bits, int64_t group_size,
                      int64_t scheme) {
  CudaCall call(codes);
  PackCall c = make_pack(codes, scale, zero, bits, group_size, scheme, kMma16);
  CudaCall::check(cuda::wquant_pack(c.params, call.stream()), "wquant_pack");
  return {c.packed, c.meta};
}

Triple wquant_unpack_cuda(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                          int64_t group_size, int64_t scheme) {
  CudaCall call(packed);
  PackCall c = make_unpack(packed, meta, n, k, bits, group_size, scheme, kMma16);
  CudaCall::check(cuda::wquant_unpack(c.params, call.stream()), "wquant_unpack");
  return {c.codes, c.scale, c.zero};
}

Tensor wquant_dequantize_cuda(Tensor packed, Tensor meta, int64_t n, int64_t k, int64_t bits,
                              int64_t group_size, int64_t scheme, ScalarType dtype) {
  CudaCall call(packed);
  DequantizeCall c = make_dequantize(packed, meta, n, k, bits, group_size, scheme, dtype, kMma16);
  CudaCall::check(cuda::wquant_dequantize(c.params, call.stream()), "wquant_dequantize");
  return c.weight;
}

Tensor wquant_expand_scales_cuda(Tensor absmax_codes, Tensor absmax_scale, Tensor offset, int64_t n,
                                 int64_t k, int64_t bits, int64_t group_size, int64_t scheme) {
  CudaCall call(absmax_codes);
  ExpandScalesCall c = make_expand_scales(absmax_codes, absmax_scale, offset, n, k, bits,
                                          group_size, scheme, kMma16);
  CudaCall::check(cuda::wquant_expand_scales(c.params, call.stream()), "wquant_expand_scales");
  return c.meta;
}

}  // namespace kvopt::ops
