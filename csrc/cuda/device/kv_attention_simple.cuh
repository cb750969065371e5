// SPDX-License-Identifier: Apache-2.0
// Decode attention in fp32 arithmetic: every type, codec, number of channels and group. The kernel
// for float32 models, and for what the tensor-core tiles leave.
//
// A lane owns four (or twice four) channels, a warp takes four slots at a time for eight query
// heads. The 32 products of slots and heads are sums over the warp; a butterfly that halves the
// number of values at each step leaves one of them in each lane:
//
//     lane = 8 * slot + head     31 shuffles for 32 sums, one exponential per lane
//
// The weights go back to all lanes through shared memory. Keys and values are read once for the
// eight heads, each a whole vector per warp and coalesced.
#pragma once

#include "cuda/device/kv_attention_share.cuh"
#include "cuda/device/qlinear_problem.cuh"

namespace kvopt::cuda {

constexpr int kSimpleSlots = 4;
constexpr int kSimpleHeads = 8;

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

__device__ __forceinline__ void add_scaled(float4& sum, float w, float4 v) {
  sum = make_float4(fmaf(w, v.x, sum.x), fmaf(w, v.y, sum.y), fmaf(w, v.z, sum.z),
                    fmaf(w, v.w, sum.w));
}

// values[j] of all lanes summed, in lane j.
__device__ __forceinline__ float transpose_sum(float (&values)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < offset; ++i) {
      const float send = upper ? values[i] : values[i + offset];
      const float keep = upper ? values[i + offset] : values[i];
      values[i] = keep + __shfl_xor_sync(0xFFFFFFFF, send, offset);
    }
  }
  return values[0];
}

// Query `head`'s element d, turned back by gap * frequencies (common/kv_store.h).
__device__ inline float turned_query(const KvAttentionParams& p, int64_t query_head, int64_t d,
                                     int gap) {
  const auto element = [&](int64_t i) {
    return load_element(p.query, query_head * p.store.dim + i, p.store.type);
  };
  if (d >= p.rotary) return element(d);
  const int64_t half = p.rotary / 2, pair = d % half;
  float sine, cosine;
  sincosf(__fmul_rn(static_cast<float>(gap), p.frequencies[pair]), &sine, &cosine);
  const float x = element(pair), y = element(pair + half);
  return d < half ? x * cosine + y * sine : y * cosine - x * sine;
}

