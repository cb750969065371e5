// SPDX-License-Identifier: Apache-2.0
// One unit of decode attention in vector registers; the including file names its instruction set by
// a macro (simd.h), everything has internal linkage. The running softmax is that of
// kv_attention.cpp. A tile is at most 32 slots of one part, with an integer codec of one group:
//
//     q' = q * s (its channels' scales), c = q . lo     once per tile and query head
//     logit_s = q' . code_s + c                         kLanes sums in registers at a time
//     a += (p_s * s_s) * code_s,  b += p_s * lo_s       scale and minimum of the slot's value group
//
// so codes become floats in a register and go nowhere else: code to float is one table lookup or
// conversion for kLanes channels, shared by all query heads of the group. Bytes bound it: K and V
// of a slot once, 4 * D bytes in bf16, D + D / 8 + 4 D / G in int4 with D channels.
#pragma once

#include "cpu/kv_attention_task.h"
#include "cpu/kv_registers.h"
#include "cpu/qlinear_epilogue.h"  // exponential

namespace kvopt::cpu {
namespace {

constexpr int kTile = 32;

// Vectors side by side.
struct Vectors {
  const uint8_t* first;
  int64_t bytes;  // of one
  int64_t count;
};

// out[query][slot] for kQueries queries (kQueries, D), kLanes dot products at a time.
template <class Read, int kQueries>
KVOPT_INLINE void dots(const Vectors& keys, int64_t chunks, const float* queries,
                       float (*out)[kTile]) {
  constexpr int kSlots = kLanes / kQueries;
  for (int64_t slot = 0; slot < keys.count; slot += kSlots) {
    Floats sums[kLanes];
    const uint8_t* rows[kSlots];
#pragma GCC unroll 16
    for (int s = 0; s < kSlots; ++s) {
      const int64_t at = slot + s < keys.count ? slot + s : keys.count - 1;
      rows[s] = keys.first + at * keys.bytes;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = zero_floats();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Floats q[kQueries];
#pragma GCC unroll 8
      for (int g = 0; g < kQueries; ++g) {
        q[g] = load_floats(queries + (g * chunks + chunk) * kLanes);
      }
#pragma GCC unroll 16
      for (int s = 0; s < kSlots; ++s) {
        const Floats key = Read::load(rows[s], chunk);
#pragma GCC unroll 8
        for (int g = 0; g < kQueries; ++g) {
          sums[g * kSlots + s] = multiply_add(key, q[g], sums[g * kSlots + s]);
        }
      }
    }
    alignas(64) float totals[kLanes];
    store_floats(totals, totals_of(sums));
    for (int g = 0; g < kQueries; ++g) {
      memcpy(out[g] + slot, totals + g * kSlots, kSlots * sizeof(float));
    }
  }
}

// sums (kQueries, D + 2 apart) += weights[query] . values, kChunks chunks from `chunk` on. With an
// integer codec the weights of a chunk are those of its group.
template <class Read, int kQueries, int kChunks>
KVOPT_INLINE void add_values(const Vectors& values, int64_t chunk, int64_t lanes_per_group,
                             int64_t queries, const float* weights, float* sums, int64_t stride) {
  Floats total[kQueries][kChunks];
  const float* of_chunk[kChunks];
#pragma GCC unroll 4
  for (int c = 0; c < kChunks; ++c) {
    const int64_t group = Read::kInteger ? (chunk + c) * kLanes / lanes_per_group : 0;
    of_chunk[c] = weights + group * queries * kTile;
#pragma GCC unroll 8
    for (int g = 0; g < kQueries; ++g) {
      total[g][c] = Read::arrange(load_floats(sums + g * stride + (chunk + c) * kLanes));
    }
  }
  for (int64_t slot = 0; slot < values.count; ++slot) {
    const uint8_t* row = values.first + slot * values.bytes;
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
      const Floats value = Read::load(row, chunk + c);
#pragma GCC unroll 8
      for (int g = 0; g < kQueries; ++g) {
        total[g][c] = multiply_add(value, set_floats(of_chunk[c][g * kTile + slot]), total[g][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 8
    for (int g = 0; g < kQueries; ++g) {
      store_floats(sums + g * stride + (chunk + c) * kLanes, Read::restore(total[g][c]));
    }
  }
}

template <class Read, int kQueries>
KVOPT_INLINE void add_all_values(const Vectors& values, int64_t chunks, int64_t lanes_per_group,
                                 int64_t queries, const float* weights, float* sums,
                                 int64_t stride) {
  constexpr int kMost = kLanes == 16 ? (kQueries == 8 ? 2 : 4) : (kQueries == 4 ? 2 : 4);
  int64_t chunk = 0;
  for (; chunk + kMost <= chunks; chunk += kMost) {
    add_values<Read, kQueries, kMost>(values, chunk, lanes_per_group, queries, weights, sums,
                                      stride);
  }
  for (; chunk < chunks; ++chunk) {
    add_values<Read, kQueries, 1>(values, chunk, lanes_per_group, queries, weights, sums, stride);
  }
}

template <class Read>
struct Part {
  const KvAttentionTask& task;
  int64_t chunks;

  // Query heads in eights (fours in the smaller registers), then what is left.
  void all_dots(const Vectors& keys, const float* queries, float (*out)[kTile]) const {
    const int64_t dim = chunks * kLanes;
    int64_t g = 0;
    if constexpr (kLanes == 16) {
      for (; g + 8 <= task.query_group; g += 8) {
        dots<Read, 8>(keys, chunks, queries + g * dim, out + g);
      }
    }
    for (; g + 4 <= task.query_group; g += 4) {
      dots<Read, 4>(keys, chunks, queries + g * dim, out + g);
    }
    for (; g + 2 <= task.query_group; g += 2) {
      dots<Read, 2>(keys, chunks, queries + g * dim, out + g);
    }
    if (g < task.query_group) dots<Read, 1>(keys, chunks, queries + g * dim, out + g);
  }

  void all_values(const Vectors& values, int64_t lanes_per_group, const float* weights) const {
    const int64_t stride = chunks * kLanes + 2, queries = task.query_group;
    float* const sums = task.partial + 2;
    int64_t g = 0;
    if constexpr (kLanes == 16) {
      for (; g + 8 <= queries; g += 8) {
        add_all_values<Read, 8>(values, chunks, lanes_per_group, queries, weights + g * kTile,
                                sums + g * stride, stride);
      }
    }
    for (; g + 4 <= queries; g += 4) {
      add_all_values<Read, 4>(values, chunks, lanes_per_group, queries, weights + g * kTile,
                              sums + g * stride, stride);
    }
    for (; g + 2 <= queries; g += 2) {
      add_all_values<Read, 2>(values, chunks, lanes_per_group, queries, weights + g * kTile,
                              sums + g * stride, stride);
    }
    if (g < queries) {
      add_all_values<Read, 1>(values, chunks, lanes_per_group, queries, weights + g * kTile,
                              sums + g * stride, stride);
    }
  }
};

// The running softmax over the tile's logits: they become weights, and what was summed before is
// scaled to the new largest.
inline void take_tile(const KvAttentionTask& task, int64_t chunks, int64_t count,
                      float (*logits)[kTile]) {
  const int64_t stride = chunks * kLanes + 2;
  constexpr float kInfinity = __builtin_huge_valf();
  for (int64_t g = 0; g < task.query_group; ++g) {
    float* const row = logits[g];
    for (int64_t s = count; s < kTile; ++s) row[s] = -kInfinity;
    float* const state = task.partial + g * stride;
    Floats most = load_floats(row);
    for (int v = 1; v < kTile / kLanes; ++v) most = max_floats(load_floats(row + v * kLanes), most);
    const float tile_largest = largest_of(most);
    if (tile_largest > state[0]) {
      alignas(64) float shrink[kLanes];
      store_floats(shrink, exponential(set_floats(state[0] - tile_largest)));
      state[0] = tile_largest;
      state[1] *= shrink[0];
      const Floats factor = set_floats(shrink[0]);
      for (int64_t c = 0; c < chunks; ++c) {
        float* const at = state + 2 + c * kLanes;
        store_floats(at, multiply(load_floats(at), factor));
      }
      for (int64_t j = 0; j < task.value_groups; ++j) {
        float* const at = task.offsets + (g * task.value_groups + j) * kKvOffsetLanes;
        store_floats(at, multiply(load_floats(at), factor));
      }
    }
    const Floats largest = set_floats(state[0]);
    for (int v = 0; v < kTile / kLanes; ++v) {
      float* const at = row + v * kLanes;
      store_floats(at, exponential(subtract(load_floats(at), largest)));
    }
    for (int64_t s = count; s < kTile; ++s) row[s] = 0.0f;
    Floats sum = load_floats(row);
    for (int v = 1; v < kTile / kLanes; ++v) sum = add(sum, load_floats(row + v * kLanes));
    state[1] += total_of(sum);
  }
}

inline void scale_tile(int64_t queries, const float* factors, float (*rows)[kTile]) {
  for (int64_t g = 0; g < queries; ++g) {
    for (int v = 0; v < kTile / kLanes; ++v) {
      float* const at = rows[g] + v * kLanes;
      store_floats(at, multiply(load_floats(at), load_floats(factors + v * kLanes)));
    }
  }
}

inline void multiply_by_halves(const uint16_t* halves, int64_t count, float* values) {
  alignas(64) uint16_t copy[kTile] = {};  // never read past the array
  memcpy(copy, halves, static_cast<size_t>(count) * 2);
  for (int v = 0; v < kTile / kLanes; ++v) {
    float* const at = values + v * kLanes;
    store_floats(at, multiply(load_floats(at), load_halves(copy + v * kLanes)));
  }
}

// scaled = q * s, in the reader's order, and constants = q . lo, for an integer codec's group of
// slots; `scale` holds both.
template <class Read>
void scale_queries(const KvAttentionTask& task, const float* q, const uint16_t* scale) {
  constexpr int64_t kBatch = 8;
  const int64_t dim = task.store->dim;
  for (int64_t first = 0; first < task.query_group; first += kBatch) {
    const int64_t count = task.query_group - first < kBatch ? task.query_group - first : kBatch;
    Floats constants[kBatch];
    for (int64_t g = 0; g < count; ++g) constants[g] = zero_floats();
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Floats of_codes = load_halves(scale + d), lowest = load_halves(scale + dim + d);
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = (first + g) * dim + d;
        const Floats x = load_floats(q + at);
        store_floats(task.scaled + at, Read::arrange(multiply(x, of_codes)));
        constants[g] = multiply_add(x, lowest, constants[g]);
      }
    }
    for (int64_t g = 0; g < count; ++g) task.constants[first + g] = total_of(constants[g]);
  }
}

// Slots [index, index + count) of the segment, which lie at `slot` of their part.
template <class Read>
void run_tile(const KvAttentionTask& task, bool packed, int64_t index, int64_t slot,
              int64_t count) {
  const KvStore& s = *task.store;
  const int64_t chunks = s.dim / kLanes, queries = task.query_group;
  const Part<Read> part{task, chunks};
  const int64_t bytes = packed ? task.packed_bytes : task.plain_bytes;
  const auto of = [&](const void* base) {
    return Vectors{static_cast<const uint8_t*>(base) + slot * bytes, bytes, count};
  };
  const Vectors keys = of(packed ? s.packed_keys : s.plain_keys);
  const Vectors values = of(packed ? s.packed_values : s.plain_values);
  float (*const logits)[kTile] = reinterpret_cast<float (*)[kTile]>(task.tile);
  float (*const other)[kTile] = logits + queries;

  const auto all_logits = [&](const float* q, float (*out)[kTile]) {
    if constexpr (!Read::kInteger) {
      part.all_dots(keys, q, out);
      return;
    }
    const uint16_t* const scale = s.key_scale + slot / s.group * 2 * s.dim;
    scale_queries<Read>(task, q, scale);
    part.all_dots(keys, task.scaled, out);
    for (int64_t g = 0; g < queries; ++g) {
      const Floats constant = set_floats(task.constants[g]);
      for (int v = 0; v < kTile / kLanes; ++v) {
        float* const at = out[g] + v * kLanes;
        store_floats(at, add(load_floats(at), constant));
      }
    }
  };

  all_logits(task.queries, logits);
  if (task.turned != nullptr) {
    const int32_t* const positions =
        packed ? task.packed_positions + index : task.plain_positions + index - task.packed;
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any = any || positions[i] < task.first;
    if (any) {
      all_logits(task.turned, other);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t g = 0; positions[i] < task.first && g < queries; ++g) {
          logits[g][i] = other[g][i];
        }
      }
    }
  }
  alignas(64) float of_keys[kTile], of_values[kTile];
  const bool scaled = packed && (Read::kUnit != 1.0f || s.factors != nullptr);
  if (scaled) {
    for (int i = 0; i < kTile; ++i) of_keys[i] = of_values[i] = Read::kUnit;
    if (Read::kUnit != 1.0f) {
      multiply_by_halves(s.key_scale + slot, count, of_keys);
      multiply_by_halves(s.value_scale + slot, count, of_values);
    }
    for (int64_t i = 0; s.factors != nullptr && i < count; ++i) {
      of_keys[i] *= s.factors[(slot + i) * 2];
      of_values[i] *= s.factors[(slot + i) * 2 + 1];
    }
    scale_tile(queries, of_keys, logits);
  }
  if (task.logits != nullptr) {
    for (int64_t g = 0; g < queries; ++g) {
      memcpy(task.logits + g * task.filled + index, logits[g], count * sizeof(float));
    }
  }
  take_tile(task, chunks, count, logits);
  if (scaled) scale_tile(queries, of_values, logits);

