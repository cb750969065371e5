// SPDX-License-Identifier: Apache-2.0
// Who leaves a full segment: KvVictimRule of common/kv_store.h.
#pragma once

#include <cstdint>

#include "common/kv_store.h"

namespace kvopt::cpu {

// What all heads of a row evict where they are full, with `shared`; -1 where there is no token.
// `more_scores`, laid out as the store's, are added to them; null for none.
int64_t kv_common_victim(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                         int64_t row);

// The index in segment (row, head), which is full, of the token that makes room for one at
// `position`. `common` is that of the row, or -1.
int64_t kv_find_victim(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                       int64_t row, int64_t head, int32_t position, int64_t common);

}  // namespace kvopt::cpu
