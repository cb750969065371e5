// SPDX-License-Identifier: Apache-2.0
// Decode attention on tensor cores: 16 slots at a time against eight query heads, keys and values
// straight from memory into registers.
//
//     logits (16 slots x 8 heads) = K (16 x D) q^T          A rows are slots
//     out    (D x 8 heads)       += V^T (D x 16) p^T        A rows are channels
//
// (m16n8k16; a group of fewer heads leaves columns empty.) Logits come out as slots by heads, the
// second product wants them as heads by slots: `movmatrix` turns 8 x 8 of them in one instruction.
// Nothing but the query passes through shared memory.
//
// A warp works on its own: it keeps largest logit, sum and out of its slots, and loads ahead: the
// next keys are on their way while it takes exponentials, the next values while it multiplies keys.
// Four warps join at the end of their run.
#pragma once

#include "cuda/device/kv_attention_simple.cuh"
#include "cuda/device/kv_attention_tile.cuh"

namespace kvopt::cuda {

constexpr int kTileHeads = 8;

// Blocks of a multiprocessor at a time, as far as registers go.
__host__ __device__ constexpr int tile_blocks(int dim) { return dim <= 64 ? 3 : 2; }

__device__ __forceinline__ float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

template <int kDim>
struct WarpState {
  float out[kDim / 16][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // of heads 2t, 2t + 1
  float sum[2] = {0, 0};                      // of this lane's slots
};

// Weights are kept 2^4 times too large against underflow in 16 bits; the sums are, too.
constexpr float kWeightExponent = 4;

// The warp's tiles of a part: slots first + (warp + 4 k) * unit.
template <int kDim, KvCodec kCodec, bool kBFloat>
__device__ void work_on_part(WarpState<kDim>& state, const Part& part, const TileParams& p,
                             const QueryOperands<kDim>& q, uint4* group, int first_unit,
                             int last_unit) {
  using T = Tile<kDim, kCodec, kBFloat>;
  constexpr bool kBFloatWeights = kBFloat && kCodec == KvCodec::kModel;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int end = min(last_unit * kUnit, part.count);
  const auto next = [&](int slot) {
    // The other half of the unit, or the warp's next unit.
    if (slot % kUnit == 0 && slot + T::kSlots < end) return slot + T::kSlots;
    return slot / kUnit * kUnit + kAttentionWarps * kUnit;
  };
  int slot = (first_unit + static_cast<int>(threadIdx.x) / 32) * kUnit;
  if (slot >= end) return;
  T tile;
  tile.load_keys(part, p, slot);
  if (T::kAhead) tile.load_values(part, p, slot);
  while (slot < end) {
    const int following = next(slot);
    if constexpr (T::kBits < 16) {
      const int ahead = next(following);
      if (ahead < end) T::prefetch(part, p, ahead);
    }
    float logits[4];
    bool early[2] = {};
    bool any_early = false;
    if (part.positions != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        early[i] = part.positions[T::existing(part, slot + T::key_slot(i))] < p.first;
        any_early |= early[i];
      }
      any_early = __any_sync(0xFFFFFFFF, any_early);
    }
    tile.share_group(group);
#pragma unroll 1
    for (int form = kStraight; form <= (any_early ? kTurnedRest : kStraight); ++form) {
      float products[4];
      tile.multiply_keys(products, q, form, group);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (form != kStraight && !early[i / 2]) continue;
        logits[i] = products[i] + (form == kTurnedRest ? logits[i] : 0.0f);
      }
    }
    float2 multipliers[2];  // of a slot's key and of its value
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multipliers[i] = make_float2(p.scale, 1);
      if constexpr (kCodec == KvCodec::kFp8) {
        // e4m3 in an fp16's place is 2^-8 of its value: so are the sums of values.
        multipliers[i].x *= half_value(tile.slot_scales[i] & 0xFFFF);
        multipliers[i].y = half_value(tile.slot_scales[i] >> 16) * 256.0f;
      }
      if (part.factors != nullptr) {
        const uint32_t at = T::existing(part, slot + T::key_slot(i));
        const float2 factor = reinterpret_cast<const float2*>(part.factors)[at];
        multipliers[i].x *= factor.x;
        multipliers[i].y *= factor.y;
      }
    }
    if (!T::kAhead) tile.load_values(part, p, slot);
    if (T::kAhead && following < end) tile.load_keys(part, p, following);

