// SPDX-License-Identifier: Apache-2.0
// The softmax side of kv_select_scores in vector registers: three passes over a row that lies in
// cache. The including file names its instruction set by a macro (simd.h), everything has internal
// linkage.
#pragma once

#include "cpu/kv_registers.h"
#include "cpu/qlinear_epilogue.h"  // exponential

namespace kvopt::cpu {
namespace {

// a where 0 <= position <= newest, else b
KVOPT_INLINE Floats where_seen(Ints positions, Ints newest, Floats a, Floats b) {
#if defined(KVOPT_QLINEAR_AVX2)
  const __m256i hidden =
      _mm256_or_si256(_mm256_cmpgt_epi32(positions, newest), _mm256_srai_epi32(positions, 31));
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(hidden));
#else
  // As unsigned numbers the negative ones are large.
  return _mm512_mask_blend_ps(_mm512_cmple_epu32_mask(positions, newest), b, a);
#endif
}

// v, or 0 where x is -infinity
KVOPT_INLINE Floats zero_unless_finite(Floats x, Floats v) {
#if defined(KVOPT_QLINEAR_AVX2)
  return _mm256_andnot_ps(_mm256_cmp_ps(x, set_floats(-__builtin_huge_valf()), _CMP_EQ_OQ), v);
#else
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set_floats(-__builtin_huge_valf()), _CMP_NEQ_UQ),
                             v);
#endif
}

// See kv_select_rows. The last stretch is read from and written to copies.
inline void run_select_row(float* logits, int64_t count, const int32_t* positions, int32_t newest,
                           bool maximum, float* scores) {
  if (newest < 0) return;
  const Floats nothing = set_floats(-__builtin_huge_valf());
  const Ints limit = set_ints(newest);
  const int64_t whole = count / kLanes * kLanes, edge = count - whole;
  const size_t edge_bytes = static_cast<size_t>(edge) * 4;
  alignas(64) float edge_logits[kLanes];
  alignas(64) float edge_scores[kLanes] = {};
  Floats most = nothing;
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Floats x = where_seen(load_ints(positions + j), limit, load_floats(logits + j), nothing);
    store_floats(logits + j, x);
    most = max_floats(x, most);
  }
  if (edge > 0) {
    alignas(64) int32_t edge_positions[kLanes];
    for (int i = 0; i < kLanes; ++i) edge_positions[i] = -1;
    store_floats(edge_logits, nothing);
    memcpy(edge_positions, positions + whole, edge_bytes);
    memcpy(edge_logits, logits + whole, edge_bytes);
    memcpy(edge_scores, scores + whole, edge_bytes);
    const Floats x =
        where_seen(load_ints(edge_positions), limit, load_floats(edge_logits), nothing);
    store_floats(edge_logits, x);
    most = max_floats(x, most);
  }
  const float largest = largest_of(most);
  if (largest == -__builtin_huge_valf()) return;
  const Floats by = set_floats(largest);
  Floats sum = zero_floats();
  const auto weigh = [&](float* at) {
    const Floats x = load_floats(at);
    // Hidden keys get 0, not the smallest number that the exponential knows.
    const Floats e = zero_unless_finite(x, exponential(subtract(x, by)));
    store_floats(at, e);
    sum = add(sum, e);
  };
  for (int64_t j = 0; j < whole; j += kLanes) weigh(logits + j);
  if (edge > 0) weigh(edge_logits);
  const Floats share = set_floats(1.0f / total_of(sum));
  const auto take = [&](const float* weights, float* to) {
    const Floats weight = multiply(load_floats(weights), share);
    const Floats had = load_floats(to);
    store_floats(to, maximum ? max_floats(weight, had) : add(had, weight));
  };
  for (int64_t j = 0; j < whole; j += kLanes) take(logits + j, scores + j);
  if (edge > 0) {
    take(edge_logits, edge_scores);
    memcpy(scores + whole, edge_scores, edge_bytes);
  }
}

}  // namespace
}  // namespace kvopt::cpu
