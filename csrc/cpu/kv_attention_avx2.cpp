// SPDX-License-Identifier: Apache-2.0
// Decode attention and prefill scores with 8 channels a register: kv_attention_tiles.h,
// kv_select_row.h. Nothing but the functions
// at the end may have external linkage.
#define KVOPT_QLINEAR_AVX2

#include "cpu/kv_attention_tiles.h"
#include "cpu/kv_select_row.h"

namespace kvopt::cpu {

void kv_attention_unit_avx2(const KvAttentionTask& task) { run_unit(task); }

void kv_exponentials_avx2(const float* row, int64_t count, float largest, float factor,
                          float* out) {
  run_exponentials(row, count, largest, factor, out);
}

void kv_select_row_avx2(float* logits, int64_t count, const int32_t* positions, int32_t newest,
                        bool maximum, float* scores) {
  run_select_row(logits, count, positions, newest, maximum, scores);
}

}  // namespace kvopt::cpu
