// SPDX-License-Identifier: Apache-2.0
// kv_evict_keys.h with 8 slots a register.
#include "cpu/kv_evict_keys.h"

namespace kvopt::cpu {

int32_t kv_keys_avx2(const KvKeyRule& rule, const int32_t* positions, const float* scores,
                     int64_t count, int32_t* keys) {
  return all_keys(rule, positions, scores, count, keys);
}

}  // namespace kvopt::cpu
