// SPDX-License-Identifier: Apache-2.0
// Tokens that move between the slots of a segment, with their positions and scores.
#pragma once

#include "cuda/device/kv_store.cuh"
#include "cuda/device/kv_victim.cuh"

namespace kvopt::cuda {

__device__ __forceinline__ void note(const KvStore& s, int64_t place, int32_t position,
                                     float score) {
  s.positions[place] = position;
  if (s.scores != nullptr) s.scores[place] = score;
}

__device__ __forceinline__ void copy_note(const KvStore& s, int64_t to, int64_t from) {
  note(s, to, s.positions[from], s.scores == nullptr ? 0.0f : s.scores[from]);
}

__device__ __forceinline__ int64_t packed_place(const KvStore& s, int64_t row, int64_t slot) {
  return row * (s.packed_slots + s.plain_slots) + slot;
}

__device__ __forceinline__ int64_t plain_place(const KvStore& s, int64_t row, int64_t slot) {
  return packed_place(s, row, s.packed_slots + slot);
}

// In shared memory: plain slots of the segment.
struct KvGaps {
  int leaving[kKvMaxGroup];                     // in any order
  int holes[kKvMaxGroup], movers[kKvMaxGroup];  // mover i goes to hole i
  int hole_count;
};

// Of `n` plain tokens, those in leaving[0 .. count) go: finds who fills the slots that they leave
// below n - count. All threads call it, right after they wrote `leaving`; the results are visible.
__device__ inline void find_movers(int n, int count, KvGaps& gaps) {
  const int rest = n - count;
  if (threadIdx.x == 0) gaps.hole_count = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * count; i += kKvEvictThreads) {
    // Threads below `count`: a leaving slot, a hole if it lies below `rest`. The others: slot rest
    // + (i - count), a mover if it stays.
    const bool hole = i < count;
    const int slot = hole ? gaps.leaving[i] : rest + i - count;
    int below = 0;  // leaving slots before it on its side of `rest`
    bool leaves = false;
    for (int j = 0; j < count; ++j) {
      const int other = gaps.leaving[j];
      below += other < slot && (other < rest) == hole;
      leaves |= other == slot;
    }
    if (hole && slot < rest) {
      gaps.holes[below] = slot;
      atomicAdd(&gaps.hole_count, 1);
    } else if (!hole && !leaves) {
      gaps.movers[slot - rest - below] = slot;
    }
  }
  __syncthreads();
}

// A warp per token that moves. Afterwards the caller synchronises.
__device__ inline void fill_gaps(const KvStore& s, int64_t row, const KvSegment& g,
                                 const KvGaps& gaps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < gaps.hole_count; i += kKvEvictThreads / 32) {
    const int64_t to = g.plain_begin + gaps.holes[i], from = g.plain_begin + gaps.movers[i];
    for (int c = 4 * lane; c < s.dim; c += 128) {
      const int64_t target = plain_vector(s, row, to) + c, source = plain_vector(s, row, from) + c;
      store_four(s.plain_keys, target, load_four(s.plain_keys, source, s.type), s.type);
      store_four(s.plain_values, target, load_four(s.plain_values, source, s.type), s.type);
    }
    if (lane == 0) copy_note(s, plain_place(s, row, to), plain_place(s, row, from));
  }
}

}  // namespace kvopt::cuda
