// SPDX-License-Identifier: Apache-2.0
// Decode attention in portable C++, and the join of its units.
//
// A unit is at most 512 slots of one segment. It goes through them once with the running softmax of
// FlashAttention (arXiv:2205.14135, section 3.1): m the largest logit so far, l the sum of e^(logit
// - m), a the sum of e^(logit - m) v. A segment's units are joined in order:
//
//     M = max m_i,   out = sum e^(m_i - M) a_i / sum e^(m_i - M) l_i
//
// and where scores are updated, p = e^(logit - M) / L from the logits that the units wrote down.
// The vector versions (kv_attention_tiles.h) take 32 slots and all query heads of the KV head at a
// time, so that every vector is read from memory once and bytes bound it.
#include <algorithm>
#include <limits>

#include "cpu/kv.h"
#include "cpu/kv_attention_task.h"
#include "cpu/kv_numbers.h"

namespace kvopt::cpu {
namespace {

constexpr int64_t kTile = 32;

template <typename Real>
Real dot(const Real* a, const Real* b, int64_t count) {
  Real sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (int j = 0; i < count; ++i, ++j) sums[j] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <typename Real>
void turn_back(const KvAttentionParams& p, int64_t row, const Real* query, Real* turned) {
  std::copy(query, query + p.store.dim, turned);
  const int64_t half = p.rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(p.gap[row]) * p.frequencies[i];
    const Real cosine = std::cos(static_cast<Real>(angle));
    const Real sine = std::sin(static_cast<Real>(angle));
    turned[i] = query[i] * cosine + query[i + half] * sine;
    turned[i + half] = query[i + half] * cosine - query[i] * sine;
  }
}

template <typename Real>
void read_slot(const KvStore& s, const KvSegment& segment, int64_t index, Real* key, Real* value) {
  const int64_t packed = segment.packed();
  if (index < packed) {
    kv_read_packed_key(s, segment.packed_begin + index, key);
    kv_read_packed_value(s, segment.packed_begin + index, value);
  } else {
    const int64_t at = (segment.plain_begin + index - packed) * s.dim;
    kv_load(s.type, s.plain_keys, at, s.dim, key);
    kv_load(s.type, s.plain_values, at, s.dim, value);
  }
}

template <typename Real>
void run_unit(const KvAttentionParams& p, const KvAttentionUnit& unit, Real* partial,
              Real* logits) {
  const KvStore& s = p.store;
  const int64_t row = unit.segment / s.heads, dim = s.dim;
  const KvSegment segment(s, row, unit.segment % s.heads);
  const int64_t filled = segment.filled();
  const int64_t first_query = unit.segment * p.query_group * dim;
  for (int64_t g = 0; g < p.query_group; ++g) {
    Real query[kKvMostDim], turned[kKvMostDim], key[kKvMostDim], value[kKvMostDim];
    kv_load(p.store.type, p.query, first_query + g * dim, dim, query);
    for (int64_t d = 0; d < dim; ++d) query[d] *= static_cast<Real>(p.scale_double);
    const bool turns = p.first > 0 && p.frequencies != nullptr;
    if (turns) turn_back(p, row, query, turned);
    Real* const largest = partial + g * (dim + 2);
    Real* const total = largest + 1;
    Real* const sum = largest + 2;
    *largest = -std::numeric_limits<Real>::infinity();
    *total = 0;
    for (int64_t d = 0; d < dim; ++d) sum[d] = 0;
    for (int64_t i = unit.begin; i < unit.end; ++i) {
      read_slot(s, segment, i, key, value);
      const bool back = turns && s.positions[segment.state(i)] < p.first;
      const Real logit = dot(back ? turned : query, key, dim);
      if (logits != nullptr) logits[unit.logits + g * filled + i] = logit;
      if (logit > *largest) {
        const Real shrink = std::exp(*largest - logit);
        *largest = logit;
        *total *= shrink;
        for (int64_t d = 0; d < dim; ++d) sum[d] *= shrink;
      }
      const Real weight = std::exp(logit - *largest);
      *total += weight;
      for (int64_t d = 0; d < dim; ++d) sum[d] += weight * value[d];
    }
  }
}

void exponentials(const double* row, int64_t count, double largest, double factor, double* out,
                  Isa) {
  for (int64_t i = 0; i < count; ++i) out[i] = std::exp(row[i] - largest) * factor;
}

void exponentials(const float* row, int64_t count, float largest, float factor, float* out,
                  [[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return kv_exponentials_avx512(row, count, largest, factor, out);
  if (isa >= Isa::kAvx2) return kv_exponentials_avx2(row, count, largest, factor, out);
#endif
  for (int64_t i = 0; i < count; ++i) out[i] = std::exp(row[i] - largest) * factor;
}

using VectorUnit = void (*)(const KvAttentionTask&);

int64_t value_groups(const KvStore& s) {
  return kv_code_bits(s.codec) > 0 ? kv_value_groups(s.dim, s.group) : 0;
}

// The best instruction set whose registers the vectors fill.
VectorUnit vector_unit(const KvStore& s, [[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  const auto fills = [&](int64_t lanes) {
    return s.dim % lanes == 0 && (kv_code_bits(s.codec) == 0 || s.group % lanes == 0);
  };
  if (isa >= Isa::kAvx512 && fills(16)) return kv_attention_unit_avx512;
  if (isa >= Isa::kAvx2 && fills(8)) return kv_attention_unit_avx2;
#endif
  return nullptr;
}

KvAttentionTask prepare(const KvAttentionParams& p, const KvAttentionUnit& unit, float* partial,
                        float* logits, float* scratch) {
  const KvStore& s = p.store;
  const int64_t row = unit.segment / s.heads, numbers = p.query_group * s.dim;
  const KvSegment segment(s, row, unit.segment % s.heads);
  float* const queries = scratch;
  float* const turned = queries + numbers;
  kv_load(s.type, p.query, unit.segment * numbers, numbers, queries);
  for (int64_t i = 0; i < numbers; ++i) queries[i] *= p.scale;
  const bool turns = p.first > 0 && p.frequencies != nullptr;
  for (int64_t g = 0; turns && g < p.query_group; ++g) {
    turn_back(p, row, queries + g * s.dim, turned + g * s.dim);
  }
  KvAttentionTask task{};
  task.store = &p.store;
  task.query_group = p.query_group;
  task.packed = segment.packed();
  task.filled = segment.filled();
  task.packed_begin = segment.packed_begin;
  task.plain_begin = segment.plain_begin;
  task.packed_positions = s.positions + segment.packed_state;
  task.plain_positions = s.positions + segment.plain_state;
  task.packed_bytes = kv_packed_bytes(s.codec, s.type, s.dim);
  task.plain_bytes = s.dim * kv_type_bytes(s.type);
  task.value_groups = value_groups(s);
  task.begin = unit.begin;
  task.end = unit.end;
  task.first = p.first;
  task.queries = queries;
  task.turned = turns ? turned : nullptr;
  task.partial = partial;
  task.logits = logits == nullptr ? nullptr : logits + unit.logits;
  task.scaled = turned + numbers;
  task.constants = task.scaled + numbers;
  task.tile = task.constants + p.query_group;
  task.offsets = task.tile + 2 * p.query_group * kTile;
  task.weights = task.offsets + p.query_group * task.value_groups * kKvOffsetLanes;
  return task;
}

// Blocks of a segment's slots: weights of all query heads, added or compared, then noted.
template <typename Real>
void update_scores(const KvAttentionParams& p, const KvSegment& segment, const Real* logits,
                   const Real* largest, const Real* total, Isa isa) {
  constexpr int64_t kBlock = 256;
  const int64_t filled = segment.filled();
  float* const scores = p.store.scores;
  Real sum[kBlock], weights[kBlock];
  for (int64_t begin = 0; begin < filled; begin += kBlock) {
    const int64_t count = std::min(kBlock, filled - begin);
    for (int64_t i = 0; i < count; ++i) sum[i] = 0;
    for (int64_t g = 0; g < p.query_group; ++g) {
      exponentials(logits + g * filled + begin, count, largest[g], 1 / total[g], weights, isa);
      if (p.update == KvUpdate::kMaximum) {
        for (int64_t i = 0; i < count; ++i) sum[i] = std::max(sum[i], weights[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) sum[i] += weights[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float& score = scores[segment.state(begin + i)];
      const float weight = static_cast<float>(sum[i]);
      score = p.update == KvUpdate::kAdd       ? score + weight
              : p.update == KvUpdate::kReplace ? weight
                                               : std::max(score, weight);
    }
  }
}

template <typename Real>
void join(const KvAttentionParams& p, const KvAttentionUnit* units, int64_t count,
          const Real* partials, const Real* logits, Isa isa) {
  const KvStore& s = p.store;
  const int64_t dim = s.dim, stride = kv_attention_partial(p), unit = units->segment;
  Real largest[kKvMostGroup], total[kKvMostGroup], out[kKvMostDim];
  for (int64_t g = 0; g < p.query_group; ++g) {
    const Real* const part = partials + g * (dim + 2);
    Real most = part[0];
    for (int64_t i = 1; i < count; ++i) most = std::max(most, part[i * stride]);
    Real sum = 0;
    for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Real factor = std::exp(part[i * stride] - most);
      sum += factor * part[i * stride + 1];
      for (int64_t d = 0; d < dim; ++d) out[d] += factor * part[i * stride + 2 + d];
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
    kv_save(s.type, out, dim, p.out, (unit * p.query_group + g) * dim);
    largest[g] = most;
    total[g] = sum;
  }
  if (p.update == KvUpdate::kNone) return;
  const KvSegment segment(s, unit / s.heads, unit % s.heads);
  update_scores(p, segment, logits + units->logits, largest, total, isa);
}

}  // namespace

int64_t kv_attention_partial(const KvAttentionParams& p) {
  return p.query_group * (p.store.dim + 2);
}

int64_t kv_attention_scratch(const KvAttentionParams& p) {
  const int64_t groups = value_groups(p.store);
  return p.query_group * (3 * p.store.dim + 1 + 2 * kTile + groups * (kKvOffsetLanes + kTile));
}

void kv_attention_units(const KvAttentionParams& p, const KvAttentionUnit* units, void* partials,
                        void* logits, float* scratch, int64_t begin, int64_t end, Isa isa) {
  const int64_t stride = kv_attention_partial(p);
  if (is_double(p.store.type)) {
    for (int64_t i = begin; i < end; ++i) {
      run_unit(p, units[i], static_cast<double*>(partials) + i * stride,
               static_cast<double*>(logits));
    }
    return;
  }
  float* const parts = static_cast<float*>(partials);
  float* const wide = static_cast<float*>(logits);
  const VectorUnit vectors = vector_unit(p.store, isa);
  for (int64_t i = begin; i < end; ++i) {
    if (vectors == nullptr) {
      run_unit(p, units[i], parts + i * stride, wide);
    } else {
      vectors(prepare(p, units[i], parts + i * stride, wide, scratch));
    }
  }
}

void kv_attention_join(const KvAttentionParams& p, const KvAttentionUnit* units, int64_t count,
                       const void* partials, const void* logits, Isa isa) {
  if (is_double(p.store.type)) {
    join(p, units, count, static_cast<const double*>(partials), static_cast<const double*>(logits),
         isa);
  } else {
    join(p, units, count, static_cast<const float*>(partials), static_cast<const float*>(logits),
         isa);
  }
}

}  // namespace kvopt::cpu