    float highest[2] = {state.largest[0], state.largest[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = slot + T::key_slot(i);
      const bool there = T::Format::kInteger || at < part.count;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& logit = logits[2 * i + e];
        logit = there ? logit * multipliers[i].x : -INFINITY;
        highest[e] = fmaxf(highest[e], logit);
      }
      if (part.logits != nullptr && there) {
        float* to = part.logits + int64_t{at} * p.logit_stride + 2 * t;
        if (p.even_heads) {
          if (2 * t >= p.heads) continue;
          *reinterpret_cast<float2*>(to) = make_float2(logits[2 * i], logits[2 * i + 1]);
        } else {
          if (2 * t < p.heads) to[0] = logits[2 * i];
          if (2 * t + 1 < p.heads) to[1] = logits[2 * i + 1];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        highest[e] = fmaxf(highest[e], __shfl_xor_sync(0xFFFFFFFF, highest[e], offset));
      }
    }
    const bool grown = highest[0] > state.largest[0] || highest[1] > state.largest[1];
    if (__any_sync(0xFFFFFFFF, grown)) {
      const float change[2] = {exp2_fast(state.largest[0] - highest[0]),
                               exp2_fast(state.largest[1] - highest[1])};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        state.largest[e] = highest[e];
        state.sum[e] *= change[e];
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) state.out[i][j] *= change[j % 2];
      }
    }
    uint32_t b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float w[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        w[e] = exp2_fast(logits[2 * i + e] - highest[e] + kWeightExponent);
        state.sum[e] += w[e];
        w[e] *= multipliers[i].y;
      }
      b[i] = transpose_8x8(kBFloatWeights ? bfloat_pair(w[0], w[1]) : half_pair(w[0], w[1]));
    }
    const auto& v = tile.values;
    const auto& r = tile.ranges;
    const uint32_t scale[2] = {__byte_perm(r[0], r[1], kLowHalves),
                               __byte_perm(r[2], r[3], kLowHalves)};
    const uint32_t low[2] = {__byte_perm(r[0], r[1], kHighHalves),
                             __byte_perm(r[2], r[3], kHighHalves)};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      using F = typename T::Format;
      const uint32_t a[4] = {F::value_pair(v[0], v[1], 2 * i, scale[0], low[0]),
                             F::value_pair(v[0], v[1], 2 * i + 1, scale[0], low[0]),
                             F::value_pair(v[2], v[3], 2 * i, scale[1], low[1]),
                             F::value_pair(v[2], v[3], 2 * i + 1, scale[1], low[1])};
      mma_step<kBFloatWeights>(state.out[i], a, b[0], b[1]);
    }
    if (following < end) {
      if (T::kAhead) {
        tile.load_values(part, p, following);
      } else {
        tile.load_keys(part, p, following);
      }
    }
    slot = following;
  }
}

// The channel of element e of operand pair n for lane 4 * g + t.
template <int kDim, KvCodec kCodec>
__device__ __forceinline__ int query_channel(int t, int n, int e) {
  if constexpr (kCodec == KvCodec::kModel) return 8 * (t + 4 * (n / 4)) + 2 * (n % 4) + e;
  return t * (kDim / 4) + Codes<kCodec>::key_channel(n, e);
}

