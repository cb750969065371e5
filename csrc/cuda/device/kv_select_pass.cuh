// SPDX-License-Identifier: Apache-2.0
// The two passes of kv_select.cu over tiles of logits. A tile class multiplies kX vectors that stay
// with kY that stream past; a thread holds rows row(i) of the ones and columns column(j) of the
// others, kRowLanes neighbouring lanes share rows, so every result is a sum along a thread's
// columns and, at the end, over those lanes.
#pragma once

#include "cuda/device/kv_store.cuh"

namespace kvopt::cuda {

struct SelectLaunch {
  KvSelectParams p;
  int splits;         // of the keys, in the first pass
  float2* partials;   // (splits, B, Hq, q): largest logit (base 2), sum of 2^(logit - largest)
  float* normaliser;  // (B, Hq, q): log2 of a query's whole sum, +inf where it sees no key
};

// Over the warp: the smallest position >= 0 (INT32_MAX without one), or the largest of all.
template <bool kSmallest>
__device__ __forceinline__ int extreme_position(const int32_t* positions, int count) {
  int v = kSmallest ? INT32_MAX : -1;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int position = positions[i];
    v = !kSmallest ? max(v, position) : position >= 0 ? min(v, position) : v;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xFFFFFFFF, v, offset);
    v = kSmallest ? min(v, other) : max(v, other);
  }
  return v;
}

// First pass: queries stay, keys stream. Block (query tile, split, b * Hq + head).
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) normaliser_kernel(SelectLaunch a) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int32_t positions[Tile::kY];
  const KvSelectParams& p = a.p;
  const int64_t query_heads = p.heads * p.query_group;
  const int64_t query_head = blockIdx.z, row = query_head / query_heads;
  const int64_t head = query_head % query_heads / p.query_group;
  const int64_t first_query = int64_t{blockIdx.x} * Tile::kX;
  const int queries = static_cast<int>(min(int64_t{Tile::kX}, p.queries - first_query));
  const int64_t tiles = (p.keys + Tile::kY - 1) / Tile::kY;
  const int64_t run = (tiles + a.splits - 1) / a.splits;
  const int64_t begin = blockIdx.y * run, end = min(begin + run, tiles);
  const int32_t* query_positions = p.query_positions + row * p.queries + first_query;
  const int32_t* key_positions =
      p.key_positions + (row * p.position_heads + head % p.position_heads) * p.keys;
  const float scale = p.scale * 1.44269504088896341f;

  Tile tile(shared, p.type, static_cast<int>(p.dim));
  tile.stay(p.query, (query_head * p.queries + first_query) * p.dim, queries);
  int mine[Tile::kRows];
  float largest[Tile::kRows], sum[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    mine[i] = Tile::row(i) < queries ? query_positions[Tile::row(i)] : -1;
    largest[i] = -INFINITY;
    sum[i] = 0;
  }
  const int newest = extreme_position<false>(query_positions, queries);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first_key = t * Tile::kY;
    const int keys = static_cast<int>(min(int64_t{Tile::kY}, p.keys - first_key));
    if (extreme_position<true>(key_positions + first_key, keys) > newest) continue;
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kY; i += Tile::kThreads) {
      positions[i] = i < keys ? key_positions[first_key + i] : -1;
    }
    float products[Tile::kRows][Tile::kColumns];
    tile.multiply(products, p.key, ((row * p.heads + head) * p.keys + first_key) * p.dim, keys);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      float highest = largest[i];
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        const int position = positions[Tile::column(j)];
        const bool seen = position >= 0 && position <= mine[i];
        products[i][j] = seen ? products[i][j] * scale : -INFINITY;
        highest = fmaxf(highest, products[i][j]);
      }
      if (highest == -INFINITY) continue;
      sum[i] *= exp2f(largest[i] - highest);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sum[i] += exp2f(products[i][j] - highest);
      largest[i] = highest;
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    float highest = largest[i];
#pragma unroll
    for (int offset = 1; offset < Tile::kRowLanes; offset *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, offset));
    }
    float total = sum[i] == 0 ? 0.0f : sum[i] * exp2f(largest[i] - highest);
