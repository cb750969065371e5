// SPDX-License-Identifier: Apache-2.0
// One warp's tile of 16 slots: its loads, and its product with the query. What
// the numbers mean to the tensor cores stands in kv_attention_codes.cuh.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/kv_attention_codes.cuh"
#include "cuda/device/kv_mma.cuh"

namespace kvopt::cuda {

// kBytes from memory, as words; kBytes is 2, 4, 8 or a multiple of 16, the address a multiple of
// it, or of 16.
template <int kBytes>
__device__ __forceinline__ void load_words(uint32_t* words, const uint8_t* from) {
  if constexpr (kBytes == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    static_assert(kBytes % 16 == 0);
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

// A part of a segment: vectors side by side, filled from the front.
struct Part {
  const uint8_t* keys;
  const uint8_t* values;
  const uint16_t* key_scale;    // of the first slot's group; per vector with fp8
  const uint16_t* value_scale;  // of the first slot
  const float* factors;         // of the first slot, or null
  const int32_t* positions;     // of the first slot; null unless early slots see a turned query
  float* logits;                // of the first slot, or null
  int count;
};

struct TileParams {
  int group_shift;   // log2 of a group's slots, and of a value group's channels
  int heads;         // of this block, up to eight
  int logit_stride;  // floats between two slots' logits
  bool even_heads;   // of this block, and in a slot's logits
  int first;         // positions below it see the turned query
  float scale;       // of logits to base 2
};

// Query operands in shared memory, [form][packed?][four pairs of channels][lane]. Packed ones are
// in fp16 and in the order of the codec, plain ones in the model's type. The forms: the query, the
// turned query rounded, and what that rounding left, for a turned number has more bits than the
// model's type.
enum QueryForm : int { kStraight = 0, kTurned = 1, kTurnedRest = 2 };

template <int kDim>
struct QueryOperands {
  uint4 pairs[3][2][kDim / 32][32];
};

template <int kDim, KvCodec kCodec, bool kBFloat>
struct Tile {
  using Format = Codes<kCodec>;
  static constexpr bool kPackedOperand = kCodec != KvCodec::kModel;
  static constexpr int kBits = Format::kBits;
  static constexpr int kPairs = kDim / 8;  // per lane and key
  static constexpr int kSlots = 16;
  static constexpr int kBytes = kDim * kBits / 8;                         // of a vector
  static constexpr int kKeyBytes = kBytes / 4, kValueBytes = kBytes / 8;  // of a lane
  static constexpr int kKeyWords = kKeyBytes / 4, kValueWords = (kValueBytes + 3) / 4;
  // Where registers are short, values are loaded only when the keys are done with.
  static constexpr bool kAhead = kDim < 256;

  uint32_t keys[2][kKeyWords];
  uint32_t values[4][kValueWords];
  uint32_t ranges[4];               // of the values: scale, minimum
  uint32_t slot_scales[2];          // fp8: of a key and of its value
  uint32_t group_words[kDim / 32];  // a 32nd of the group's scales and minima of the keys

  // Slots of the tile that this lane reads as keys (rows g, g + 8) and as values (columns).
  __device__ static int key_slot(int i) { return static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i; }
  __device__ static int value_slot(int i) {
    return 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2 + 8 * (i / 2);
  }
  // No load depends on a condition: a slot behind the last one reads that one, and its weight is
  // 0. Integer codecs fill whole groups.
  __device__ static uint32_t existing(const Part& part, int slot) {
    return Format::kInteger ? slot : min(slot, part.count - 1);
  }

  __device__ void load_keys(const Part& part, const TileParams& p, int slot) {
    const int t = threadIdx.x % 4;
    // 16 bits: pieces of eight channels, dealt to the four lanes in turn.
    const uint8_t* of_lane = part.keys + t * (kBits == 16 ? 16 : kKeyBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = existing(part, slot + key_slot(i));
      const uint8_t* from = of_lane + at * static_cast<uint32_t>(kBytes);
      if constexpr (kBits == 16) {
#pragma unroll
        for (int j = 0; j < kPairs / 4; ++j) load_words<16>(&keys[i][4 * j], from + 64 * j);
      } else {
        load_words<kKeyBytes>(keys[i], from);
      }
      if constexpr (kCodec == KvCodec::kFp8) {
        slot_scales[i] = part.key_scale[at] | uint32_t{part.value_scale[at]} << 16;
      }
    }
    if constexpr (Format::kInteger) {
      const uint32_t group = static_cast<uint32_t>(slot) >> p.group_shift;
      const auto* from = reinterpret_cast<const uint8_t*>(part.key_scale) + group * (4 * kDim);
      load_words<kDim / 8>(group_words, from + threadIdx.x % 32 * (kDim / 8));
    }
  }

  // The warp's shared memory gets the group's scales and minima, which every lane needs a quarter
  // of.
  __device__ void share_group(uint4* group) const {
    if constexpr (Format::kInteger) {
      __syncwarp();
      auto* words = reinterpret_cast<uint32_t*>(group) + threadIdx.x % 32 * (kDim / 32);
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) words[i] = group_words[i];
      __syncwarp();
    }
  }

  __device__ void load_values(const Part& part, const TileParams& p, int slot) {
    const int g = threadIdx.x % 32 / 4;
    const uint8_t* of_lane = part.values + g * kValueBytes;
    const uint32_t groups = max(1u, static_cast<uint32_t>(kDim) >> p.group_shift);
    const auto* ranges_of_lane = reinterpret_cast<const uint32_t*>(part.value_scale) +
                                 (static_cast<uint32_t>(g * (kDim / 8)) >> p.group_shift);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = existing(part, slot + value_slot(i));
      load_words<kValueBytes>(values[i], of_lane + at * static_cast<uint32_t>(kBytes));
      ranges[i] = 0;
      if constexpr (Format::kInteger) ranges[i] = ranges_of_lane[at * groups];
    }
  }

  // Asks the L2 for a tile that is further ahead than registers allow loads to be.
  __device__ static void prefetch(const Part& part, const TileParams& p, int slot) {
    if (!Format::kInteger && slot + kSlots > part.count) return;
    constexpr int kLine = 128;
    const int lane = threadIdx.x % 32;
    const uint8_t* of_lane = (lane < 16 ? part.keys : part.values) +
                             static_cast<uint32_t>(slot) * static_cast<uint32_t>(kBytes);
#pragma unroll
    for (int i = 0; i < kSlots * kBytes; i += 16 * kLine) {
      const int at = i + lane % 16 * kLine;
      if (at < kSlots * kBytes) prefetch_l2(of_lane + at);
    }
    if constexpr (Format::kInteger) {
      const uint32_t groups = max(1u, static_cast<uint32_t>(kDim) >> p.group_shift);
      const auto* scale = reinterpret_cast<const uint8_t*>(part.key_scale) +
                          (static_cast<uint32_t>(slot) >> p.group_shift) * (4 * kDim);
      const auto* range = reinterpret_cast<const uint8_t*>(part.value_scale) + slot * groups * 4;
      const bool is_scale = lane * kLine < 4 * kDim;
      const uint32_t at = (is_scale ? lane : lane - 4 * kDim / kLine) * kLine;
      if (is_scale || at < kSlots * groups * 4) prefetch_l2((is_scale ? scale : range) + at);
    }
  }

  // Word i of this lane's quarter of the scales, or from quad kDim / 8 on of the minima.
  __device__ static uint32_t group_word(const uint4* group, int from, int i) {
    const uint4 four = group[from + static_cast<int>(threadIdx.x) % 4 * (kDim / 32) + i / 4];
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }

  // Products of the loaded keys and the query, before the scale of the softmax and of slots.
  __device__ void multiply_keys(float (&logits)[4], const QueryOperands<kDim>& q, int form,
                                const uint4* group) const {
    const int lane = threadIdx.x % 32;
    const auto& query = q.pairs[form][kPackedOperand];
    float lowest[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] = 0;
#pragma unroll
    for (int step = 0; step < kPairs / 2; ++step) {
      const uint4 four = query[step / 2][lane];
      uint32_t b[2] = {step % 2 == 0 ? four.x : four.z, step % 2 == 0 ? four.y : four.w};
      if constexpr (Format::kInteger) {
        const uint32_t straight[2] = {b[0], b[1]};
        uint32_t low[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = 2 * step + e;
          const int c0 = Format::key_channel(n, 0), c1 = Format::key_channel(n, 1);
          uint32_t scale = group_word(group, 0, c0 / 2);
          low[e] = group_word(group, kDim / 8, c0 / 2);
          if (c1 / 2 != c0 / 2) {
            const uint32_t halves = c0 % 2 == 0 ? kLowHalves : kHighHalves;
            scale = __byte_perm(scale, group_word(group, 0, c1 / 2), halves);
            low[e] = __byte_perm(low[e], group_word(group, kDim / 8, c1 / 2), halves);
          }
          b[e] = multiply_halves(b[e], scale);
          if (Format::key_exponent(n) != 0) {
            b[e] = multiply_halves(b[e], power_pair(-Format::key_exponent(n)));
          }
        }
        const uint32_t a[4] = {low[0], low[0], low[1], low[1]};
        mma_step<false>(lowest, a, straight[0], straight[1]);
      }
      const uint32_t a[4] = {
          Format::key_pair(keys[0], 2 * step), Format::key_pair(keys[1], 2 * step),
          Format::key_pair(keys[0], 2 * step + 1), Format::key_pair(keys[1], 2 * step + 1)};
      mma_step<kBFloat && !kPackedOperand>(logits, a, b[0], b[1]);
    }
    constexpr float kUp = Format::kInteger ? 0x1p24f : kBits == 8 ? 256.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] = fmaf(logits[i], kUp, lowest[i]);
  }
};

}  // namespace kvopt::cuda