template <int kDim>
__device__ int packed_channel(KvCodec codec, int t, int n, int e) {
  if (codec == KvCodec::kInt4) return query_channel<kDim, KvCodec::kInt4>(t, n, e);
  if (codec == KvCodec::kInt2) return query_channel<kDim, KvCodec::kInt2>(t, n, e);
  return query_channel<kDim, KvCodec::kInt8>(t, n, e);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, tile_blocks(kDim))
    tile_attention_kernel(AttentionLaunch a) {
  // The query, first as numbers; at the end the warps' sums.
  struct Query {
    QueryOperands<kDim> query;
    float numbers[2][kTileHeads][kDim];
  };
  union Shared {
    Query query;
    float out[kAttentionWarps][kTileHeads][kDim];
  };
  __shared__ __align__(16) uint8_t shared_bytes[sizeof(Shared)];
  __shared__ float2 summaries[kAttentionWarps][kTileHeads];
  __shared__ uint4 groups[kAttentionWarps][kDim / 4];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const KvAttentionParams& p = a.p;
  const KvStore& s = p.store;
  const Share share = find_share(s, static_cast<int>(blockIdx.x), false, a.wave);
  let_next_kernel_start();
  if (share.segment < 0) return;
  const int64_t row = share.segment / static_cast<int>(s.heads);
  const KvSegment g = load_segment(s, share.segment);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_head = blockIdx.y * kTileHeads;
  const bool turns = p.first > 0 && p.gap != nullptr && p.frequencies != nullptr;
  const bool brain = s.type == KvType::kBFloat16;
  const int heads = static_cast<int>(min(int64_t{kTileHeads}, p.query_group - first_head));
  const TileParams tile{.group_shift = 31 - __clz(static_cast<int>(s.group)),
                        .heads = heads,
                        .logit_stride = static_cast<int>(p.query_group),
                        .even_heads = heads % 2 == 0 && p.query_group % 2 == 0,
                        .first = p.first,
                        .scale = p.scale * 1.44269504088896341f};
  const int64_t query_head = share.segment * p.query_group + first_head;
  // The query as it is, then in the operands' order.
#pragma unroll
  for (int i = threadIdx.x; i < kTileHeads * (kDim / 4); i += kAttentionThreads) {
    const int head = i / (kDim / 4), d = 4 * (i % (kDim / 4));
    float4 q = make_float4(0, 0, 0, 0);
    if (head < heads) q = load_four(p.query, (query_head + head) * s.dim + d, s.type);
    *reinterpret_cast<float4*>(&shared.query.numbers[0][head][d]) = q;
  }
  if (turns) {
    const int gap = p.gap[row];
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileHeads * kDim; i += kAttentionThreads) {
      const int head = i / kDim, d = i % kDim;
      const bool there = head < heads;
      shared.query.numbers[1][head][d] = there ? turned_query(p, query_head + head, d, gap) : 0.0f;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 6 * (kDim / 8) * 32; i += kAttentionThreads) {
    const int of = i % 32, n = i / 32 % (kDim / 8), kind = i / 32 / (kDim / 8);
    const int form = kind / 2;
    const bool packed = kind % 2 != 0;
    if (form != kStraight && !turns) break;
    float q[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int d = packed ? packed_channel<kDim>(s.codec, of % 4, n, e)
                           : query_channel<kDim, KvCodec::kModel>(of % 4, n, e);
      q[e] = shared.query.numbers[form != kStraight][of / 4][d];
      if (form == kTurnedRest) {
        q[e] -= brain && !packed ? __bfloat162float(__float2bfloat16_rn(q[e]))
                                 : __half2float(__float2half_rn(q[e]));
      }
    }
    reinterpret_cast<uint32_t*>(&shared.query.query.pairs[form][packed][n / 4][of])[n % 4] =
        brain && !packed ? bfloat_pair(q[0], q[1]) : half_pair(q[0], q[1]);
  }
  __syncthreads();

  WarpState<kDim> state;
  const int64_t places = row * (s.packed_slots + s.plain_slots);
  const auto part_of = [&](bool packed) {
    Part part{};
    part.count = packed ? g.packed : g.plain;
    const int64_t begin = packed ? g.packed_begin : g.plain_begin;
    const int64_t vector = row * (packed ? s.packed_slots : s.plain_slots) + begin;
    const int64_t place = places + begin + (packed ? 0 : s.packed_slots);
    const int64_t bytes =
        kv_packed_bytes(packed ? s.codec : KvCodec::kModel, s.type, s.dim) * vector;
    part.keys = (packed ? s.packed_keys : static_cast<const uint8_t*>(s.plain_keys)) + bytes;
    part.values = (packed ? s.packed_values : static_cast<const uint8_t*>(s.plain_values)) + bytes;
    if (turns) part.positions = s.positions + place;
    if (p.update != KvUpdate::kNone) {
      part.logits = a.workspace.logits + place * p.query_group + first_head;
    }
    if (!packed) return part;
    if (s.factors != nullptr) part.factors = s.factors + 2 * vector;
    if (s.codec == KvCodec::kFp8) {
      part.key_scale = s.key_scale + vector;
      part.value_scale = s.value_scale + vector;
    } else if (s.codec != KvCodec::kModel) {
      part.key_scale = s.key_scale + vector / s.group * 2 * s.dim;
      part.value_scale = s.value_scale + vector * kv_value_groups(s.dim, s.group) * 2;
    }
    return part;
  };
  const int packed_units = (g.packed + kUnit - 1) / kUnit;
  const auto work = [&]<KvCodec kCodec, bool kBFloat>(bool packed) {
    const int before = packed ? 0 : packed_units;
    const int first = max(share.first_unit - before, 0);
    const int last = (packed ? min(share.last_unit, packed_units) : share.last_unit) - before;
    if (first < last) {
      work_on_part<kDim, kCodec, kBFloat>(state, part_of(packed), tile, shared.query.query,
                                          groups[warp], first, last);
    }
  };
  if (s.codec == KvCodec::kFp8) work.template operator()<KvCodec::kFp8, false>(true);
  if (s.codec == KvCodec::kInt8) work.template operator()<KvCodec::kInt8, false>(true);
  if (s.codec == KvCodec::kInt4) work.template operator()<KvCodec::kInt4, false>(true);
  if (s.codec == KvCodec::kInt2) work.template operator()<KvCodec::kInt2, false>(true);
  for (int packed = s.codec == KvCodec::kModel; packed >= 0; --packed) {
#if __CUDA_ARCH__ >= 800
    if (brain) {
      work.template operator()<KvCodec::kModel, true>(packed != 0);
      continue;
    }
#endif
    work.template operator()<KvCodec::kModel, false>(packed != 0);
  }

#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      state.sum[e] += __shfl_xor_sync(0xFFFFFFFF, state.sum[e], offset);
    }
    if (lane < 4) summaries[warp][2 * lane + e] = make_float2(state.largest[e], state.sum[e]);
  }
  __syncthreads();  // the query is no longer needed, either
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const int channel = lane / 4 * (kDim / 8) + 2 * i;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      *reinterpret_cast<float2*>(&shared.out[warp][2 * (lane % 4) + e][channel]) =
          make_float2(state.out[i][e], state.out[i][2 + e]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.heads * (kDim / 4); i += kAttentionThreads) {
    const int head = i / (kDim / 4), d = 4 * (i % (kDim / 4));
    float highest = -INFINITY, total = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, summaries[w][head].x);
    float4 v = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float2 summary = summaries[w][head];
      if (summary.y == 0) continue;
      const float by = exp2f(summary.x - highest);
      total = fmaf(summary.y, by, total);
      add_scaled(v, by, *reinterpret_cast<const float4*>(&shared.out[w][head][d]));
    }
    const int64_t at = blockIdx.x * p.query_group + first_head + head;
    if (d == 0) a.workspace.summary[at] = make_float2(highest - kWeightExponent, total);
    *reinterpret_cast<float4*>(a.workspace.partial + at * s.dim + d) = v;
  }
}

}  // namespace kvopt::cuda
