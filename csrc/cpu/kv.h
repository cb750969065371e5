// SPDX-License-Identifier: Apache-2.0
// The KV-cache operators on the CPU: common/kv_store.h. Each call works on a range of independent
// units that the op layer spreads over threads; the split never depends on how many there are, so
// the bits do not either.
#pragma once

#include "common/kv_store.h"
#include "cpu/isa.h"

namespace kvopt::cpu {

constexpr int64_t kKvMostDim = 1024;    // D, and
constexpr int64_t kKvMostGroup = 1024;  // G: of arrays on the stack

// Floats of scratch that packing needs; 0 where nothing is ever packed.
int64_t kv_pack_scratch(const KvStore& store);

// Segments [begin, end) of B * H, row by row.
void kv_quant_pack(const KvPackParams& p, float* scratch, int64_t begin, int64_t end);
void kv_quant_unpack(const KvUnpackParams& p, int64_t begin, int64_t end);
// The first segment, row * H + head, that would take an index outside [0, n); -1 if none would.
int64_t kv_quant_pack_fault(const KvPackParams& p);

// All heads of rows [begin, end): shared eviction looks at them together.
void kv_evict_append(const KvAppendParams& p, float* scratch, int64_t begin, int64_t end);

// Segments [begin, end), with what kv_merge_evict_common gave for every row. Bytes of scratch,
// aligned for doubles.
int64_t kv_merge_evict_scratch(const KvMergeEvictParams& p);
void kv_merge_evict(const KvMergeEvictParams& p, const int64_t* common, void* scratch,
                    int64_t begin, int64_t end);
// Rows [begin, end): what all heads of a row evict, with `shared`, else -1.
void kv_merge_evict_common(const KvMergeEvictParams& p, int64_t* common, int64_t begin,
                           int64_t end);

// Vectors [begin, end). Without `direction` the distances alone are written.
void kv_merge_pair(const KvMergeParams& p, int64_t begin, int64_t end);

// Attention in two passes: units of at most kKvUnit slots of a segment, each of which leaves, per
// query head, its largest logit, the sum of exponentials and the weighted sum of values; then
// segments, which join their units in order.
constexpr int64_t kKvUnit = 512;

struct KvAttentionUnit {
  int64_t segment;     // row * H + head
  int64_t begin, end;  // slots, by index in the segment
  int64_t logits;      // where the segment's logits begin
};

// Numbers of a unit's result, (query_group, D + 2), fp64 for a float64 store; and floats of scratch
// that a thread needs.
int64_t kv_attention_partial(const KvAttentionParams& p);
int64_t kv_attention_scratch(const KvAttentionParams& p);

// `logits`: where they go if scores are updated, (query_group, filled slots) per segment, or null.
void kv_attention_units(const KvAttentionParams& p, const KvAttentionUnit* units, void* partials,
                        void* logits, float* scratch, int64_t begin, int64_t end,
                        Isa isa = selected_isa());
// The `count` units of one segment and their partials.
void kv_attention_join(const KvAttentionParams& p, const KvAttentionUnit* units, int64_t count,
                       const void* partials, const void* logits, Isa isa = selected_isa());

// `count` numbers from index `first`, times a factor, in the type of the sums.
template <typename Real>
void kv_widen(KvType type, const void* source, int64_t first, int64_t count, double factor,
              Real* values);
// logits (rows, count), overwritten: softmax over the keys with 0 <= position <= newest[row], added
// to scores (count), or where it is larger in their place.
void kv_select_rows(float* logits, int64_t rows, int64_t count, const int32_t* positions,
                    const int32_t* newest, bool maximum, float* scores, Isa isa = selected_isa());
void kv_select_rows(double* logits, int64_t rows, int64_t count, const int32_t* positions,
                    const int32_t* newest, bool maximum, double* scores, Isa isa = selected_isa());

}  // namespace kvopt::cpu