template <int kChunks>
__global__ void __launch_bounds__(kAttentionThreads) simple_attention_kernel(AttentionLaunch a) {
  __shared__ float queries[2][kSimpleHeads][kKvMaxDim];
  __shared__ float weights[kAttentionWarps][32];
  __shared__ float changes[kAttentionWarps][kSimpleHeads];
  __shared__ float2 summaries[kAttentionWarps][kSimpleHeads];
  __shared__ float4 sums[kAttentionWarps][32];
  const KvAttentionParams& p = a.p;
  const KvStore& s = p.store;
  const Share share = find_share(s, static_cast<int>(blockIdx.x), false, a.wave);
  let_next_kernel_start();
  if (share.segment < 0) return;
  const int64_t row = share.segment / static_cast<int>(s.heads);
  const KvSegment g = load_segment(s, share.segment);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int dim = static_cast<int>(s.dim);
  const int64_t first_head = blockIdx.y * kSimpleHeads;
  const int heads = static_cast<int>(min(int64_t{kSimpleHeads}, p.query_group - first_head));
  const int64_t query_head = share.segment * p.query_group + first_head;
  const bool turned = p.first > 0 && p.gap != nullptr && p.frequencies != nullptr;
  for (int i = threadIdx.x; i < kSimpleHeads * kKvMaxDim; i += kAttentionThreads) {
    const int head = i / kKvMaxDim, d = i % kKvMaxDim;
    const bool there = head < heads && d < dim;
    queries[0][head][d] =
        there ? load_element(p.query, (query_head + head) * dim + d, s.type) : 0.0f;
    if (turned) {
      queries[1][head][d] = there ? turned_query(p, query_head + head, d, p.gap[row]) : 0.0f;
    }
  }
  __syncthreads();

  float4 out[kSimpleHeads][kChunks];
#pragma unroll
  for (int h = 0; h < kSimpleHeads; ++h) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) out[h][c] = make_float4(0, 0, 0, 0);
  }
  float largest = -INFINITY, sum = 0;  // of head lane % 8; alike in its four lanes
  const float scale = p.scale * 1.44269504088896341f;
  const int packed_units = (g.packed + kUnit - 1) / kUnit;
  const int my_head = lane % kSimpleHeads, my_slot = lane / kSimpleHeads;

  for (int unit = share.first_unit + warp; unit < share.last_unit; unit += kAttentionWarps) {
    const bool packed = unit < packed_units;
    const int begin = (packed ? unit : unit - packed_units) * kUnit;
    const int end = min(begin + kUnit, packed ? g.packed : g.plain);
    for (int i = begin; i < end; i += kSimpleSlots) {
      float4 keys[kSimpleSlots][kChunks], values[kSimpleSlots][kChunks];
      bool early[kSimpleSlots];
#pragma unroll
      for (int j = 0; j < kSimpleSlots; ++j) {
        const int slot = i + j;
        early[j] = false;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int chunk = 32 * c + lane;
          keys[j][c] = values[j][c] = make_float4(0, 0, 0, 0);
          if (slot >= end || 4 * chunk >= dim) continue;
          if (packed) {
            keys[j][c] = load_packed_key(s, row, g.packed_begin + slot, chunk);
            values[j][c] = load_packed_value(s, row, g.packed_begin + slot, chunk);
          } else {
            const int64_t at = plain_vector(s, row, g.plain_begin + slot) + 4 * chunk;
            keys[j][c] = load_four(s.plain_keys, at, s.type);
            values[j][c] = load_four(s.plain_values, at, s.type);
          }
        }
        if (turned && slot < end) {
          early[j] = s.positions[slot_place(s, row, g, packed ? slot : g.packed + slot)] < p.first;
        }
      }
      float products[32];
#pragma unroll
      for (int j = 0; j < kSimpleSlots; ++j) {
#pragma unroll
        for (int h = 0; h < kSimpleHeads; ++h) {
          float product = 0;
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const float4 q = reinterpret_cast<const float4*>(queries[early[j]][h])[32 * c + lane];
            product = dot(q, keys[j][c], product);
          }
          products[kSimpleHeads * j + h] = product;
        }
      }
      const bool there = i + my_slot < end;
      const float logit = transpose_sum(products) * scale;
      if (p.update != KvUpdate::kNone && there && my_head < heads) {
        const int index = i + my_slot + (packed ? 0 : g.packed);
        a.workspace.logits[slot_place(s, row, g, index) * p.query_group + first_head + my_head] =
            logit;
      }
      float highest = there ? logit : -INFINITY;
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 8));
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 16));
      highest = fmaxf(highest, largest);
      const float change = largest == highest ? 1.0f : exp2f(largest - highest);
      const float weight = there ? exp2f(logit - highest) : 0.0f;
      float added = weight + __shfl_xor_sync(0xFFFFFFFF, weight, 8);
      added += __shfl_xor_sync(0xFFFFFFFF, added, 16);
      largest = highest;
      sum = fmaf(sum, change, added);
      weights[warp][lane] = weight;
      if (lane < kSimpleHeads) changes[warp][lane] = change;
      __syncwarp();
#pragma unroll
      for (int h = 0; h < kSimpleHeads; ++h) {
        const float by = changes[warp][h];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          out[h][c] =
              make_float4(out[h][c].x * by, out[h][c].y * by, out[h][c].z * by, out[h][c].w * by);
#pragma unroll
          for (int j = 0; j < kSimpleSlots; ++j) {
            add_scaled(out[h][c], weights[warp][kSimpleHeads * j + h], values[j][c]);
          }
        }
      }
      __syncwarp();
    }
  }

  if (lane < kSimpleHeads) summaries[warp][lane] = make_float2(largest, sum);
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kSimpleHeads; ++h) {
    float highest = -INFINITY, total = 0;
    for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, summaries[w][h].x);
    for (int w = 0; w < kAttentionWarps; ++w) {
      if (summaries[w][h].y != 0) {
        total += summaries[w][h].y * exp2f(summaries[w][h].x - highest);
      }
    }
    const float by = summaries[warp][h].y == 0 ? 0.0f : exp2f(summaries[warp][h].x - highest);
    const int64_t at = blockIdx.x * p.query_group + first_head + h;
    if (threadIdx.x == 0 && h < heads) a.workspace.summary[at] = make_float2(highest, total);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      sums[warp][lane] =
          make_float4(out[h][c].x * by, out[h][c].y * by, out[h][c].z * by, out[h][c].w * by);
      __syncthreads();
      const int d = 4 * (32 * c + lane);
      if (warp == 0 && h < heads && d < dim) {
        float4 v = sums[0][lane];
        for (int w = 1; w < kAttentionWarps; ++w) add_scaled(v, 1.0f, sums[w][lane]);
        *reinterpret_cast<float4*>(a.workspace.partial + at * dim + d) = v;
      }
      __syncthreads();
    }
  }
}

}  // namespace kvopt::cuda
