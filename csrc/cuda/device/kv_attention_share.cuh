// SPDX-License-Identifier: Apache-2.0
// Who works on which slots: the filled slots of all segments, known on the device only, in equal
// shares for a grid that the host fixed from capacities.
//
// The slots of a segment are cut into units of 32, packed and plain ones apart. Each segment is
// split into as many equal runs of units as it takes for no run to be longer than `chunk`; runs are
// numbered over all segments, and block i takes run i. Every block computes this from the lengths
// anew: a few loads from L2 and a scan over the block.
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

constexpr int kUnit = 32;               // slots
constexpr int kAttentionThreads = 128;  // of every block here
constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr int kSmallestChunk = kAttentionWarps;  // units: one for each warp

__host__ __device__ __forceinline__ int kv_units(int packed, int plain) {
  return (packed + kUnit - 1) / kUnit + (plain + kUnit - 1) / kUnit;
}

struct Share {
  int segment;  // -1: none
  int split;    // of `splits`
  int splits;
  int first_block;  // the run of split 0
  int first_unit, last_unit;
};

__device__ __forceinline__ int block_scan(int value, int& total, int* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFF, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // earlier sums may still be read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kAttentionWarps; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  return before + sum - value;  // of the threads before this one
}

// The share of block `block`, or with `of_segment` the splits of segment `block` (units unset).
// `wave` is how many blocks the device runs at a time.
__device__ inline Share find_share(const KvStore& s, int block, bool of_segment, int wave) {
  __shared__ Share found;
  __shared__ int warp_sums[kAttentionWarps];
  const int segments = static_cast<int>(s.rows * s.heads);
  const int each = (segments + kAttentionThreads - 1) / kAttentionThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, segments);
  const int end = min(begin + each, segments);
  const auto units_of = [&](int segment) {
    const int2 filled = reinterpret_cast<const int2*>(s.lengths)[segment];
    return kv_units(filled.x, filled.y);
  };
  if (threadIdx.x == 0) found.segment = -1;
  int units = 0, total;
  for (int i = begin; i < end; ++i) units += units_of(i);
  block_scan(units, total, warp_sums);
  // Much work: four runs for each place, so that the last wave costs little. Little work: one.
  const int rounds = total > 32 * wave ? 4 : 1;
  // A segment's last run may be short: as many places fewer, so that the runs fit the waves.
  const int places = rounds * wave - min(segments, rounds * wave / 2);
  const int chunk = max(kSmallestChunk, (total + places - 1) / places);
  int splits = 0, all;
  for (int i = begin; i < end; ++i) splits += (units_of(i) + chunk - 1) / chunk;
  int first = block_scan(splits, all, warp_sums);
  for (int i = begin; i < end; ++i) {
    const int here = units_of(i), count = (here + chunk - 1) / chunk;
    const bool mine = of_segment ? i == block : block >= first && block < first + count;
    if (mine) {
      const int split = of_segment ? 0 : block - first;
      const int run = count == 0 ? 0 : (here + count - 1) / count;
      found = {i, split, count, first, min(split * run, here), min((split + 1) * run, here)};
    }
    first += count;
  }
  __syncthreads();
  return found;
}

// What the passes hand to each other through device memory, in this order.
struct AttentionWorkspace {
  float2* summary;  // (blocks, query_group): largest logit (base 2) of a run, its sum of 2^(logit -
                    // largest)
  float* partial;   // (blocks, query_group, D): the run's sum of 2^(logit - largest) * value
  float* logits;    // (B, Q + P, query_group), base 2; only with an update of scores
};

struct AttentionLaunch {
  KvAttentionParams p;
  AttentionWorkspace workspace;
  int blocks;  // no more runs than this
  int wave;
};

}  // namespace kvopt::cuda
