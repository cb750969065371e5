// SPDX-License-Identifier: Apache-2.0
#include "cuda/wsearch.h"
#include "ops/cuda_call.h"
#include "ops/wsearch_common.h"

namespace kvopt::ops {

Triple wsearch_cuda(Tensor weight, std::optional<Tensor> importance, int64_t bits,
                    int64_t group_size, int64_t scheme, int64_t steps, double smallest) {
  CudaCall call(weight);
  const SearchCall c = make_search(weight, importance, bits, group_size, scheme, steps, smallest);
  CudaCall::check(c.is_double ? cuda::wsearch(c.params<double>(), call.stream())
                              : cuda::wsearch(c.params<float>(), call.stream()),
                  "wsearch");
  return {c.codes, c.scale, c.zero};
}

Triple wsearch_hqq_cuda(Tensor weight, int64_t bits, int64_t group_size, int64_t scheme,
                        int64_t iterations, double beta, double kappa, double norm) {
  CudaCall call(weight);
  const HqqCall c = make_hqq(weight, bits, group_size, scheme, iterations, beta, kappa, norm);
  CudaCall::check(cuda::wsearch_hqq(c.params, call.stream()), "wsearch_hqq");
  return {c.codes, c.scale, c.zero};
}

}  // namespace kvopt::ops
