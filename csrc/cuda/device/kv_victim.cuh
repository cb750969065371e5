// SPDX-License-Identifier: Apache-2.0
// Who leaves a full segment (KvVictimRule of common/kv_store.h): a pass of a block's threads over
// the slots, 8 bytes each, and the smallest of their keys
//
//     (protected?, priority, position, index)
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

constexpr int kKvEvictThreads = 512;  // of a block that works on a segment

struct Key {
  uint64_t high, low;
};

constexpr Key kNoKey{~uint64_t{0}, ~uint64_t{0}};

__device__ __forceinline__ bool before(const Key& a, const Key& b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

// Numbers whose order as unsigned integers is that of the arguments.
__device__ __forceinline__ uint32_t ordered(int32_t v) {
  return static_cast<uint32_t>(v) ^ 0x80000000u;
}
__device__ __forceinline__ uint32_t ordered(float v) {
  if (isnan(v)) v = INFINITY;
  const uint32_t bits = __float_as_uint(v + 0.0f);  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The order of age: position, then index.
__device__ __forceinline__ uint64_t age_key(int32_t position, int index) {
  return uint64_t{ordered(position)} << 32 | static_cast<uint32_t>(index);
}

__device__ __forceinline__ int index_of(const Key& key) {
  return static_cast<int>(key.low & 0xFFFFFFFF);
}

// Of a slot of a segment with this capacity.
__device__ __forceinline__ Key key_of(const KvVictimRule& rule, int capacity, int32_t newest,
                                      int32_t position, float score, int index) {
  uint32_t priority;
  if (rule.order == KvOrder::kOldest) {
    priority = ordered(position);
  } else {
    const int64_t age = int64_t{newest} - position;
    priority = ordered(rule.age ? __fdiv_rn(score, static_cast<float>(age < 1 ? 1 : age)) : score);
  }
  const bool old = position >= rule.first;
  const int64_t last = newest - kv_recent(rule.recent, capacity);
  const uint64_t level = !old ? 2 : position <= last ? 0 : 1;
  return {level << 32 | priority, age_key(position, index)};
}

// The smallest of the threads' keys, for every thread.
__device__ inline Key block_smallest(Key key) {
  __shared__ Key of_warp[32];
  __syncthreads();  // an earlier result may still be read
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Key other{__shfl_xor_sync(0xFFFFFFFF, key.high, offset),
                    __shfl_xor_sync(0xFFFFFFFF, key.low, offset)};
    if (before(other, key)) key = other;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = key;
  __syncthreads();
  key = of_warp[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) {
    if (before(of_warp[i], key)) key = of_warp[i];
  }
  return key;
}

__device__ __forceinline__ bool is_full(const KvStore& s, const KvSegment& g) {
  return g.plain >= g.plain_capacity && g.packed + s.group > g.packed_capacity;
}

// The index in a full segment of the token that makes room for one at `newest`; `common` is that of
// the row, or -1; `more_scores`, laid out as the store's, are added to them, null for none.
__device__ __forceinline__ int find_victim(const KvVictimRule& rule, const KvStore& s,
                                           const float* more_scores, int64_t row, int64_t head,
                                           const KvSegment& g, int32_t newest, int common) {
  if (rule.victim != nullptr) {
    const int given = rule.victim[row * rule.victim_heads + head % rule.victim_heads];
    if (given >= 0 && given < g.filled()) return given;
  }
  if (common >= 0) return common;
  Key best = kNoKey;
  const int n = g.filled();
  const bool by_score = rule.order == KvOrder::kLowestScore && s.scores != nullptr;
  constexpr int kBatch = 4;  // loads under way before the first is looked at
  for (int first = threadIdx.x; first < n; first += kBatch * kKvEvictThreads) {
    int32_t position[kBatch];
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t place = slot_place(s, row, g, min(first + i * kKvEvictThreads, n - 1));
      position[i] = s.positions[place];
      score[i] = by_score ? s.scores[place] : static_cast<float>(position[i]);
      if (by_score && more_scores != nullptr) score[i] = __fadd_rn(score[i], more_scores[place]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kKvEvictThreads;
      const Key key = key_of(rule, g.capacity(), newest, position[i], score[i], index);
      if (index < n && before(key, best)) best = key;
    }
  }
  return index_of(block_smallest(best));
}

// Launches, for `shared`: common[row] = the index that all heads of the row evict, -1 where none of
// them does; before any head changes.
void find_common_victims(const KvVictimRule& rule, const KvStore& s, const float* more_scores,
                         int32_t* common, cudaStream_t stream);

}  // namespace kvopt::cuda