#pragma unroll
    for (int offset = 1; offset < Tile::kRowLanes; offset *= 2) {
      total += __shfl_xor_sync(0xFFFFFFFF, total, offset);
    }
    if (threadIdx.x % Tile::kRowLanes != 0 || Tile::row(i) >= queries) continue;
    const int64_t all = p.rows * query_heads * p.queries;
    a.partials[blockIdx.y * all + query_head * p.queries + first_query + Tile::row(i)] =
        make_float2(highest, total);
  }
}

// Joins the splits of the first pass, in their order.
__global__ void __launch_bounds__(128) join_normalisers_kernel(SelectLaunch a) {
  const int64_t all = a.p.rows * a.p.heads * a.p.query_group * a.p.queries;
  const int64_t i = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (i >= all) return;
  float highest = -INFINITY, total = 0;
  for (int j = 0; j < a.splits; ++j) highest = fmaxf(highest, a.partials[j * all + i].x);
  for (int j = 0; j < a.splits; ++j) {
    const float2 part = a.partials[j * all + i];
    if (part.y != 0) total += part.y * exp2f(part.x - highest);
  }
  a.normaliser[i] = total == 0 ? INFINITY : highest + log2f(total);
}

// Second pass: keys stay, the queries of all heads of the group stream. Block (key tile, b * H +
// h).
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) score_kernel(SelectLaunch a) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int32_t positions[Tile::kY];
  __shared__ float normalisers[Tile::kY];
  const KvSelectParams& p = a.p;
  const int64_t segment = blockIdx.y, row = segment / p.heads, head = segment % p.heads;
  const int64_t first_key = int64_t{blockIdx.x} * Tile::kX;
  const int keys = static_cast<int>(min(int64_t{Tile::kX}, p.keys - first_key));
  const int64_t tiles = (p.queries + Tile::kY - 1) / Tile::kY;
  const int32_t* query_positions = p.query_positions + row * p.queries;
  const int32_t* key_positions =
      p.key_positions + (row * p.position_heads + head % p.position_heads) * p.keys + first_key;
  const float scale = p.scale * 1.44269504088896341f;

  Tile tile(shared, p.type, static_cast<int>(p.dim));
  tile.stay(p.key, (segment * p.keys + first_key) * p.dim, keys);
  int mine[Tile::kRows];
  float score[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    mine[i] = Tile::row(i) < keys ? key_positions[Tile::row(i)] : -1;
    score[i] = 0;
  }
  const int oldest = extreme_position<true>(key_positions, keys);
  for (int64_t step = 0; step < p.query_group * tiles; ++step) {
    const int64_t query_head = segment * p.query_group + step / tiles;
    const int64_t first_query = step % tiles * Tile::kY;
    const int queries = static_cast<int>(min(int64_t{Tile::kY}, p.queries - first_query));
    if (oldest > extreme_position<false>(query_positions + first_query, queries)) continue;
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kY; i += Tile::kThreads) {
      positions[i] = i < queries ? query_positions[first_query + i] : -1;
      normalisers[i] =
          i < queries ? a.normaliser[query_head * p.queries + first_query + i] : INFINITY;
    }
    float products[Tile::kRows][Tile::kColumns];
    tile.multiply(products, p.query, (query_head * p.queries + first_query) * p.dim, queries);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int position = positions[Tile::column(j)];
      const float normaliser = normalisers[Tile::column(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        const bool seen = mine[i] >= 0 && mine[i] <= position;
        const float weight = seen ? exp2f(fmaf(products[i][j], scale, -normaliser)) : 0.0f;
        score[i] = p.maximum ? fmaxf(score[i], weight) : score[i] + weight;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int offset = 1; offset < Tile::kRowLanes; offset *= 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFF, score[i], offset);
      score[i] = p.maximum ? fmaxf(score[i], other) : score[i] + other;
    }
    if (threadIdx.x % Tile::kRowLanes == 0 && Tile::row(i) < keys) {
      p.scores[segment * p.keys + first_key + Tile::row(i)] = score[i];
    }
  }
}

}  // namespace kvopt::cuda
