// SPDX-License-Identifier: Apache-2.0
// The search's errors with 8 candidates a register. Compiled without fused multiply-add, which
// would round once where the rule rounds twice.
#include "cpu/wsearch.h"
#include "cpu/wsearch_errors.h"

namespace kvopt::cpu {

void candidate_errors_avx2(const float* values, const float* importance, int64_t count,
                           const float* scales, const float* zeros, int64_t candidates,
                           float largest_code, float* errors) {
  add_candidate_errors(values, importance, count, scales, zeros, candidates, largest_code, errors);
}

}  // namespace kvopt::cpu
