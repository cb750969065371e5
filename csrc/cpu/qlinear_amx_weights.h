// SPDX-License-Identifier: Apache-2.0
// From packed bytes to operands B of the AMX kernels, for every format: 32 rows of w, up to
// kStretchSteps steps at a time, with their scales. Everything has internal linkage. A step costs
// 32 (int8) or 32 (bf16) stores of 64 bytes and one or two instructions for each; it is shared by
// all operands A of a batch.
#pragma once

#include "cpu/qlinear_amx_prepare.h"

namespace kvopt::cpu {
namespace {

// The codes of 16 columns of 16 rows (`half` of the tile) as four registers of bytes, 16 rows x 4
// columns each.
template <int kBits>
KVOPT_INLINE void load_codes(const uint8_t* source, int64_t unit, int half, Ints* codes) {
  const uint8_t* w = source + half * 64;
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i) codes[i] = load_ints(w + i * 128);
  } else if constexpr (kBits == 4) {
    const Ints mask = set_ints(0x0F0F0F0F);
    for (int i = 0; i < 2; ++i) {
      const Ints v = load_ints(w + i * 128);
      codes[2 * i] = bit_and(v, mask);
      codes[2 * i + 1] = bit_and(_mm512_srli_epi32(v, 4), mask);
    }
  } else if constexpr (kBits == 2) {
    const Ints mask = set_ints(0x03030303);
    const Ints v = load_ints(w);
    codes[0] = bit_and(v, mask);
    codes[1] = bit_and(_mm512_srli_epi32(v, 2), mask);
    codes[2] = bit_and(_mm512_srli_epi32(v, 4), mask);
    codes[3] = bit_and(_mm512_srli_epi32(v, 6), mask);
  } else {  // two such blocks and their third bits
    const Ints mask = set_ints(0x03030303);
    const Ints top = set_ints(0x04040404);
    const Ints v = load_ints(w + unit % 2 * 128);
    const Ints third = _mm512_srl_epi32(load_ints(w + 256), _mm_cvtsi64_si128(unit % 2 * 4));
    codes[0] = _mm512_or_si512(bit_and(v, mask), bit_and(_mm512_slli_epi32(third, 2), top));
    codes[1] = _mm512_or_si512(bit_and(_mm512_srli_epi32(v, 2), mask),
                               bit_and(_mm512_slli_epi32(third, 1), top));
    codes[2] = _mm512_or_si512(bit_and(_mm512_srli_epi32(v, 4), mask), bit_and(third, top));
    codes[3] = _mm512_or_si512(bit_and(_mm512_srli_epi32(v, 6), mask),
                               bit_and(_mm512_srli_epi32(third, 1), top));
  }
}

// One or two terms or planes of the weight lie kStretchSteps steps apart.
constexpr int64_t kTermBytes = kStretchSteps * 2 * kOperandBytes;

struct Tables {
  Ints high;
  Ints low;
};

KVOPT_INLINE Ints broadcast_bytes(const uint8_t* table) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// A constant of the weight's scheme that turns codes into what is multiplied.
KVOPT_INLINE Tables load_tables(const QuantFormat& format) {
  Tables t = {zero_ints(), zero_ints()};
  if (kInt8) {
    if (format.has_book()) {
      const A8Book book = a8_book(format.scheme);
      t.high =
          _mm512_sub_epi8(broadcast_bytes(book.high), _mm512_set1_epi8(kBookMiddle >> kPlaneBits));
      t.low = broadcast_bytes(book.low);
    } else {
      t.high = _mm512_set1_epi8(static_cast<char>(1 << (format.bits - 1)));
    }
  } else {
    const AmxWords words = amx_words(format);
    t.high = load_ints(words.high);
    t.low = load_ints(words.low);
  }
  return t;
}

