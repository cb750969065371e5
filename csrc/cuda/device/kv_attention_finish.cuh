// SPDX-License-Identifier: Apache-2.0
// The second pass of decode attention: joins the runs of each segment and turns logits into scores.
//
// With M = max m_j and L = sum of l_j 2^(m_j - M) over the runs j of a segment, in their order:
//     out = sum_j 2^(m_j - M) o_j / L          p = 2^(logit - (M + log2 L))
// The first B * Hq blocks write one query head's output each; of the others, which are there only
// if scores are updated, block i takes the slots of run i, one slot per thread.
#pragma once

#include "cuda/device/kv_attention_share.cuh"
#include "cuda/device/qlinear_problem.cuh"
#include "cuda/kv.h"

namespace kvopt::cuda {

__device__ __forceinline__ float block_max(float v, float* warps) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFF, v, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  return fmaxf(fmaxf(warps[0], warps[1]), fmaxf(warps[2], warps[3]));
}

__device__ __forceinline__ float block_sum(float v, float* warps) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFF, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  return warps[0] + warps[1] + warps[2] + warps[3];
}

// A run that holds nothing has the summary (-inf, 0).
__device__ __forceinline__ float run_weight(float2 summary, float highest) {
  return summary.y == 0 ? 0.0f : exp2f(summary.x - highest);
}

__device__ void join_runs(const AttentionLaunch& a, int64_t query_head) {
  __shared__ float4 sums[kAttentionThreads];
  __shared__ float warps[kAttentionWarps];
  static_assert(kAttentionWarps == 4);
  const KvAttentionParams& p = a.p;
  const KvStore& s = p.store;
  const int64_t segment = query_head / p.query_group, head = query_head % p.query_group;
  const Share share = find_share(s, static_cast<int>(segment), true, a.wave);
  wait_for_previous_kernel();  // lengths are older than that
  const int chunks = static_cast<int>(s.dim / 4), parts = kAttentionThreads / chunks;
  const int chunk = threadIdx.x % chunks, part = threadIdx.x / chunks;
  if (share.splits == 0) {
    if (part == 0) {
      store_four(p.out, query_head * s.dim + 4 * chunk, make_float4(0, 0, 0, 0), s.type);
    }
    return;
  }
  const float2* summary = a.workspace.summary + share.first_block * p.query_group + head;
  float highest = -INFINITY;
  for (int j = threadIdx.x; j < share.splits; j += kAttentionThreads) {
    highest = fmaxf(highest, summary[j * p.query_group].x);
  }
  highest = block_max(highest, warps);
  float total = 0;
  for (int j = threadIdx.x; j < share.splits; j += kAttentionThreads) {
    const float2 run = summary[j * p.query_group];
    total += run.y * run_weight(run, highest);
  }
  total = block_sum(total, warps);
  float4 v = make_float4(0, 0, 0, 0);
  if (part < parts) {
#pragma unroll 4
    for (int j = part; j < share.splits; j += parts) {
      const int64_t at = (share.first_block + j) * p.query_group + head;
      const float by = run_weight(a.workspace.summary[at], highest);
      const float4 o =
          *reinterpret_cast<const float4*>(a.workspace.partial + at * s.dim + 4 * chunk);
      v = make_float4(fmaf(by, o.x, v.x), fmaf(by, o.y, v.y), fmaf(by, o.z, v.z),
                      fmaf(by, o.w, v.w));
    }
  }
  sums[threadIdx.x] = v;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < parts; ++i) {
    const float4 o = sums[i * chunks + chunk];
    v = make_float4(v.x + o.x, v.y + o.y, v.z + o.z, v.w + o.w);
  }
  const float over = 1.0f / total;
  store_four(p.out, query_head * s.dim + 4 * chunk,
             make_float4(v.x * over, v.y * over, v.z * over, v.w * over), s.type);
}

__device__ __forceinline__ void add_weight(float logit, float& sum, float& largest) {
  const float weight = exp2f(logit);
  sum += weight;
  largest = fmaxf(largest, weight);
}

__device__ void update_scores(const AttentionLaunch& a, int block) {
  __shared__ float normalisers[kKvMostQueryGroup];
  const KvAttentionParams& p = a.p;
  const KvStore& s = p.store;
  const Share share = find_share(s, block, false, a.wave);
  wait_for_previous_kernel();
  if (share.segment < 0) return;
  const int64_t row = share.segment / static_cast<int>(s.heads);
  const KvSegment g = load_segment(s, share.segment);
  const int heads = static_cast<int>(p.query_group);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int head = warp; head < heads; head += kAttentionWarps) {
    const float2* summary = a.workspace.summary + share.first_block * p.query_group + head;
    float highest = -INFINITY, total = 0;
    for (int j = lane; j < share.splits; j += 32) {
      highest = fmaxf(highest, summary[j * p.query_group].x);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, offset));
    }
    for (int j = lane; j < share.splits; j += 32) {
      const float2 run = summary[j * p.query_group];
      total += run.y * run_weight(run, highest);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xFFFFFFFF, total, offset);
    }
    if (lane == 0) normalisers[head] = highest + log2f(total);
  }
  __syncthreads();
  const int packed_units = (g.packed + kUnit - 1) / kUnit;
  const int slots = (share.last_unit - share.first_unit) * kUnit;
  // Several slots of a thread have their loads under way together.
  constexpr int kBatch = 4;
  for (int first = threadIdx.x; first < slots; first += kBatch * kAttentionThreads) {
    int64_t place[kBatch];
    float had[kBatch], sum[kBatch] = {}, largest[kBatch] = {};
    bool there[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = min(first + j * kAttentionThreads, slots - 1);
      const int unit = share.first_unit + i / kUnit;
      const bool packed = unit < packed_units;
      const int index = (packed ? unit : unit - packed_units) * kUnit + i % kUnit;
      const int filled = packed ? g.packed : g.plain;
      there[j] = first + j * kAttentionThreads < slots && index < filled;
      place[j] = slot_place(s, row, g, min(index, filled - 1) + (packed ? 0 : g.packed));
      had[j] = s.scores[place[j]];
    }
    if (heads % 4 == 0) {
      for (int head = 0; head < heads; head += 4) {
        float4 four[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          four[j] = *reinterpret_cast<const float4*>(a.workspace.logits + place[j] * heads + head);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          add_weight(four[j].x - normalisers[head], sum[j], largest[j]);
          add_weight(four[j].y - normalisers[head + 1], sum[j], largest[j]);
          add_weight(four[j].z - normalisers[head + 2], sum[j], largest[j]);
          add_weight(four[j].w - normalisers[head + 3], sum[j], largest[j]);
        }
      }
    } else {
      for (int head = 0; head < heads; ++head) {
        float one[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) one[j] = a.workspace.logits[place[j] * heads + head];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          add_weight(one[j] - normalisers[head], sum[j], largest[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (!there[j]) continue;
      s.scores[place[j]] = p.update == KvUpdate::kAdd       ? had[j] + sum[j]
                           : p.update == KvUpdate::kReplace ? sum[j]
                                                            : fmaxf(had[j], largest[j]);
    }
  }
}

__global__ void __launch_bounds__(kAttentionThreads) finish_attention_kernel(AttentionLaunch a) {
  const int64_t query_heads = a.p.store.rows * a.p.store.heads * a.p.query_group;
  if (blockIdx.x < query_heads) {
    join_runs(a, blockIdx.x);
  } else {
    update_scores(a, static_cast<int>(blockIdx.x - query_heads));
  }
}

}  // namespace kvopt::cuda
