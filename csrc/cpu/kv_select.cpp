// SPDX-License-Identifier: Apache-2.0
// The softmax side of kv_select_scores in portable C++.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kv.h"
#include "cpu/kv_attention_task.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

template <typename Real>
void select_row(Real* logits, int64_t count, const int32_t* positions, int32_t newest, bool maximum,
                Real* scores) {
  Real largest = -std::numeric_limits<Real>::infinity();
  for (int64_t j = 0; j < count; ++j) {
    const bool seen = positions[j] >= 0 && positions[j] <= newest;
    if (!seen) logits[j] = -std::numeric_limits<Real>::infinity();
    largest = std::max(largest, logits[j]);
  }
  if (largest == -std::numeric_limits<Real>::infinity()) return;
  Real total = 0;
  for (int64_t j = 0; j < count; ++j) {
    logits[j] = std::exp(logits[j] - largest);
    total += logits[j];
  }
  for (int64_t j = 0; j < count; ++j) {
    const Real weight = logits[j] / total;
    scores[j] = maximum ? std::max(scores[j], weight) : scores[j] + weight;
  }
}

}  // namespace

template <typename Real>
void kv_widen(KvType type, const void* source, int64_t first, int64_t count, double factor,
              Real* values) {
  kv_load(type, source, first, count, values);
  if (factor == 1.0) return;
  for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<Real>(factor);
}

template void kv_widen(KvType, const void*, int64_t, int64_t, double, float*);
template void kv_widen(KvType, const void*, int64_t, int64_t, double, double*);

void kv_select_rows(double* logits, int64_t rows, int64_t count, const int32_t* positions,
                    const int32_t* newest, bool maximum, double* scores, Isa) {
  for (int64_t i = 0; i < rows; ++i) {
    select_row(logits + i * count, count, positions, newest[i], maximum, scores);
  }
}

void kv_select_rows(float* logits, int64_t rows, int64_t count, const int32_t* positions,
                    const int32_t* newest, bool maximum, float* scores, [[maybe_unused]] Isa isa) {
  auto* row = select_row<float>;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    row = kv_select_row_avx512;
  } else if (isa >= Isa::kAvx2) {
    row = kv_select_row_avx2;
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    row(logits + i * count, count, positions, newest[i], maximum, scores);
  }
}

}  // namespace kvopt::cpu