#if !defined(KVOPT_AMX_INT8)
// bf16 of q - 128 for the codes in bytes 0 and 2 of each lane, `high` being the lane shifted down
// by two bytes or more. The bits of 2^23 + q are those of q under the exponent of 2^23; the
// difference of two such numbers is exact, and so is its upper half.
KVOPT_INLINE Ints words_of_bytes(Ints low, Ints high) {
  constexpr int kBothOr = 0xEA;  // (a & b) | c
  const Ints mask = set_ints(0xFF);
  const Ints magic = set_ints(0x4B000000);
  const Floats middle = set_floats(8388608.0f + 128.0f);
  low = _mm512_ternarylogic_epi32(low, mask, magic, kBothOr);
  high = _mm512_ternarylogic_epi32(high, mask, magic, kBothOr);
  low = _mm512_castps_si512(subtract(_mm512_castsi512_ps(low), middle));
  high = _mm512_castps_si512(subtract(_mm512_castsi512_ps(high), middle));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}
#endif

// 16 columns from `source` to the rows of both operands B at `out` (half 1 follows kOperandBytes
// on).
template <int kBits, bool kBook>
KVOPT_INLINE void unpack_unit(const uint8_t* source, int64_t unit, const Tables& tables,
                              bool two_terms, uint8_t* out) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, out += kOperandBytes) {
#if defined(KVOPT_AMX_INT8)
    Ints codes[4];
    load_codes<kBits>(source, unit, half, codes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBook) {
        store_ints(out + i * 64, _mm512_shuffle_epi8(tables.high, codes[i]));
        store_ints(out + kTermBytes + i * 64, _mm512_shuffle_epi8(tables.low, codes[i]));
      } else {
        store_ints(out + i * 64, _mm512_sub_epi8(codes[i], tables.high));
      }
    }
    (void)two_terms;
#else
    if constexpr (kBits == 4) {  // the look-up reads five bits and holds every value twice
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Ints v = load_ints(source + half * 64 + i * 128);
        const Ints index[4] = {v, _mm512_srli_epi16(v, 8), _mm512_srli_epi16(v, 4),
                               _mm512_srli_epi16(v, 12)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          uint8_t* row = out + (4 * i + j) * 64;
          store_ints(row, _mm512_permutexvar_epi16(index[j], tables.high));
          if (kBook && two_terms) {
            store_ints(row + kTermBytes, _mm512_permutexvar_epi16(index[j], tables.low));
          }
        }
      }
    } else {
      Ints codes[4];
      load_codes<kBits>(source, unit, half, codes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if constexpr (kBits == 8) {
          const Ints v = codes[i];
          store_ints(out + 2 * i * 64, words_of_bytes(v, _mm512_srli_epi32(v, 16)));
          store_ints(out + (2 * i + 1) * 64,
                     words_of_bytes(_mm512_srli_epi32(v, 8), _mm512_srli_epi32(v, 24)));
        } else {
          const Ints next = _mm512_srli_epi16(codes[i], 8);
          store_ints(out + 2 * i * 64, _mm512_permutexvar_epi16(codes[i], tables.high));
          store_ints(out + (2 * i + 1) * 64, _mm512_permutexvar_epi16(next, tables.high));
        }
      }
    }
#endif
  }
}

// Consecutive chunks of a tile of w, unpacked.
struct Chunk {
  int64_t group;
  int64_t steps;
  int64_t first;     // step of the row
  const uint8_t* b;  // operands, two for each step
};

struct Stretch {
  int64_t chunks;
  Chunk chunk[2 * kStretchChunks];
  alignas(64) float scale[2 * kStretchChunks][kTileRows];
  alignas(64) float offset[2 * kStretchChunks][kTileRows];
  alignas(64) uint8_t operands[2 * kTermBytes];
};

struct Cursor {
  int64_t group = 0;
  int64_t step = 0;  // within the group
};

KVOPT_INLINE void prefetch_ahead(const uint8_t* w, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(w + i), _MM_HINT_T1);
  }
}

template <bool kAsymmetric>
KVOPT_INLINE void load_meta(const QuantFormat& format, const uint16_t* meta, float unit,
                            float* scale, float* offset) {
  for (int v = 0; v < 2; ++v) {
    const Floats s = multiply(load_halves(meta + v * kLanes), set_floats(unit));
    store_floats(scale + v * kLanes, s);
    if constexpr (kAsymmetric) {
      const Floats middle = set_floats(static_cast<float>(1 << (format.bits - 1)));
      const Floats zero = load_halves(meta + kTileRows + v * kLanes);
      store_floats(offset + v * kLanes, multiply(s, subtract(middle, zero)));
    }
  }
}

