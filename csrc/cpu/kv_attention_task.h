// SPDX-License-Identifier: Apache-2.0
// What the portable side of decode attention prepares for the vector side: numbers and pointers, no
// code, so that every instruction set may include it.
#pragma once

#include "common/kv_store.h"

namespace kvopt::cpu {

constexpr int64_t kKvOffsetLanes = 16;  // partial sums of an offset: of the widest registers

struct KvAttentionTask {
  const KvStore* store;
  int64_t query_group;
  int64_t packed, filled;             // of the segment
  int64_t packed_begin, plain_begin;  // among the store's slots
  const int32_t* packed_positions;    // of the segment's parts
  const int32_t* plain_positions;
  int64_t packed_bytes, plain_bytes;  // of a vector
  int64_t value_groups;               // of a packed value; 0 without an integer codec
  int64_t begin, end;                 // slots, by index in the segment
  int32_t first;                      // positions below it see `turned`
  const float* queries;               // (query_group, D), times the logits' scale
  const float* turned;                // likewise, or null
  float* partial;                     // (query_group, D + 2): largest, total, sums
  float* logits;                      // (query_group, filled) or null
  // scratch
  float* scaled;     // (query_group, D)
  float* constants;  // (query_group)
  float* tile;       // (2, query_group, 32)
  float* offsets;    // (query_group, value_groups, kKvOffsetLanes)
  float* weights;    // (value_groups, query_group, 32)
};

// Of one instruction set each: units whose D, and integer codec's group, are multiples of its
// lanes.
void kv_attention_unit_avx2(const KvAttentionTask& task);
void kv_attention_unit_avx512(const KvAttentionTask& task);
// out[i] = e^(row[i] - largest) * factor
void kv_exponentials_avx2(const float* row, int64_t count, float largest, float factor, float* out);
void kv_exponentials_avx512(const float* row, int64_t count, float largest, float factor,
                            float* out);

// One row of kv_select_rows.
void kv_select_row_avx2(float* logits, int64_t count, const int32_t* positions, int32_t newest,
                        bool maximum, float* scores);
void kv_select_row_avx512(float* logits, int64_t count, const int32_t* positions, int32_t newest,
                          bool maximum, float* scores);

}  // namespace kvopt::cpu