  if constexpr (!Read::kInteger) {
    part.all_values(values, 1, logits[0]);
    return;
  }
  // Weights times the slots' scales, for every group of channels; and times their minima, summed.
  const int64_t groups = task.value_groups;
  const uint16_t* const pairs = s.value_scale + slot * groups * 2;
  for (int64_t j = 0; j < groups; ++j) {
    Floats scales[kTile / kLanes], minima[kTile / kLanes];
    for (int v = 0; v < kTile / kLanes; ++v) {
      load_pairs(pairs + 2 * j, groups, v * kLanes, count - 1, &scales[v], &minima[v]);
    }
    for (int64_t g = 0; g < queries; ++g) {
      float* const weights = task.weights + (j * queries + g) * kTile;
      float* const offset = task.offsets + (g * groups + j) * kKvOffsetLanes;
      Floats sum = load_floats(offset);
      for (int v = 0; v < kTile / kLanes; ++v) {
        const Floats weight = load_floats(logits[g] + v * kLanes);
        store_floats(weights + v * kLanes, multiply(weight, scales[v]));
        sum = multiply_add(weight, minima[v], sum);
      }
      store_floats(offset, sum);
    }
  }
  part.all_values(values, s.group, task.weights);
}

inline void run_any_tile(const KvAttentionTask& task, bool packed, int64_t index, int64_t slot,
                         int64_t count) {
  const KvStore& s = *task.store;
  if (packed && s.codec != KvCodec::kModel) {
    switch (s.codec) {
      case KvCodec::kFp8:
        return run_tile<ReadE4m3>(task, packed, index, slot, count);
      case KvCodec::kInt8:
        return run_tile<ReadInt8>(task, packed, index, slot, count);
      case KvCodec::kInt4:
        return run_tile<ReadInt4>(task, packed, index, slot, count);
      default:
        return run_tile<ReadInt2>(task, packed, index, slot, count);
    }
  }
  switch (s.type) {
    case KvType::kFloat16:
      return run_tile<ReadHalf>(task, packed, index, slot, count);
    case KvType::kBFloat16:
      return run_tile<ReadBFloat>(task, packed, index, slot, count);
    default:
      return run_tile<ReadFloat>(task, packed, index, slot, count);
  }
}

inline void run_unit(const KvAttentionTask& task) {
  const KvStore& s = *task.store;
  const int64_t stride = s.dim + 2;
  for (int64_t g = 0; g < task.query_group; ++g) {
    float* const state = task.partial + g * stride;
    state[0] = -__builtin_huge_valf();
    for (int64_t d = 1; d < stride; ++d) state[d] = 0.0f;
  }
  for (int64_t i = 0; i < task.query_group * task.value_groups * kKvOffsetLanes; ++i) {
    task.offsets[i] = 0.0f;
  }
  for (int64_t index = task.begin; index < task.end;) {
    const bool packed = index < task.packed;
    const int64_t slot =
        packed ? task.packed_begin + index : task.plain_begin + index - task.packed;
    int64_t limit = packed && task.packed < task.end ? task.packed : task.end;
    if (packed && task.value_groups > 0) {
      const int64_t group_end = index + s.group - slot % s.group;
      limit = group_end < limit ? group_end : limit;
    }
    const int64_t count = limit - index < kTile ? limit - index : kTile;
    run_any_tile(task, packed, index, slot, count);
    index += count;
  }
  for (int64_t g = 0; task.value_groups > 0 && g < task.query_group; ++g) {
    float* const sums = task.partial + g * stride + 2;
    for (int64_t d = 0; d < s.dim; d += kLanes) {
      const int64_t of = g * task.value_groups + d / s.group;
      const float offset = total_of(load_floats(task.offsets + of * kKvOffsetLanes));
      store_floats(sums + d, add(load_floats(sums + d), set_floats(offset)));
    }
  }
}

inline void run_exponentials(const float* row, int64_t count, float largest, float factor,
                             float* out) {
  const Floats by = set_floats(factor), most = set_floats(largest);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_floats(out + i, multiply(exponential(subtract(load_floats(row + i), most)), by));
  }
  if (i == count) return;
  alignas(64) float edge[kLanes] = {};
  memcpy(edge, row + i, static_cast<size_t>(count - i) * sizeof(float));
  store_floats(edge, multiply(exponential(subtract(load_floats(edge), most)), by));
  memcpy(out + i, edge, static_cast<size_t>(count - i) * sizeof(float));
}

}  // namespace
}  // namespace kvopt::cpu