template <int kBits, bool kBook, bool kAsymmetric>
void unpack_stretch(const QLinearParams& p, const AmxLayout& layout, int64_t tile,
                    const Tables& tables, float unit_scale, Cursor* cursor, Stretch* stretch) {
  const bool two_terms = kBook && (kInt8 || amx_two_terms(p.format));
  const uint8_t* w = p.packed + tile * layout.tile_bytes;
  const uint16_t* meta = p.meta + tile * layout.groups * layout.meta_stride;
  stretch->chunks = 0;
  int64_t used = 0;  // steps of the stretch
  while (cursor->group < layout.groups && used < kStretchSteps) {
    const int64_t begin = cursor->group * layout.group_columns;
    const int64_t end = begin + layout.group_columns < p.k ? begin + layout.group_columns : p.k;
    const int64_t group_steps = (end - begin + kStepColumns - 1) / kStepColumns;
    const int64_t left = group_steps - cursor->step;
    const bool rest = left <= kStretchSteps - used;
    if (!rest && used > 0) break;  // a group is divided only where it is longer than a stretch
    Chunk* chunk = stretch->chunk + stretch->chunks;
    chunk->group = cursor->group;
    chunk->steps = rest ? left : kStretchSteps - used;
    chunk->first = cursor->group * layout.group_steps + cursor->step;
    chunk->b = stretch->operands + used * 2 * kOperandBytes;
    load_meta<kAsymmetric>(p.format, meta + cursor->group * layout.meta_stride, unit_scale,
                           stretch->scale[stretch->chunks], stretch->offset[stretch->chunks]);
    if (kAsymmetric && !rest) {  // the zero point is for the whole group: its last chunk adds it
      memset(stretch->offset[stretch->chunks], 0, sizeof(stretch->offset[0]));
    }
    for (int64_t step = 0; step < chunk->steps; ++step) {
      uint8_t* out = stretch->operands + (used + step) * 2 * kOperandBytes;
      for (int64_t u = 0; u < kStepUnits; ++u) {
        const int64_t column = begin + (cursor->step + step) * kStepColumns + u * kUnitColumns;
        uint8_t* rows = out + u * kUnitBytes;
        if (column >= end) {  // x is 0 there; w must be a number
          for (int64_t i = 0; i < kUnitBytes; i += 64) {
            for (int64_t half = 0; half < 2; ++half) {
              store_ints(rows + half * kOperandBytes + i, zero_ints());
              if (two_terms) store_ints(rows + kTermBytes + half * kOperandBytes + i, zero_ints());
            }
          }
          continue;
        }
        const int64_t unit = column / kUnitColumns;
        const int64_t from = kBits == 3 ? unit / 2 * 384 : unit * kBits * 64;
        const int64_t size = kBits == 3 ? 384 : kBits * 64;
        if (from + size <= layout.tile_bytes) {
          prefetch_ahead(w + from + kStretchSteps * kStepUnits * kBits * 64, kBits * 64);
          unpack_unit<kBits, kBook>(w + from, unit, tables, two_terms, rows);
        } else {  // the tile ends inside the unit
          alignas(64) uint8_t edge[512] = {};
          memcpy(edge, w + from, static_cast<size_t>(layout.tile_bytes - from));
          unpack_unit<kBits, kBook>(edge, unit, tables, two_terms, rows);
        }
      }
    }
    used += chunk->steps;
    ++stretch->chunks;
    if (kInt8 && kBook) {  // the high plane is done; the low one is a chunk of its own
      stretch->chunk[stretch->chunks] = *chunk;
      Chunk* low = stretch->chunk + stretch->chunks;
      low->b += kTermBytes;
      for (int64_t i = 0; i < kTileRows; i += kLanes) {
        float* scale = stretch->scale[stretch->chunks - 1] + i;
        store_floats(stretch->scale[stretch->chunks] + i, load_floats(scale));
        store_floats(scale,
                     multiply(load_floats(scale), set_floats(static_cast<float>(1 << kPlaneBits))));
      }
      ++stretch->chunks;
    }
    if (rest) {
      ++cursor->group;
      cursor->step = 0;
    } else {
      cursor->step += chunk->steps;
    }
  }
}

}  // namespace
}  // namespace kvopt::cpu
