// SPDX-License-Identifier: Apache-2.0
#include "cuda/wsearch.h"
#include "ops/cuda_call.h"
#include "ops/gptq_common.h"

namespace kvopt::ops {

Quadruple gptq_block_cuda(Tensor weight, Tensor factor, std::optional<Tensor> importance,
                          std::optional<Tensor> scale, std::optional<Tensor> zero, int64_t begin,
                          int64_t end, int64_t bits, int64_t group_size, int64_t scheme,
                          int64_t steps, double smallest) {
  CudaCall call(weight);
  const GptqCall c = make_gptq(weight, factor, importance, scale, zero, begin, end, bits,
                               group_size, scheme, steps, smallest);
  CudaCall::check(c.is_double ? cuda::gptq_block(c.params<double>(), call.stream())
                              : cuda::gptq_block(c.params<float>(), call.stream()),
                  "gptq_block");
  return {c.codes, c.errors, c.scale, c.zero};
}

}  // namespace kvopt::ops
